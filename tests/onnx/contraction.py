#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Contracts ONNX models and holds the results to what onnxruntime makes of them.

    contraction.py PATH/TO/concertina [--evaluate PATH/TO/onnx_evaluate] [--only NAME,...] [--keep FOLDER]
    contraction.py PATH/TO/concertina --models FOLDER

Every case is a model of cases.py: it is contracted with --verify, and must have the operators that the case lists, be
accepted by onnx.checker, keep all that no region takes in, and compute the same at several sizes, within a bound of
what rounding may do. A result that is changed must be found by `concertina verify`. Then input that no tool should
trust. With --models, the models of a folder, at their own size.

A line per failure; the exit code is 1 if there is one.
"""

import argparse
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from xml.etree import ElementTree

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import bad_input  # noqa: E402
import models  # noqa: E402
from cases import CASES  # noqa: E402

UNIT = {TensorProto.FLOAT: 2.0**-24, TensorProto.DOUBLE: 2.0**-53, TensorProto.FLOAT16: 2.0**-11,
        TensorProto.BFLOAT16: 2.0**-8}


class Failure(Exception):
    pass


def require(holds, what):
    if not holds:
        raise Failure(what)


def run(program, *arguments):
    """Exit code, standard output and error. A crash or a timeout is a failure."""
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=600,
                          stdin=subprocess.DEVNULL)
    require(done.returncode >= 0, f"{' '.join(map(str, arguments))}: killed by signal {-done.returncode}")
    return done.returncode, done.stdout, done.stderr


def first_line(text):
    return text.strip().split("\n")[0][:300]


# ---- running models --------------------------------------------------------------------------------------------------


def constants_of(model):
    return {each.name for each in model.graph.initializer}


def inputs_of(model):
    constants = constants_of(model)
    return [each for each in model.graph.input if each.name not in constants]


def resized(model, free):
    """The model with free axes of inputs, and so all that follows from them, not stated."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if free == "none":
        return result
    for each in inputs_of(result):
        for axis, dim in enumerate(each.type.tensor_type.shape.dim):
            if axis == 0 or (free == "all" and axis > 1):
                dim.dim_param = f"{each.name}_{axis}"
    for each in result.graph.output:
        for axis, dim in enumerate(each.type.tensor_type.shape.dim):
            dim.dim_param = f"{each.name}_{axis}"
    del result.graph.value_info[:]
    return result


def random_inputs(model, batch, spatial, free, random):
    """For every input: declared extents, the given ones where they are free or not known."""
    values = {}
    for each in inputs_of(model):
        tensor = each.type.tensor_type
        dims = []
        for axis, dim in enumerate(tensor.shape.dim):
            named = not dim.HasField("dim_value") or dim.dim_value <= 0
            if axis == 0 and (named or free != "none"):
                dims.append(batch)
            elif axis > 1 and (named or free == "all") and spatial:
                dims.append(spatial[axis - 2])
            else:
                dims.append(dim.dim_value if not named else 8)
        if tensor.elem_type == TensorProto.BOOL:
            values[each.name] = random.integers(0, 2, [] if not dims else dims).astype(bool)
        elif tensor.elem_type in models.FLOATS:
            dtype = np.float64 if tensor.elem_type == TensorProto.DOUBLE else np.float32
            values[each.name] = random.standard_normal(dims).astype(dtype)
            if tensor.elem_type in models.NARROW:
                values[each.name] = models.array_of(models.tensor_of("", values[each.name], tensor.elem_type))
        else:
            values[each.name] = random.integers(0, 5, dims).astype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return values


class Runner:
    """A model in onnxruntime without any optimisation, or, in double, by ONNX's reference."""

    def __init__(self, model):
        self.reference = models.type_of(model) == TensorProto.DOUBLE
        if self.reference:
            self.session = ReferenceEvaluator(model)
            return
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(models.widened(model).SerializeToString(), options,
                                                    providers=["CPUExecutionProvider"])

    def __call__(self, inputs):
        if self.reference:
            return self.session.run(None, dict(inputs))
        known = {each.name for each in self.session.get_inputs()}
        return self.session.run(None, {name: value for name, value in inputs.items() if name in known})


def bound_of(model, result, free, inputs, regions, type):
    """Per output and element, how far rounding in both models and of the contracted weights may move it; None where
    the model has operators of which that is not known."""
    absolute = models.absolute(resized(models.widened(model), free))
    if absolute is None:
        return None
    outputs = Runner(absolute)({name: np.abs(value) for name, value in inputs.items()})
    double = all(each.dtype == np.float64 for each in outputs)  # else some Cast rounds
    arithmetic = UNIT[TensorProto.DOUBLE if double else TensorProto.FLOAT]
    count = models.roundings(model) + models.roundings(result) + 8
    # Stored weights and biases are rounded once more, from float, in every region.
    factor = 2 * count * arithmetic + (1.01 * UNIT[type] * (regions + 1) if type in models.NARROW else 0)
    tiny = 2.0**-24 * count if type == TensorProto.FLOAT16 else 0
    return [factor * np.abs(each) + tiny for each in outputs]


def compare(model, result, free, sizes, batches, regions, random):
    """Requires equal outputs, border included, within what rounding may do; the worst fraction of that bound."""
    type = models.type_of(model)
    before, after = Runner(resized(model, free)), Runner(resized(result, free))
    worst = 0.0
    for spatial in sizes:
        for batch in batches:
            inputs = random_inputs(model, batch, spatial, free, random)
            where = " and ".join(f"{name} of {list(value.shape)}" for name, value in inputs.items())
            expected, found = before(inputs), after(inputs)
            bounds = bound_of(model, result, free, inputs, regions, type)
            for i, (a, b) in enumerate(zip(expected, found)):
                name = model.graph.output[i].name
                require(a.shape == b.shape, f"{where}: {name} is {list(b.shape)}, not {list(a.shape)}")
                if a.dtype.kind != "f":
                    require(np.array_equal(a, b), f"{where}: {name} differs")
                    continue
                require(np.array_equal(np.isfinite(a), np.isfinite(b)), f"{where}: {name} is finite elsewhere")
                finite = np.isfinite(a)
                difference = np.abs(np.where(finite, a, 0).astype(np.float64) - np.where(finite, b, 0))
                # Where no bound is known: a thousand roundings of the largest, and of 1, as of a sigmoid's input.
                loose = 1e3 * UNIT[TensorProto.FLOAT if type not in UNIT else type]
                bound = bounds[i] if bounds else loose * max(1, np.max(np.abs(a), initial=0, where=finite))
                fractions = difference / np.maximum(np.asarray(bound, np.float64), 1e-300)
                fraction = np.max(fractions, initial=0)
                at = np.unravel_index(np.argmax(fractions), a.shape) if a.size else ()
                require(fraction <= 1, f"{where}: {name}{[int(k) for k in at]} is off by {difference[at]:.3g}, "
                                       f"{fraction:.3g} of its bound, of values up to {np.max(np.abs(a)):.3g}")
                worst = max(worst, float(fraction))
    return worst


