#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compares operators with onnx's reference evaluator, in double, and with onnxruntime, in float.

    evaluate.py BUILD/tests/onnx_evaluate [--cases N] [--seed N] [--only Conv,Pad] [--verbose]
    evaluate.py BUILD/tests/onnx_evaluate --models FOLDER

Models of one operator are drawn at random: attributes, shapes, versions, and which inputs are constants. A case fails
if our values are neither's, or if we refuse it and one of them does not. The summary counts in how many cases one of
them differs from us; --verbose shows them. With --models, each model in the folder, and in folders in it, is run on
random inputs of two sizes where sizes are open, and compared with onnxruntime alone.

Needs the packages onnx, onnxruntime and numpy; exit code 77 without them.
"""

import argparse
import collections
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

try:
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22)


class Case:
    """One node: its inputs (None where one is left out), which of them are constants, attributes and outputs.

    Arrays of Python's float take the type that is asked of model()."""

    def __init__(self, op_type, inputs, opset, outputs=1, **attributes):
        self.op_type, self.inputs, self.opset, self.outputs = op_type, inputs, opset, outputs
        self.attributes = {key: value for key, value in attributes.items() if value is not None}
        self.constant = [False] * len(inputs)

    def model(self, dtype):
        names = ["" if array is None else f"i{k}" for k, array in enumerate(self.inputs)]
        arrays = [array if array is None or array.dtype != float else array.astype(dtype) for array in self.inputs]
        attributes = {
            key: (
                numpy_helper.from_array(value.astype(dtype) if value.dtype == float else value)
                if isinstance(value, np.ndarray)
                else (
                    int(getattr(TensorProto, value[5:]))
                    if isinstance(value, str) and value.startswith("type:")
                    else value
                )
            )
            for key, value in self.attributes.items()
        }
        if self.attributes.get("to") == "type:REAL":
            attributes["to"] = TensorProto.DOUBLE if dtype == np.float64 else TensorProto.FLOAT
        outputs = [f"o{k}" for k in range(self.outputs)]
        node = helper.make_node(self.op_type, names, outputs, name="node", **attributes)
        feeds, values, initializers = {}, [], []
        for name, array, constant in zip(names, arrays, self.constant):
            if array is None:
                continue
            if constant:
                initializers.append(numpy_helper.from_array(array, name))
            else:
                feeds[name] = array
                values.append(
                    helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                )
        # onnxruntime takes outputs without a type, but not the checker.
        graph = helper.make_graph(
            [node], "g", values, [onnx.ValueInfoProto(name=name) for name in outputs], initializers
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8), feeds

    def __str__(self):
        texts = []
        for array in self.inputs:
            if array is None:
                texts.append("none")
            else:
                values = array.tolist() if array.size < 9 and array.dtype != float else ""
                texts.append(f"{array.dtype}{list(array.shape)}{values}")
        return f"{self.op_type}-{self.opset}({', '.join(texts)}) {self.attributes}"


