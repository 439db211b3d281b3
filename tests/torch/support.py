# SPDX-License-Identifier: Apache-2.0
"""What the tests of the PyTorch package share. Without PyTorch each test is skipped, and named."""

import importlib.util
import pathlib
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
if not importlib.util.find_spec("concertina"):  # not installed: from the tree
    sys.path.insert(0, str(ROOT / "examples" / "torch" / "src"))

HAVE_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = unittest.skipUnless(HAVE_TORCH, "PyTorch is not installed (scripts/setup --torch)")


def needs(*modules):
    missing = [module for module in ("torch", *modules) if importlib.util.find_spec(module) is None]
    return unittest.skipIf(missing, f"{', '.join(missing)} not installed (scripts/setup --torch)")


if HAVE_TORCH:
    import copy

    import torch
    from torch import nn

    import concertina.torch as ct

    # One of every geometry, its input and what expands it.
    GEOMETRIES = {
        "conv1d": (lambda: nn.Conv1d(4, 6, 5, padding=2), (2, 4, 13), ("cl", "ck")),
        "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 13), ("cl", "ck")),
        "conv2d": (lambda: nn.Conv2d(3, 8, 7, padding=3), (2, 3, 9, 10), ("cl", "ck")),
        "conv2d valid": (lambda: nn.Conv2d(3, 5, (5, 2), padding="valid"), (2, 3, 9, 10), ("cl", "ck")),
        "stride, dilation": (lambda: nn.Conv2d(4, 6, 5, 2, 3, 2, bias=False), (2, 4, 14, 13), ("cl", "ck")),
        "groups": (lambda: nn.Conv2d(6, 4, (7, 4), (2, 1), (3, 1), groups=2), (2, 6, 11, 9), ("cl", "ck")),
        "depthwise": (lambda: nn.Conv2d(5, 5, 5, padding=2, groups=5), (2, 5, 8, 8), ("cl", "ck")),
        "depthwise multiplier": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (2, 3, 8, 8), ("cl",)),
        "pointwise": (lambda: nn.Conv2d(5, 4, 1, stride=2), (2, 5, 7, 7), ("cl",)),
        "conv3d": (lambda: nn.Conv3d(2, 4, (3, 5, 4), (1, 2, 1), 1), (2, 2, 5, 7, 6), ("cl", "ck")),
        "linear": (lambda: nn.Linear(7, 5), (3, 2, 7), ("fc",)),
        "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (4, 7), ("fc",)),
    }

    def layered(model):
        """The same parameters, the layers run in turn."""
        return with_when(copy.deepcopy(model), "never")

    def with_when(model, when):
        for module in model.modules():
            if isinstance(module, ct.ExpandedWeight):
                module.when = when
        return model

    def gradients(model, x):
        """Outputs and the gradients of all parameters, of a loss that weighs each output differently."""
        model.zero_grad()
        y = model(x)
        torch.sin(torch.arange(y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape) + y).sum().backward()
        return [y.detach()] + [parameter.grad for parameter in model.parameters()]

    def difference(a, b):
        """The largest norm of a difference, relative to the second's."""
        return max(float((x - y).norm() / y.norm().clamp_min(1e-30)) for x, y in zip(a, b, strict=True))

    def small_net():
        return nn.Sequential(
            nn.Conv2d(3, 8, 7, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 7, padding=3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip
