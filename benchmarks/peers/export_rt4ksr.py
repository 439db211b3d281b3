#!/usr/bin/env python3
"""Exports RT4KSR x2 in its train form, with the published weights, for optimize_onnx.py.

    benchmarks/peers/export_rt4ksr.py CHECKOUT rt4ksr.onnx

CHECKOUT is eduardzamfir/RT4KSR at fd6627a48d78. Needs PyTorch, torchvision, onnx and onnxscript. Its blocks pad what
the first 1x1 makes with that layer's bias, by assignments to slices; here the input is padded with zeros in front of
the 1x1, which is the same function. The branch of high frequencies, which the published network does not use, goes.
SPDX-License-Identifier: Apache-2.0
"""

import argparse
import sys
import types
from pathlib import Path

import torch
from torch.nn.functional import pad


def block(self, x):
    between = self.fea_conv(self.expand_conv(pad(x, (1, 1, 1, 1)))) + self.expand_conv(x)
    return self.reduce_conv(between) + x


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout / "code"))
    from model import arch, modules

    config = types.SimpleNamespace(act_type="gelu", feature_channels=24, num_blocks=4, scale=2, is_train=True)
    network = torch.nn.DataParallel(arch.rt4ksr_rep(config))
    weights = torch.load(arguments.checkout / "code/checkpoints/rt4ksr_x2.pth", map_location="cpu")
    network.load_state_dict(weights["state_dict"])
    network = network.module.eval()
    network.gaussian = torch.nn.Identity()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        published = network(x)
        modules.ResBlock.forward = block
        difference = (network(x) - published).abs().max().item()
    if not difference <= 1e-4 * published.abs().max().item():
        sys.exit(f"export_rt4ksr.py: outputs differ by {difference}")
    torch.onnx.export(network, x, arguments.output, dynamo=True)


if __name__ == "__main__":
    main()
