#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws pairs of models, of the same map and of others, and counts what `concertina verify` says of them.

    mutations.py BUILD/examples/concertina BUILD/tests/onnx_evaluate [--pairs N | --seconds S] [--seed N]
                 [--only NAME,...] [--keep FOLDER]

A random network is rewritten in one of the ways of RIGHT, or changed in one of those of WRONG and then, as often as
not, rewritten as well. Both models of a pair are run by onnx_evaluate, in double: where a right pair differs the
rewriting is wrong, and where a wrong one does not, nothing is asked. No wrong pair may be proved, no right one called
wrong, and only those of MAY_BE_UNPROVED not be proved. A line for each failure, a table; exit code 1 if there is one.
"""

import argparse
import collections
import functools
import itertools
import pathlib
import shutil
import sys
import tempfile
import time

import numpy as np
import onnx
from onnx import TensorProto, helper

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import models  # noqa: E402
from contraction import Failure, evaluated, first_line, random_inputs, require, run  # noqa: E402

# ---- networks --------------------------------------------------------------------------------------------------------


class Network(models.Builder):
    """One to thirty random layers."""

    def __init__(self, seed):
        draw = np.random.default_rng(seed)
        super().__init__(str(seed), opset=int(draw.choice([13, 17, 21])),
                         type=TensorProto.DOUBLE if draw.random() < 0.3 else TensorProto.FLOAT)
        self.random, self.passed = draw, []
        if draw.random() < 0.7:
            self.image()
        else:
            self.rows()
        made = [name for node in self.nodes for name in node.output if node.op_type != "Constant"]
        ends = {made[-1]} | {str(name) for name in draw.choice(made, int(draw.choice([0, 0, 1, 2])))}
        for name in made:
            if name in ends:
                self.output(name)

    def one_of(self, *choices):
        return choices[self.random.integers(len(choices))]

    def activation(self, x):
        op, attributes = self.one_of(("Relu", {}), ("Relu", {}), ("LeakyRelu", {}), ("LeakyRelu", {"alpha": 0.2}),
                                     ("Sigmoid", {}), ("Tanh", {}), ("Elu", {}), ("Softplus", {}), ("Abs", {}))
        return self.add(op, x, **attributes)

    def plain(self, x, c):
        """A convolution that keeps the map's size, of any kernel, dilation or groups."""
        kernel, dilation, groups = self.one_of(1, 3, 3, 5), self.one_of(1, 1, 2), self.one_of(1, 1, 2)
        groups = groups if c % groups == 0 else 1
        return self.conv(x, c, c // groups, kernel, kernel, pads=kernel // 2 * dilation, dilations=dilation,
                         group=groups, bias=self.one_of(True, False))

    def image(self):
        c, size = self.one_of(2, 3, 4, 6), self.one_of(4, 6, 8)
        x = self.input("x", [1, c, size, size])
        for _ in range(self.random.integers(1, 6)):
            x, c, size = self.piece(x, c, size)
        if self.random.random() < 0.5:
            x = self.add("GlobalAveragePool", self.activation(x))
            x = self.one_of(lambda: self.add("Flatten", x), lambda: self.reshape(x, 1, c))()
            self.dense(x, c, self.one_of(c, 5))

    def dense(self, x, c, to):
        bias = self.constant(self.random.standard_normal(to))
        return self.one_of(lambda: self.add("Gemm", x, self.weight(c, to), bias),
                           lambda: self.add("Gemm", x, self.weight(to, c), bias, transB=1),
                           lambda: self.add("Gemm", x, self.weight(c, to)),
                           lambda: self.add("Add", self.add("MatMul", x, self.weight(c, to)), bias))()

    def piece(self, x, c, size):
        add, conv, relu = self.add, self.conv, self.activation
        what = self.one_of("plain", "residual", "separable", "repvgg", "row", "strided", "branches", "split", "gate",
                           "two", "gather", "pool", "scaled", "shared", "shuffle", "transposed", "space", "padded")
        if what == "residual":
            y = self.norm(self.plain(relu(self.norm(self.plain(x, c), c)), c), c)
            return relu(add("Add", *self.one_of((x, y), (y, x)))), c, size
        if what == "separable":
            y = conv(relu(conv(x, c, 1, 3, 3, group=c, pads=1)), c + 1, c, 1, 1, bias=False)
            return relu(self.norm(y, c + 1)), c + 1, size
        if what == "repvgg":
            large, small = self.norm(conv(x, c, c, 3, 3, pads=1, bias=False), c), self.norm(conv(x, c, c, 1, 1), c)
            return relu(add("Sum", large, small, self.norm(x, c)) if self.one_of(0, 1) else
                        add("Add", add("Add", large, small), x)), c, size
        if what == "row":
            return conv(conv(x, 2 * c, c, 1, 1, bias=False), c, 2 * c, 3, 3, pads=1), c, size
        if what == "strided" and size % 2 == 0:
            return relu(conv(x, c + 2, c, 3, 3, strides=2, pads=[1, 1, 0, 0])), c + 2, size // 2
        if what == "branches":
            return add("Concat", *(self.one_of(relu, lambda y: self.plain(y, c))(x) for _ in range(2)),
                       axis=1), 2 * c, size
        if what == "split" and c % 2 == 0:
            a, b = add("Split", x, self.constant([c // 2, c // 2]), outputs=2, axis=1)
            return add("Concat", relu(a), self.plain(b, c // 2), axis=1), c, size
        if what == "gate":
            y = add("Sigmoid", conv(add("GlobalAveragePool", x), c, c, 1, 1))
            return add("Mul", *self.one_of((x, y), (y, x))), c, size
        if what == "two":
            a, b = relu(self.plain(x, c)), add("Exp", add("Tanh", x))
            return add(self.one_of("Sub", "Div", "Max", "Min", "Mul", "Add"), a, b), c, size
        if what == "gather":
            return add("Gather", x, self.constant(self.random.permutation(c)), axis=1), c, size
        if what == "pool":
            op, kernel = self.one_of("MaxPool", "AveragePool"), self.one_of([1, 3], [3, 1], [3, 3])
            return add(op, x, kernel_shape=kernel, pads=[k // 2 for k in kernel] * 2), c, size
        if what == "scaled":
            values = self.one_of(self.random.standard_normal([c, 1, 1]), np.full([c, 1, 1], 0.75), np.array(-1.0))
            return relu(add(self.one_of("Mul", "Add", "Sub", "Div"), x, self.constant(values))), c, size
        if what == "shared":
            weight = self.weight(c, c, 3, 3)
            y = relu(conv(x, c, c, 3, 3, weight=weight, bias=False, pads=1))
            return add("Add", conv(y, c, c, 3, 3, weight=weight, bias=False, pads=1), y), c, size
        if what == "shuffle" and c % 2 == 0:
            y = add("Transpose", self.reshape(x, 1, 2, c // 2, size, size), perm=[0, 2, 1, 3, 4])
            return self.reshape(y, 1, c, size, size), c, size
        if what == "transposed":
            return add("Transpose", relu(add("Transpose", x, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2]), c, size
        if what == "space":
            begin = self.random.integers(0, 2, 2)
            limits = [begin, begin + size - 1, np.array([2, 3])]
            return add("Slice", self.pad(x, [0, 0, 1, 0, 0, 0, 0, 1]), *map(self.constant, limits)), c, size - 1
        if what == "padded":
            return relu(conv(self.pad(x, [0, 0, 1, 1, 0, 0, 1, 1]), c, c, 3, 3)), c, size
        return relu(self.plain(x, c)), c, size

    def rows(self):
        """Linear layers of rows, some with attention."""
        n, c = self.one_of(3, 4), self.one_of(4, 5)
        x = self.input("x", [n, c])
        for _ in range(self.random.integers(1, 4)):
            what = self.one_of("layer", "residual", "attention", "normed" if self.opset >= 17 else "layer")
            if what == "layer":
                x = self.activation(self.dense(x, c, c))
            elif what == "residual":
                y = self.dense(self.activation(self.dense(x, c, 2 * c)), 2 * c, c)
                x = self.add("Add", *self.one_of((x, y), (y, x)))
            elif what == "normed":
                x = self.add("LayerNormalization", x, self.weight(c, low=0.5), self.weight(c), axis=-1)
            else:
                query, key, value = (self.add("MatMul", x, self.weight(c, c)) for _ in range(3))
                scores = self.add("MatMul", query, self.add("Transpose", key, perm=[1, 0]))
                scores = self.add("Softmax", self.add("Mul", scores, self.constant(np.array(0.5))), axis=-1)
                x = self.add("Add", self.add("MatMul", scores, value), x)


# ---- editing ---------------------------------------------------------------------------------------------------------


class Unfit(Exception):
    """The network has nothing that this way changes."""


class Edit:
    """A copy of a model, its nodes in any order until it is finished."""

    def __init__(self, model, random, tools):
        self.model, self.random, self.tools = onnx.ModelProto(), random, tools
        self.model.CopyFrom(model)
        self.shuffle = False
        self.graph, self.floats = self.model.graph, models.type_of(model)
        self.opset = model.opset_import[0].version
        self.inputs, self.outputs = ([each.name for each in infos] for infos in (self.graph.input, self.graph.output))
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.dims = {each.name: tuple(d.dim_value for d in each.type.tensor_type.shape.dim)
                     for each in [*inferred.input, *inferred.value_info, *inferred.output]}

    def pick(self, choices):
        choices = list(choices)
        if not choices:
            raise Unfit
        return choices[self.random.integers(len(choices))]

    def nodes(self, *ops):
        return [node for node in self.graph.node if node.op_type in ops or (not ops and node.op_type != "Constant")]

    def constants(self):
        return {each.name: each for each in self.graph.initializer}

    def weights(self):
        """Constants of floats that are read, with more elements than one."""
        return [each for each in self.graph.initializer
                if each.data_type == self.floats and np.prod(each.dims) > 1 and self.readers(each.name)]

    def value(self, node, i):
        constants = self.constants()
        if len(node.input) <= i or node.input[i] not in constants:
            raise Unfit
        return np.array(models.array_of(constants[node.input[i]]))

    def varying(self):
        return self.inputs + [name for node in self.nodes() for name in node.output if name]

    def inner(self):
        return [name for name in self.varying() if name not in self.inputs + self.outputs]

    def readers(self, name):
        return [(node, i) for node in self.graph.node for i, read in enumerate(node.input) if read == name]

    def maker(self, name):
        return next((node for node in self.graph.node if name in node.output), None)

    def fresh(self):
        used = set(self.constants()) | set(self.varying()) | {name for node in self.graph.node for name in node.output}
        return next(name for name in map("f{}".format, range(10000)) if name not in used)

    def constant(self, values):
        values, name = np.asarray(values), self.fresh()
        type = TensorProto.INT64 if values.dtype.kind == "i" else self.floats
        self.graph.initializer.append(models.tensor_of(name, values, type))
        return name

    def add(self, op, *inputs, made=None, **attributes):
        made = made or self.fresh()
        self.graph.node.append(helper.make_node(op, inputs, [made] if isinstance(made, str) else made, **attributes))
        return made

    def replace(self, node, op, *inputs, **attributes):
        node.CopyFrom(helper.make_node(op, inputs, list(node.output), **attributes))

    def splice(self, name, op, *more, **attributes):
        """Puts a node between a tensor and all that read it, or one that does."""
        node, new = self.maker(name), self.fresh()
        if node and (name in self.outputs or self.random.random() < 0.5):
            node.output[list(node.output).index(name)] = new
            self.add(op, new, *more, made=name, **attributes)
        else:
            reader, i = self.pick(self.readers(name))
            reader.input[i] = self.add(op, name, *more, made=new, **attributes)
        return self.graph.node[-1]

    def rename(self, names):
        for node in self.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        for each in self.graph.initializer:
            each.name = names.get(each.name, each.name)

    def finished(self):
        """The model, its nodes in order, a random one if wanted."""
        left, done, order = list(self.graph.node), {"", *self.constants(), *self.inputs}, []
        while left:
            ready = [node for node in left if done.issuperset(node.input)]
            if not ready:
                raise Unfit  # a cycle
            node = self.pick(ready) if self.shuffle else ready[0]
            left.remove(node)
            order.append(onnx.NodeProto.FromString(node.SerializeToString()))
            done |= set(node.output)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(order)
        try:
            onnx.checker.check_model(self.model, full_check=True)
        except Exception:
            raise Unfit from None  # shapes that do not fit
        return self.model


def attribute(node, name, default=None):
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def set_attribute(node, **values):
    for name, value in values.items():
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend(kept + ([] if value is None else [helper.make_attribute(name, value)]))


# ---- the same map, written in another way ----------------------------------------------------------------------------

DEFAULTS = {"Conv": {"dilations": [1, 1], "group": 1, "strides": [1, 1], "pads": [0, 0, 0, 0], "auto_pad": "NOTSET"},
            "MaxPool": {"ceil_mode": 0, "storage_order": 0, "dilations": [1, 1], "strides": [1, 1]},
            "AveragePool": {"ceil_mode": 0, "count_include_pad": 0, "strides": [1, 1], "auto_pad": "NOTSET"},
            "LeakyRelu": {"alpha": 0.01}, "Elu": {"alpha": 1.0}, "Softmax": {"axis": -1}, "Flatten": {"axis": 1},
            "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}, "BatchNormalization": {"epsilon": 1e-5},
            "LayerNormalization": {"axis": -1, "epsilon": 1e-5}}
MOST_INPUTS = {"Conv": 3, "Gemm": 3, "Pad": 4, "Slice": 5, "LayerNormalization": 3, "Dropout": 3}


def permute_names(e):
    names = e.pick([e.inner(), list(e.constants())])
    e.rename(dict(zip(names, e.random.permutation(names))))


def move_to_nodes(e):
    for each in [onnx.TensorProto.FromString(each.SerializeToString()) for each in e.graph.initializer]:
        if e.random.random() < 0.6:
            e.graph.initializer.remove(each)
            e.add("Constant", value=each, made=each.name)


def split_constant(e):
    name = e.pick(name for name in e.constants() if len(e.readers(name)) > 1)
    for node, i in e.readers(name)[1:]:
        node.input[i] = e.constant(e.value(node, i))


def duplicate(e):
    """A node for one of those that read it, and so its maker for that, if it gets so far."""
    name = e.pick(name for name in e.inner() if len(e.readers(name)) > 1)
    for _ in range(e.random.integers(1, 4)):
        maker = e.maker(name)
        if maker is None:
            break
        node, i = e.pick(e.readers(name))
        made = [f"{e.fresh()}_{o}" for o in range(len(maker.output))]
        node.input[i] = made[list(maker.output).index(name)]
        e.graph.node.add().CopyFrom(maker)
        e.graph.node[-1].output[:] = made
        name = maker.input[0]


def write_defaults(e):
    e.pick(e.nodes(*DEFAULTS))
    for node in e.nodes(*DEFAULTS):
        for name, value in DEFAULTS[node.op_type].items():
            if attribute(node, name) is None:
                set_attribute(node, **{name: value})


def add_unread(e):
    weight = e.constant(e.random.standard_normal(3))
    e.add("Relu", e.add(e.pick(["Relu", "Neg", "Identity"]), e.pick(e.varying())))
    e.add("Mul", weight, weight)


def flatten(e):
    node = e.pick(node for node in e.nodes("Flatten", "Reshape") if len(e.dims[node.output[0]]) == 2)
    if node.op_type == "Reshape":
        e.replace(node, "Flatten", node.input[0])
    else:
        e.replace(node, "Reshape", node.input[0], e.constant(np.array(e.pick([[0, -1], [1, -1]]))))


def change_nothing(e, ways=(("Add", 0.0), ("Sub", 0.0), ("Mul", 1.0), ("Div", 1.0))):
    op, value = e.pick(ways)
    e.splice(e.pick(e.varying()), op, e.constant(np.array(value)))


def negate_twice(e):
    node = e.splice(e.pick(e.varying()), "Neg")
    node.input[0] = e.add("Mul", node.input[0], e.constant(np.array(-1.0)))


def transpose_back(e):
    name = e.pick(name for name in e.varying() if len(e.dims.get(name, ())) > 1)
    perm = e.random.permutation(len(e.dims[name]))
    node = e.splice(name, "Transpose", perm=perm)
    node.input[0] = e.add("Transpose", node.input[0], perm=np.argsort(perm))


def padded(e, *ops):
    return e.pick(node for node in e.nodes(*ops or ["Conv"]) if any(attribute(node, "pads", [])))


def pad_apart(e):
    node = padded(e)
    pads = attribute(node, "pads")
    node.input[0] = e.add("Pad", node.input[0], e.constant(np.array([0, 0, *pads[:2], 0, 0, *pads[2:]])))
    set_attribute(node, pads=None)


def pad_automatically(e):
    node = e.pick(node for node in e.nodes("Conv") if e.dims[node.input[0]][2:] == e.dims[node.output[0]][2:])
    set_attribute(node, pads=None, auto_pad=e.pick(["SAME_UPPER", "SAME_LOWER"]))


def fold_norm(e):
    norm = e.pick(node for node in e.nodes("BatchNormalization") if e.maker(node.input[0]) in e.nodes("Conv")
                  and len(e.readers(node.input[0])) == 1 and node.input[0] not in e.outputs)
    conv = e.maker(norm.input[0])
    scale, shift, mean, variance = (e.value(norm, i).astype(np.float64) for i in range(1, 5))
    factor = scale / np.sqrt(variance + np.float32(attribute(norm, "epsilon", 1e-5)).astype(np.float64))
    bias = e.value(conv, 2) if len(conv.input) > 2 and conv.input[2] else 0
    conv.input[1:] = [e.constant(e.value(conv, 1) * factor[:, None, None, None]),
                      e.constant((bias - mean) * factor + shift)]
    conv.output[0] = norm.output[0]
    e.graph.node.remove(norm)


def contract(e, *options):
    source, target = e.tools.folder / "in.onnx", e.tools.folder / "out.onnx"
    onnx.save(e.finished(), source)
    code, _, error = run(e.tools.concertina, "contract", source, "-o", target, *options)
    require(code == 0, f"contract: exit code {code} {first_line(error)}")
    result = onnx.load(target)
    if result.graph == e.graph:
        raise Unfit
    e.__init__(result, e.random, e.tools)


def write_uniform(e):
    each = e.pick(each for each in e.weights() if np.ptp(models.array_of(each)) == 0)
    value, dims = models.array_of(each).flat[0], np.array(each.dims)
    node, i = e.pick(e.readers(each.name))
    tensor = models.tensor_of("", np.array([value]), e.floats)
    node.input[i] = e.pick([lambda: e.constant(value), lambda: e.add("Expand", e.constant(value), e.constant(dims)),
                            lambda: e.add("ConstantOfShape", e.constant(dims), value=tensor)])()


def take_gemm_apart(e):
    node = e.pick(e.nodes("Gemm"))
    weight = e.value(node, 1)
    product = node.input[0], e.constant(weight.T if attribute(node, "transB", 0) else weight)
    if len(node.input) > 2 and node.input[2]:
        e.replace(node, "Add", e.add("MatMul", *product), node.input[2])
    else:
        e.replace(node, "MatMul", *product)


def transpose_weight(e):
    node = e.pick(e.nodes("Gemm"))
    node.input[1] = e.constant(e.value(node, 1).T)
    set_attribute(node, transB=1 - attribute(node, "transB", 0))


def invert_operation(e):
    node = e.pick(node for node in e.nodes("Sub", "Div") if node.input[1] in e.constants())
    op, f = ("Add", np.negative) if node.op_type == "Sub" else ("Mul", np.reciprocal)
    e.replace(node, op, node.input[0], e.constant(f(e.value(node, 1))))


def slice_instead(e):
    node = e.pick(e.nodes("Split"))
    ends = np.cumsum(e.value(node, 1))
    for name, begin, end in zip(node.output, [0, *ends], ends):
        e.add("Slice", node.input[0], *(e.constant(np.array([k])) for k in (begin, end, 1)), made=name)
    e.graph.node.remove(node)


def add_in_pairs(e):
    node = e.pick(node for node in e.nodes("Sum") if len(node.input) == 3)
    e.replace(node, "Add", node.input[0], e.add("Add", *node.input[1:]))


def reduce_instead(e):
    node = e.pick(e.nodes("GlobalAveragePool"))
    axes = {"axes": [2, 3]} if e.opset < 18 else {}
    e.replace(node, "ReduceMean", node.input[0], *[] if axes else [e.constant(np.array([2, 3]))], **axes)


def write_groups_out(e):
    node = e.pick(node for node in e.nodes("Conv") if attribute(node, "group", 1) > 1)
    parts = np.split(e.value(node, 1), attribute(node, "group"))
    zero = np.zeros_like(parts[0])
    node.input[1] = e.constant(np.concatenate([np.concatenate([part if g == h else zero for h in range(len(parts))], 1)
                                               for g, part in enumerate(parts)]))
    set_attribute(node, group=None)


def ring_with_zeros(e):
    node = e.pick(e.nodes("Conv"))
    dilation, pads = attribute(node, "dilations", [1, 1])[0], attribute(node, "pads", [0] * 4)
    node.input[1] = e.constant(np.pad(e.value(node, 1), [(0, 0), (0, 0), (1, 1), (1, 1)]))
    set_attribute(node, pads=[pad + dilation for pad in pads], kernel_shape=None)


def rewrite_often(e):
    for way in e.random.permutation([name for name in RIGHT if name != "several of these"])[:6]:
        try:
            RIGHT[way](e)
        except Unfit:
            pass
        e.__init__(e.finished(), e.random, e.tools)


RIGHT = {
    "nodes reordered": lambda e: setattr(e, "shuffle", True),
    "tensors renamed": lambda e: e.rename({name: f"r{i}" for i, name in enumerate([*e.inner(), *e.constants()])}),
    "names permuted": permute_names,
    "Identity or Dropout inserted": lambda e: e.splice(e.pick(e.varying()), e.pick(["Identity", "Dropout"])),
    "constants moved to nodes": move_to_nodes,
    "a shared constant split": split_constant,
    "nodes duplicated": duplicate,
    "operands of a sum or the like swapped": lambda e: reverse(
        e.pick(e.nodes("Add", "Mul", "Max", "Min", "Sum")).input),
    "default attributes written": write_defaults,
    "an input left out named": lambda e: e.pick(
        node for op, most in MOST_INPUTS.items() for node in e.nodes(op) if len(node.input) < most).input.append(""),
    "unread parts added": add_unread,
    "Flatten for Reshape": flatten,
    "0 added or 1 multiplied": change_nothing,
    "negated twice": negate_twice,
    "transposed and back": transpose_back,
    "Pad before Conv": pad_apart,
    "padded automatically": pad_automatically,
    "norm folded": fold_norm,
    "contracted": contract,
    "contracted at any cost": lambda e: contract(e, "--when", "always"),
    "uniform constants made by nodes": write_uniform,
    "Gemm taken apart": take_gemm_apart,
    "weight transposed": transpose_weight,
    "Add for Sub, Mul for Div": invert_operation,
    "Slice for Split": slice_instead,
    "Add for Sum": add_in_pairs,
    "ReduceMean for GlobalAveragePool": reduce_instead,
    "groups written out": write_groups_out,
    "kernel ringed with zeros": ring_with_zeros,
    "several of these": rewrite_often,
}
CONTRACTING = {"contracted", "contracted at any cost", "several of these"}
# Which of these the tool does not always recognise, and why.
MAY_BE_UNPROVED = {
    "0 added or 1 multiplied": "what adds 0 passes on no zero's sign, and is a map",
    "operands of a sum or the like swapped": "of more than two operands the order is that of summation",
    "negated twice": "between two nodes that are not linear no region begins or ends at a common tensor",
    "transposed and back": "the same; and only Transposes that swap channels first and last are linear",
    "uniform constants made by nodes": "Expand and ConstantOfShape are not evaluated",
    "Slice for Split": "of two results of a Split each is compared with the other's Slice",
    "Add for Sum": "of operands that are not linear, sums are compared node by node",
    "several of these": "one of them may be any of the above",
}

# ---- another map -----------------------------------------------------------------------------------------------------

UNARY = ["Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Softplus", "Abs", "Exp", "Neg", "Identity"]
BINARY = ["Add", "Sub", "Mul", "Div", "Max", "Min"]
NUMBERS = [("alpha", 0.3), ("epsilon", 0.02), ("axis", 0), ("axis", 2), ("axis", 3), ("strides", [2, 2]), ("group", 1),
           ("transB", 1), ("beta", 0.5), ("count_include_pad", 1)]


def reverse(items, i=0, j=1):
    items[i], items[j] = items[j], items[i]


def change(e, tensors, f):
    """One of the constants, changed."""
    tensor = e.pick(tensors)
    tensor.CopyFrom(models.tensor_of(tensor.name, f(np.array(models.array_of(tensor))), tensor.data_type))


def scale_one(e, factor):
    """One of the larger weights by a factor."""
    def scaled(values):
        values.flat[e.pick(np.flatnonzero(np.abs(values) >= 0.5 * np.abs(values).max()))] *= factor
        return values
    change(e, (each for each in e.weights() if np.any(models.array_of(each))), scaled)


def roll(e, axis, least=1):
    change(e, (each for each in e.weights() if len(each.dims) > max(axis, least) and each.dims[axis] > 1),
           lambda values: np.roll(values, e.pick(range(1, values.shape[axis])), axis))


def alike(e):
    """Two constants of the same dimensions."""
    return e.pick((a, b) for a in e.weights() for b in e.weights() if a.name != b.name and a.dims == b.dims)


def of_shape(e, name):
    return [other for other in e.varying() if name in e.dims and other != name and e.dims[other] == e.dims[name]]


def same_shape(e):
    return [(node, i) for node in e.nodes() if len(node.output) == 1 for i in range(len(node.input))
            if node.input[i] in of_shape(e, node.output[0])]


def rewire(e):
    node, i = e.pick((node, i) for node in e.nodes() for i in range(len(node.input)) if of_shape(e, node.input[i]))
    node.input[i] = e.pick(of_shape(e, node.input[i]))


def exchange_makers(e):
    a = e.pick(name for name in e.inner() if of_shape(e, name))
    makers = e.maker(a), e.maker(e.pick(set(of_shape(e, a)) - set(e.inputs)))
    names = [node.output[0] for node in makers]
    makers[0].output[0], makers[1].output[0] = reversed(names)


def skip(e):
    node, i = e.pick(same_shape(e))
    e.replace(node, "Identity", node.input[i])


def take_earlier(e):
    maker, j = e.pick(same_shape(e))
    node, i = e.pick(e.readers(maker.output[0]))
    node.input[i] = maker.input[j]


def take_later(e):
    """What another reader of the tensor makes of it."""
    later, j = e.pick((node, j) for node, j in same_shape(e) if len(e.readers(node.input[j])) > 1)
    node, i = e.pick((node, i) for node, i in e.readers(later.input[j]) if node != later)
    node.input[i] = later.output[0]


def double_branch(e):
    node = e.pick(node for node in e.nodes("Add", "Sum") if node.input[0] in e.dims and node.input[1] in e.dims)
    i = e.pick([0, 1])
    node.input[i] = e.pick([lambda: e.add("Add", *[node.input[i]] * 2), lambda: node.input[1 - i]])()


def exchange_operator(e, *ops):
    node = e.pick(e.nodes(*ops))
    e.replace(node, e.pick(op for op in ops if op != node.op_type), *node.input)


def exchange_pool(e):
    node = e.pick(e.nodes("MaxPool", "AveragePool"))
    node.op_type = "AveragePool" if node.op_type == "MaxPool" else "MaxPool"


def change_number(e):
    node, name, value = e.pick((node, *each) for node in e.nodes() for each in NUMBERS if each[0] in
                               DEFAULTS.get(node.op_type, {}) or attribute(node, each[0]) is not None)
    set_attribute(node, **{name: value})


def take_constant(e):
    a, b = alike(e)
    node, i = e.pick(e.readers(a.name))
    node.input[i] = b.name


def exchange_constants(e):
    a, b = alike(e)
    a.name, b.name = b.name, a.name


def exchange_outputs(e):
    a, b = e.pick((a, b) for a in e.outputs for b in e.outputs if a < b and e.dims[a] == e.dims[b])
    e.rename({a: b, b: a})


def permute_axes(e):
    node = e.pick(e.nodes("Transpose"))
    set_attribute(node, perm=e.random.permutation(attribute(node, "perm")))


def move_padding(e):
    node = padded(e, "Conv", "MaxPool", "AveragePool")
    pads = np.array(attribute(node, "pads")).reshape(2, 2)
    moved = e.pick([pads[::-1], pads[:, ::-1], pads + [[1], [-1]], pads + [[0, 1], [0, -1]]])
    set_attribute(node, pads=moved.flatten())


def dilate(e):
    node = padded(e)
    by = 3 - attribute(node, "dilations", [1, 1])[0]
    set_attribute(node, dilations=[by, by], pads=[pad * by // (3 - by) for pad in attribute(node, "pads")])


WRONG = {
    "operands swapped": lambda e: reverse(
        e.pick(node for node in e.nodes("Sub", "Div", "MatMul", "Concat") if len(node.input) > 1).input),
    "another tensor read": rewire,
    "outputs exchanged": exchange_outputs,
    "makers exchanged": exchange_makers,
    "a node skipped": skip,
    "taken a node earlier": take_earlier,
    "taken a node later": take_later,
    "a branch doubled": double_branch,
    "another function": lambda e: exchange_operator(e, *UNARY),
    "another operation": lambda e: exchange_operator(e, *BINARY),
    "another pool": exchange_pool,
    "another number": change_number,
    "a weight off by a thousandth": lambda e: scale_one(e, 1.001),
    "a sign flipped": lambda e: scale_one(e, -1),
    "a weight lost": lambda e: scale_one(e, 0),
    "output channels permuted": lambda e: roll(e, 0),
    "input channels permuted": lambda e: roll(e, 1),
    "a kernel moved": lambda e: roll(e, e.pick([2, 3]), 3),
    "a matrix transposed": lambda e: change(
        e, (each for each in e.weights() if len(each.dims) > 1 and each.dims[-1] == each.dims[-2]),
        lambda values: np.swapaxes(values, -1, -2)),
    "constants exchanged": exchange_constants,
    "the constant of another": take_constant,
    "a bias left out": lambda e: e.pick(
        node for node in e.nodes("Conv", "Gemm") if len(node.input) > 2).input.pop(),
    "parameters of a norm exchanged": lambda e: reverse(
        e.pick(e.nodes("BatchNormalization")).input, *e.pick([(1, 4), (2, 3), (1, 2)])),
    "bounds, indices, sizes or pads changed": lambda e: change(
        e, (each for each in e.graph.initializer if each.data_type == TensorProto.INT64),
        lambda values: e.pick([np.roll(values, 1), values + 1, values - 1, values[::-1]])),
    "axes permuted": permute_axes,
    "parts exchanged": lambda e: reverse(e.pick(e.nodes("Split")).output),
    "padding moved": move_padding,
    "another dilation": dilate,
    "padded with ones": lambda e: e.pick(e.nodes("Pad")).input.append(e.constant(np.array(1.0))),
}
# Errors that a contraction in float may hide in the bound of its rounding.
SMALL = {"a weight off by a thousandth"}

# ---- pairs -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(64)
def network(seed, i):
    return Network([seed, i]).model()


def draw(table, name, tools, seed):
    """A network, and what it became: of the first seed that the change fits."""
    for attempt in range(200):
        random = np.random.default_rng([*seed, attempt])
        try:
            model = network(seed[0], seed[1] + attempt)
            e = Edit(model, random, tools)
            table[name](e)
            if table is WRONG and random.random() < 0.5:
                e.__init__(e.finished(), random, tools)
                RIGHT[e.pick(way for way in RIGHT if name not in SMALL or way not in CONTRACTING)](e)
            pair = [model, e.finished()]
            return pair if random.random() < 0.5 else pair[::-1]
        except Unfit:
            continue
    raise Failure("it fits no network")


def differ(model, pair, tools, seed):
    """Whether the outputs of two models differ by more than what rounding constants once more may do."""
    inputs = random_inputs(model, 1, None, "none", np.random.default_rng(seed))
    first, second = (evaluated(tools.evaluate, tools.folder, path, inputs) for path in pair)
    bound = 1e-11 if models.type_of(model) == TensorProto.DOUBLE else 2e-5
    return any(a.shape != second[name].shape or
               not np.all(np.abs(a - second[name]) <= bound * np.abs(a).max(initial=0)) for name, a in first.items())


def check(table, name, tools, seed):
    """What the tool says of a pair, or "equal" of one that the error leaves the same; a Failure where it may not."""
    pair = [tools.folder / "a.onnx", tools.folder / "b.onnx"]
    drawn = draw(table, name, tools, seed)
    for model, path in zip(drawn, pair):
        onnx.save(model, path)
    try:
        if differ(drawn[0], pair, tools, seed):
            require(table is WRONG, "the rewritten model computes something else")
        elif table is WRONG:
            return "equal"
    except Failure:
        if table is RIGHT:
            raise
        return "equal"  # or what nobody can run
    code, output, error = run(tools.concertina, "verify", *pair)
    require(code in (0, 1, 6), f"exit code {code} {first_line(error)}")
    verdict = {0: "proved", 1: "wrong", 6: "not proved"}[code]
    require(table is RIGHT or code != 0, "a wrong pair is proved")
    require(table is WRONG or code != 1, f"a right pair is called wrong: {output}")
    require(table is WRONG or code == 0 or name in MAY_BE_UNPROVED, f"a right pair is not proved: {output}")
    return verdict


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("concertina")
    parser.add_argument("evaluate", help="the program onnx_evaluate")
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--seconds", type=float, help="draw pairs for so long instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="ways whose names contain one of these")
    parser.add_argument("--keep", metavar="FOLDER", help="where pairs that fail are kept")
    tools = parser.parse_args()
    ways = [(table, name) for table in (RIGHT, WRONG) for name in table
            if any(part in name for part in tools.only.split(","))]
    counts, start = collections.Counter(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        tools.folder = pathlib.Path(scratch)
        for i in itertools.count():
            if time.monotonic() - start > tools.seconds if tools.seconds else i >= tools.pairs:
                break
            table, name = way = ways[i % len(ways)]
            try:
                counts[table is RIGHT, name, check(table, name, tools, [tools.seed, i])] += 1
            except Failure as failure:
                counts[table is RIGHT, name, "failed"] += 1
                print(f"FAILED {i}, {'right' if table is RIGHT else 'wrong'}, {name}: {failure}", flush=True)
                if tools.keep:
                    for path in tools.folder.glob("?.onnx"):
                        kept = f"{tools.seed}.{i}.{name.replace(' ', '_')}.{path.name}"
                        shutil.copy(path, pathlib.Path(tools.keep) / kept)
    verdicts = ["proved", "wrong", "not proved", "equal", "failed"]
    print(f"{'':45}" + "".join(f"{verdict:>11}" for verdict in verdicts))
    for table, name in ways:
        row = [counts[table is RIGHT, name, verdict] for verdict in verdicts]
        print(f"{'right' if table is RIGHT else 'wrong'}, {name:38}" + "".join(f"{count or '':>11}" for count in row))
    of = lambda is_right, *wanted: sum(count for (table, _, verdict), count in counts.items()
                                       if table == is_right and verdict in wanted)
    failed = of(True, "failed") + of(False, "failed")
    print(f"right: {of(True, *verdicts)} pairs, {of(True, 'not proved')} not proved; wrong: {of(False, *verdicts)}, of "
          f"which {of(False, 'equal')} are no errors; {failed} failed, {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