class Draw:
    """Random choices."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def integer(self, least, most):
        return int(self.rng.integers(least, most + 1))

    def integers(self, count, least, most):
        return [self.integer(least, most) for _ in range(count)]

    def shape(self, least_rank=1, most_rank=4, most=4):
        return self.integers(self.integer(least_rank, most_rank), 1, most)

    def reals(self, shape, low=-3.0, high=3.0):
        return np.asarray(self.rng.uniform(low, high, shape))

    def opset(self, least=7, most=22):
        return self(*[version for version in OPSETS if least <= version <= most])

    def broadcastable(self, shape):
        """A shape that broadcasts to this one."""
        part = [1 if self.integer(0, 2) == 0 else extent for extent in shape]
        return part[self.integer(0, len(part)) :]

    def pair(self):
        shape = self.shape(0)
        shapes = [shape, self.broadcastable(shape)]
        if self.integer(0, 1):
            shapes[0] = [1 if self.integer(0, 3) == 0 else extent for extent in shapes[0]]
        return shapes[:: self(1, -1)]

    def axis(self, rank, negative=True):
        return self.integer(-rank if negative else 0, rank - 1)


def ints(*values):
    return np.array(values, np.int64).reshape(len(values))


# ---- elementwise


def unary(d, op):
    since = {
        "Erf": 9,
        "Round": 11,
        "Celu": 12,
        "HardSwish": 14,
        "Mish": 18,
        "Gelu": 20,
        "Sign": 9,
        "ThresholdedRelu": 10,
    }
    opset = d.opset(max(7, since.get(op, 7)))
    low, high = {"Log": (0.1, 3), "Sqrt": (0, 3)}.get(op, (-4, 4))
    attributes = {}
    for name, ops in [
        ("alpha", "Elu LeakyRelu Celu Selu HardSigmoid ThresholdedRelu"),
        ("beta", "HardSigmoid"),
        ("gamma", "Selu"),
    ]:
        if op in ops.split() and d.integer(0, 1):
            attributes[name] = float(np.float32(d.rng.uniform(0.1, 1.5)))
    if op == "Gelu":
        attributes["approximate"] = d(None, "none", "tanh")
    return Case(op, [d.reals(d.shape(0), low, high)], opset, **attributes)


def binary(d, op):
    a, b = d.pair()
    low, high = {"Pow": (0.2, 2), "Div": (0.3, 3)}.get(op, (-3, 3))
    if d.integer(0, 3) == 0 and op in ("Add", "Sub", "Mul", "Div"):
        draw = lambda shape: np.asarray(d.rng.integers(1, 9, shape) * d(1, -1), np.int64)
        return Case(op, [draw(a), draw(b)], d.opset(7))
    inputs = [d.reals(a, low, high), d.reals(b, low, high)]
    opset = d.opset()
    if op == "Pow" and d.integer(0, 1):
        inputs[1] = np.asarray(2.0)
    elif op == "Pow" and opset >= 12 and d.integer(0, 1):
        inputs[1] = np.asarray(d.rng.integers(-2, 4, b), np.int64)
    return Case(op, inputs, opset)


def comparison(d, op):
    a, b = d.pair()
    opset = d.opset({"Equal": 11, "Less": 9, "Greater": 9}.get(op, 12))
    draw = lambda shape: np.asarray(d.rng.integers(-1, 2, shape))
    return Case(op, [draw(a).astype(float), draw(b).astype(float)] if d.integer(0, 1) else [draw(a), draw(b)], opset)


def logical(d, op):
    draw = lambda shape: np.asarray(d.rng.integers(0, 2, shape), bool)
    if op == "Not":
        return Case(op, [draw(d.shape(0))], d.opset())
    a, b = d.pair()
    return Case(op, [draw(a), draw(b)], d.opset())


def variadic(d, op):
    shape = d.shape(0)
    return Case(
        op, [d.reals(d.broadcastable(shape) if d.integer(0, 1) else shape) for _ in range(d.integer(1, 3))], d.opset(8)
    )


def prelu(d, op):
    shape = d.shape()
    return Case(op, [d.reals(shape), d.reals(d.broadcastable(shape))], d.opset())


def clip(d, op):
    opset = d.opset()
    x, low, high = (
        d.reals(d.shape(0)),
        d(None, float(np.float32(d.rng.uniform(-2, 0.5)))),
        d(None, float(np.float32(d.rng.uniform(-0.5, 2)))),
    )
    if opset < 11:
        return Case(op, [x], opset, min=low, max=high)
    return Case(op, [x, None if low is None else np.asarray(low), None if high is None else np.asarray(high)], opset)


def cast(d, op):
    to = d("FLOAT", "DOUBLE", "INT64", "INT32", "BOOL", "UINT8", "INT8")
    shape = d.shape(0)
    x = d(
        d.reals(shape, 0, 100),
        np.asarray(d.rng.integers(-300, 300, shape)),
        np.asarray(d.rng.integers(0, 2, shape), bool),
        np.asarray(d.rng.integers(0, 255, shape), np.uint8),
    )
    return Case(op, [x], d.opset(9), to=f"type:{to}")


def where(d, op):
    a, b = d.pair()
    c = d.broadcastable(a)
    return Case(op, [np.asarray(d.rng.integers(0, 2, c), bool), d.reals(a), d.reals(b)], d.opset(9))


# ---- windows


def window(d, rank, sizes, pool=False):
    kernel = d.integers(rank, 1, 4)
    dilations = d.integers(rank, 1, 2) if d.integer(0, 1) else None
    extents = [(k - 1) * (e or 1) + 1 for k, e in zip(kernel, dilations or [1] * rank)]
    for i in range(rank):
        sizes[i] = max(sizes[i], extents[i])
    strides = d(None, d.integers(rank, 1, 3))
    auto_pad = d(None, None, None, "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    pads = None
    if auto_pad in (None, "NOTSET") and d.integer(0, 2):
        pads = [d.integer(0, k - 1 if pool else k) for k in kernel * 2]
    if auto_pad not in (None, "NOTSET") and "SAME" in auto_pad:
        dilations = None  # onnxruntime's conditions
        strides = strides and [min(s, k) for s, k in zip(strides, kernel)]
    return kernel, {"strides": strides, "dilations": dilations, "auto_pad": auto_pad, "pads": pads}


def conv(d, op):
    rank = d.integer(1, 3)
    sizes = d.integers(rank, 1, 9)
    kernel, attributes = window(d, rank, sizes)
    group, each_in, each_out = d(1, 1, 2, 3), d.integer(1, 3), d.integer(1, 3)
    x = d.reals([d.integer(1, 3), group * each_in, *sizes])
    inputs = [x, d.reals([group * each_out, each_in, *kernel])]
    if d.integer(0, 1):
        inputs.append(d.reals([group * each_out]))
    return Case(op, inputs, d.opset(), group=group, kernel_shape=d(None, kernel), **attributes)


def conv_transpose(d, op):
    rank = d.integer(1, 3)
    sizes = d.integers(rank, 1, 5)
    kernel, attributes = d.integers(rank, 1, 4), {}
    strides, dilations = d.integers(rank, 1, 3), d.integers(rank, 1, 2)
    group, each_in, each_out = d(1, 1, 2, 3), d.integer(1, 3), d.integer(1, 3)
    more = [d.integer(0, s - 1) for s in strides]
    full = [(n - 1) * s + (k - 1) * e + 1 + m for n, s, k, e, m in zip(sizes, strides, kernel, dilations, more)]
    attributes = {"strides": strides, "dilations": dilations, "output_padding": more}
    form = d("pads", "pads", "output_shape", "auto_pad")
    if form == "pads":
        attributes["pads"] = [d.integer(0, min(k - 1, (n - 1) // 2)) for k, n in zip(kernel * 2, full * 2)]
    elif form == "output_shape":
        attributes["output_shape"] = [d.integer(max(1, n - k), n) for n, k in zip(full, kernel)]
        attributes["auto_pad"] = d(None, "SAME_UPPER", "SAME_LOWER")
    else:
        attributes["auto_pad"] = d("VALID", "SAME_UPPER", "SAME_LOWER")
        if attributes["auto_pad"] != "VALID":
            attributes["output_padding"] = None
            attributes["strides"] = [min(s, (k - 1) * e + 1) for s, k, e in zip(strides, kernel, dilations)]
    if d.integer(0, 1) and attributes["output_padding"] and not any(attributes["output_padding"]):
        attributes["output_padding"] = None
    inputs = [d.reals([d.integer(1, 2), group * each_in, *sizes]), d.reals([group * each_in, each_out, *kernel])]
    if d.integer(0, 1):
        inputs.append(d.reals([group * each_out]))
    return Case(op, inputs, d.opset(), group=group, kernel_shape=d(None, kernel), **attributes)


def pool(d, op):
    rank = d.integer(1, 3)
    sizes = d.integers(rank, 1, 9)
    kernel, attributes = window(d, rank, sizes, pool=True)
    opset = d.opset()
    ceil = {"ceil_mode": d(0, 1)} if opset >= 10 else {}
    if opset < (19 if op == "AveragePool" else 10):
        attributes["dilations"] = None
    if op == "AveragePool":
        attributes["count_include_pad"] = d(None, 0, 1)
    return Case(
        op, [d.reals([d.integer(1, 2), d.integer(1, 3), *sizes])], opset, kernel_shape=kernel, **ceil, **attributes
    )


def global_pool(d, op):
    return Case(op, [d.reals(d.shape(3, 5))], d.opset())


# ---- products, norms, reductions


def gemm(d, op):
    m, k, n = d.integers(3, 1, 6)
    first, second = d(0, 1), d(0, 1)
    inputs = [d.reals([k, m] if first else [m, k]), d.reals([n, k] if second else [k, n])]
    opset = d.opset()
    if opset < 11 or d.integer(0, 2):
        inputs.append(d.reals(d.broadcastable([m, n])))
    return Case(op, inputs, opset, transA=first, transB=second, alpha=d(None, 0.5), beta=d(None, 0.25))


def matmul(d, op):
    m, k, n = d.integers(3, 1, 5)
    batch = d.shape(0, 2)
    left, right = d(batch, d.broadcastable(batch)), d(batch, d.broadcastable(batch))
    a, b = d([k], [*left, m, k], [*left, m, k]), d([k], [*right, k, n], [*right, k, n])
    return Case(op, [d.reals(a), d.reals(b)], d.opset())


def batch_norm(d, op):
    shape = d.shape(2, 5)
    tensors = [d.reals([shape[1]]) for _ in range(3)] + [d.reals([shape[1]], 0.1, 2)]
    return Case(op, [d.reals(shape), *tensors], d(9, 12, 14, 15, 17), epsilon=d(None, 1e-3))


def instance_norm(d, op):
    shape = [d.integer(1, 3), d.integer(1, 3), *d.integers(d.integer(1, 3), 2, 5)]
    return Case(op, [d.reals(shape), d.reals([shape[1]]), d.reals([shape[1]])], d.opset(), epsilon=d(None, 1e-3))


def layer_norm(d, op):
    shape = d.integers(d.integer(1, 4), 2, 5)
    axis = d.axis(len(shape))
    scale = shape[axis:]
    inputs = [d.reals(shape), d.reals(scale)] + ([d.reals(scale)] if d.integer(0, 1) else [])
    return Case(op, inputs, d.opset(17), axis=axis, epsilon=d(None, 1e-3))


def softmax(d, op):
    shape, opset = d.shape(), d.opset()
    axis = d(None, d.axis(len(shape), opset >= 11))
    if axis is None and opset < 13 and len(shape) < 2:
        axis = 0
    return Case(op, [d.reals(shape)], opset, axis=axis)


def reduction(d, op):
    shape, opset = d.shape(), d.opset()
    axes = sorted(d.rng.permutation(len(shape))[: d.integer(1, len(shape))].tolist())
    if opset >= 11:
        axes = [axis - len(shape) if d.integer(0, 2) == 0 else axis for axis in axes]
    x, keep = d.reals(shape), d(None, 0, 1)
    if opset >= (13 if op == "ReduceSum" else 18):
        none = d(None, 0, 1)
        return Case(
            op,
            [x, ints(*axes)] if none is None or d.integer(0, 1) else [x],
            opset,
            keepdims=keep,
            noop_with_empty_axes=none,
        )
    return Case(op, [x], opset, axes=d(None, axes), keepdims=keep)


def arg_best(d, op):
    shape, opset = d.shape(), d.opset()
    x = np.asarray(d.rng.integers(-2, 3, shape), float)
    last = {"select_last_index": d(0, 1)} if opset >= 12 else {}
    return Case(op, [x], opset, axis=d.axis(len(shape), opset >= 11), keepdims=d(None, 0, 1), **last)


# ---- selections


def concat(d, op):
    shape = d.shape()
    axis = d.axis(len(shape))
    shapes = [list(shape) for _ in range(d.integer(1, 3))]
    for each in shapes:
        each[axis] = d.integer(0, 3)
    opset = d.opset()
    return Case(op, [d.reals(each) for each in shapes], opset, axis=axis if opset >= 11 else axis % len(shape))


def slice_(d, op):
    shape, opset = d.shape(1, 4, 6), d.opset()
    axes = sorted(d.rng.permutation(len(shape))[: d.integer(1, len(shape))].tolist())
    starts, ends = d.integers(len(axes), -8, 8), d.integers(len(axes), -8, 8)
    if opset < 10:
        return Case(op, [d.reals(shape)], opset, starts=starts, ends=ends, axes=axes)
    steps = [d(1, 2, 3, -1, -2) for _ in axes]
    for i in range(len(axes)):
        if d.integer(0, 3) == 0:
            ends[i] = 2**63 - 1 if steps[i] > 0 else -(2**63)
    inputs = [d.reals(shape), ints(*starts), ints(*ends)]
    if d.integer(0, 3):
        inputs.append(ints(*[axis - len(shape) if d.integer(0, 2) == 0 else axis for axis in axes]))
        inputs += [ints(*steps)] if d.integer(0, 2) else []
    return Case(op, inputs, opset) if len(inputs) == 5 or min(ends) > -100 else slice_(d, op)


def split(d, op):
    shape, opset = d.shape(1, 4, 7), d.opset()
    axis = d.axis(len(shape), opset >= 11)
    parts = d.integers(d.integer(1, 3), 1, 3)
    form = d("given", "equal")
    if form == "equal":
        parts = [parts[0]] * len(parts)
    shape[axis] = sum(parts)
    x = d.reals(shape)
    if form == "equal" and opset >= 18:
        if len(parts) > 1 and parts[0] > 1 and d.integer(0, 1):
            x = np.delete(x, 0, axis)
        return Case(op, [x], opset, outputs=len(parts), axis=axis, num_outputs=len(parts))
    if form == "equal":
        return Case(op, [x], opset, outputs=len(parts), axis=axis)
    if opset >= 13:
        return Case(op, [x, ints(*parts)], opset, outputs=len(parts), axis=axis)
    return Case(op, [x], opset, outputs=len(parts), axis=axis, split=parts)


def pad(d, op):
    shape, opset, mode = d.shape(1, 4, 5), d.opset(), d("constant", "reflect", "edge")
    if opset >= 19 and d.integer(0, 5) == 0:
        mode = "wrap"
    rank = len(shape)
    axes = sorted(d.rng.permutation(rank)[: d.integer(1, rank)].tolist()) if opset >= 18 and d.integer(0, 1) else None
    padded = axes or list(range(rank))
    if mode == "reflect":
        shape = [max(extent, 2) for extent in shape]
    most = {"constant": lambda n: 3, "edge": lambda n: 3, "reflect": lambda n: n - 1, "wrap": lambda n: n}[mode]
    pads = [d.integer(0, most(shape[axis])) for axis in padded * 2]
    if mode == "constant" and d.integer(0, 1):
        pads = [d.integer(-(shape[axis] // 2), 2) for axis in padded * 2]
    x, value = d.reals(shape), d(None, 0.5)
    if opset < 11:
        return Case(op, [x], opset, mode=mode, pads=pads, value=value)
    inputs = [x, ints(*pads), None if value is None else np.asarray(value)]
    if axes:
        inputs.append(ints(*[axis - rank if d.integer(0, 2) == 0 else axis for axis in axes]))
    return Case(op, inputs, opset, mode=d(None, mode) if mode == "constant" else mode)


def gather(d, op):
    shape, opset = d.shape(), d.opset()
    axis = d.axis(len(shape))
    size = shape[axis]
    indices = np.asarray(d.rng.integers(-size if opset >= 11 else 0, size, d.shape(0, 2)), d(np.int64, np.int32))
    return Case(op, [d(d.reals(shape), np.asarray(d.rng.integers(-9, 9, shape))), indices], opset, axis=axis)


def expand(d, op):
    shape = d.shape(0)
    other = d.broadcastable(shape) if d.integer(0, 1) else [d.integer(1, 3), *shape]
    start = [1 if d.integer(0, 2) == 0 else extent for extent in shape]
    return Case(op, [d.reals(start), ints(*other)], d.opset(8))


def tile(d, op):
    shape = d.shape()
    return Case(op, [d.reals(shape), ints(*d.integers(len(shape), 0, 3))], d.opset())


def transpose(d, op):
    shape = d.shape(1, 5)
    return Case(op, [d.reals(shape)], d.opset(), perm=d(None, d.rng.permutation(len(shape)).tolist()))


def depth_to_space(d, op):
    b, opset = d.integer(1, 3), d.opset()
    shape = [d.integer(1, 2), d.integer(1, 2) * b * b, d.integer(1, 3), d.integer(1, 3)]
    return Case(op, [d.reals(shape)], opset, blocksize=b, mode=d(None, "DCR", "CRD") if opset >= 11 else None)


def space_to_depth(d, op):
    b = d.integer(1, 3)
    return Case(
        op,
        [d.reals([d.integer(1, 2), d.integer(1, 2), b * d.integer(1, 3), b * d.integer(1, 3)])],
        d.opset(),
        blocksize=b,
    )


def resize(d, op):
    opset = d(10, 11, 13, 18, 19)
    shape = [d.integer(1, 2), d.integer(1, 2), *d.integers(2, 1, 5)]
    scales = [1.0, 1.0, *[float(np.float32(d(0.5, 0.6, 0.75, 1.0, 1.5, 2.0, 3.0))) for _ in range(2)]]
    scales = [s if int(np.float32(s) * n) > 0 else 1.0 for s, n in zip(scales, shape)]
    mode = d("nearest", "linear")
    if opset == 10:
        return Case(op, [d.reals(shape), np.asarray(scales, np.float32)], opset, mode=mode)
    ways = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"] + (
        ["half_pixel_symmetric"] if opset >= 19 else []
    )
    attributes = {"mode": mode, "coordinate_transformation_mode": d(None, *ways)}
    if mode == "nearest":
        attributes["nearest_mode"] = d(None, "round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    roi = np.zeros(0, np.float32) if opset < 13 else None
    axes = None
    if opset >= 18 and d.integer(0, 2) == 0:
        axes = attributes["axes"] = [2, 3]
    if d.integer(0, 1):
        sizes = [shape[0], shape[1], *d.integers(2, 1, 8)][2 if axes else 0 :]
        if axes:
            attributes["keep_aspect_ratio_policy"] = d(None, "stretch", "not_larger", "not_smaller")
        return Case(
            op,
            [d.reals(shape), roi, np.zeros(0, np.float32) if opset < 13 else None, ints(*sizes)],
            opset,
            **attributes,
        )
    return Case(op, [d.reals(shape), roi, np.asarray(scales[2 if axes else 0 :], np.float32)], opset, **attributes)


def upsample(d, op):
    shape = [d.integer(1, 2), d.integer(1, 2), *d.integers(2, 1, 5)]
    scales, opset = [1.0, 1.0, d(1.0, 1.5, 2.0, 3.0), d(1.0, 1.5, 2.0, 3.0)], d(7, 9)
    mode = d("nearest", "linear")
    if opset == 7:
        return Case(op, [d.reals(shape)], opset, mode=mode, scales=scales)
    return Case(op, [d.reals(shape), np.asarray(scales, np.float32)], opset, mode=mode)


# ---- shapes


def reshape(d, op):
    shape, opset = d.shape(1, 4), d.opset()
    kept = d.integer(0, len(shape) - 1)
    rest = int(np.prod(shape[kept:]))
    target = [d(0, extent) for extent in shape[:kept]] + d([rest], [-1], [1, -1], [-1, 1, 1])
    return Case(op, [d.reals(shape), ints(*target)], opset)


def flatten(d, op):
    shape, opset = d.shape(), d.opset()
    return Case(op, [d.reals(shape)], opset, axis=d(None, d.integer(-len(shape) if opset >= 11 else 0, len(shape))))


def squeeze(d, op):
    shape, opset = [d(1, 1, 2, 3) for _ in range(d.integer(1, 4))], d.opset()
    axes = [i - len(shape) if opset >= 11 and d.integer(0, 1) else i for i, extent in enumerate(shape) if extent == 1]
    if not axes or d.integer(0, 2) == 0:
        return Case(op, [d.reals(shape)], opset)
    axes = axes[: d.integer(1, len(axes))]
    return (
        Case(op, [d.reals(shape), ints(*axes)], opset) if opset >= 13 else Case(op, [d.reals(shape)], opset, axes=axes)
    )


def unsqueeze(d, op):
    shape, opset = d.shape(0, 3), d.opset()
    rank = len(shape) + d.integer(1, 2)
    axes = d.rng.permutation(rank)[: rank - len(shape)].tolist()
    if opset >= 11:
        axes = [axis - rank if d.integer(0, 2) == 0 else axis for axis in axes]
    return (
        Case(op, [d.reals(shape), ints(*axes)], opset)
        if opset >= 13
        else Case(op, [d.reals(shape)], opset, axes=sorted(axes))
    )


def shape_of(d, op):
    shape, opset = d.shape(0), d.opset()
    ends = (
        {"start": d(None, d.integer(-5, 5)), "end": d(None, d.integer(-5, 5))} if op == "Shape" and opset >= 15 else {}
    )
    return Case(op, [d.reals(shape)], opset, **ends)


def constant(d, op):
    opset = d.opset(12)
    value = d(
        {"value": d.reals(d.shape(0))},
        {"value": np.asarray([3, 4])},
        {"value_float": 1.5},
        {"value_int": 7},
        {"value_floats": [1.0, 2.5]},
        {"value_ints": [5, 6, 7]},
    )
    return Case(op, [], opset, **value)


def constant_of_shape(d, op):
    return Case(op, [ints(*d.shape(0))], d.opset(9), value=d(None, np.asarray([2.5]), np.asarray([3])))


def range_(d, op):
    if d.integer(0, 1):
        return Case(op, [np.asarray(v) for v in (d.integer(-5, 5), d.integer(-5, 9), d(1, 2, 3, -1, -2))], d.opset(11))
    return Case(
        op, [np.asarray(float(v)) for v in (d.integer(-5, 5), d.integer(-5, 9), d(0.5, 1.5, -0.5))], d.opset(11)
    )


def identity(d, op):
    if op == "Identity":
        return Case(op, [d.reals(d.shape(0))], d.opset())
    opset = d.opset()
    x = d.reals(d.shape())
    if opset < 12:
        return Case(op, [x], opset, ratio=d(None, 0.3))
    return Case(op, [x, np.asarray(np.float32(0.3)), d(None, np.asarray(False))], opset)


GENERATORS = {
    unary: "Abs Neg Relu Sign Ceil Cos Erf Exp Floor HardSwish Log Mish Reciprocal Round Sigmoid Sin Softplus Softsign "
    "Sqrt Tanh Celu Elu HardSigmoid LeakyRelu Selu ThresholdedRelu Gelu",
    binary: "Add Sub Mul Div Pow",
    comparison: "Equal Less Greater LessOrEqual GreaterOrEqual",
    logical: "And Or Xor Not",
    variadic: "Sum Mean Min Max",
    prelu: "PRelu",
    clip: "Clip",
    cast: "Cast",
    where: "Where",
    conv: "Conv",
    conv_transpose: "ConvTranspose",
    pool: "MaxPool AveragePool",
    global_pool: "GlobalAveragePool GlobalMaxPool",
    gemm: "Gemm",
    matmul: "MatMul",
    batch_norm: "BatchNormalization",
    instance_norm: "InstanceNormalization",
    layer_norm: "LayerNormalization",
    softmax: "Softmax LogSoftmax",
    reduction: "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare",
    arg_best: "ArgMax ArgMin",
    concat: "Concat",
    slice_: "Slice",
    split: "Split",
    pad: "Pad",
    gather: "Gather",
    expand: "Expand",
    tile: "Tile",
    transpose: "Transpose",
    depth_to_space: "DepthToSpace",
    space_to_depth: "SpaceToDepth",
    resize: "Resize",
    upsample: "Upsample",
    reshape: "Reshape",
    flatten: "Flatten",
    squeeze: "Squeeze",
    unsqueeze: "Unsqueeze",
    shape_of: "Shape Size",
    constant: "Constant",
    constant_of_shape: "ConstantOfShape",
    range_: "Range",
    identity: "Identity Dropout",
}

# ---- running


class Program:
    """Ours: the values of the outputs, or why there are none."""

    def __init__(self, path, folder):
        self.path, self.folder = path, folder

    def run(self, model, feeds, path=None):
        if path is None:
            path = self.folder / "model.onnx"
            onnx.save(model, path)
        files = []
        for i, array in enumerate(feeds.values()):
            files.append(self.folder / f"input_{i}.pb")
            files[-1].write_bytes(numpy_helper.from_array(array).SerializeToString())
        arguments = [self.path, path, self.folder / "outputs.onnx", *files]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return done.stderr.strip() or f"exit code {done.returncode}"
        outputs = onnx.load(self.folder / "outputs.onnx").graph.initializer
        found = {tensor.name: numpy_helper.to_array(tensor) for tensor in outputs}
        return [found[output.name] for output in model.graph.output]


def reference(model, feeds):
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, feeds)]
    except Exception as error:  # whatever it is that it does not do
        return f"{type(error).__name__}: {error}"


def runtime(model, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, feeds)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def same(ours, theirs, tolerance):
    """None where the other has no values."""
    if isinstance(theirs, str):
        return None
    if isinstance(ours, str) or len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs):
        if a.shape != b.shape or (a.dtype.kind == "f") != (b.dtype.kind == "f"):
            return False
        b = b.astype(a.dtype)
        with np.errstate(all="ignore"):
            scale = max(1.0, float(np.max(np.abs(b[np.isfinite(b)]), initial=0)))
            close = (np.abs(a - b) <= tolerance * scale) | (a == b) | ((a != a) & (b != b))
        if not np.all(close):
            return False
    return True


def compare_operators(program, arguments):
    """Returns the number of failures."""
    only = arguments.only.split(",") if arguments.only else None
    failures, seen = 0, collections.defaultdict(collections.Counter)
    chosen = [(op, generate) for generate, ops in GENERATORS.items() for op in ops.split() if not only or op in only]
    for op, generate in chosen:
        for number in range(arguments.cases):
            d = Draw([arguments.seed, number, *op.encode()])
            case = generate(d, op)
            case.constant = [bool(d.integer(0, 1)) for _ in case.inputs]
            double, single = case.model(np.float64), case.model(np.float32)
            values = {
                "ours": program.run(*double),
                "reference": reference(*double),
                "ours in float": program.run(*single),
                "onnxruntime": runtime(*single),
            }
            # Scales are float32 in each of them.
            tolerance = 1e-6 if op in ("Resize", "Upsample") else 1e-9
            results = (
                same(values["ours"], values["reference"], tolerance),
                same(values["ours in float"], values["onnxruntime"], 2e-5),
            )
            seen[op][results] += 1
            failed = True not in results and False in results
            failures += failed
            if failed or (arguments.verbose and False in results):
                print(("FAILED " if failed else "differs ") + str(case))
                for name, found in values.items():
                    print(f"    {name}: {found if isinstance(found, str) else shown(found)}"[:500])
    for op, results in seen.items():
        line = f"{op:24} {arguments.cases} cases"
        for i, name in enumerate(("the reference", "onnxruntime")):
            counts = {key: sum(n for both, n in results.items() if both[i] is key) for key in (True, False, None)}
            line += f"; as {counts[True]} of {name}'s" + (f", unlike {counts[False]}" if counts[False] else "")
        print(line)
    print(f"{len(chosen) * arguments.cases} cases, {failures} failures")
    return failures


def shown(values):
    return " ".join(f"{value.dtype}{list(value.shape)} {value.ravel()[:12]}" for value in values)


def compare_model(program, path, large):
    """Returns whether our values are onnxruntime's."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rng, feeds = np.random.default_rng(large), {}
    for value in session.get_inputs():
        # An open first extent is the batch, the others are sizes of maps.
        opened = [(1, 3)[large], (64, 96)[large], (64, 96)[large], (64, 160)[large]]
        shape = [n if isinstance(n, int) else opened[min(i, 3)] for i, n in enumerate(value.shape)]
        dtype = {"tensor(double)": np.float64, "tensor(uint8)": np.uint8}.get(value.type, np.float32)
        feeds[value.name] = (rng.integers(0, 256, shape) if dtype == np.uint8 else rng.standard_normal(shape)).astype(
            dtype
        )
    theirs = session.run(None, feeds)
    model = onnx.load(path, load_external_data=False)
    ours = program.run(model, feeds, path)
    right = bool(same(ours, theirs, 3e-5))
    what = ours if isinstance(ours, str) else ", ".join(str(list(value.shape)) for value in ours)
    print(f"{'as onnxruntime' if right else 'FAILED'} {path}: {what}")
    return right


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--cases", type=int, default=20, help="of each operator")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="operators, with commas")
    parser.add_argument("--verbose", action="store_true", help="show where one of the two differs from us")
    parser.add_argument("--models", type=Path, help="compare the models in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Program(arguments.program, Path(folder))
        if arguments.models:
            paths = sorted(arguments.models.rglob("*.onnx"))
            right = [compare_model(program, path, large) for path in paths for large in (False, True)]
            return 0 if right and all(right) else 1
        return 1 if compare_operators(program, arguments) else 0


if __name__ == "__main__":
    sys.exit(main())