# ---- what stays ------------------------------------------------------------------------------------------------------


def shown(text):
    """As the tool prints names."""
    return "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in text.encode())


def captured(node):
    """Names that graphs in its attributes read."""
    names = set()
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                names |= set(inner.input) | captured(inner)
            names |= {each.name for each in graph.output}
    return names


def read_by(graph):
    names = {each.name for each in graph.output}
    for node in graph.node:
        names |= set(node.input) | captured(node)
    return names


def check_survivors(model, result, report):
    """All that no region takes in is as it was, and nothing is left of what they took."""
    require(result.ir_version == model.ir_version, "another IR version")
    before, after = onnx.ModelProto(), onnx.ModelProto()
    for copy, source in ((before, model), (after, result)):
        copy.CopyFrom(source)
        for field in ("node", "initializer", "value_info", "input"):
            copy.graph.ClearField(field)
    require(before.SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True),
            "fields of the model differ beside nodes, constants and shapes")

    taken = [name for region in report["regions"] for name in region["nodes"]]
    kept = {node.SerializeToString(deterministic=True) for node in result.graph.node}
    read = read_by(result.graph)
    for node in model.graph.node:
        if node.SerializeToString(deterministic=True) in kept:
            continue
        name = node.name or node.output[0]
        if name in taken:
            taken.remove(name)
            continue
        was_read = read_by(model.graph)
        dead = not any(output in read for output in node.output) and any(output in was_read for output in node.output)
        require(dead, f"{name} is gone, and in no region")
    made = {name for node in result.graph.node for name in node.output if name}
    for output in (name for node in model.graph.node for name in node.output):
        require(output in made or output not in read, f"{output} is read, but not made")

    initial = {each.name: each for each in model.graph.initializer}
    was_read = read_by(model.graph)
    for each in result.graph.initializer:
        require(each.name in read or (each.name in initial and each.name not in was_read), f"{each.name} is not read")
        if each.name in initial:
            require(each.SerializeToString(deterministic=True) ==
                    initial[each.name].SerializeToString(deterministic=True), f"constant {each.name} has changed")
    constants, inputs = constants_of(result), [each.name for each in result.graph.input]
    require([name for name in inputs if name not in constants] == [each.name for each in inputs_of(model)],
            "other inputs")
    if model.ir_version < 4:
        require(constants <= set(inputs), "initializers that are no inputs, before IR 4")
    for each in result.graph.value_info:
        require(each.name in made or each.name in constants, f"a shape of {each.name}, which is not there")
    names = [name for node in result.graph.node for name in node.output if name] + inputs
    require(len(names) == len(set(names)), "names of tensors are there twice")


def check_model(result, full):
    try:
        onnx.checker.check_model(result, full_check=full)
        if full:
            onnx.shape_inference.infer_shapes(result, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # of several types
        raise Failure(f"onnx.checker: {first_line(str(error))}") from None


# ---- what must be found ----------------------------------------------------------------------------------------------


def perturbed(model, result, by=1e-3):
    """The result with its largest new weight changed; None where all constants are the model's."""
    known = constants_of(model)
    changed = onnx.ModelProto()
    changed.CopyFrom(result)
    for tensor in changed.graph.initializer:
        values = models.array_of(tensor)
        if tensor.name in known or values.dtype.kind != "f" or not np.any(values):
            continue
        values = np.array(values)
        at = np.unravel_index(np.argmax(np.abs(values)), values.shape)
        # More than two units in the last place, of 16 bits too.
        values[at] *= 1 + {TensorProto.FLOAT16: 1e-2, TensorProto.BFLOAT16: 5e-2}.get(tensor.data_type, by)
        tensor.CopyFrom(models.tensor_of(tensor.name, values, tensor.data_type))
        return changed
    return None


def rewired(model, result):
    """The result with an attribute of a new node changed; None where there is none."""
    known = {node.SerializeToString(deterministic=True) for node in model.graph.node}
    changed = onnx.ModelProto()
    changed.CopyFrom(result)
    for node in changed.graph.node:
        if node.SerializeToString(deterministic=True) in known:
            continue
        for attribute in node.attribute:
            if attribute.name == "pads":
                attribute.ints[0] += 1
                attribute.ints[len(attribute.ints) // 2] -= 1 if attribute.ints[len(attribute.ints) // 2] else 0
                return changed
            if attribute.name == "transB":
                node.attribute.append(helper.make_attribute("alpha", 1.125))
                return changed
    return None


def check_verify(program, folder, model, result):
    source, target = folder / "in.onnx", folder / "changed.onnx"
    for pair in ((source, folder / "out.onnx"), (folder / "out.onnx", source)):  # whoever was made of whom
        code, output, error = run(program, "verify", *pair)
        require(code == 0, f"verify {pair[0].name}: exit code {code} {first_line(error)} {first_line(output)}")
    # Of float sums over forty layers the bounds exceed the elements: then nothing is proved, neither right nor wrong.
    long = len(model.graph.node) > 40
    for what, changed, codes in (("a weight is changed", perturbed(model, result), (1, 6) if long else (1,)),
                                 ("an attribute is changed", rewired(model, result), (1, 3, 6))):
        if changed is not None:
            onnx.save(changed, target)
            code, _, error = run(program, "verify", source, target)
            require(code in codes, f"verify, where {what}: exit code {code} {first_line(error)}")


def check_constants(program, folder):
    """Constants whose elements are not read, strings and types that are not known, are compared too."""
    cases = ((TensorProto.STRING, [b"cat", b"dog"], [b"dog", b"cat"]), (TensorProto.INT4, [1, 2], [1, 3]),
             (TensorProto.UINT4, [1, 2], [3, 2]), (TensorProto.FLOAT8E4M3FN, [1.0, 2.0], [2.0, 1.0]))
    for initializer, (type, values, others) in itertools.product((True, False), cases):
        for path, elements in (("a.onnx", values), ("b.onnx", others)):
            constant = helper.make_tensor("constant", type, [2], elements)
            graph = helper.make_graph(
                [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Identity", ["constant"], ["z"])],
                "constants", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3]),
                 helper.make_tensor_value_info("z", type, [2])], [constant])
            if not initializer:
                del graph.initializer[:]
                graph.node.insert(0, helper.make_node("Constant", [], ["constant"], value=constant))
            opsets = [helper.make_opsetid("", 21)]
            onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / path)
        name = TensorProto.DataType.Name(type)
        code, _, error = run(program, "verify", folder / "a.onnx", folder / "a.onnx")
        require(code == 0, f"{name}: a model and itself: exit code {code} {first_line(error)}")
        code, _, error = run(program, "verify", folder / "a.onnx", folder / "b.onnx")
        require(code in (1, 6), f"{name}: exit code {code} {first_line(error)}")


