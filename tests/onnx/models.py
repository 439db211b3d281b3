# SPDX-License-Identifier: Apache-2.0
"""Small ONNX models with random weights, and how far rounding may move what one computes."""

import zlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LATEST = onnx.defs.onnx_opset_version()
IR_OF_OPSET = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9}


class Builder:
    """A graph under construction. Nodes are n0, n1, ..., tensors t0, t1, ..., constants c0, c1, ..."""

    def __init__(self, seed, opset=17, ir=None, type=TensorProto.FLOAT):
        self.random = np.random.default_rng(zlib.crc32(seed.encode()))
        self.opset, self.type = opset, type
        self.ir = ir or IR_OF_OPSET.get(opset, 10 if opset < LATEST else onnx.IR_VERSION)
        self.nodes, self.inputs, self.outputs, self.initializers, self.values = [], [], [], [], []
        self.functions, self.domains = [], {}
        self.metadata = {"author": "a test", "purpose": "survival"}
        self.inputs_of_initializers = self.ir < 4

    def input(self, name, dims, type=None):
        self.inputs.append(helper.make_tensor_value_info(name, type or self.type, dims))
        return name

    def constant(self, values, type=None, name=None, node=False):
        """An initializer, or a Constant node's output."""
        values = np.asarray(values)
        if type is None:
            type = TensorProto.INT64 if values.dtype.kind == "i" else self.type
        name = name or f"c{len(self.initializers)}"
        tensor = tensor_of(name, values, type)
        if node:
            tensor.ClearField("name")
            return self.add("Constant", value=tensor)
        self.initializers.append(tensor)
        return name

    def random_values(self, dims, low=None):
        """Of magnitude 1 / sqrt(fan-in); all at least `low` where that is given."""
        fan_in = max(1, int(np.prod(dims[1:])))
        values = self.random.standard_normal(dims) / np.sqrt(fan_in)
        return values if low is None else low + np.abs(values)

    def weight(self, *dims, node=False, low=None):
        return self.constant(self.random_values(dims, low), node=node)

    def add(self, op, *inputs, outputs=1, domain="", name=None, made=None, **attributes):
        """Appends a node; the name of its output, or a list of them."""
        made = made or [f"t{len(self.nodes)}" if i == 0 else f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        made = [made] if isinstance(made, str) else made
        node = helper.make_node(op, inputs, made, name=f"n{len(self.nodes)}" if name is None else name,
                                domain=domain, **attributes)
        if self.ir >= 10:
            node.metadata_props.add(key="index", value=str(len(self.nodes)))
        self.nodes.append(node)
        return made[0] if len(made) == 1 else made

    # ---- layers

    def conv(self, x, *dims, bias=True, op="Conv", weight=None, node=False, **attributes):
        """dims: those of the weight. strides, dilations, pads may be one number for all axes."""
        rank = len(dims) - 2
        for name, count in (("strides", rank), ("dilations", rank), ("pads", 2 * rank)):
            if isinstance(attributes.get(name), int):
                attributes[name] = [attributes[name]] * count
        inputs = [x, weight or self.weight(*dims, node=node)]
        if bias:
            channels = dims[0] if op == "Conv" else dims[1] * attributes.get("group", 1)
            inputs.append(self.constant(self.random.standard_normal(channels), node=node))
        return self.add(op, *inputs, **attributes)

    def deconv(self, x, *dims, **attributes):
        return self.conv(x, *dims, op="ConvTranspose", **attributes)

    def norm(self, x, channels, **attributes):
        statistics = [self.weight(channels, low=0.5), self.constant(self.random.standard_normal(channels)),
                      self.constant(self.random.standard_normal(channels)), self.weight(channels, low=0.5)]
        return self.add("BatchNormalization", x, *statistics, **attributes)

    def pad(self, x, pads, value=None, mode=None):
        more = {} if mode is None else {"mode": mode}
        if self.opset < 11:
            return self.add("Pad", x, pads=pads, **more, **({} if value is None else {"value": value}))
        inputs = [x, self.constant(pads)]
        if value is not None:
            inputs.append(self.constant(np.array(value, np.float32)))
        return self.add("Pad", *inputs, **more)

    def reshape(self, x, *shape):
        return self.add("Reshape", x, self.constant(np.array(shape)))

    def mean(self, x, axes, keepdims=1):
        if self.opset < 18:
            return self.add("ReduceMean", x, axes=axes, keepdims=keepdims)
        return self.add("ReduceMean", x, self.constant(np.array(axes)), keepdims=keepdims)

    # ---- the model

    def output(self, name, dims=None, type=None):
        self.outputs.append(helper.make_tensor_value_info(name, type or self.type, dims))

    def model(self):
        inputs = list(self.inputs)
        if self.inputs_of_initializers:
            inputs += [helper.make_tensor_value_info(each.name, each.data_type, each.dims)
                       for each in self.initializers]
        graph = helper.make_graph(self.nodes, "graph", inputs, self.outputs, self.initializers,
                                  value_info=self.values)
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, version) for domain, version in self.domains.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=self.ir, functions=self.functions)
        helper.set_model_props(model, self.metadata)
        model.doc_string = "documentation"
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=not self.domains)
        shapes = {each.name: each for each in inferred.graph.output}
        for each in model.graph.output:
            if not each.type.tensor_type.HasField("shape"):
                each.CopyFrom(shapes[each.name])
        onnx.checker.check_model(model, full_check=not self.domains)
        return model


