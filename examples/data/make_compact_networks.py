#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the data that the examples and the tool's tests read, the same bytes each time. Standard library only.

    compact_networks.safetensors   the layers of two compact networks, initialised as PyTorch does: what
                                   `expand_networks` expands and contracts again
    chains/*.safetensors           small chains of layers with an input, and the output computed here in plain loops,
                                   layer by layer: what `concertina verify` must reproduce
"""

import itertools
import json
import math
import pathlib
import random
import struct

FOLDER = pathlib.Path(__file__).resolve().parent


# ---- numbers as they are stored

def to_bf16(number):
    """The bits of the nearest BF16, ties to even; for finite numbers."""
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def pack(numbers, dtype):
    if dtype == "BF16":
        return struct.pack(f"<{len(numbers)}H", *map(to_bf16, numbers))
    return struct.pack(f"<{len(numbers)}{'d' if dtype == 'F64' else 'f'}", *numbers)


def unpack(data, dtype):
    if dtype == "BF16":
        return [struct.unpack("<f", struct.pack("<I", bits << 16))[0]
                for bits in struct.unpack(f"<{len(data) // 2}H", data)]
    size, letter = (8, "d") if dtype == "F64" else (4, "f")
    return list(struct.unpack(f"<{len(data) // size}{letter}", data))


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
        draw = lambda count: pack([rng.uniform(-bound, bound) for _ in range(count)], dtype)
        self.data = {"weight": draw(out * fan_in)}
        if bias:
            self.data["bias"] = draw(out)
        self.weight = unpack(self.data["weight"], dtype)
        self.bias = unpack(self.data["bias"], dtype) if bias else [0.0] * out

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

    def __call__(self, maps, size):
        """One sample, a list of `inputs` dictionaries from position to number; returns the same of the output."""
        out_size = [(n + p + q - d * (k - 1) - 1) // s + 1 for n, p, q, d, k, s in
                    zip(size, self.padding, self.padding_end, self.dilation, self.kernel, self.stride)]
        width, taps = self.inputs // self.groups, list(itertools.product(*map(range, self.kernel)))
        result = []
        for o in range(self.out):
            first = o // (self.out // self.groups) * width
            row = o * width * len(taps)
            result.append({})
            for position in itertools.product(*map(range, out_size)):
                total = self.bias[o]
                for c in range(width):
                    for t, tap in enumerate(taps):
                        at = tuple(j * s - p + a * d for j, s, p, a, d in
                                   zip(position, self.stride, self.padding, tap, self.dilation))
                        total += self.weight[row + c * len(taps) + t] * maps[first + c].get(at, 0.0)
                result[o][position] = total
        return result, out_size


def contract(layers):
    """The single layer that equals layers of stride and dilation 1 (but for the last one's stride) without groups, as
    weight and bias: each path through one tap of every layer adds its product to the tap where it ends."""
    first = layers[0]
    kernel, bias = list(first.kernel), first.bias
    taps = list(itertools.product(*map(range, kernel)))
    weight = {(o, c, t): first.weight[(o * first.inputs + c) * len(taps) + n]
              for o in range(first.out) for c in range(first.inputs) for n, t in enumerate(taps)}
    for layer in layers[1:]:
        taps = list(itertools.product(*map(range, layer.kernel)))
        total, total_bias = {}, list(layer.bias)
        for o, m in itertools.product(range(layer.out), range(layer.inputs)):
            for n, b in enumerate(taps):
                factor = layer.weight[(o * layer.inputs + m) * len(taps) + n]
                total_bias[o] += factor * bias[m]
                for c in range(first.inputs):
                    for a in itertools.product(*map(range, kernel)):
                        at = (o, c, tuple(x + y for x, y in zip(a, b)))
                        total[at] = total.get(at, 0.0) + factor * weight[m, c, a]
        kernel = [k + l - 1 for k, l in zip(kernel, layer.kernel)]
        weight, bias = total, total_bias
    return kernel, [weight[at] for at in sorted(weight)], bias


# ---- chains

def write_chain(name, seed, size, layers, batch=1, dtype="F32", title="", expected=False, **root):
    """`layers` lists the keyword arguments of each; `size` is the spatial size of the input; `expected` adds the
    contracted layer F."""
    rng = random.Random(seed)
    built, tensors = [], {}
    for number, arguments in enumerate(layers, 1):
        built.append(Layer(rng, f"F{number}", dtype=dtype, **arguments))
        tensors.update(built[-1].tensors())
    channels, out = built[0].inputs, "F32" if dtype == "BF16" else dtype
    data = pack([rng.gauss(0, 1) for _ in range(batch * channels * math.prod(size))], dtype)
    tensors["input"] = (dtype, [batch, channels, *size], data)
    numbers, results = iter(unpack(data, dtype)), []
    for _ in range(batch):
        maps = [{p: next(numbers) for p in itertools.product(*map(range, size))} for _ in range(channels)]
        at = size
        for layer in built:
            maps, at = layer(maps, at)
        results += [number for one in maps for number in one.values()]
    tensors["output"] = (out, [batch, built[-1].out, *at], pack(results, out))
    if expected:
        kernel, weight, bias = contract(built)
        tensors["F.weight"] = (out, [built[-1].out, channels, *kernel], pack(weight, out))
        tensors["F.bias"] = (out, [built[-1].out], pack(bias, out))
        root |= {"expected": "F", "expected_geometry": None if not kernel else {
            "stride": built[-1].stride, "padding": built[0].padding, "dilation": built[0].dilation, "groups": 1}}
    chain = {"kind": "chain", "layers": [layer.node() for layer in built], **root}
    write_safetensors(FOLDER / "chains" / f"{name}.safetensors", tensors, {"chain": json.dumps(chain), "title": title})


def conv(out, inputs, *kernel, **options):
    return {"out": out, "inputs": inputs, "kernel": kernel, **options}


def write_chains():
    (FOLDER / "chains").mkdir(exist_ok=True)
    write_chain("cl-1-3-1", 1, [6, 5], [conv(6, 3, 1, 1, padding=1), conv(8, 6, 3, 3), conv(4, 8, 1, 1)], batch=2,
                expected=True, title="ExpandNet-CL of a 3x3 layer, padded on its first layer")
    write_chain("cl-1-3-1-bf16", 2, [6, 5], [conv(6, 3, 1, 1, padding=1), conv(8, 6, 3, 3), conv(4, 8, 1, 1)],
                dtype="BF16", expected=True, title="the same in BF16, output in F32")
    write_chain("ck-3-3-stride2", 3, [9, 8], [conv(6, 3, 3, 3, padding=2), conv(5, 6, 3, 3, stride=2)],
                expected=True, title="ExpandNet-CK of a 5x5 layer of stride 2")
    write_chain("depthwise-cl", 4, [6, 6],
                [conv(12, 4, 1, 1, padding=1, groups=4, bias=False), conv(12, 12, 3, 3, groups=4, bias=False),
                 conv(4, 12, 1, 1, groups=4, bias=False)], dtype="F64", title="depthwise ExpandNet-CL")
    write_chain("grouped-dilated", 5, [9, 9],
                [conv(6, 4, 3, 3, padding=2, dilation=2, groups=2), conv(6, 6, 2, 2, stride=[2, 1], groups=3)],
                dtype="F64", title="groups that differ, a dilation, a stride that differs from axis to axis")
    write_chain("linear", 6, [], [conv(24, 10), conv(16, 24), conv(5, 16)], batch=3,
                expected=True, title="three fully connected layers")
    write_chain("1d-padding-end", 7, [17], [conv(5, 2, 4, padding=1, padding_end=2), conv(3, 5, 3, stride=3)],
                dtype="F64", title="a padding that differs from side to side, as for a kernel of even size")
    write_chain("3d", 8, [4, 5, 4], [conv(3, 2, 1, 3, 3, padding=[1, 1, 1]), conv(2, 3, 3, 1, 1)],
                title="a 3x3x3 layer as space, then time")
    write_chain("inexact-padded-twice", 9, [7, 7], [conv(4, 2, 3, 3, padding=1), conv(3, 4, 3, 3, padding=1)],
                dtype="F64", title="padded in the middle, so no single layer equals it at the border",
                exact="interior")
    write_chain("exact-at-odd-sizes", 10, [7, 7],
                [conv(4, 2, 3, 3, padding=1), conv(3, 4, 3, 3, stride=2, padding=0, padding_end=1)],
                title="a padding in the middle that no output sees where the size is odd", exact="everywhere")


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
    write_chains()
    write_networks()