def check_graphs(program, folder):
    """Graphs in attributes are compared whatever type the attribute says it is of."""
    def branch(op, name):
        return helper.make_graph([helper.make_node(op, ["x"], [name])], "branch", [],
                                 [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3])])

    for type in (None, "UNDEFINED", "FLOAT", "INTS", "TENSOR", "GRAPH"):
        for path, op in (("a.onnx", "Relu"), ("b.onnx", "Neg")):
            node = helper.make_node("If", ["c"], ["y"], then_branch=branch(op, "a"), else_branch=branch("Relu", "b"))
            for attribute in node.attribute:
                attribute.ClearField("type")
                if type:
                    attribute.type = onnx.AttributeProto.AttributeType.Value(type)
            graph = helper.make_graph(
                [node], "graphs", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3]),
                                   helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])])
            onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
                      folder / path)
        for other, expected in (("a.onnx", 0), ("b.onnx", 6)):
            code, output, error = run(program, "verify", folder / "a.onnx", folder / other)
            require(code == expected, f"{type}, {other}: exit code {code} {first_line(output)} {error}")


def check_geometry(program, folder):
    """Layers that differ only in what their map's size never shows are one map there, and not at every size."""
    random = np.random.default_rng(1)
    weight, bias = random.integers(1, 8, [4, 3, 3, 3]), random.integers(-8, 8, 4)

    def layer(size, weight, pads, strides=1):
        g = models.Builder("geometry")
        y = g.add("Conv", g.input("x", [1, 3, size, size]), g.constant(weight.astype(np.float32)),
                  g.constant(bias.astype(np.float32)), kernel_shape=list(weight.shape[2:]), pads=pads,
                  strides=[strides] * 2)
        g.output(g.add("Relu", y))
        return g.model()

    other, ring, center = weight.copy(), np.pad(weight, ((0, 0), (0, 0), (1, 1), (1, 1))), weight[:, :, 1:2, 1:2]
    other[1, 1, 1, 1] += 1
    filled = ring.copy()
    filled[:, :, 0, 0] = 1
    even, odd = layer(8, weight, [1] * 4, 2), layer(9, weight, [1] * 4, 2)
    for what, a, b, everywhere, size in (
            ("padding that is not read", even, layer(8, weight, [1, 1, 0, 0], 2), 1, 0),
            ("another weight, and such padding", even, layer(8, other, [1, 1, 0, 0], 2), 1, 1),
            ("padding that is read", odd, layer(9, weight, [1, 1, 0, 0], 2), 1, 1),
            ("padding at the other side", even, layer(8, weight, [0, 0, 1, 1], 2), 1, 1),
            ("taps that read padding alone", layer(1, weight, [1] * 4), layer(1, center, [0] * 4), 1, 0),
            ("another weight, and such taps", layer(1, weight, [1] * 4), layer(1, center + 1, [0] * 4), 1, 1),
            ("the stride of one output", layer(3, weight, [0] * 4), layer(3, weight, [0] * 4, 2), 1, 0),
            ("a ring of zeros", layer(8, weight, [1] * 4), layer(8, ring, [2] * 4), 0, 0),
            ("a ring that is read", layer(8, weight, [1] * 4), layer(8, filled, [2] * 4), 1, 1)):
        for path, model in (("a.onnx", a), ("b.onnx", b)):
            onnx.save(model, folder / path)
        for border, expected in (("everywhere", everywhere), ("size", size), ("interior", size)):
            for pair in (("a.onnx", "b.onnx"), ("b.onnx", "a.onnx")):
                code, output, error = run(program, "verify", *(folder / path for path in pair), "--border", border)
                require(code == expected, f"{what}, {pair[0]}, {border}: exit code {code} {first_line(output)} {error}")


def check_without_constants(program, folder):
    """Maps that have no constants are compared with those that say the same by some, in float and in double."""
    def model(type, *nodes):
        g = models.Builder("signs", type=type)
        y = g.input("x", [1, 3, 4, 4])
        for op, *values in nodes:
            y = g.add(op, y, *(g.constant(np.full([3, 1, 1], float(value))) for value in values))
        g.output(g.add("Relu", y, made="y"))
        return g.model()

    for type in (TensorProto.FLOAT, TensorProto.DOUBLE):
        negated = model(type, ["Neg"])
        for what, a, b, expected in (
                ("a sign", negated, model(type, ["Mul", -1]), {0}),
                ("another factor", negated, model(type, ["Mul", -1.25]), {1}),
                ("a sign and a quotient", negated, model(type, ["Div", -1]), {0}),
                ("two signs", negated, model(type, ["Neg"], ["Identity"], ["Neg"], ["Neg"]), {0}),
                ("a sign and none", negated, model(type, ["Identity"]), {1, 6}),
                ("what changes nothing", model(type, ["Identity"], ["Dropout"]), model(type), {0}),
                ("that in between", model(type, ["Relu"], ["Mul", 3]),
                 model(type, ["Identity"], ["Relu"], ["Dropout"], ["Identity"], ["Mul", 3], ["Identity"]), {0}),
                ("that in between, and another factor", model(type, ["Relu"], ["Mul", 3]),
                 model(type, ["Identity"], ["Relu"], ["Dropout"], ["Mul", 4]), {6}),
                ("names of others", model(type, ["Relu"], ["Mul", 3], ["Sigmoid"]),
                 model(type, ["Mul", 3], ["Relu"], ["Sigmoid"]), {6})):
            for path, each in (("a.onnx", a), ("b.onnx", b)):
                onnx.save(each, folder / path)
            for pair in (("a.onnx", "b.onnx"), ("b.onnx", "a.onnx")):
                code, output, error = run(program, "verify", *(folder / path for path in pair))
                require(code in expected, f"{what}, {pair[0]}: exit code {code} {first_line(output)} {error}")


def check_undeclared_channels(program, folder):
    """A shift of channels is split from a padded layer only where it can be read again."""
    g = models.Builder("undeclared")
    g.output(g.add("Relu", g.conv(g.norm(g.input("x", [1, None, 8, 8]), 8), 16, 8, 3, 3, pads=1)))
    onnx.save(g.model(), folder / "in.onnx")
    for options, ops in (([], ["BatchNormalization", "Conv", "Relu"]),
                         (["--input", "x=1,8,8,8"], ["Add", "Conv", "Relu"])):
        code, output, error = run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx", "--verify",
                                  *options)
        require(code == 0, f"{options}: exit code {code} {first_line(output)} {error}")
        found = [node.op_type for node in onnx.load(folder / "out.onnx").graph.node]
        require(found == ops, f"{options}: {found}")


