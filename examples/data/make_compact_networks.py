#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes compact_networks.safetensors, the same bytes each time: the layers of two compact networks, initialised as
PyTorch does, which `expand_networks` expands and contracts again. Standard library only."""

import json
import math
import pathlib
import random
import struct

FOLDER = pathlib.Path(__file__).resolve().parent


def write_safetensors(path, tensors, metadata):
    """`tensors` maps names to (dtype, shape, bytes)."""
    size = {"F64": 8, "F32": 4, "BF16": 2}
    header, offset, data = {"__metadata__": metadata}, 0, b""
    for name in sorted(tensors, key=lambda n: (-size[tensors[n][0]], n)):  # so that every tensor is aligned
        dtype, shape, numbers = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(numbers)]}
        offset += len(numbers)
        data += numbers
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# ---- layers

def spread(value, rank):
    return list(value) if isinstance(value, (list, tuple)) else [value] * rank


class Layer:
    """A convolution, or a linear layer where `kernel` is empty, with numbers uniform within 1 / sqrt(fan_in)."""

    def __init__(self, rng, name, out, inputs, kernel=(), stride=1, padding=0, padding_end=None, dilation=1, groups=1,
                 bias=True, dtype="F32"):
        self.name, self.out, self.inputs, self.groups, self.dtype = name, out, inputs, groups, dtype
        self.kernel = kernel
        rank = len(kernel)
        self.stride, self.padding, self.dilation = (spread(v, rank) for v in (stride, padding, dilation))
        self.padding_end = self.padding if padding_end is None else spread(padding_end, rank)
        fan_in = inputs // groups * math.prod(kernel)
        bound = 1 / math.sqrt(fan_in)
        draw = lambda count: struct.pack(f"<{count}f", *(rng.uniform(-bound, bound) for _ in range(count)))
        self.data = {"weight": draw(out * fan_in)}
        if bias:
            self.data["bias"] = draw(out)

    def node(self):
        if not self.kernel:
            return {"name": self.name, "type": "linear"}
        node = {"name": self.name, "type": "conv", "stride": self.stride, "padding": self.padding,
                "dilation": self.dilation, "groups": self.groups}
        if self.padding_end != self.padding:
            node["padding_end"] = self.padding_end
        return node

    def tensors(self):
        shapes = {"weight": [self.out, self.inputs // self.groups, *self.kernel], "bias": [self.out]}
        return {f"{self.name}.{suffix}": (self.dtype, shapes[suffix], data) for suffix, data in self.data.items()}


# ---- networks

def write_networks():
    rng = random.Random(2020)
    depthwise = [(32, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2), *[(512, 1)] * 5, (512, 2), (1024, 1)]
    networks = {
        "SmallNet": [
            Layer(rng, "smallnet.conv1", 8, 3, (7, 7), padding=3),
            Layer(rng, "smallnet.conv2", 16, 8, (7, 7), padding=3),
            Layer(rng, "smallnet.conv3", 32, 16, (7, 7), padding=3),
            Layer(rng, "smallnet.fc1", 64, 512),
        ],
        "MobileNet": [
            Layer(rng, "mobilenet.conv1", 32, 3, (3, 3), stride=2, padding=1, bias=False),
            *(Layer(rng, f"mobilenet.depthwise{number}", channels, channels, (3, 3), stride=stride, padding=1,
                    groups=channels, bias=False) for number, (channels, stride) in enumerate(depthwise, 1)),
        ],
    }
    tensors = {}
    for layers in networks.values():
        for layer in layers:
            tensors.update(layer.tensors())
    description = [{"name": name, "layers": [layer.node() for layer in layers]} for name, layers in networks.items()]
    write_safetensors(FOLDER / "compact_networks.safetensors", tensors,
                      {"networks": json.dumps(description),
                       "title": "layers that ExpandNets expands: SmallNet with kernel 7, and MobileNet's first and "
                                "depthwise layers; random, as PyTorch initialises them"})


if __name__ == "__main__":
    write_networks()
