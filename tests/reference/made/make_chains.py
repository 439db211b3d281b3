#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the chains beside it, the same bytes each time: small models with an input, and the output computed here in
plain loops, layer by layer. Standard library only."""

import itertools
import math
import pathlib
import random
import struct

FOLDER = pathlib.Path(__file__).resolve().parent

# Of TensorProto.DataType, with the format of struct.
FLOAT, DOUBLE, BFLOAT16 = 1, 11, 16
FORMAT = {FLOAT: "f", DOUBLE: "d", BFLOAT16: "H"}


# ---- numbers as they are stored

def to_bfloat16(number):
    """The bits of the nearest bfloat16, ties to even; for finite numbers."""
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def pack(numbers, type):
    return struct.pack(f"<{len(numbers)}{FORMAT[type]}", *(map(to_bfloat16, numbers) if type == BFLOAT16 else numbers))


def unpack(data, type):
    numbers = [each for each, in struct.iter_unpack("<" + FORMAT[type], data)]
    return [struct.unpack("<f", struct.pack("<I", each << 16))[0] for each in numbers] if type == BFLOAT16 else numbers


# ---- messages of ONNX, as protobuf encodes them: onnx/onnx.proto has the numbers of the fields

def varint(number):
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def message(*fields):
    """Of (number, value): integers, texts or encoded messages."""
    encoded = b""
    for number, value in fields:
        if isinstance(value, int):
            encoded += varint(8 * number) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            encoded += varint(8 * number + 2) + varint(len(value)) + value
    return encoded


def tensor(name, type, dims, data):
    return message(*((1, extent) for extent in dims), (2, type), (8, name), (9, data))


def attribute(name, value):
    if isinstance(value, int):
        return message((1, name), (3, value), (20, 2))
    return message((1, name), *((8, each) for each in value), (20, 7))


def node(operator, name, inputs, **attributes):
    return message(*((1, each) for each in inputs), (2, name), (3, name), (4, operator),
                   *((5, attribute(*each)) for each in attributes.items()))


def value_info(name, type, channels, sizes):
    dims = [message((2, "N")), message((1, channels)), *(message((2, size)) for size in sizes)]
    return message((1, name), (2, message((1, message((1, type), (2, message(*((1, dim) for dim in dims))))))))


def model(title, nodes, initializers, inputs, output, metadata):
    graph = message(*((1, each) for each in nodes), (2, title), *((5, each) for each in initializers), (11, inputs),
                    (12, output))
    return message((1, 8), (2, "concertina"), (7, graph), (8, message((1, ""), (2, 17))),
                   *((14, message((1, key), (2, value))) for key, value in metadata.items()))


# ---- layers

def spread(value, rank):
    return list(value) if isinstance(value, (list, tuple)) else [value] * rank


class Layer:
    """A convolution, or a linear layer where `kernel` is empty."""

    def __init__(self, name, type, out, inputs, kernel, weight, bias, stride=1, padding=0, padding_end=None, dilation=1,
                 groups=1):
        self.name, self.type, self.out, self.inputs, self.kernel, self.groups = name, type, out, inputs, kernel, groups
        self.stride, self.padding, self.dilation = (spread(v, len(kernel)) for v in (stride, padding, dilation))
        self.padding_end = self.padding if padding_end is None else spread(padding_end, len(kernel))
        self.data = {"weight": weight} | ({"bias": bias} if bias else {})
        self.weight = unpack(weight, type)
        self.bias = unpack(bias, type) if bias else [0.0] * out

    def initializers(self):
        dims = {"weight": [self.out, self.inputs // self.groups, *self.kernel], "bias": [self.out]}
        return [tensor(f"{self.name}.{suffix}", self.type, dims[suffix], data) for suffix, data in self.data.items()]

    def nodes(self, x, y):
        """From tensor x to y; with casts to float of what is stored in bfloat16."""
        names, casts = [f"{self.name}.{suffix}" for suffix in self.data], []
        if self.type == BFLOAT16:
            casts = [node("Cast", name + ".cast", [name], to=FLOAT) for name in names]
            names = [name + ".cast" for name in names]
        attributes = {"transB": 1} if not self.kernel else {
            "dilations": self.dilation, "group": self.groups, "kernel_shape": self.kernel,
            "pads": self.padding + self.padding_end, "strides": self.stride}
        return [*casts, node("Conv" if self.kernel else "Gemm", y, [x, *names], **attributes)]

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


def random_layer(rng, name, type, out, inputs, kernel=(), groups=1, bias=True, **geometry):
    """With numbers uniform within 1 / sqrt(fan_in)."""
    fan_in = inputs // groups * math.prod(kernel)
    bound = 1 / math.sqrt(fan_in)
    weight, bias = (pack([rng.uniform(-bound, bound) for _ in range(count)], type)
                    for count in (out * fan_in, out if bias else 0))
    return Layer(name, type, out, inputs, list(kernel), weight, bias, groups=groups, **geometry)


def contract(layers, type):
    """The single layer that equals layers of stride and dilation 1 (but for the last one's stride) without groups: each
    path through one tap of every layer adds its product to the tap where it ends."""
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
    return Layer("F", type, layers[-1].out, first.inputs, kernel, pack([weight[at] for at in sorted(weight)], type),
                 pack(bias, type), stride=layers[-1].stride, padding=first.padding)


# ---- chains

def write_chain(name, seed, size, layers, batch=1, type=FLOAT, expected=False, **metadata):
    """`layers` lists the keyword arguments of each; `size` is the spatial size of the input; `expected` adds the model
    of the contracted layer. What is stored in bfloat16 is computed in float."""
    rng = random.Random(seed)
    layers = [random_layer(rng, f"F{number}", type, **each) for number, each in enumerate(layers, 1)]
    channels, out, computed = layers[0].inputs, layers[-1].out, FLOAT if type == BFLOAT16 else type
    numbers = unpack(pack([rng.gauss(0, 1) for _ in range(batch * channels * math.prod(size))], type), type)
    results, remaining = [], iter(numbers)
    for _ in range(batch):
        maps = [{p: next(remaining) for p in itertools.product(*map(range, size))} for _ in range(channels)]
        at = size
        for layer in layers:
            maps, at = layer(maps, at)
        results += [number for one in maps for number in one.values()]

    def write(file, content):
        (FOLDER / name / file).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name / file).write_bytes(content)

    def write_model(file, layers):
        tensors = ["input", *(layer.name for layer in layers[:-1]), "output"]
        nodes = [each for layer, x, y in zip(layers, tensors, tensors[1:]) for each in layer.nodes(x, y)]
        axes = "DHW"[3 - len(size):]
        write(file, model(name, nodes, [each for layer in layers for each in layer.initializers()],
                          value_info("input", computed, channels, axes),
                          value_info("output", computed, out, ["out_" + axis for axis in axes]), metadata))

    write_model("model.onnx", layers)
    if expected:
        write_model("expected.onnx", [contract(layers, computed)])
    for file, dims, data in (("input", [batch, channels, *size], numbers), ("output", [batch, out, *at], results)):
        write(f"test_data_set_0/{file}_0.pb", tensor(file, computed, dims, pack(data, computed)))


def conv(out, inputs, *kernel, **options):
    return {"out": out, "inputs": inputs, "kernel": kernel, **options}


def main():
    cl = [conv(6, 3, 1, 1, padding=1), conv(8, 6, 3, 3), conv(4, 8, 1, 1)]
    write_chain("cl-1-3-1", 1, [6, 5], cl, batch=2, expected=True,
                title="ExpandNet-CL of a 3x3 layer, padded on its first layer")
    write_chain("cl-1-3-1-bf16", 2, [6, 5], cl, type=BFLOAT16, expected=True, title="the same in bfloat16")
    write_chain("ck-3-3-stride2", 3, [9, 8], [conv(6, 3, 3, 3, padding=2), conv(5, 6, 3, 3, stride=2)],
                expected=True, title="ExpandNet-CK of a 5x5 layer of stride 2")
    write_chain("depthwise-cl", 4, [6, 6],
                [conv(12, 4, 1, 1, padding=1, groups=4, bias=False), conv(12, 12, 3, 3, groups=4, bias=False),
                 conv(4, 12, 1, 1, groups=4, bias=False)], type=DOUBLE, title="depthwise ExpandNet-CL")
    write_chain("grouped-dilated", 5, [9, 9],
                [conv(6, 4, 3, 3, padding=2, dilation=2, groups=2), conv(6, 6, 2, 2, stride=[2, 1], groups=3)],
                type=DOUBLE, title="groups that differ, a dilation, a stride that differs from axis to axis")
    write_chain("linear", 6, [], [conv(24, 10), conv(16, 24), conv(5, 16)], batch=3, expected=True,
                title="three fully connected layers")
    write_chain("1d-padding-end", 7, [17], [conv(5, 2, 4, padding=1, padding_end=2), conv(3, 5, 3, stride=3)],
                type=DOUBLE, title="a padding that differs from side to side, as for a kernel of even size")
    write_chain("3d", 8, [4, 5, 4], [conv(3, 2, 1, 3, 3, padding=[1, 1, 1]), conv(2, 3, 3, 1, 1)],
                title="a 3x3x3 layer as space, then time")
    write_chain("inexact-padded-twice", 9, [7, 7], [conv(4, 2, 3, 3, padding=1), conv(3, 4, 3, 3, padding=1)],
                type=DOUBLE, title="padded in the middle, so no single layer equals it at the border",
                exact="interior")
    write_chain("exact-at-odd-sizes", 10, [7, 7],
                [conv(4, 2, 3, 3, padding=1), conv(3, 4, 3, 3, stride=2, padding=0, padding_end=1)],
                title="a padding in the middle that no output sees where the size is odd", exact="size")


if __name__ == "__main__":
    main()