def check_structure(program, folder):
    """What is taken for the same is compared, whatever its names are: models that differ are never proved equal."""
    def model(nodes, constants=(), outputs=("y",), dims=(1, 3, 4, 4), inputs=("x",)):
        made = [helper.make_node(op, read, written, **attributes) for op, read, written, attributes in nodes]
        info = lambda names: [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in names]
        graph = helper.make_graph(made, "structure", info(inputs), info(outputs),
                                  [numpy_helper.from_array(value, name) for name, value in dict(constants).items()])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def node(op, read, written, **attributes):
        return op, read.split(), written.split(), attributes

    weights = {name: np.random.default_rng(seed).standard_normal([3, 3, 1, 1]).astype(np.float32)
               for seed, name in enumerate(("v", "w"))}
    whole = {"u": np.einsum("oiab,ijab->ojab", weights["w"], weights["v"])}
    half, three, tenth = (np.full([1], value, np.float32) for value in (0.5, 3, 0.1))
    negated = [node("Neg", "z", "n"), node("Identity", "n", "t")]
    changed = lambda value: model([node("Dropout", "c", "d"), node("Mul", "d c2", "e"), node("Sigmoid", "x", "s"),
                                   node("Mul", "s e", "y")], {"c": value, "c2": three})
    chain = [node("Tanh", "x", "t0"), node("Conv", "t0 v", "t1"), node("Conv", "t1 w", "t2"), node("Relu", "t2", "y")]
    pool = lambda indices: model([node("MaxPool", "x", f"p {indices}", kernel_shape=[1, 1]), node("Relu", "p", "y")])
    random = [node("RandomNormalLike", "x", name) for name in ("r", "q")]
    twice = [node("Relu", "x", "r2"), node("Relu", "x", "r"), node("Sigmoid", "x", "s")]
    branches = [twice[0], twice[1], node("Conv", "r v", "c")]
    leaky = lambda alpha: model([node("LeakyRelu", "x", "a", alpha=alpha), node("Reciprocal", "a", "y")])
    heads = lambda *names: [each for name, weight in zip(names, "vwu") for each in
                            (node("Conv", f"x {weight}", f"{name}0"), node("Sin", f"{name}0", f"{name}1"))] + [
                                node("Concat", " ".join(f"{name}1" for name in names), "y", axis=1)]
    deep = lambda names: [each for name, weight in zip(names, "vwu") for each in
                          (node("Conv", f"x {weight}4", f"{name}2"), node("Conv", f"{name}2 {weight}8", f"{name}0"),
                           node("Sin", f"{name}0", f"{name}1"))] + [
                               node("Concat", " ".join(f"{name}1" for name in names), "y", axis=1)]
    products = {**weights, **whole}
    for name, product in [*products.items()]:
        square = np.random.default_rng(len(products)).standard_normal([3, 3])
        inverse = product[:, :, 0, 0] @ np.linalg.inv(square)
        products |= {f"{name}{i}": each.astype(np.float32).reshape(3, 3, 1, 1)
                     for i, each in ((4, square), (8, inverse))}
        products[name] = np.einsum("oiab,ijab->ojab", products[f"{name}8"], products[f"{name}4"])
    for what, a, b, expected in (
            ("a tensor that Identity passes on", model([*negated, node("Relu", "x", "r"), node("Sigmoid", "r", "y")],
                                                       (), ("t", "y"), inputs=("x", "z")),
             model([*negated, node("Sigmoid", "t", "y")], (), ("t", "y"), inputs=("x", "z")), {1, 6}),
            ("a transposition", model([node("Transpose", "x", "t", perm=[0, 2, 1]), node("Mul", "t c", "y")],
                                      {"c": three}, dims=(1, 5, 5)),
             model([node("Mul", "x c", "y")], {"c": three}, dims=(1, 5, 5)), {1, 6}),
            ("constants behind Dropout", changed(half), changed(tenth), {1, 6}),
            ("random numbers", model([random[0], node("Add", "x r", "s"), node("Sub", "s r", "y")]),
             model([*random, node("Add", "x r", "s"), node("Sub", "s q", "y")]), {1, 6}),
            ("the sign of zero", leaky(0.0), leaky(-0.0), {1, 6}),
            ("names that are shifted", model(chain, weights),
             model([node("Tanh", "x", "t0"), node("Conv", "t0 u", "t1"), node("Relu", "t1", "y")], whole), {0}),
            ("names that are swapped", model(chain, weights),
             model([node("Tanh", "x", "t2"), node("Conv", "t2 v", "t0"), node("Conv", "t0 w", "t1"),
                    node("Relu", "t1", "y")], weights), {0}),
            ("outputs that nobody reads", pool("i"), pool("j"), {0}),
            ("equal nodes made one", model([*branches, node("Conv", "r2 v", "c2"), node("Mul", "c c2", "y")], weights),
             model([*branches[1:], node("Mul", "c c", "y")], weights), {0}),
            ("one of equal nodes made another",
             model([*branches, node("Conv", "r2 v", "c2"), node("Mul", "c c2", "y")], weights),
             model([*branches, node("Conv", "r2 w", "c2"), node("Mul", "c c2", "y")], weights), {1, 6}),
            ("operands that are swapped", model([*twice[1:], node("Mul", "r s", "y")]),
             model([*twice[1:], node("Mul", "s r", "y")]), {0}),
            ("operands of a difference", model([*twice[1:], node("Sub", "r s", "y")]),
             model([*twice[1:], node("Sub", "s r", "y")]), {1, 6}),
            ("what is left out", model([node("Clip", "x low", "y")], {"low": np.float32(0)}),
             model([("Clip", ["x", "low", ""], ["y"], {})], {"low": np.float32(0)}), {0}),
            ("a factor of one", model([node("Relu", "x", "r"), node("Tanh", "r", "y")]),
             model([node("Relu", "x", "r"), node("Mul", "r one", "m"), node("Tanh", "m", "y")],
                   {"one": np.ones([1], np.float32)}), {0}),
            ("a factor of one that adds an axis",
             model([node("Relu", "x", "r"), node("Sigmoid", "r", "y")], dims=(3, 4)),
             model([node("Relu", "x", "r"), node("Mul", "r one", "m"), node("Sigmoid", "m", "y")],
                   {"one": np.ones([1, 1, 1], np.float32)}, dims=(3, 4)), {6}),
            ("outputs that are exchanged", model([node("Relu", "x", "y"), node("Tanh", "x", "z")], outputs=("y", "z")),
             model([node("Relu", "x", "z"), node("Tanh", "x", "y")], outputs=("y", "z")), {6}),
            ("names of others, and a node that is another",
             model([node("Relu", "x", "p"), node("Conv", "p v", "q"), node("Tanh", "q", "y")], weights),
             model([node("Relu", "x", "q"), node("Conv", "q v", "p"), node("Sigmoid", "p", "y")], weights), {6}),
            ("names of others that one would be wrong by", model(heads("a", "b"), weights),
             model(heads("b", "a"), weights), {0}),
            ("names of others that are contracted", model(deep("abc"), products), model(heads(*"cab"), products), {0}),
            ("a wrong one of them", model(heads("a", "b"), weights),
             model(heads("b", "a"), {**weights, "w": weights["v"]}), {1, 6})):
        for path, each in (("a.onnx", a), ("b.onnx", b)):
            onnx.save(each, folder / path)
        for pair in (("a.onnx", "b.onnx"), ("b.onnx", "a.onnx")):
            code, output, error = run(program, "verify", *(folder / path for path in pair))
            require(code in expected, f"{what}, {pair[0]}: exit code {code} {first_line(output)} {error}")