# ---- types -----------------------------------------------------------------------------------------------------------


def tensor_of(name, values, type):
    """A tensor of any float type, or of integers or booleans as they are."""
    values = np.asarray(values)
    if type in (TensorProto.INT64, TensorProto.INT32, TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL,
                TensorProto.FLOAT, TensorProto.DOUBLE):
        return numpy_helper.from_array(np.array(values, helper.tensor_dtype_to_np_dtype(type), order="C"), name)
    if type == TensorProto.FLOAT16:
        return helper.make_tensor(name, type, values.shape, values.astype(np.float16).tobytes(), raw=True)
    if type != TensorProto.BFLOAT16:
        raise ValueError(f"tensors of type {type}")
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return helper.make_tensor(name, type, values.shape, rounded.tobytes(), raw=True)


def array_of(tensor):
    """Its elements; 16-bit floats as float32."""
    if tensor.data_type == TensorProto.BFLOAT16:
        bits = np.frombuffer(tensor.raw_data, np.uint16) if tensor.raw_data else np.array(tensor.int32_data, np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32).reshape(tensor.dims)
    values = numpy_helper.to_array(tensor)
    return values.astype(np.float32) if tensor.data_type == TensorProto.FLOAT16 else values


NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE) + NARROW


def type_of(model):
    """Of the weights: the first float type of an initializer, a Constant or an input."""
    tensors = list(model.graph.initializer) + constants_of(model.graph)
    types = [each.data_type for each in tensors]
    types += [each.type.tensor_type.elem_type for each in model.graph.input]
    return next((type for type in types if type in FLOATS), TensorProto.FLOAT)


def constants_of(graph):
    """The tensors of its Constant nodes."""
    return [attribute.t for node in graph.node if node.op_type == "Constant"
            for attribute in node.attribute if attribute.name == "value"]


