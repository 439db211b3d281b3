#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains SmallNet expanded, contracts it, and says what that saved: a minute on two cores.

The images are generated: ten classes, each a texture of its own under noise, shifts and changes of contrast.
"""

import argparse
import copy
import time

import concertina.torch as ct
import torch
from torch import nn


def small_net():
    """The network of the paper's CIFAR experiments, with 7x7 kernels."""

    def stage(inside, outside):
        return [nn.Conv2d(inside, outside, 7, padding=3), nn.BatchNorm2d(outside), nn.ReLU(), nn.MaxPool2d(2)]

    features = [*stage(3, 8), *stage(8, 16), *stage(16, 32)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


def images(count, generator):
    """Generated images [count, 3, 32, 32] and their classes."""
    textures = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(7)).repeat(1, 1, 4, 4)
    labels = torch.randint(10, (count,), generator=generator)
    shifts = torch.randint(8, (count, 2), generator=generator).tolist()
    x = torch.stack([textures[c].roll(shift, (1, 2)) for c, shift in zip(labels.tolist(), shifts, strict=True)])
    contrast = torch.rand(count, 1, 1, 1, generator=generator)
    return x * (contrast + 0.5) + torch.randn(x.shape, generator=generator), labels


def train(model, batches, learning_rate=0.02):
    """The mean loss of the last quarter of the batches, and seconds a step."""
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9)
    model.train()
    losses, start = [], time.perf_counter()
    for x, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(len(losses) // 4, 1) :]
    return sum(last) / len(last), (time.perf_counter() - start) / len(losses)


@torch.no_grad()
def recognised(model, x, labels):
    return int((model.eval()(x).argmax(1) == labels).sum())


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=150, help="training steps of 64 images")
    options = arguments.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    batches = [images(64, generator) for _ in range(options.steps)]
    tests = images(1000, generator)

    # Layers become three each; what the modules are called, and what they compute, stays.
    model = ct.expand_(small_net(), "cl+fc")
    print(ct.report(model))

    layered = copy.deepcopy(model)
    for module in layered.modules():
        if isinstance(module, ct.ExpandedWeight):
            module.when = "never"
    _, layered_step = train(layered, batches[:5])
    loss, step = train(model, batches)
    print(
        f"\n{len(batches)} steps, loss {loss:.3f}: {1e3 * step:.1f} ms a step; layer by layer {1e3 * layered_step:.1f}"
    )

    # Back to the plain network: the names of the state dict are those of small_net().
    before = recognised(model, *tests)
    verdict_of = copy.deepcopy(model)
    ct.contract_(model)
    small_net().load_state_dict(model.state_dict())
    print(f"recognised of {len(tests[1])} test images: {before} expanded, {recognised(model, *tests)} contracted\n")
    print(ct.verify(verdict_of, model))
    sizes = [sum(p.numel() for p in each.parameters()) for each in (verdict_of, model)]
    print(f"\nparameters: {sizes[0]:,} in training, {sizes[1]:,} shipped")


if __name__ == "__main__":
    main()