def check_defaults(program, folder):
    """Attributes that are left out are what ONNX says they are, of every operator and version."""
    source = (pathlib.Path(__file__).parent / "../../examples/onnx/value_numbers.cpp").read_text()
    table = source.split("constexpr Default defaults[]")[1].split("};")[0]
    rows = re.findall(r'\{((?:"[^"]*"\s*)+), "(\w+)",\s*([^{}]+?)\}', table)
    require(len(rows) > 40, f"{len(rows)} rows")
    for operators, attribute, rest in rows:
        value, *versions = [each.strip() for each in rest.split(",")]
        since, until = (int(each) for each in [*versions, "1", "999"][:2]) if len(versions) == 2 else (
            int(versions[0]) if versions else 1, 999)
        stated = value.strip('"').encode() if value.startswith('"') else (
            np.float32(value.rstrip("F")) if value.endswith("F") else int(value))
        for operator in "".join(re.findall('"([^"]*)"', operators)).split():
            for schema in onnx.defs.get_all_schemas_with_history():
                of_other = schema.name != operator or schema.domain or attribute not in schema.attributes
                if of_other or not max(7, since) <= schema.since_version <= until:
                    continue
                default = schema.attributes[attribute].default_value
                require(default.type and helper.get_attribute_value(default) == stated,
                        f"{operator}-{schema.since_version}: {attribute} is {default}, not {value}")
    cases = (("LeakyRelu", {"alpha": 0.01}, {"alpha": 0.02}), ("Softmax", {"axis": -1}, {"axis": 1}),
             ("MaxPool", {"kernel_shape": [2, 2], "ceil_mode": 0, "pads": [0] * 4, "strides": [1, 1]},
              {"kernel_shape": [2, 2], "pads": [0, 1, 0, 0]}))
    for op, same, other in cases:
        left_out = {key: value for key, value in same.items() if key == "kernel_shape"}
        for attributes, expected in ((same, 0), (other, 6)):
            for path, given in (("a.onnx", left_out), ("b.onnx", attributes)):
                node = helper.make_node(op, ["x"], ["y"], **given)
                info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, None, None]) for name in "xy"]
                onnx.save(helper.make_model(helper.make_graph([node], "one", info[:1], info[1:]),
                                            opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / path)
            code, output, error = run(program, "verify", folder / "a.onnx", folder / "b.onnx")
            require(code == expected, f"{op} {attributes}: exit code {code} {first_line(output)} {error}")


def check_passed_on(program, folder):
    """What changes nothing is what it reads: not its constant, nor of other extents, types or values than it says."""
    def model(nodes, constants=(), dims=(2, 3, 1, 1), inputs=(("x", TensorProto.FLOAT),), opsets=()):
        made = [helper.make_node(op, read.replace("-", "").split(" "), [written], **attributes)
                for op, read, written, attributes in nodes]
        info = [helper.make_tensor_value_info(name, type, dims if name == "x" else [2]) for name, type in inputs]
        result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph(made, "passed on", info, [result],
                                  [numpy_helper.from_array(value, name) for name, value in dict(constants).items()])
        imports = [helper.make_opsetid("", 18), *opsets]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)

    one = {"one": np.ones([1], np.float32)}
    node = lambda op, read, written, **attributes: (op, read, written, attributes)
    scaled = lambda op: model([node(op, "x", "r"), node("Mul", "one r", "m"), node("Exp", "m", "y")], one)
    flat = lambda *between: model([*between, node("Softmax", between[-1][2] if between else "x", "y", axis=1)],
                                  dims=(2, 3, 1, 1))
    cast = lambda to, large: model(
        [node("Cast", "i", "c", to=to), node("Mul", "c c", "d"), node("Cast", "d", "f", to=TensorProto.FLOAT),
         node("Mul", "x f", "y")], {"i": np.int64([100_000 if large else 7])})
    import_ml = [helper.make_opsetid("ai.onnx.ml", 3)]
    for what, a, b, expected in (
            ("a factor of one on the left", scaled("Relu"), scaled("Sigmoid"), {6}),
            ("that and none", scaled("Relu"), model([node("Relu", "x", "r"), node("Exp", "r", "y")]), {0}),
            ("extents that are flattened", model([node("Flatten", "x", "f"), node("Shape", "f", "s"),
                                                  node("Cast", "s", "y", to=TensorProto.FLOAT)]),
             model([node("Shape", "x", "s"), node("Cast", "s", "y", to=TensorProto.FLOAT)]), {6}),
            ("a softmax of what is flattened", flat(node("Flatten", "x", "f")), flat(), {6}),
            ("integers of another type", cast(TensorProto.INT32, True), cast(TensorProto.INT64, True), {1, 6}),
            ("versions of operators that none uses", scaled("Relu"),
             model([node("Relu", "x", "r"), node("Mul", "one r", "m"), node("Exp", "m", "y")], one, opsets=import_ml),
             {0})):
        for path, each in (("a.onnx", a), ("b.onnx", b)):
            onnx.save(each, folder / path)
        for pair in (("a.onnx", "b.onnx"), ("b.onnx", "a.onnx")):
            code, output, error = run(program, "verify", *(folder / path for path in pair))
            require(code in expected, f"{what}, {pair[0]}: exit code {code} {first_line(output)} {error}")
    # Parts that only the caller knows, a mean of nothing, sizes that round, integers that wrap: what is written is what
    # was read.
    halves = helper.make_graph(
        [helper.make_node("Split", ["x", "parts"], ["p", "q"], axis=1), helper.make_node("Conv", ["p", "v"], ["c"]),
         helper.make_node("Conv", ["c", "w"], ["y"])], "parts",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 5, 5]),
         helper.make_tensor_value_info("parts", TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.float32(np.arange(9).reshape(3, 3, 1, 1)), name) for name in "vw"])
    mean = model([node("ReduceMean", "x", "m", noop_with_empty_axes=1), node("Mul", "m three", "n"),
                  node("Mul", "n three", "y")], {"three": np.float32([3])}, dims=(1, 3, 4, 4))
    resized = model([node("Resize", "x - scales", "r", mode="nearest"), node("GlobalAveragePool", "r", "g"),
                     node("Mul", "g three", "y")],
                    {"scales": np.float32([1, 1, 0.7, 0.7]), "three": np.float32([3])}, dims=(1, 3, 10, 10))
    drawn = lambda *dims: np.random.default_rng(1).standard_normal(dims).astype(np.float32)
    for what, made, values in (
            ("parts", helper.make_model(halves, opset_imports=[helper.make_opsetid("", 18)], ir_version=8),
             {"x": drawn(1, 4, 5, 5), "parts": np.int64([3, 1])}),
            ("a mean of nothing", mean, {"x": drawn(1, 3, 4, 4)}),
            ("a size that float rounds", resized, {"x": drawn(1, 3, 10, 10)}),
            ("a square that wraps", cast(TensorProto.INT32, True), {"x": np.ones([2, 3, 1, 1], np.float32)})):
        onnx.save(made, folder / "in.onnx")
        code, output, error = run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx", "--verify")
        require(code == 0, f"{what}: exit code {code} {first_line(output)} {error}")
        before, after = (Runner(each)(values)[0] for each in (made, onnx.load(folder / "out.onnx")))
        require(before.shape == after.shape and np.abs(before - after).max() <= 1e-6 * np.abs(before).max(),
                f"{what}: the result is another one")
    # Many outputs of one node, strings and empty constants take no more time than they have bytes.
    parts = [f"p{i}" for i in range(5000)]
    split = lambda op: helper.make_model(helper.make_graph(
        [helper.make_node("Split", ["x"], parts, axis=1, num_outputs=len(parts)), helper.make_node(op, ["p0"], ["y"])],
        "parts", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, len(parts)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor(f"s{i}", TensorProto.STRING, [1], [b"text"]) for i in range(5000)]),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    for path, op in (("a.onnx", "Tanh"), ("b.onnx", "Sigmoid")):
        onnx.save(split(op), folder / path)
    code, output, error = run(program, "verify", folder / "a.onnx", folder / "b.onnx")
    require(code == 6, f"many outputs: exit code {code} {first_line(output)} {error}")