def widened(model):
    """The same with 16-bit floats as float32, which every runtime has kernels for."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for info in [*result.graph.input, *result.graph.output, *result.graph.value_info]:
        if info.type.tensor_type.elem_type in NARROW:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in [*result.graph.initializer, *constants_of(result.graph)]:
        if tensor.data_type in NARROW:
            tensor.CopyFrom(numpy_helper.from_array(array_of(tensor), tensor.name))
    for node in result.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in NARROW:
                attribute.i = TensorProto.FLOAT
    return result


# ---- the bound -------------------------------------------------------------------------------------------------------

# |f(x) - f(y)| <= |x - y| and |f(x)| <= |x|, element by element or in the largest.
CONTRACTIONS = {"Relu", "Identity", "Dropout", "Neg", "Clip", "LeakyRelu", "Tanh", "Abs"}
SAME_OF_ABSOLUTE = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sum", "Mul", "AveragePool", "MaxPool",
                    "GlobalAveragePool", "ReduceMean", "Pad", "Slice", "Split", "Gather", "Concat", "Flatten",
                    "Reshape", "Transpose", "Constant", "Shape", "DepthToSpace", "SpaceToDepth", "Resize", "Upsample",
                    "Squeeze", "Unsqueeze", "Cast", "ConstantOfShape"}


def absolute(model):
    """The model with the absolute values of its weights, without activations: for absolute inputs it gives a bound
    of every output, and of what relative errors of the inputs and in between do to it. None where that is not known."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    tensors = {each.name: each for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    tensors[node.output[0]] = attribute.t

    def change(name, f):
        tensor = tensors[name]
        changed = numpy_helper.from_array(f(array_of(tensor)).astype(array_of(tensor).dtype), tensor.name)
        if tensor.name:
            graph.initializer.add().CopyFrom(changed)
            graph.initializer[-1].name = name + ".abs"
        else:
            new = graph.node.add()
            new.CopyFrom(helper.make_node("Constant", [], [name + ".abs"], value=changed))
        return name + ".abs"

    for node in list(graph.node):
        floats = [name for name in node.input if name in tensors and tensors[name].data_type in FLOATS]
        if node.op_type == "Constant":
            if node.attribute[0].name in ("value_float", "value_floats"):
                node.attribute[0].f = abs(node.attribute[0].f)
                node.attribute[0].floats[:] = [abs(each) for each in node.attribute[0].floats]
        elif node.op_type in CONTRACTIONS:
            if len(node.output) > 1:
                return None
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output))
        elif node.op_type == "BatchNormalization" and len(node.output) == 1:
            if any(name not in tensors for name in node.input[1:]):
                return None
            eps = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            scale, bias, mean, variance = (array_of(tensors[name]) for name in node.input[1:])
            factor = np.abs(scale) / np.sqrt(variance + eps)
            names = [change(node.input[1], lambda _: factor),
                     change(node.input[2], lambda _: np.abs(bias) + np.abs(mean) * factor),
                     change(node.input[3], np.zeros_like),
                     change(node.input[4], lambda values: np.ones_like(values) - eps)]
            node.input[1:] = names
        elif node.op_type == "Sub" or (node.op_type == "Div" and node.input[1] in floats) or \
                node.op_type in SAME_OF_ABSOLUTE:
            for i, name in enumerate(node.input):
                if name in floats:
                    node.input[i] = change(name, np.abs)
            if node.op_type == "Sub":
                node.op_type = "Add"
            for attribute in node.attribute:
                if attribute.name in ("alpha", "beta"):
                    attribute.f = abs(attribute.f)
        else:
            return None
    # New constants first.
    nodes = sorted(graph.node, key=lambda node: node.op_type != "Constant")
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def roundings(model):
    """How many an output has behind it, at most, along its longest chain: nodes in all, with their fan-in."""
    tensors = {each.name: list(each.dims) for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            tensors[node.output[0]] = list(node.attribute[0].t.dims)
    shapes = {each.name: [d.dim_value for d in each.type.tensor_type.shape.dim]
              for each in onnx.shape_inference.infer_shapes(model).graph.value_info}
    shapes |= {each.name: [d.dim_value for d in each.type.tensor_type.shape.dim] for each in model.graph.input}
    count = 0
    for node in model.graph.node:
        weight = tensors.get(node.input[1], []) if len(node.input) > 1 else []
        if node.op_type == "Conv":
            count += int(np.prod(weight[1:])) + 2
        elif node.op_type == "ConvTranspose":
            count += weight[0] * int(np.prod(weight[2:])) + 2
        elif node.op_type in ("Gemm", "MatMul"):
            count += max(weight, default=1) + 4
        elif node.op_type in ("AveragePool", "GlobalAveragePool", "ReduceMean"):
            count += int(np.prod([max(d, 1) for d in shapes.get(node.input[0], [])])) + 2
        elif node.op_type == "BatchNormalization":
            count += 8
        else:
            count += len(node.input)
    return count
