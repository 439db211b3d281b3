#!/usr/bin/env python3
"""What optimizers make of ONNX models beside `concertina contract`: size, and onnxruntime's time.

Each model is given to onnxruntime (all optimisations, saved before the layout is chosen), onnxsim, onnxoptimizer,
onnxslim and concertina, those that are installed; of each result it prints nodes, parameters and multiply-adds, and the
processor time of onnxruntime on one thread with all its optimisations. Rounds alternate between the results, so that
all see the same machine; medians are compared. A MobileOne-style network and layers that upsample are made here, with
random weights.

    benchmarks/peers/optimize_onnx.py build/release/examples/concertina [MODEL.onnx ...] [--when always]
SPDX-License-Identifier: Apache-2.0
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

try:
    import numpy as np
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    sys.exit(f"optimize_onnx.py: {error.name} is not installed; nothing compared")


def mobileone(channels=(64, 128), blocks=3, branches=4, size=28):
    """Blocks of a depthwise 3x3 and a pointwise layer, each of several branches with norms, and a skip."""
    generator = np.random.default_rng(1)
    nodes, constants = [], []

    def constant(values):
        name = f"c{len(constants)}"
        constants.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def node(op, inputs, **attributes):
        nodes.append(helper.make_node(op, inputs, [f"t{len(nodes)}"], f"n{len(nodes)}", **attributes))
        return nodes[-1].output[0]

    def norm(x, width):
        statistics_ = [generator.uniform(0.5, 1.5, width), generator.normal(0, 0.1, width),
                       generator.normal(0, 0.1, width), generator.uniform(0.5, 1.5, width)]
        return node("BatchNormalization", [x, *map(constant, statistics_)])

    def conv(x, inside, outside, kernel, stride, groups):
        scale = (inside // groups * kernel * kernel) ** -0.5
        weight = constant(generator.normal(0, scale, (outside, inside // groups, kernel, kernel)))
        return norm(node("Conv", [x, weight], pads=[kernel // 2] * 4, strides=[stride] * 2, group=groups), outside)

    def block(x, inside, outside, kernel, stride, groups):
        parts = [conv(x, inside, outside, kernel, stride, groups) for _ in range(branches)]
        if kernel > 1:
            parts.append(conv(x, inside, outside, 1, stride, groups))
        if inside == outside and stride == 1:
            parts.append(norm(x, inside))
        y = parts[0]
        for part in parts[1:]:
            y = node("Add", [y, part])
        return node("Relu", [y])

    x, width = "x", 32
    for outside in channels:
        for index in range(blocks):
            x = block(x, width, width, 3, 2 if index == 0 else 1, width)
            x = block(x, width, outside, 1, 1, 1)
            width = outside
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32, size, size])]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, channels[-1], size // 4, size // 4])]
    graph = helper.make_graph(nodes, "mobileone", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def upsampling(nearest, channels, size=96):
    """A 3x3 layer to twice the size: after nearest upsampling, or with a pixel shuffle behind it."""
    outside = channels if nearest else 4 * channels
    weight = np.random.default_rng(1).normal(0, 0.1, (outside, channels, 3, 3)).astype(np.float32)
    constants = [numpy_helper.from_array(weight, "weight"),
                 numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")]
    if nearest:
        nodes = [helper.make_node("Resize", ["x", "", "scales"], ["t"], "resize", mode="nearest", nearest_mode="floor",
                                  coordinate_transformation_mode="asymmetric"),
                 helper.make_node("Conv", ["t", "weight"], ["y"], "conv", pads=[1] * 4)]
    else:
        nodes = [helper.make_node("Conv", ["x", "weight"], ["t"], "conv", pads=[1] * 4),
                 helper.make_node("DepthToSpace", ["t"], ["y"], "shuffle", blocksize=2)]
    graph = helper.make_graph(nodes, "upsampling", [helper.make_tensor_value_info("x", 1, [1, channels, size, size])],
                              [helper.make_tensor_value_info("y", 1, [1, channels, 2 * size, 2 * size])], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def by_onnxruntime(model, folder):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "ort.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "ort.onnx")


def by_onnxsim(model, _):
    import onnxsim
    return onnxsim.simplify(model)[0]


def by_onnxoptimizer(model, _):
    import onnxoptimizer
    return onnxoptimizer.optimize(model, onnxoptimizer.get_fuse_and_elimination_passes())


def by_onnxslim(model, _):
    import onnxslim
    return onnxslim.slim(model)


def by_concertina(program, when, model, folder):
    onnx.save(model, folder / "in.onnx")
    subprocess.run([program, "contract", folder / "in.onnx", "-o", folder / "out.onnx", "--verify",
                    "--initializers-are-constant", "--when", when], check=True, stdout=subprocess.DEVNULL)
    return onnx.load(folder / "out.onnx")


def costs(model):
    """Elements of float constants, and multiply-adds of convolutions and linear layers, of whatever domain."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    parameters = sum(int(np.prod(tensor.dims)) for tensor in constants.values()
                     if tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE))
    # onnxruntime infers shapes of its own operators too.
    counted = onnx.ModelProto()
    counted.CopyFrom(model)
    layers = [node for node in counted.graph.node
              if node.op_type in ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")]
    seen = {value.name for value in counted.graph.output} | set(constants)
    for node in layers:
        for name in (node.input[0], node.input[1], node.output[0]):
            if name not in seen:
                seen.add(name)
                counted.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    timed = Timed(counted)
    names = [value.name for value in timed.session.get_outputs()]
    shapes = dict(zip(names, (value.shape for value in timed.session.run(None, timed.inputs))))
    shapes |= {name: value.shape for name, value in timed.inputs.items()}
    shapes |= {name: tensor.dims for name, tensor in constants.items()}
    multiply_adds = 0
    for node in layers:
        weight = shapes[node.input[1]]
        transposed = node.op_type.endswith("Gemm") and any(a.name == "transB" and a.i for a in node.attribute)
        if node.op_type == "ConvTranspose":
            multiply_adds += int(np.prod(shapes[node.input[0]])) * int(np.prod(weight[1:]))
        elif node.op_type.endswith("Conv"):
            multiply_adds += int(np.prod(shapes[node.output[0]])) * int(np.prod(weight[1:]))
        else:
            multiply_adds += int(np.prod(shapes[node.output[0]])) * weight[1 if transposed else 0]
    return parameters, multiply_adds


class Timed:
    """A model on one thread, with random input."""

    def __init__(self, model):
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        generator = np.random.default_rng(0)
        self.inputs = {value.name: generator.standard_normal(
            [extent if isinstance(extent, int) else 1 if axis == 0 else 224 for axis, extent in enumerate(value.shape)]
        ).astype(np.float32) for value in self.session.get_inputs()}
        self.times = []

    def measure(self, seconds=0.3):
        end = time.process_time() + seconds
        while time.process_time() < end:
            start = time.process_time()
            self.session.run(None, self.inputs)
            self.times.append(time.process_time() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("models", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--when", default="smaller", help="as concertina contract")
    arguments = parser.parse_args()
    ort.set_default_logger_severity(4)
    inputs = [(Path(path).name, onnx.load(path)) for path in arguments.models]
    inputs.append(("MobileOne-style, made here", mobileone()))
    for channels in (16, 64):
        inputs.append((f"3x3 of {channels} channels and a pixel shuffle", upsampling(False, channels)))
        inputs.append((f"nearest upsampling and a 3x3 of {channels} channels", upsampling(True, channels)))
    tools = {"onnxruntime": by_onnxruntime, "onnxsim": by_onnxsim, "onnxoptimizer": by_onnxoptimizer,
             "onnxslim": by_onnxslim,
             "concertina": lambda model, folder: by_concertina(arguments.program, arguments.when, model, folder)}
    for name, model in inputs:
        print(f"{name}\n  {'':14}{'nodes':>6}{'parameters':>12}{'multiply-adds':>15}{'ms':>9}{'of input':>10}")
        with tempfile.TemporaryDirectory() as temporary:
            results = {"input": model}
            for tool, optimize in tools.items():
                folder = Path(temporary) / tool
                folder.mkdir()
                copy = onnx.ModelProto()
                copy.CopyFrom(model)
                try:
                    results[tool] = optimize(copy, folder)
                except ImportError:
                    print(f"  {tool:14}not installed")
                except Exception as error:  # whatever a tool may throw
                    print(f"  {tool:14}{type(error).__name__}: {str(error).splitlines()[0][:80]}")
            timed = {tool: Timed(result) for tool, result in results.items()}
            for _ in range(arguments.rounds):
                for each in timed.values():
                    each.measure()
            reference = statistics.median(timed["input"].times)
            for tool, result in results.items():
                parameters, multiply_adds = costs(result)
                median = statistics.median(timed[tool].times)
                print(f"  {tool:14}{len(result.graph.node):6}{parameters:12,}{multiply_adds:15,}{1e3 * median:9.3f}"
                      f"{median / reference:10.2f}")


if __name__ == "__main__":
    main()