def check_limits(program, folder):
    """What only the caller knows, what a type does not hold or an operator does not take, and names that are taken."""
    F, F16, BF16, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT64
    drawn = lambda *dims: np.random.default_rng(1).standard_normal(dims).astype(np.float32)

    def model(nodes, inputs, constants=(), opset=17, values=()):
        made = [helper.make_node(op, read.split(" "), [written], **attributes)
                for op, read, written, *more in nodes for attributes in [more[0] if more else {}]]
        info = lambda rows: [helper.make_tensor_value_info(*row) for row in rows]
        type = inputs[0][1] if inputs[0][1] in (F16, BF16) else F
        graph = helper.make_graph(made, "limits", info(inputs), info([(made[-1].output[0], type, None)]),
                                  [each if isinstance(each, TensorProto) else numpy_helper.from_array(each, name)
                                   for name, each in dict(constants).items()], value_info=info(values))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)

    def contracted(what, made, kept, values=None):
        """That it ends, is valid, keeps so many nodes, and computes the same."""
        onnx.save(made, folder / "in.onnx")
        code, output, error = run(program, "contract", "--when=always", folder / "in.onnx", "-o", folder / "out.onnx")
        require(code == 0, f"{what}: exit code {code} {first_line(output)} {error}")
        result = onnx.load(folder / "out.onnx")
        require(len(result.graph.node) == kept, f"{what}: {len(result.graph.node)} nodes")
        if values is None:
            return
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(result, strict_mode=True))
        before, after = (Runner(each)(values)[0].astype(np.float64) for each in (made, result))
        require(before.shape == after.shape and np.abs(before - after).max() <= 1e-6 * np.abs(before).max(),
                f"{what}: the result is another one")

    ends = {"s": np.int64([0]), "e": np.int64([8]), "a": np.int64([1])}
    x = ("x", F, [4, 8, 4, 4])
    conv = {"w": drawn(3, 2, 1, 1), "g": np.int64([0, 1])}
    contracted("steps of the caller's", model(
        [("Slice", "x s e a steps", "p"), ("Gather", "p g", "q", {"axis": 1}), ("Conv", "q w", "y")],
        [x, ("steps", I64, [1])], ends | conv), 3, {"x": drawn(4, 8, 4, 4), "steps": np.int64([2])})
    contracted("a size by the caller's axes", model(
        [("Slice", "x s e axes", "p"), ("GlobalAveragePool", "p", "q"), ("Conv", "q w", "y")],
        [x, ("axes", I64, [1])], {"s": np.int64([0]), "e": np.int64([2]), "w": drawn(3, 8, 1, 1)}), 3,
        {"x": drawn(4, 8, 4, 4), "axes": np.int64([2])})
    contracted("channels by the caller's steps", model(
        [("Slice", "x s e a steps", "p"), ("Conv", "p w", "q"), ("Relu", "q", "y")], [x, ("steps", I64, [1])],
        ends | {"w": drawn(3, 4, 1, 1)}), 3, {"x": drawn(4, 8, 4, 4), "steps": np.int64([2])})
    contracted("an axis inserted twice", model([("Unsqueeze", "x", "p", {"axes": [0] * 1000}), ("Neg", "p", "y")],
                                               [("x", F, [1, 8])], opset=11), 2)
    for type, small in ((F16, np.float16(1e-5)), (F, np.float32(1e-25))):
        contracted(f"{type}: weights that underflow", model(
            [("Conv", "x v", "p"), ("Conv", "p v", "y")], [("x", type, [1, 4, 2, 2])],
            {"v": np.full([4, 4, 1, 1], small)}), 2, {"x": np.full([1, 4, 2, 2], np.float32(6e4))})
    contracted("weights that overflow", model(
        [("Conv", "x v", "p"), ("Conv", "p v", "y")], [x], {"v": np.full([8, 8, 1, 1], np.float32(1e30))}), 2)
    contracted("names that a type is declared of", model(
        [("Conv", "x v", "p"), ("Conv", "p v b", "y")], [x], {"v": drawn(8, 8, 1, 1), "b": drawn(8)},
        values=[("y.weight", F, [7, 7]), ("y.bias", I64, [7])]), 1, {"x": drawn(4, 8, 4, 4)})
    odd = "z\u202ey\u009bx\u00e9"
    onnx.save(model([("Conv", "x v", "p"), ("Conv", "p v", odd)], [x], {"v": drawn(8, 8, 1, 1)}), folder / "in.onnx")
    code, output, error = run(program, "info", "--json", folder / "in.onnx")
    require(code == 0 and output.isascii() and odd in [each["result"] for each in json.loads(output)["regions"]],
            f"a name that a terminal would not show: {output} {error}")
    onnx.save(model([("Conv", "x v", "p"), ("Conv", "p v", "a]]>&<b")], [x], {"v": drawn(8, 8, 1, 1)}),
              folder / "in.onnx")
    code, output, error = run(program, "info", "--svg", folder / "in.onnx")
    require(code == 0 and "a]]>&<b" in "".join(ElementTree.fromstring(output).itertext()),
            f"a name that ends what has not begun: {error}")
    bfloat16 = lambda *dims: helper.make_tensor("k", BF16, dims, drawn(*dims).ravel())
    for opset, kept in ((13, 4), (22, 1)):
        contracted(f"bfloat16 at opset {opset}", model(
            [("Transpose", "x", "p", {"perm": [0, 2, 3, 1]}), ("MatMul", "p k", "q"),
             ("Transpose", "q", "r", {"perm": [0, 3, 1, 2]}), ("Mul", "r m", "y")], [("x", BF16, [1, 4, 3, 3])],
            {"k": bfloat16(4, 4), "m": helper.make_tensor("m", BF16, [4, 1, 1], [1, 2, 3, 4])}, opset), kept)

    # Integers are rounded by each mean; what is not finite proves nothing, but where one of two is.
    chosen = [("c", TensorProto.BOOL, [2, 3, 2, 2]), ("i", TensorProto.INT32, [2, 3, 2, 2]),
              ("j", TensorProto.INT32, [2, 3, 2, 2])]
    means = lambda *rest: model([("Where", "c i j", "w"), *rest, ("Cast", "m", "y", {"to": F})], chosen)
    over = {"axes": [2, 3]}
    scaled = lambda weight: model([("Conv", "x v", "p"), ("Mul", "p two", "y")], [x],
                                  {"v": weight, "two": np.float32([2])})
    plain = lambda weight: model([("Conv", "x v", "y")], [x], {"v": weight})
    infinite, finite = drawn(4, 8, 1, 1), drawn(4, 8, 1, 1)
    infinite[0, 0] = np.inf
    for what, a, b, expected in (
            ("means of integers", means(("ReduceMean", "w", "n", over), ("Add", "n n", "m")),
             means(("Add", "w w", "n"), ("ReduceMean", "n", "m", over)), 6),
            ("infinite weights", scaled(infinite), plain(2 * infinite), 6),
            ("infinite weights of one", scaled(infinite), plain(2 * finite), 1)):
        for path, each in (("a.onnx", a), ("b.onnx", b)):
            onnx.save(each, folder / path)
        code, output, error = run(program, "verify", folder / "a.onnx", folder / "b.onnx")
        require(code == expected, f"{what}: exit code {code} {first_line(output)} {error}")


def check_integers(program, folder):
    """Constants of integers that wrap around, as 8 bits do, are left to whoever runs the model."""
    weight, zero = np.array([[100, 200], [130, 90]], np.uint8).reshape(2, 2, 1, 1), np.uint8(128)
    for what, nodes in (("Sub", [("Sub", ["w", "z"], {}), ("Cast", ["t0"], {"to": TensorProto.FLOAT})]),
                        ("Cast", [("Cast", ["f"], {"to": TensorProto.INT32}),
                                  ("Cast", ["t0"], {"to": TensorProto.FLOAT})])):
        made = [helper.make_node(op, read, [f"t{i}"], **attributes) for i, (op, read, attributes) in enumerate(nodes)]
        made += [helper.make_node("Conv", ["x", "t1"], ["t2"]), helper.make_node("Conv", ["t2", "v"], ["y"])]
        info = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4])
        constants = {"w": weight, "z": zero, "f": np.float32(3e9) * np.ones([2, 2, 1, 1], np.float32),
                     "v": np.arange(1, 5).astype(np.float32).reshape(2, 2, 1, 1)}
        model = helper.make_model(
            helper.make_graph(made, "integers", [info("x")], [info("y")],
                              [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]),
            opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, folder / "in.onnx")
        code, output, error = run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx", "--verify")
        require(code == 0, f"{what}: exit code {code} {first_line(output)} {error}")
        x = {"x": np.random.default_rng(1).standard_normal([1, 2, 4, 4]).astype(np.float32)}
        before, after = (Runner(each)(x)[0] for each in (model, onnx.load(folder / "out.onnx")))
        require(np.abs(before - after).max() <= 1e-6 * np.abs(before).max(), f"{what}: the result is another one")


def check_runner_of_integers(programs, folder):
    """The project's own evaluator wraps integers of up to 32 bits around, constants and others, as numpy does."""
    for dtype, op in itertools.product((np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32),
                                       ("Add", "Sub", "Mul", "Pow", "Div", "Neg")):
        if (op == "Pow" and dtype != np.int32) or (op == "Neg" and np.iinfo(dtype).min == 0):
            continue
        limits, type = np.iinfo(dtype), helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        x = np.array([[limits.max, limits.min], [limits.max // 2, 5]], dtype)
        y = np.array([[limits.max, 3], [3, 7]] if op != "Div" or limits.min == 0 else [[1, -1], [-1, 5]], dtype)
        y = y % 12 if op == "Pow" else y
        with np.errstate(all="ignore"):
            expected = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Pow": np.power,
                        "Div": np.floor_divide, "Neg": lambda x, _: np.negative(x)}[op](x, y).astype(np.float64).T
        for constant in (False, True):
            nodes = [helper.make_node(op, ["x"] if op == "Neg" else ["x", "y"], ["t0"]),
                     helper.make_node("Transpose", ["t0"], ["t1"]),
                     helper.make_node("Cast", ["t1"], ["z"], to=TensorProto.FLOAT)]
            graph = helper.make_graph(
                nodes, "integers", [] if constant else [helper.make_tensor_value_info("x", type, [2, 2])],
                [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 2])],
                [numpy_helper.from_array(value, name) for name, value in (("x", x), ("y", y))[0 if constant else 1:]])
            onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
                      folder / "in.onnx")
            found = evaluated(programs.evaluate, folder, folder / "in.onnx", {} if constant else {"x": x})["z"]
            require(np.array_equal(found, expected), f"{op} of {np.dtype(dtype)}: {found.tolist()}, "
                                                     f"not {expected.tolist()}")


# ---- one case --------------------------------------------------------------------------------------------------------


def contract(program, folder, options):
    """Contracts in.onnx to out.onnx: the model, the result and the report."""
    code, output, error = run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx", "--verify", "--json",
                              *options)
    detail = first_line(error)
    if code in (1, 6) and output:
        verification = json.loads(output)["verification"]["regions"]
        failures = [(each["result"], each["unproved"] or
                     "; ".join(proof["failure"] for proof in each["proofs"] if not proof["holds"]))
                    for each in verification]
        detail = "; ".join(f"{result}: {failure}" for result, failure in failures if failure)
    require(code == 0, f"exit code {code}: {detail}")
    require(error == "", f"something on standard error: {first_line(error)}")
    return onnx.load(folder / "in.onnx"), onnx.load(folder / "out.onnx"), json.loads(output)


def evaluated(program, folder, model, inputs):
    """Outputs by name, as the project's own evaluator computes them in double; None where it lacks an operator."""
    paths = [folder / f"input_{i}.pb" for i in range(len(inputs))]
    for path, value in zip(paths, inputs.values()):
        path.write_bytes(numpy_helper.from_array(np.asarray(value)).SerializeToString())
    code, _, error = run(program, "--wide", model, folder / "outputs.onnx", *paths)
    if code != 0 and "not supported" in error:
        return None
    require(code == 0, f"onnx_evaluate: {first_line(error)}")
    return {each.name: models.array_of(each) for each in onnx.load(folder / "outputs.onnx").graph.initializer}


def evaluate(program, folder, model, free, random):
    """What the project's own evaluator makes of the model in double is what onnxruntime computes."""
    if models.type_of(model) in models.NARROW or any(node.domain for node in model.graph.node):
        return
    inputs = random_inputs(model, 1, None, "none", random)
    found = evaluated(program, folder, folder / "in.onnx", inputs)
    if found is None:
        return
    bounds = bound_of(model, model, "none", inputs, 0, models.type_of(model))
    for i, expected in enumerate(Runner(model)(inputs)):
        name = model.graph.output[i].name
        require(found[name].shape == expected.shape, f"onnx_evaluate: {name} has another shape")
        bound = bounds[i] if bounds else 1e-4 * np.max(np.abs(expected), initial=0)
        finite = np.isfinite(expected)
        difference = np.abs(np.where(finite, found[name], 0) - np.where(finite, expected, 0))
        require(np.array_equal(finite, np.isfinite(found[name])) and np.all(difference <= bound),
                f"onnx_evaluate: {name} differs")


def sizes_of(case):
    if case.sizes is not None:
        return case.sizes
    return [(9, 11, 6), (12, 13, 7), (10, 12, 9)] if case.free != "none" and case.free != "batch" else [None]


def check_case(programs, folder, case):
    random = np.random.default_rng(1)
    onnx.save(case.model(), folder / "in.onnx")
    model, result, report = contract(programs.concertina, folder, case.options)
    found = [node.op_type for node in result.graph.node]
    if case.ops is not None:
        require(found == case.ops, f"{' '.join(found)}, not {' '.join(case.ops)}; left: " +
                "; ".join(f"{each['where']}: {each['reason']}" for each in report["left"])[:300])
    reasons = [each["reason"] for each in report["left"]]
    if case.says is not None:
        require(any(case.says in reason for reason in reasons), f"no reason with \"{case.says}\": {reasons}")
    check_survivors(model, result, report)
    check_model(result, not any(node.domain for node in model.graph.node))
    free, sizes = case.free, sizes_of(case)
    if any(region["exact"] != "everywhere" for region in report["regions"]) and free == "all" and case.sizes is None:
        raise Failure("a region that is not exact everywhere: " + ", ".join(r["exact"] for r in report["regions"]))
    compare(model, result, free, sizes, [1, 3] if free != "none" else [None], len(report["regions"]), random)
    if programs.evaluate and sizes:
        evaluate(programs.evaluate, folder, model, free, random)
    if report["regions"] and not case.options[2:] and case.proofs:
        check_verify(programs.concertina, folder, model, result)


def check_models(programs, folder, paths):
    """Models of others, at their own size: contracted, verified, compared."""
    for path in paths:
        for when in ("smaller", "always"):
            yield f"{path} --when {when}", lambda path=path, when=when: check_fixture(programs, folder, path, when)


def check_fixture(programs, folder, path, when):
    start, model = time.monotonic(), onnx.load(path)
    listed = {tensor.name for tensor in model.graph.initializer} & {value.name for value in model.graph.input}
    constant = ["--initializers-are-constant"] if listed else []
    out = folder / f"{path.stem}.onnx"
    code, output, error = run(programs.concertina, "contract", path, "-o", out, "--verify", "--json", "--when", when,
                              *constant)
    require(code == 0, f"exit code {code}: {first_line(error)} {output[-500:] if code == 1 else ''}")
    seconds = time.monotonic() - start
    result, report = onnx.load(out), json.loads(output)
    check_survivors(model, result, report)
    check_model(result, True)
    code, _, error = run(programs.concertina, "verify", path, out, *constant)
    require(code == 0, f"verify: exit code {code} {first_line(error)}")
    code, output, error = run(programs.concertina, "contract", path, "--verify", "--border", "interior", "--when", when,
                              *constant)
    require(code == 0, f"off the border: exit code {code} {first_line(error)} {output[-500:]}")
    dims = [dim.dim_value for dim in inputs_of(model)[0].type.tensor_type.shape.dim]
    open_ones = any(extent <= 0 for extent in dims[2:])
    sizes = [(64, 96), (96, 64)] if open_ones else [tuple(dims[2:])]
    batches = [1, 2] if dims and dims[0] <= 0 else [dims[0]]
    fraction = compare(model, result, "none", sizes, batches, len(report["regions"]), np.random.default_rng(1))
    changed = perturbed(model, result, 0.1)  # the bounds of wide layers are wide
    if changed is not None:
        onnx.save(changed, out)
        code, _, error = run(programs.concertina, "verify", path, out, *constant)
        require(code == 1, f"verify, where a weight is changed: exit code {code} {first_line(error)}")
    cost = report["multiply_adds"]
    print(f"{path.name} --when {when}: {len(report['regions'])} regions, nodes {report['nodes']['before']} -> "
          f"{report['nodes']['after']}, multiply-adds {cost['after'] / max(cost['before'], 1):.1%}, "
          f"{fraction:.2g} of the bound, {seconds:.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("concertina")
    parser.add_argument("--evaluate", help="the program onnx_evaluate, to be held to onnxruntime too")
    parser.add_argument("--models", metavar="FOLDER", help="contract the models in this folder instead")
    parser.add_argument("--only", help="cases whose names contain one of these")
    parser.add_argument("--keep", metavar="FOLDER", help="where models of cases that fail are kept")
    programs = parser.parse_args()
    programs.concertina = os.path.abspath(programs.concertina)
    wanted = (programs.only or "").split(",")

    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        if programs.models:
            paths = sorted(pathlib.Path(programs.models).rglob("*.onnx"))
            checks = list(check_models(programs, folder, paths))
        else:
            checks = [(case.name, lambda case=case: check_case(programs, folder, case)) for case in CASES.values()]
            checks.append(("maps without constants", lambda: check_without_constants(programs.concertina, folder)))
            checks.append(("channels that are not declared",
                           lambda: check_undeclared_channels(programs.concertina, folder)))
            checks.append(("structure", lambda: check_structure(programs.concertina, folder)))
            checks.append(("what is passed on", lambda: check_passed_on(programs.concertina, folder)))
            checks.append(("limits of types, operators and names",
                           lambda: check_limits(programs.concertina, folder)))
            checks.append(("attributes left out", lambda: check_defaults(programs.concertina, folder)))
            checks.append(("integers that wrap around", lambda: check_integers(programs.concertina, folder)))
            if programs.evaluate:
                checks.append(("integers that wrap around in runs",
                               lambda: check_runner_of_integers(programs, folder)))
            checks.append(("constants that are compared as bytes",
                           lambda: check_constants(programs.concertina, folder)))
            checks.append(("graphs in attributes", lambda: check_graphs(programs.concertina, folder)))
            checks.append(("geometry that a size does not show",
                           lambda: check_geometry(programs.concertina, folder)))
            checks += bad_input.checks(run, require, programs.concertina, folder)
        checks = [(name, check) for name, check in checks if any(part in name for part in wanted)]
        failures = 0
        for name, check in checks:
            for each in folder.iterdir():
                if each.is_file() or each.is_symlink():
                    each.unlink()
            try:
                check()
            except Failure as failure:
                failures += 1
                print(f"FAILED {name}: {failure}", flush=True)
            except Exception as error:  # of onnx, of onnxruntime, of this script
                failures += 1
                print(f"FAILED {name}: {type(error).__name__}: {first_line(str(error))}", flush=True)
            else:
                continue
            if programs.keep:
                for each in folder.glob("*.onnx"):
                    target = pathlib.Path(programs.keep) / f"{name.replace('/', '_')}.{each.name}"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(each.read_bytes())
        print(f"{len(checks)} checks, {failures} failed")
        return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
