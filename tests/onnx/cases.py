# SPDX-License-Identifier: Apache-2.0
"""The models that are contracted, one function each, and the operators that remain, in order."""

import dataclasses
import typing

import numpy as np
import onnx
from models import LATEST, Builder, tensor_of
from onnx import TensorProto, helper

CASES = {}


@dataclasses.dataclass
class Case:
    name: str
    ops: list
    make: typing.Callable
    options: list
    dims: list = (1, 8, 9, 11)  # of the input x; a name is not known
    free: str = "all"  # axes of the input that the model does not depend on: all, batch, none
    says: str = None  # a reason why something is left
    builder: dict = dataclasses.field(default_factory=dict)
    sizes: list = None  # spatial ones to run at
    proofs: bool = True  # whether a perturbed result is to be found

    def model(self):
        g = Builder(self.name, **self.builder)
        x = g.input("x", list(self.dims)) if self.dims else None
        y = self.make(g, x)
        for name in [y] if isinstance(y, str) else y or []:
            g.output(name)
        return g.model()


def case(ops, *options, name=None, when="always", dims=None, free=None, says=None, sizes=None, proofs=True, **builder):
    """Registers a function from Builder and input to output; options are those of `concertina contract`."""
    def register(make):
        options_of = ([] if when is None else ["--when", when]) + list(options)
        key = name or make.__name__
        assert key not in CASES, key
        more = {"dims": dims} if dims is not None else {}
        if free:
            more["free"] = free
        CASES[key] = Case(key, ops.split(), make, options_of, says=says, builder=builder, sizes=sizes, proofs=proofs,
                          **more)
        return make
    return register


def dims_of(rank, channels=8):
    return [1, channels] + [9, 11, 6][:rank]


# ---- one pattern each, 2-d -------------------------------------------------------------------------------------------


@case("Add Conv Relu")
def bn_conv_padded(g, x):
    return g.add("Relu", g.conv(g.norm(x, 8), 16, 8, 3, 3, pads=1))


@case("Conv Relu")
def ck_chain(g, x):
    return g.add("Relu", g.conv(g.conv(x, 32, 8, 3, 3, pads=2), 16, 32, 3, 3))


@case("Conv Relu")
def cl_chain(g, x):
    y = g.conv(g.conv(x, 32, 8, 1, 1, pads=1), 32, 32, 3, 3)
    return g.add("Relu", g.conv(y, 16, 32, 1, 1))


@case("Conv Relu")
def conv_add(g, x):
    return g.add("Relu", g.add("Add", g.conv(x, 16, 8, 3, 3, pads=1), g.weight(1, 16, 1, 1)))


@case("Conv Relu")
def conv_avgpool(g, x):
    return g.add("Relu", g.add("AveragePool", g.conv(x, 16, 8, 1, 1), kernel_shape=[3, 3]))


@case("Conv Relu")
def conv_bn(g, x):
    return g.add("Relu", g.norm(g.conv(x, 16, 8, 3, 3, pads=1, bias=False), 16))


@case("Conv Relu")
def conv_mul(g, x):
    return g.add("Relu", g.add("Mul", g.conv(x, 16, 8, 3, 3, pads=1), g.weight(1, 16, 1, 1)))


@case("ConvTranspose Relu")
def deconv_bn(g, x):
    return g.add("Relu", g.norm(g.deconv(x, 8, 16, 4, 4, strides=2, pads=1), 16))


@case("ConvTranspose Relu")
def deconv_pw(g, x):
    return g.add("Relu", g.conv(g.deconv(x, 8, 16, 4, 4, strides=2, pads=1), 8, 16, 1, 1))


@case("Conv Relu")
def dw_then_pw(g, x):
    return g.add("Relu", g.conv(g.conv(x, 8, 1, 3, 3, group=8, pads=1), 16, 8, 1, 1))


@case("Gemm Relu", dims=[4, 8])
def gemm_bn(g, x):
    return g.add("Relu", g.norm(g.add("Gemm", x, g.weight(8, 16), g.weight(16)), 16))


@case("MatMul Add Relu", dims=[2, 5, 8], free="batch")
def linear_linear(g, x):
    y = g.add("Add", g.add("MatMul", x, g.weight(8, 32)), g.weight(32))
    return g.add("Relu", g.add("Add", g.add("MatMul", y, g.weight(32, 16)), g.weight(16)))


@case("MatMul Relu", dims=[2, 5, 8], free="batch")
def matmul_matmul(g, x):
    return g.add("Relu", g.add("MatMul", g.add("MatMul", x, g.weight(8, 32)), g.weight(32, 16)))


@case("Conv Relu")
def pad_conv(g, x):
    return g.add("Relu", g.conv(g.pad(x, [0, 0, 1, 1, 0, 0, 1, 1]), 16, 8, 3, 3))


@case("Conv Relu")
def parallel_add(g, x):
    return g.add("Relu", g.add("Add", g.conv(x, 8, 8, 3, 3, pads=1), g.conv(x, 8, 8, 1, 1)))


@case("Conv Relu")
def parallel_add_same_kernel(g, x):
    return g.add("Relu", g.add("Add", g.conv(x, 8, 8, 3, 3, pads=1), g.conv(x, 8, 8, 3, 3, pads=1)))


@case("Conv Relu")
def parallel_concat(g, x):
    return g.add("Relu", g.add("Concat", g.conv(x, 8, 8, 3, 3, pads=1), g.conv(x, 16, 8, 3, 3, pads=1), axis=1))


@case("Conv Relu")
def pw_then_3x3_padded_nobias(g, x):
    return g.add("Relu", g.conv(g.conv(x, 32, 8, 1, 1, bias=False), 16, 32, 3, 3, pads=1, bias=False))


@case("Conv Relu")
def pw_then_pw(g, x):
    return g.add("Relu", g.conv(g.conv(x, 32, 8, 1, 1), 16, 32, 1, 1))


def repvgg_block(g, x, channels=8, rank=2, strides=1, out=None):
    out = out or channels
    branches = [g.norm(g.conv(x, out, channels, *[3] * rank, pads=1, bias=False, strides=strides), out),
                g.norm(g.conv(x, out, channels, *[1] * rank, bias=False, strides=strides), out)]
    y = g.add("Add", *branches)
    return g.add("Add", y, g.norm(x, out)) if strides == 1 and out == channels else y


@case("Conv Relu")
def repvgg(g, x):
    return g.add("Relu", repvgg_block(g, x))


@case("Conv Relu")
def skip(g, x):
    return g.add("Relu", g.add("Add", g.conv(x, 8, 8, 3, 3, pads=1), x))


# ---- of ranks 1 to 3 -------------------------------------------------------------------------------------------------

for rank in (1, 2, 3):
    def of_rank(ops="Conv Relu", rank=rank, **more):
        def register(make):
            named = lambda g, x: g.add("Relu", make(g, x, rank))
            case(ops, name=f"{make.__name__}_{rank}d", dims=more.pop("dims", dims_of(rank)), **more)(named)
        return register

    @of_rank()
    def chain(g, x, rank):
        y = g.conv(g.conv(x, 12, 8, *[1] * rank, pads=1), 12, 12, *[3] * rank)
        return g.conv(y, 6, 12, *[1] * rank)

    @of_rank()
    def strided(g, x, rank):
        return g.norm(g.conv(g.conv(x, 12, 8, *[3] * rank, pads=1, strides=2), 6, 12, *[1] * rank), 6)

    @of_rank()
    def twice_strided(g, x, rank):
        y = g.conv(x, 6, 8, *[1] * rank, strides=2, bias=False)
        return g.conv(y, 5, 6, *[2] * rank, strides=2)

    @of_rank()
    def dilated(g, x, rank):
        return g.conv(g.conv(x, 6, 8, *[3] * rank, dilations=2, pads=2), 5, 6, *[1] * rank)

    @of_rank()
    def dilated_twice(g, x, rank):
        return g.conv(g.conv(x, 6, 8, *[2] * rank, dilations=2, pads=3), 5, 6, *[2] * rank, dilations=2)

    @of_rank()
    def grouped(g, x, rank):
        y = g.conv(g.conv(x, 12, 4, *[1] * rank, group=2), 6, 6, *[3] * rank, group=2)
        return g.norm(y, 6)

    @of_rank()
    def groups_within_groups(g, x, rank):
        return g.conv(g.conv(x, 8, 2, *[3] * rank, group=4, pads=1, bias=False), 6, 4, *[1] * rank, group=2)

    @of_rank()
    def depthwise_with_norms(g, x, rank):
        y = g.add("Add", g.norm(g.conv(x, 8, 1, *[3] * rank, group=8, pads=1, bias=False), 8),
                  g.norm(g.conv(x, 8, 1, *[1] * rank, group=8, bias=False), 8))
        return g.add("Add", y, g.norm(x, 8))

    @of_rank()
    def asymmetric(g, x, rank):
        y = g.conv(x, 6, 8, *[2] * rank, pads=[1, 0, 2][:rank] + [2, 3, 0][:rank])
        return g.conv(y, 5, 6, *[2, 1, 2][:rank])

    @of_rank()
    def asymmetric_branches(g, x, rank):
        return g.add("Add", g.conv(x, 5, 8, *[3, 1, 3][:rank], pads=[1, 0, 1][:rank] * 2),
                     g.conv(x, 5, 8, *[1, 3, 3][:rank], pads=[0, 1, 1][:rank] * 2))

    @of_rank()
    def repvgg_of_rank(g, x, rank):
        return repvgg_block(g, x, rank=rank)

    @of_rank()
    def repvgg_with_stride(g, x, rank):
        return repvgg_block(g, x, rank=rank, strides=2, out=6)

    @of_rank(free="batch")
    def global_pool(g, x, rank):
        return g.add("GlobalAveragePool", g.conv(x, 6, 8, *[1] * rank))

    @of_rank("Conv Conv Relu", says="zero")
    def biased_before_padded(g, x, rank):
        return g.conv(g.conv(x, 6, 8, *[1] * rank), 6, 6, *[3] * rank, pads=1)

    @of_rank("ConvTranspose Relu")
    def deconv_between(g, x, rank):
        y = g.conv(x, 6, 8, *[1] * rank, bias=False)
        return g.norm(g.conv(g.deconv(y, 6, 5, *[2] * rank, strides=2), 4, 5, *[1] * rank), 4)

    @of_rank()
    def scales(g, x, rank):
        y = g.conv(x, 6, 8, *[3] * rank)
        y = g.add("Mul", y, g.weight(6, *[1] * rank))
        y = g.add("Add", g.weight(1, 6, *[1] * rank), y)
        return g.add("Div", g.add("Sub", y, g.weight(6, *[1] * rank)), g.weight(6, *[1] * rank, low=0.5))

# ---- types that the model does not state -----------------------------------------------------------------------------


@case("Where Conv Relu")
def after_where(g, x):
    positive = g.add("Greater", x, g.constant(np.array(0, np.float32)))
    y = g.add("Where", positive, x, g.constant(np.array(-1, np.float32)))
    return g.add("Relu", g.add("Add", g.norm(g.conv(y, 6, 8, 3, 3), 6), g.weight(6, 1, 1)))


CASES["after_where"].ops = "Greater Where Conv Relu".split()


@case("QuantizeLinear DequantizeLinear Conv Relu")
def after_dequantize(g, x):
    y = g.add("QuantizeLinear", x, *quantisation(g))
    y = g.add("DequantizeLinear", y, *quantisation(g))
    return g.add("Relu", g.add("Add", g.norm(g.conv(y, 6, 8, 3, 3), 6), g.weight(6, 1, 1)))


@case("DequantizeLinear Conv Relu", type=TensorProto.UINT8)
def after_dequantize_of_an_input(g, x):
    g.type = TensorProto.FLOAT
    y = g.add("DequantizeLinear", x, *quantisation(g))
    y = g.add("Relu", g.add("Add", g.norm(g.conv(y, 6, 8, 3, 3), 6), g.weight(6, 1, 1)))
    return y


@case("If Conv Relu")
def after_if(g, x):
    y = branches(g, condition(g), ([helper.make_node("Neg", [x], ["a"])], [], "a"),
                 ([helper.make_node("Abs", [x], ["b"])], [], "b"))
    return g.add("Relu", g.add("Add", g.norm(g.conv(y, 6, 8, 3, 3), 6), g.weight(6, 1, 1)))


@case("Shape Cast Mul Conv Relu")
def after_cast_of_shape(g, x):
    y = g.add("Mul", x, g.add("Cast", g.add("Shape", x, start=1, end=2), to=TensorProto.FLOAT))
    return g.add("Relu", g.add("Add", g.norm(g.conv(y, 6, 8, 3, 3), 6), g.weight(6, 1, 1)))


@case("Cast Conv Conv Relu", free="all")
def double_after_cast(g, x):
    g.type = TensorProto.DOUBLE
    y = g.conv(g.add("Cast", x, to=g.type), 6, 8, 3, 3)
    return g.add("Relu", g.add("Add", g.add("Mul", y, g.weight(6, 1, 1)), g.add("Neg", y)))


CASES["double_after_cast"].ops = "Cast Conv Relu".split()

# ---- auto_pad --------------------------------------------------------------------------------------------------------

for auto, kernel in (("SAME_UPPER", 3), ("SAME_UPPER", 2), ("SAME_LOWER", 2), ("SAME_LOWER", 4), ("VALID", 3)):
    @case("Conv Relu", name=f"auto_pad_{auto.lower()}_{kernel}")
    def _(g, x, auto=auto, kernel=kernel):
        return g.add("Relu", g.norm(g.conv(x, 6, 8, kernel, kernel, auto_pad=auto), 6))

    if auto != "VALID":
        for size in (9, 10):
            @case("Conv Relu", name=f"auto_pad_{auto.lower()}_{kernel}_strided_{size}", dims=[1, 8, size, 12],
                  free="batch")
            def _(g, x, auto=auto, kernel=kernel):
                return g.add("Relu", g.norm(g.conv(x, 6, 8, kernel, kernel, auto_pad=auto, strides=2), 6))

        @case("Conv BatchNormalization Relu", name=f"auto_pad_{auto.lower()}_{kernel}_strided_dynamic",
              dims=["n", 8, "h", "w"], says="auto_pad")
        def _(g, x, auto=auto, kernel=kernel):
            return g.add("Relu", g.norm(g.conv(x, 6, 8, kernel, kernel, auto_pad=auto, strides=2), 6))


@case("Conv Relu", sizes=[])  # onnxruntime refuses dilations there
def auto_pad_same_dilated(g, x):
    return g.add("Relu", g.norm(g.conv(x, 6, 8, 3, 2, auto_pad="SAME_LOWER", dilations=2), 6))


@case("Conv Relu")
def auto_pad_notset_with_pads(g, x):
    return g.add("Relu", g.norm(g.conv(x, 6, 8, 3, 3, auto_pad="NOTSET", pads=[0, 1, 2, 1]), 6))


# ---- arithmetic ------------------------------------------------------------------------------------------------------

for name, shape in (("scalar", []), ("one", [1]), ("ones", [1, 1, 1, 1]), ("c11", [6, 1, 1]), ("1c11", [1, 6, 1, 1])):
    for op in ("Add", "Sub", "Mul", "Div"):
        for side in ("right", "left"):
            if op == "Div" and side == "left":
                continue

            @case("Conv Relu", name=f"{op.lower()}_{name}_{side}")
            def _(g, x, op=op, shape=shape, side=side):
                y, c = g.conv(x, 6, 8, 3, 3, pads=1), g.weight(*shape, low=0.5)
                return g.add("Relu", g.add(op, *((y, c) if side == "right" else (c, y))))


@case("Conv Div Relu", says="divides by its input")
def div_left(g, x):
    return g.add("Relu", g.add("Div", g.weight(6, 1, 1), g.conv(x, 6, 8, 3, 3)))


@case("Conv Relu")
def neg(g, x):
    return g.add("Relu", g.add("Neg", g.conv(x, 6, 8, 3, 3, pads=1)))


@case("Conv Relu")
def sum_of_three(g, x):
    return g.add("Relu", g.add("Sum", g.conv(x, 8, 8, 3, 3, pads=1), x, g.conv(x, 8, 8, 1, 1)))


@case("Conv Relu")
def sum_of_one(g, x):
    return g.add("Relu", g.add("Sum", g.conv(x, 8, 8, 3, 3, pads=1)))


@case("Conv Relu")
def difference(g, x):
    return g.add("Relu", g.add("Sub", x, g.conv(x, 8, 8, 3, 3, pads=1)))


@case("Conv Relu")
def sum_with_itself(g, x):
    y = g.conv(x, 8, 8, 3, 3, pads=1)
    return g.add("Relu", g.add("Add", y, y))


@case("Conv Add Relu", free="batch", says="its constant is not one number a channel")
def add_per_column(g, x):
    return g.add("Relu", g.add("Add", g.conv(x, 8, 8, 3, 3, pads=1), g.weight(9, 1)))


@case("Conv Mul Relu", dims=[1, 8, 9, 8], free="batch")
def mul_per_row_of_as_many_as_channels(g, x):
    return g.add("Relu", g.add("Mul", g.conv(x, 8, 8, 3, 3, pads=1), g.weight(8)))


@case("Conv Mul Relu", says="")
def mul_broadcasts_one_channel(g, x):
    return g.add("Relu", g.add("Mul", g.conv(x, 1, 8, 3, 3, pads=1), g.weight(4, 1, 1)))


@case("Mul Conv Relu", dims=[1, 1, 9, 11], says="")
def mul_broadcasts_an_input(g, x):
    return g.add("Relu", g.conv(g.add("Mul", x, g.weight(4, 1, 1)), 6, 4, 3, 3))


@case("Conv Mul Relu", says="both operands vary")
def mul_by_itself(g, x):
    y = g.conv(x, 8, 8, 3, 3)
    return g.add("Relu", g.add("Mul", y, y))


@case("Conv Relu")
def mul_by_zero(g, x):
    return g.add("Relu", g.add("Mul", g.conv(x, 8, 8, 3, 3), g.constant(np.zeros((8, 1, 1), np.float32))))


@case("Conv Div Relu", says="divides by zero", sizes=[(9, 11)])
def div_by_zero(g, x):
    c = np.ones((8, 1, 1), np.float32)
    c[3] = 0
    return g.add("Relu", g.add("Div", g.conv(x, 8, 8, 3, 3), g.constant(c)))


@case("Conv Relu")
def scale_before_unpadded(g, x):
    return g.add("Relu", g.conv(g.add("Add", g.add("Mul", x, g.weight(8, 1, 1)), g.weight(8, 1, 1)), 6, 8, 3, 3))


@case("Conv Relu")
def scale_before_padded(g, x):
    return g.add("Relu", g.conv(g.add("Mul", x, g.weight(8, 1, 1)), 6, 8, 3, 3, pads=1))


@case("Add Conv Relu", says="")
def shift_before_padded(g, x):
    return g.add("Relu", g.conv(g.add("Add", x, g.weight(8, 1, 1)), 6, 8, 3, 3, pads=1))


@case("Add Conv Relu")
def shift_before_padded_twice(g, x):
    y = g.conv(g.add("Add", g.add("Mul", x, g.weight(8, 1, 1)), g.weight(8, 1, 1)), 6, 8, 3, 3, pads=1)
    return g.add("Relu", g.norm(y, 6))


@case("Conv Relu")
def normalized_input(g, x):
    y = g.add("Div", g.add("Sub", x, g.weight(1, 8, 1, 1)), g.weight(1, 8, 1, 1, low=0.5))
    return g.add("Relu", g.conv(y, 6, 8, 3, 3, strides=2))


@case("Conv Add Relu", dims=["n", 8, "h", "w"], says="broadcast")
def sum_that_broadcasts(g, x):
    y = g.conv(x, 8, 8, 3, 3, pads=1)
    return g.add("Relu", g.add("Add", y, g.add("GlobalAveragePool", y)))


CASES["sum_that_broadcasts"].ops = "Conv GlobalAveragePool Add Relu".split()

# ---- Pad -------------------------------------------------------------------------------------------------------------

for opset in (9, 10, 11, 13, 18):
    @case("Conv Relu", name=f"pad_opset_{opset}", opset=opset)
    def _(g, x):
        return g.add("Relu", g.conv(g.pad(x, [0, 0, 1, 0, 0, 0, 2, 1], value=0.0), 6, 8, 3, 3, pads=1))

    @case("Pad Conv Relu", name=f"crop_conv_bn_opset_{opset}", opset=opset)
    def _(g, x):
        return g.add("Relu", g.norm(g.conv(g.pad(x, [0, 0, -1, 0, 0, 0, -1, -2]), 6, 8, 3, 3), 6))

    @case("Pad Conv Relu", name=f"pad_by_one_opset_{opset}", says="zeros", opset=opset)
    def _(g, x):
        return g.add("Relu", g.conv(g.pad(x, [0, 0, 1, 1, 0, 0, 1, 1], value=1.0), 6, 8, 3, 3))

    for mode in ("reflect", "edge"):
        @case("Pad Conv Relu", name=f"pad_{mode}_opset_{opset}", says="zeros", opset=opset)
        def _(g, x, mode=mode):
            return g.add("Relu", g.conv(g.pad(x, [0, 0, 1, 1, 0, 0, 1, 1], mode=mode), 6, 8, 3, 3))


@case("Conv Relu")
def crop_after_padded(g, x):
    return g.add("Relu", g.pad(g.conv(x, 6, 8, 3, 3, pads=1), [0, 0, -1, -1, 0, 0, -1, -1]))


@case("Conv Relu")
def crop_repairs_border(g, x):
    y = g.conv(g.conv(x, 6, 8, 3, 3, pads=1), 6, 6, 3, 3, pads=1)
    return g.add("Relu", g.pad(y, [0, 0, -1, -1, 0, 0, -1, -1]))


@case("Pad Conv Relu", says="")
def crop_before_padded(g, x):
    return g.add("Relu", g.conv(g.pad(x, [0, 0, -1, -1, 0, 0, -1, -1]), 6, 8, 3, 3, pads=1))


@case("Pad Conv Relu", says="batch or channels")
def pad_channels(g, x):
    return g.add("Relu", g.conv(g.pad(x, [0, 1, 0, 0, 0, 1, 0, 0]), 6, 10, 3, 3))


@case("Pad Conv Relu", opset=18, says="names axes")
def pad_with_axes(g, x):
    y = g.add("Pad", x, g.constant([1, 1, 1, 2]), "", g.constant([2, -1]))
    return g.add("Relu", g.conv(y, 6, 8, 3, 3))


@case("Conv Relu")
def pad_by_constant_node(g, x):
    y = g.add("Pad", x, g.constant([0, 0, 1, 1, 0, 0, 1, 1], node=True), "", mode="constant")
    return g.add("Relu", g.conv(y, 6, 8, 3, 3))


@case("Conv Relu")
def conv_then_pad(g, x):
    y = g.pad(g.conv(x, 6, 8, 1, 1, bias=False), [0, 0, 1, 1, 0, 0, 1, 1])
    return g.add("Relu", g.conv(y, 5, 6, 3, 3))


@case("Conv Pad Relu", says="")
def biased_then_pad(g, x):
    return g.add("Relu", g.pad(g.conv(x, 6, 8, 1, 1), [0, 0, 1, 1, 0, 0, 1, 1]))


@case("Conv Add Relu", says="")
def padded_chain_with_skip(g, x):
    y = g.conv(g.pad(x, [0, 0, 1, 1, 0, 0, 1, 1]), 16, 8, 1, 1)
    y = g.conv(g.conv(y, 16, 16, 3, 3), 8, 16, 1, 1)
    return g.add("Relu", g.add("Add", y, x))


CASES["padded_chain_with_skip"].ops = ["Conv", "Relu"]
CASES["padded_chain_with_skip"].says = None

# ---- channels selected, joined, shuffled -----------------------------------------------------------------------------


@case("Conv Relu")
def slice_after(g, x):
    y = g.conv(x, 12, 8, 3, 3, pads=1)
    return g.add("Relu", g.add("Slice", y, g.constant([2]), g.constant([9]), g.constant([1]), g.constant([2])))


@case("Conv Relu")
def slice_before(g, x):
    y = g.add("Slice", x, g.constant([-6]), g.constant([1000]), g.constant([-3]))
    return g.add("Relu", g.conv(y, 6, 6, 3, 3, pads=1))


@case("Conv Relu", opset=9)
def slice_of_attributes(g, x):
    y = g.add("Slice", g.conv(x, 12, 8, 3, 3), starts=[3], ends=[-1], axes=[1])
    return g.add("Relu", y)


@case("Conv Slice Relu", says="")
def slice_of_positions(g, x):
    return g.add("Relu", g.add("Slice", g.conv(x, 6, 8, 3, 3), g.constant([1]), g.constant([4]), g.constant([2])))


@case("Conv Slice Relu", says="", free="all")
def slice_backwards(g, x):
    y = g.conv(x, 6, 8, 3, 3)
    return g.add("Relu", g.add("Slice", y, g.constant([5]), g.constant([0]), g.constant([1]), g.constant([-1])))


def split(g, x, parts):
    if g.opset < 13:
        return g.add("Split", x, outputs=len(parts), axis=1, split=parts)
    if g.opset >= 18 and len(set(parts)) == 1:
        return g.add("Split", x, outputs=len(parts), axis=1, num_outputs=len(parts))
    return g.add("Split", x, g.constant(parts), outputs=len(parts), axis=1)


for opset in (11, 13, 18):
    for parts in ([4, 4], [3, 5]):
        @case("Conv Relu", name=f"split_{parts[0]}_{parts[1]}_opset_{opset}", opset=opset)
        def _(g, x, parts=parts):
            a, b = split(g, x, parts)
            return g.add("Relu", g.add("Concat", g.conv(a, 4, parts[0], 3, 3, pads=1),
                                       g.conv(b, 5, parts[1], 3, 3, pads=1), axis=1))


@case("Conv Relu")
def split_evenly_by_default(g, x):
    a, b = g.add("Split", g.conv(x, 8, 8, 3, 3), outputs=2, axis=-3)
    return g.add("Relu", g.add("Add", b, g.conv(a, 4, 4, 1, 1)))


@case("Conv Split Relu Relu Concat")
def split_read_apart(g, x):
    a, b = g.add("Split", g.norm(g.conv(x, 8, 8, 3, 3), 8), outputs=2, axis=1)
    return g.add("Concat", g.add("Relu", a), g.add("Relu", b), axis=1)


@case("Conv Relu", opset=18)
def split_with_a_remainder(g, x):
    a, b, c = g.add("Split", x, outputs=3, axis=1, num_outputs=3)
    y = g.add("Concat", c, g.conv(a, 2, 3, 1, 1), g.conv(b, 2, 3, 1, 1), axis=1)
    return g.add("Relu", g.conv(y, 5, 6, 3, 3))


@case("Conv Relu")
def split_one_part_unread(g, x):
    a, _ = g.add("Split", x, outputs=2, axis=1)
    return g.add("Relu", g.norm(g.conv(a, 5, 4, 3, 3), 5))


@case("Conv Relu")
def gather_between(g, x):
    y = g.add("Gather", g.conv(x, 8, 8, 3, 3), g.constant(np.array([7, 0, -2, 3, 3])), axis=1)
    return g.add("Relu", g.conv(y, 6, 5, 1, 1))


@case("Conv Gather Relu", says="")
def gather_one(g, x):
    return g.add("Relu", g.add("Gather", g.conv(x, 8, 8, 3, 3), g.constant(np.array(2)), axis=1))


@case("Conv Relu")
def inception(g, x):
    branches = [g.conv(x, 3, 8, 1, 1), g.conv(g.conv(x, 4, 8, 1, 1, bias=False), 5, 4, 3, 3, pads=1),
                g.conv(g.add("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1), 2, 8,
                       1, 1), x]
    return g.add("Relu", g.conv(g.add("Concat", *branches, axis=-3), 6, 18, 1, 1))


@case("Conv Relu")
def concat_with_itself(g, x):
    y = g.conv(x, 4, 8, 3, 3)
    return g.add("Relu", g.add("Concat", y, y, axis=1))


@case("Conv Concat Relu", says="")
def concat_of_positions(g, x):
    return g.add("Relu", g.add("Concat", g.norm(g.conv(x, 8, 8, 3, 3, pads=1), 8), x, axis=2))


def shuffle(g, x, groups, *dims):
    y = g.add("Transpose", g.reshape(x, dims[0], groups, dims[1] // groups, *dims[2:]), perm=[0, 2, 1, 3, 4])
    return g.reshape(y, *dims)


@case("Conv Relu", free="none")
def channel_shuffle(g, x):
    y = shuffle(g, g.conv(x, 8, 4, 1, 1, group=2), 2, 1, 8, 9, 11)
    return g.add("Relu", g.conv(y, 6, 4, 3, 3, group=2))


@case("Conv Relu", free="batch", dims=["n", 8, 9, 11])
def channel_shuffle_dynamic_batch(g, x):
    y = shuffle(g, g.conv(x, 12, 4, 1, 1, group=2), 3, -1, 12, 9, 11)
    return g.add("Relu", g.norm(y, 12))


@case("Conv Reshape Transpose Reshape BatchNormalization Relu", free="none", says="")
def transposed_positions(g, x):
    y = g.reshape(g.conv(x, 8, 8, 1, 1), 1, 8, 9, 11)
    y = g.add("Transpose", y, perm=[0, 1, 3, 2])
    return g.add("Relu", g.norm(g.reshape(y, 1, 8, 11, 9), 8))


# ---- fully connected -------------------------------------------------------------------------------------------------


def gemm(g, x, out, given, bias=True, **attributes):
    dims = (out, given) if attributes.get("transB", 0) else (given, out)
    return g.add("Gemm", x, g.weight(*dims), *([g.weight(out)] if bias else []), **attributes)


for opset in (7, 9, 11, 13, 18, LATEST):
    @case("Gemm Relu", name=f"gemm_gemm_opset_{opset}", dims=[2, 8], opset=opset)
    def _(g, x):
        return g.add("Relu", gemm(g, gemm(g, x, 16, 8, transB=1), 6, 16))

    @case("Gemm Relu" if opset >= 11 else "MatMul Relu", name=f"matmul_matmul_opset_{opset}", dims=[2, 8], opset=opset)
    def _(g, x):
        return g.add("Relu", g.add("MatMul", g.add("MatMul", x, g.weight(8, 16)), g.weight(16, 6)))


@case("Gemm Relu", dims=[2, 8])
def gemm_alpha_beta(g, x):
    return g.add("Relu", gemm(g, gemm(g, x, 16, 8, alpha=0.5, beta=-2.0), 6, 16, transB=1, alpha=-1.5, beta=0.0))


@case("Gemm Relu", dims=[2, 8])
def gemm_scalar_bias(g, x):
    y = g.add("Gemm", x, g.weight(8, 5), g.weight(1))
    return g.add("Relu", gemm(g, y, 6, 5))


@case("Gemm Relu", dims=[2, 8])
def gemm_row_bias(g, x):
    return g.add("Relu", gemm(g, g.add("Gemm", x, g.weight(8, 5), g.weight(1, 5)), 6, 5))


@case("Gemm Gemm Relu", dims=[2, 8], free="none", says="differs from row to row")
def gemm_matrix_bias(g, x):
    return g.add("Relu", gemm(g, g.add("Gemm", x, g.weight(8, 5), g.weight(2, 5)), 6, 5))


@case("Gemm Gemm Relu", dims=[2, 8], free="none", says="differs from row to row")
def gemm_column_bias(g, x):
    return g.add("Relu", gemm(g, g.add("Gemm", x, g.weight(8, 5), g.weight(2, 1)), 6, 5))


@case("Gemm Gemm Relu", dims=[8, 3], free="none", says="transA")
def gemm_of_transposed(g, x):
    return g.add("Relu", gemm(g, gemm(g, x, 5, 8, transA=1), 6, 5))


@case("Gemm Relu", dims=[2, 8])
def linear_of_two_axes(g, x):
    y = g.add("Mul", g.add("Add", g.add("MatMul", x, g.weight(8, 16)), g.weight(16)), g.weight(1, 16))
    return g.add("Relu", g.norm(g.add("Add", g.add("MatMul", y, g.weight(16, 6)), g.weight(6)), 6))


@case("Gemm Relu", dims=[2, 8])
def linear_residual(g, x):
    return g.add("Relu", g.add("Add", x, gemm(g, gemm(g, x, 16, 8), 8, 16)))


@case("MatMul Add Relu", dims=[2, 5, 8], free="batch")
def linear_residual_of_three_axes(g, x):
    y = g.add("Add", g.add("MatMul", x, g.weight(8, 16)), g.weight(16))
    return g.add("Relu", g.add("Add", g.add("MatMul", y, g.weight(16, 8)), x))


@case("MatMul MatMul Relu", dims=[2, 5, 8], says="no matrix", free="none")
def matmul_of_batched_weight(g, x):
    return g.add("Relu", g.add("MatMul", g.add("MatMul", x, g.weight(2, 8, 6)), g.weight(2, 6, 4)))


@case("MatMul MatMul Relu", dims=[2, 8, 5], free="none", says="second operand is not a constant")
def matmul_constant_on_the_left(g, x):
    return g.add("Relu", g.add("MatMul", g.weight(4, 6), g.add("MatMul", g.weight(6, 8), x)))


@case("Gemm Relu", dims=[2, 8, 3], free="batch")
def flatten_gemm_gemm(g, x):
    return g.add("Relu", gemm(g, gemm(g, g.add("Flatten", x), 12, 24), 5, 12))


CASES["flatten_gemm_gemm"].ops = "Flatten Gemm Relu".split()


for text, between in (("dropout", lambda g, y: g.add("Dropout", y)), ("norm", lambda g, y: g.norm(y, 24)),
                      ("scale", lambda g, y: g.add("Mul", y, g.constant(np.float32(3))))):
    @case("Relu Flatten Gemm", name=f"relu_flatten_{text}_gemm", dims=[2, 8, 3], free="batch")
    def _(g, x, between=between):  # where the flattening and the linear layer come together only when contracted
        return gemm(g, between(g, g.add("Flatten", g.add("Relu", x))), 5, 24)


@case("Pad Pad Conv Relu", dims=[1, 4, 1, 6], free="none", proofs=False)  # nothing but zeros are left
def moved_rows(g, x):
    """Of which one side takes away more rows than there are, once the other has added some."""
    y = g.pad(g.conv(x, 3, 4, 1, 1, bias=False, strides=[2, 1]), [0, 0, 1, 0, 0, 0, -1, 0])
    return g.add("Relu", g.conv(y, 2, 3, 1, 1))


@case("Conv Flatten Relu", dims=[2, 4, 6, 5], free="batch")
def conv_flatten_gemm(g, x):
    return g.add("Relu", gemm(g, g.add("Flatten", g.conv(x, 3, 4, 3, 3, pads=1)), 5, 90))


for size in (7, 8, 9):  # the last positions are read, or not
    @case("Conv Flatten Relu", name=f"strided_conv_flatten_gemm_{size}",
          dims=[2, 4, size, size], free="batch")
    def _(g, x, size=size):
        y = g.add("Flatten", g.conv(x, 3, 4, 3, 3, strides=2))
        return g.add("Relu", gemm(g, y, 5, 3 * ((size - 3) // 2 + 1) ** 2))

    @case("Conv Flatten Relu", name=f"strided_pointwise_flatten_gemm_{size}", dims=[2, 4, size, size], free="batch")
    def _(g, x, size=size):
        y = g.add("Flatten", g.conv(x, 3, 4, 1, 1, strides=3))
        return g.add("Relu", gemm(g, y, 5, 3 * ((size - 1) // 3 + 1) ** 2))

    @case("Conv Flatten Relu", name=f"padded_strided_conv_flatten_gemm_{size}", dims=[2, 4, size, size], free="batch")
    def _(g, x, size=size):
        y = g.add("Flatten", g.conv(x, 3, 4, 3, 3, strides=2, pads=1))
        return g.add("Relu", gemm(g, y, 5, 3 * ((size - 1) // 2 + 1) ** 2))


@case("Conv Flatten Relu", dims=[2, 4, 8, 8], free="batch")
def cropped_flatten_gemm(g, x):
    y = g.add("Flatten", g.pad(g.conv(x, 3, 4, 1, 1), [0, 0, -1, -1, 0, 0, -1, 0]))
    return g.add("Relu", gemm(g, y, 5, 3 * 6 * 7))


CASES["cropped_flatten_gemm"].ops = "Pad Conv Flatten Relu".split()


@case("Conv Flatten Relu", dims=[2, 4, 6, 5], free="batch")
def grouped_conv_flatten_gemm(g, x):
    y = g.add("Flatten", g.conv(x, 4, 1, 3, 3, group=4, pads=1))
    return g.add("Relu", gemm(g, y, 5, 120))


for text, shape in (("minus_one_first", [-1, 120]), ("copied", [0, -1]), ("batch", [2, -1]), ("all", [2, 120])):
    @case("Flatten Gemm Relu", name=f"reshape_{text}_gemm", dims=[2, 4, 6, 5],
          free="none" if shape[0] == 2 else "batch")
    def _(g, x, shape=shape):
        return g.add("Relu", g.norm(gemm(g, g.reshape(x, *shape), 5, 120), 5))


@case("Reshape Gemm Relu", dims=[4, 4, 6, 5], free="none", says="flattening")
def reshape_of_the_batch_gemm(g, x):
    return g.add("Relu", gemm(g, gemm(g, g.reshape(x, 2, 240), 5, 240), 4, 5))


@case("Flatten Gemm Relu", dims=[2, 4, 6, 5], free="none")
def flatten_of_batch_gemm(g, x):
    return g.add("Relu", gemm(g, g.add("Flatten", g.norm(x, 4), axis=2), 5, 30))


CASES["flatten_of_batch_gemm"].ops = "BatchNormalization Flatten Gemm Relu".split()

# ---- pools -----------------------------------------------------------------------------------------------------------

for opset, kind in ((13, "attribute"), (18, "input")):
    for keep in (0, 1):
        for axes in ([2, 3], [-1, -2]):
            @case("Flatten Gemm Relu" if not keep else "Conv Relu", dims=[2, 4, 6, 5], free="batch", opset=opset,
                  name=f"mean_keep_{keep}_axes_{kind}_{'negative' if axes[0] < 0 else 'positive'}")
            def _(g, x, keep=keep, axes=axes):
                y = g.mean(g.conv(x, 6, 4, 1, 1), axes, keep)
                return g.add("Relu", gemm(g, y, 5, 6) if not keep else g.conv(y, 5, 6, 1, 1))


@case("Conv Flatten Relu", dims=[2, 4, 6, 5], free="batch")
def global_pool_flatten_gemm(g, x):
    y = g.add("Flatten", g.add("GlobalAveragePool", g.conv(x, 6, 4, 3, 3, pads=1)))
    return g.add("Relu", gemm(g, y, 5, 6))


@case("Conv GlobalAveragePool Flatten Gemm Relu", dims=["n", 4, "h", "w"], says="not known")
def global_pool_dynamic(g, x):
    y = g.add("GlobalAveragePool", g.norm(g.conv(x, 6, 4, 3, 3, pads=1), 6))
    return g.add("Relu", gemm(g, gemm(g, g.add("Flatten", y), 8, 6), 5, 8))


@case("Conv ReduceMean Relu", dims=[2, 4, 6, 5], says="not over all spatial axes")
def mean_over_rows(g, x):
    return g.add("Relu", g.mean(g.norm(g.conv(x, 6, 4, 3, 3), 6), [3]))


@case("Conv ReduceMean Relu", dims=[2, 4, 6, 5])
def mean_over_channels(g, x):
    return g.add("Relu", g.mean(g.norm(g.conv(x, 6, 4, 3, 3), 6), [1]))


def pool(g, x, kernel=2, strides=2, **attributes):
    return g.add("AveragePool", x, kernel_shape=[kernel] * 2, strides=[strides] * 2, **attributes)


@case("Conv Relu")
def pool_strided(g, x):
    return g.add("Relu", pool(g, g.conv(x, 6, 8, 3, 3, pads=1), 2, 2))


@case("Conv Relu")
def pool_before(g, x):
    return g.add("Relu", g.conv(pool(g, x, 3, 2), 6, 8, 1, 1))


@case("Conv AveragePool Relu", says="count_include_pad 0")
def pool_padded_dividing_by_fewer(g, x):
    return g.add("Relu", pool(g, g.conv(x, 6, 8, 1, 1, bias=False), 3, 1, pads=[1, 1, 1, 1]))


@case("Conv Relu")
def pool_padded(g, x):
    return g.add("Relu", pool(g, g.conv(x, 6, 8, 1, 1, bias=False), 3, 2, pads=[1, 1, 1, 1], count_include_pad=1))


@case("Conv AveragePool Relu", says="")
def pool_padded_after_bias(g, x):
    return g.add("Relu", pool(g, g.conv(x, 6, 8, 1, 1), 3, 1, pads=[1, 1, 1, 1], count_include_pad=1))


@case("Conv Relu", dims=[1, 8, 8, 12], free="batch")
def pool_ceil_mode_that_changes_nothing(g, x):
    return g.add("Relu", pool(g, g.conv(x, 6, 8, 1, 1), 2, 2, ceil_mode=1))


@case("Conv AveragePool Relu", dims=[1, 8, 9, 12], free="batch", says="ceil_mode")
def pool_ceil_mode_that_hangs_over(g, x):
    return g.add("Relu", pool(g, g.conv(x, 6, 8, 1, 1), 2, 2, ceil_mode=1))


@case("Conv AveragePool Relu", dims=[1, 8, "h", 12], says="ceil_mode")
def pool_ceil_mode_dynamic(g, x):
    return g.add("Relu", pool(g, g.conv(x, 6, 8, 1, 1), 2, 2, ceil_mode=1))


@case("Conv AveragePool Relu", says="count_include_pad 0")
def pool_auto_pad(g, x):
    return g.add("Relu", pool(g, g.conv(x, 6, 8, 1, 1), 3, 1, auto_pad="SAME_UPPER"))


@case("Conv Relu")
def pool_auto_pad_valid(g, x):
    return g.add("Relu", pool(g, g.conv(x, 6, 8, 1, 1), 3, 2, auto_pad="VALID"))


@case("Conv AveragePool Relu", opset=19, says="dilated")
def pool_dilated(g, x):
    return g.add("Relu", pool(g, g.conv(x, 6, 8, 1, 1), 2, 1, dilations=[2, 2]))


@case("Conv MaxPool Relu")
def max_pool(g, x):
    return g.add("Relu", g.add("MaxPool", g.norm(g.conv(x, 6, 8, 1, 1), 6), kernel_shape=[2, 2]))


# ---- channels last ---------------------------------------------------------------------------------------------------


@case("Conv Relu", dims=[1, 8, 9])
def linear_over_channels_1d(g, x):
    y = g.add("Transpose", g.conv(x, 12, 8, 3, pads=1), perm=[0, 2, 1])
    y = g.add("Add", g.add("MatMul", y, g.weight(12, 10)), g.weight(10))
    return g.add("Relu", g.conv(g.add("Transpose", y, perm=[0, 2, 1]), 6, 10, 1))


@case("Conv Relu")
def linear_over_channels_2d(g, x):
    y = g.add("Transpose", g.conv(x, 12, 8, 3, 3, pads=1), perm=[0, 2, 3, 1])
    y = g.add("Mul", g.add("Add", g.add("MatMul", y, g.weight(12, 10)), g.weight(10)), g.weight(10))
    return g.add("Relu", g.conv(g.add("Transpose", y, perm=[0, 3, 1, 2]), 6, 10, 1, 1))


@case("Conv Transpose Relu")
def channels_last_after_conv(g, x):
    y = g.add("Transpose", g.conv(x, 12, 8, 3, 3, pads=1), perm=[0, 2, 3, 1])
    return g.add("Relu", g.add("Add", g.add("MatMul", y, g.weight(12, 10)), g.weight(10)))


@case("Transpose Conv Relu", dims=[1, 9, 11, 8], free="batch")
def channels_last_before_conv(g, x):
    y = g.add("Add", g.add("MatMul", x, g.weight(8, 10)), g.weight(10))
    return g.add("Relu", g.conv(g.add("Transpose", y, perm=[0, 3, 1, 2]), 6, 10, 3, 3))


@case("Conv MatMul Relu", says="", dims=[1, 8, 9, 12], free="batch")
def linear_over_columns(g, x):
    return g.add("Relu", g.add("MatMul", g.norm(g.conv(x, 8, 8, 3, 3, pads=1), 8), g.weight(12, 8)))


@case("Conv Transpose MatMul Relu", says="", dims=[1, 8, 9, 12], free="batch")
def linear_over_rows(g, x):
    y = g.add("Transpose", g.norm(g.conv(x, 8, 8, 3, 3, pads=1), 8), perm=[0, 1, 3, 2])
    return g.add("Relu", g.add("MatMul", y, g.weight(9, 8)))


@case("MatMul Add Relu", dims=[2, 4, 5, 8], free="batch")
def linear_linear_of_four_axes(g, x):
    y = g.add("Add", g.add("MatMul", x, g.weight(8, 16)), g.weight(16))
    return g.add("Relu", g.add("Add", g.add("MatMul", y, g.weight(16, 4)), g.weight(4)))


@case("Transpose Relu", dims=[2, 8, 9])
def transposes_alone(g, x):
    y = g.add("Transpose", g.add("Transpose", g.add("Transpose", x, perm=[0, 2, 1]), perm=[0, 2, 1]), perm=[0, 2, 1])
    return g.add("Relu", y)


CASES["transposes_alone"].ops = ["Transpose"] * 3 + ["Relu"]

# ---- nothing in between ----------------------------------------------------------------------------------------------


@case("Conv Relu")
def identities_between(g, x):
    y = g.add("Identity", g.conv(x, 12, 8, 3, 3))
    y = g.add("Dropout", g.add("Cast", y, to=TensorProto.FLOAT))
    return g.add("Relu", g.norm(y, 12))


@case("Conv Relu", opset=7)
def dropout_opset_7(g, x):
    return g.add("Relu", g.norm(g.add("Dropout", g.conv(x, 12, 8, 3, 3), ratio=0.5), 12))


@case("Conv Relu", opset=13)
def dropout_with_ratio(g, x):
    ratio = g.constant(np.array(0.5, np.float32))
    return g.add("Relu", g.norm(g.add("Dropout", g.conv(x, 12, 8, 3, 3), ratio), 12))


@case("Conv Relu")
def dropout_not_training(g, x):
    training = g.constant(np.array(False), TensorProto.BOOL)
    y = g.add("Dropout", g.conv(x, 12, 8, 3, 3), "", training)
    return g.add("Relu", g.norm(y, 12))


@case("Conv Dropout BatchNormalization Relu", says="mask")
def dropout_with_mask(g, x):
    y, mask = g.add("Dropout", g.conv(x, 12, 8, 3, 3), outputs=2)
    g.output(mask, type=TensorProto.BOOL)
    return g.add("Relu", g.norm(y, 12))


@case("Conv Dropout BatchNormalization Relu", says="training mode", sizes=[])
def dropout_training(g, x):
    ratio, training = g.constant(np.array(0.5, np.float32)), g.constant(np.array(True), TensorProto.BOOL)
    return g.add("Relu", g.norm(g.add("Dropout", g.conv(x, 12, 8, 3, 3), ratio, training), 12))


@case("Conv Cast Cast BatchNormalization Relu", says="changes the type")
def cast_and_back(g, x):
    y = g.add("Cast", g.conv(x, 12, 8, 3, 3), to=TensorProto.FLOAT16)
    return g.add("Relu", g.norm(g.add("Cast", y, to=TensorProto.FLOAT), 12))


@case("Conv")
def output_is_a_region(g, x):
    return g.add("Identity", g.norm(g.conv(x, 12, 8, 3, 3), 12))


@case("Conv BatchNormalization Relu", says="training", opset=15, sizes=[])
def norm_in_training_mode(g, x):
    y = g.conv(g.conv(x, 12, 8, 1, 1), 12, 12, 3, 3)
    statistics = [g.weight(12, low=0.5) for _ in range(4)]
    y, mean, variance = g.add("BatchNormalization", y, *statistics, outputs=3, training_mode=1)
    g.output(mean)
    return g.add("Relu", y)


@case("Conv BatchNormalization Relu", says="as in training", opset=9, sizes=[])
def norm_with_more_outputs(g, x):
    y = g.conv(g.conv(x, 12, 8, 1, 1), 12, 12, 3, 3)
    statistics = [g.weight(12, low=0.5) for _ in range(4)]
    y, *_ = g.add("BatchNormalization", y, *statistics, outputs=5)
    return g.add("Relu", y)


@case("Conv Relu", dims=[2, 8, 9, 11])
def norm_before_unpadded(g, x):
    return g.add("Relu", g.conv(g.norm(x, 8, epsilon=0.25), 6, 8, 3, 3))


@case("Conv Relu", opset=7)
def norm_opset_7(g, x):
    return g.add("Relu", g.norm(g.conv(x, 6, 8, 3, 3), 6, spatial=1, momentum=0.5))


@case("BatchNormalization Relu")
def norm_alone(g, x):
    return g.add("Relu", g.norm(x, 8))


@case("BatchNormalization BatchNormalization Relu")
def norms_alone(g, x):
    return g.add("Relu", g.norm(g.norm(x, 8), 8))


# ---- what is read elsewhere ------------------------------------------------------------------------------------------


@case("Conv BatchNormalization Relu BatchNormalization Relu Add")
def conv_shared_by_two_norms(g, x):
    y = g.conv(x, 6, 8, 3, 3)
    return g.add("Add", g.add("Relu", g.norm(y, 6)), g.add("Relu", g.norm(y, 6)))


@case("Conv Relu")
def conv_shared_by_two_norms_that_meet(g, x):
    y = g.conv(x, 6, 8, 3, 3)
    return g.add("Relu", g.add("Add", g.norm(y, 6), g.norm(y, 6)))


@case("Conv Relu Conv Relu")
def weight_shared_by_two_regions(g, x):
    w = g.weight(8, 8, 3, 3)
    y = g.add("Relu", g.norm(g.conv(x, 8, 8, 3, 3, weight=w, pads=1), 8))
    return g.add("Relu", g.norm(g.conv(y, 8, 8, 3, 3, weight=w, pads=1), 8))


@case("Conv Relu Conv Relu")
def weight_shared_with_what_stays(g, x):
    w = g.weight(8, 8, 3, 3)
    y = g.add("Relu", g.norm(g.conv(x, 8, 8, 3, 3, weight=w, pads=1), 8))
    return g.add("Relu", g.conv(y, 8, 8, 3, 3, weight=w, pads=1))


@case("Conv Conv Relu")
def output_inside(g, x):
    y = g.conv(g.conv(x, 12, 8, 1, 1), 6, 12, 3, 3)
    g.output(y)
    return g.add("Relu", g.norm(g.conv(y, 5, 6, 3, 3), 5))


@case("Conv Conv Relu", "--keep", "t1")
def kept_inside(g, x):
    y = g.conv(g.conv(x, 12, 8, 1, 1), 6, 12, 3, 3)
    return g.add("Relu", g.norm(g.conv(y, 5, 6, 3, 3), 5))


@case("Conv BatchNormalization Relu Conv Relu", "--only", "t3")
def only_one_tensor(g, x):
    y = g.add("Relu", g.norm(g.conv(x, 8, 8, 3, 3), 8))
    return g.add("Relu", g.norm(g.conv(y, 5, 8, 3, 3), 5))


CASES["only_one_tensor"].options[-1] = "t4"


@case("Conv BatchNormalization Relu Conv Relu", "--only", "n3")
def only_one_node(g, x):
    y = g.add("Relu", g.norm(g.conv(x, 8, 8, 3, 3), 8))
    return g.add("Relu", g.norm(g.conv(y, 5, 8, 3, 3), 5))


def branches(g, condition, then, otherwise, **more):
    """An If; each body is a list of nodes and initializers, and makes the tensor of its name."""
    graphs = {}
    for name, (nodes, initializers, output) in (("then_branch", then), ("else_branch", otherwise)):
        graphs[name] = helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(output, g.type, None)],
                                         initializers)
    return g.add("If", condition, **graphs, **more)


def condition(g):
    return g.input("condition", [], TensorProto.BOOL)


@case("Conv Conv If Relu")
def read_by_a_body(g, x):
    y = g.conv(g.conv(x, 12, 8, 1, 1), 6, 12, 3, 3)
    z = g.norm(g.conv(y, 6, 6, 3, 3, pads=1), 6)
    then = [helper.make_node("Add", [z, y], ["then_out"])], [], "then_out"
    otherwise = [helper.make_node("Sub", [z, y], ["else_out"])], [], "else_out"
    return g.add("Relu", branches(g, condition(g), then, otherwise))


@case("Conv If Relu")
def weight_read_by_a_body(g, x):
    w = g.weight(8, 8, 3, 3)
    y = g.norm(g.conv(x, 8, 8, 3, 3, weight=w, pads=1), 8)
    then = [helper.make_node("Conv", [y, w], ["then_out"])], [], "then_out"
    otherwise = [helper.make_node("Conv", ["x", w], ["else_out"])], [], "else_out"
    return g.add("Relu", branches(g, condition(g), then, otherwise))


@case("If Relu")
def bodies_with_convs(g, x):
    bodies = []
    for name in ("then", "else"):
        weights = [tensor_of(f"{name}_w{i}", g.random_values([8, 8, 1, 1]), g.type) for i in range(2)]
        nodes = [helper.make_node("Conv", [x, f"{name}_w0"], [f"{name}_between"]),
                 helper.make_node("Conv", [f"{name}_between", f"{name}_w1"], [f"{name}_out"])]
        bodies.append((nodes, weights, f"{name}_out"))
    return g.add("Relu", branches(g, condition(g), *bodies))


@case("Conv Relu If")
def names_of_a_body_are_taken(g, x):
    y = g.norm(g.conv(x, 8, 8, 3, 3, pads=1), 8)
    bodies = []
    for name in ("then", "else"):
        weight = tensor_of(f"{y}.weight", g.random_values([8, 8, 1, 1]), g.type)
        nodes = [helper.make_node("Conv", ["relu", weight.name], [f"{y}.bias" if name == "then" else "else_out"])]
        bodies.append((nodes, [weight], nodes[0].output[0]))
    g.add("Relu", y, made="relu")
    return branches(g, condition(g), *bodies)


@case("Conv Relu")
def names_are_taken(g, x):
    y = g.norm(g.conv(x, 8, 8, 3, 3, pads=1), 8)
    g.constant(np.zeros(3, np.float32), name=f"{y}.weight")
    return g.add("Relu", y)


@case("MatMul Add Relu", dims=[2, 5, 8], free="batch")
def names_of_nodes_are_taken(g, x):
    y = g.add("Add", g.add("MatMul", x, g.weight(8, 16)), g.weight(16))
    y = g.add("Add", g.add("MatMul", y, g.weight(16, 6)), g.weight(6), name="last")
    return g.add("Relu", y, name="last.MatMul")


@case("Conv Relu")
def constant_nodes(g, x):
    return g.add("Relu", g.conv(g.conv(x, 12, 8, 1, 1, node=True), 6, 12, 3, 3, node=True))


@case("Constant Conv Relu Conv Relu")
def constant_node_shared_with_what_stays(g, x):
    w = g.weight(8, 8, 3, 3, node=True)
    y = g.add("Relu", g.norm(g.conv(x, 8, 8, 3, 3, weight=w), 8))
    return g.add("Relu", g.conv(y, 8, 8, 3, 3, weight=w))


@case("Conv Relu")
def constant_node_of_a_number(g, x):
    y = g.add("Mul", g.conv(x, 6, 8, 3, 3), g.add("Constant", value_float=0.3))
    return g.add("Relu", g.add("Add", y, g.add("Constant", value_floats=[0.7])))


@case("Conv Conv Add Relu")
def two_inputs(g, x):
    z = g.input("z", [1, 8, 9, 11])
    return g.add("Relu", g.add("Add", g.norm(g.conv(x, 6, 8, 3, 3), 6), g.norm(g.conv(z, 6, 8, 3, 3), 6)))


@case("Conv Conv")
def two_outputs(g, x):
    return [g.norm(g.conv(x, 6, 8, 3, 3), 6), g.norm(g.conv(x, 5, 8, 1, 1), 5)]


@case("Conv Conv Relu", says="not a constant", free="none")
def weight_that_is_an_input(g, x):
    w = g.input("w", [6, 8, 3, 3])
    return g.add("Relu", g.conv(g.conv(x, 6, 8, 3, 3, weight=w), 5, 6, 1, 1))


@case("Conv Relu")
def weight_that_is_a_product(g, x):
    w = g.add("Mul", g.weight(6, 8, 3, 3), g.weight(6, 1, 1, 1))
    return g.add("Relu", g.conv(g.conv(x, 6, 8, 3, 3, weight=w), 5, 6, 1, 1))


@case("Sigmoid Conv Conv Relu", says="not a constant")
def weight_that_is_computed(g, x):
    w = g.add("Sigmoid", g.weight(6, 8, 3, 3))
    return g.add("Relu", g.conv(g.conv(x, 6, 8, 3, 3, weight=w), 5, 6, 1, 1))


@case("Conv Relu Relu Conv Relu", says=None)
def dead_code(g, x):
    y = g.norm(g.conv(x, 8, 8, 3, 3), 8)
    g.add("Relu", y)
    return g.add("Relu", g.norm(g.conv(g.add("Relu", y), 8, 8, 3, 3), 8))


# ---- models as files -------------------------------------------------------------------------------------------------

for opset in (7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 22, 23, 24, LATEST):
    @case("Conv Relu Conv Relu", name=f"opset_{opset}", opset=opset)
    def _(g, x):
        y = g.norm(g.conv(g.pad(x, [0, 0, 1, 1, 0, 0, 1, 1]), 6, 8, 3, 3), 6)
        y = g.add("Relu", g.add("Add", g.add("Mul", y, g.weight(6, 1, 1)), g.weight(6, 1, 1)))
        z = g.conv(g.add("Identity", y), 5, 6, 1, 1)
        return g.add("Relu", g.add("Concat", z, g.conv(y, 3, 6, 1, 1), axis=1))


@case("Conv Relu", opset=9, ir=3)
def ir_3(g, x):
    return g.add("Relu", g.norm(g.conv(x, 6, 8, 3, 3), 6))


def with_initializers_as_inputs(g, x):
    g.inputs_of_initializers = True
    return g.add("Relu", g.norm(g.conv(x, 6, 8, 3, 3), 6))


case("Conv BatchNormalization Relu", name="initializers_are_inputs", says="not a constant", opset=11)(
    with_initializers_as_inputs)
case("Conv Relu", "--initializers-are-constant", name="initializers_are_constant", opset=11)(
    with_initializers_as_inputs)

for name, type in (("float16", TensorProto.FLOAT16), ("bfloat16", TensorProto.BFLOAT16),
                   ("double", TensorProto.DOUBLE)):
    @case("Conv Relu", name=f"{name}_repvgg", type=type, opset=22)
    def _(g, x):
        return g.add("Relu", repvgg_block(g, x))

    @case("Conv Relu", name=f"{name}_chain", type=type, opset=22)
    def _(g, x):
        y = g.conv(g.conv(x, 12, 8, 1, 1, pads=1), 12, 12, 3, 3)
        return g.add("Relu", g.add("Mul", g.conv(y, 6, 12, 1, 1), g.weight(6, 1, 1)))

    @case("Gemm Relu", name=f"{name}_gemm", type=type, dims=[2, 8], opset=22)
    def _(g, x):
        return g.add("Relu", gemm(g, gemm(g, x, 16, 8, transB=1), 6, 16))

    @case("MatMul Add Relu", name=f"{name}_linear", type=type, dims=[2, 5, 8], free="batch", opset=22)
    def _(g, x):
        y = g.add("Add", g.add("MatMul", x, g.weight(8, 16)), g.weight(16))
        return g.add("Relu", g.add("MatMul", y, g.weight(16, 6)))

    @case("Cast Conv Cast Relu", name=f"{name}_cast_around", opset=22)
    def _(g, x, type=type):
        g.type, outer = type, g.type
        y = g.norm(g.conv(g.add("Cast", x, to=type), 6, 8, 3, 3), 6)
        g.type = outer
        return g.add("Relu", g.add("Cast", y, to=outer))


@case("Conv Relu", type=TensorProto.FLOAT16, opset=15)
def float16_with_norm_in_float(g, x):
    y = g.conv(x, 6, 8, 3, 3)
    g.type = TensorProto.FLOAT
    y = g.norm(y, 6)
    g.type = TensorProto.FLOAT16
    return g.add("Relu", y)


for dims in (["n", 8, 9, 11], [1, 8, "h", "w"], ["n", 8, "h", "w"], ["n", "c", "h", "w"]):
    key = "".join(str(d) if isinstance(d, str) else "" for d in dims)

    @case("Conv Relu Conv Relu", name=f"dynamic_{key}", dims=dims)
    def _(g, x):
        y = g.conv(g.conv(g.conv(x, 12, 8, 1, 1, pads=1), 12, 12, 3, 3), 8, 12, 1, 1)
        return g.add("Relu", repvgg_block(g, g.add("Relu", y)))


@case("Shape Reshape Conv Relu")
def rank_unknown(g, x):
    x = g.add("Reshape", x, g.add("Shape", x))
    return g.add("Relu", g.norm(g.conv(x, 6, 8, 3, 3), 6))


@case("Conv Relu")
def nodes_without_names(g, x):
    y = g.conv(x, 6, 8, 3, 3, name="")
    return g.add("Relu", g.norm(y, 6, name=""), name="")


@case("Conv Relu")
def odd_names(g, x):
    y = g.conv(x, 6, 8, 3, 3, name="a \"b\" \u00fc", made="t/0:0\n\u00fc")
    y = g.norm(y, 6, name="n/1 'b' \u00e9", made="t 1'")
    return g.add("Relu", y, made="y\\")


@case("Conv Gelu Conv Relu", opset=17)
def another_domain(g, x):
    g.domains["com.microsoft"] = 1
    y = g.add("Gelu", g.norm(g.conv(x, 6, 8, 3, 3), 6), domain="com.microsoft")
    y = g.add("Relu", g.norm(g.conv(y, 6, 6, 3, 3), 6))
    g.output(y, [1, 6, 5, 7])


CASES["another_domain"].sizes = [(9, 11)]


@case("Conv block Relu", opset=17)
def functions(g, x):
    body = [helper.make_node("Conv", ["a", "w"], ["b"]), helper.make_node("Conv", ["b", "w"], ["c"])]
    g.functions.append(helper.make_function("local", "block", ["a", "w"], ["c"], body, [helper.make_opsetid("", 17)]))
    g.domains["local"] = 1
    y = g.add("block", g.norm(g.conv(x, 8, 8, 3, 3), 8), g.weight(8, 8, 1, 1), domain="local")
    g.output(g.add("Relu", y), [1, 8, 7, 9])


CASES["functions"].sizes = [(9, 11)]

# ---- borders ---------------------------------------------------------------------------------------------------------


def agree_at_even_sizes(g, x):
    a = g.conv(x, 6, 8, 3, 3, strides=2, pads=1)
    return g.add("Relu", g.add("Add", a, g.conv(x, 6, 8, 2, 2, strides=2)))


case("Conv Relu", name="sum_at_even_size", dims=[1, 8, 10, 12], free="batch")(agree_at_even_sizes)
case("Conv Conv Add Relu", name="sum_at_unknown_size", dims=[1, 8, "h", "w"], sizes=[(10, 12), (6, 8)], says="")(
    agree_at_even_sizes)
case("Conv Conv Add Relu", "--border", "everywhere", name="sum_everywhere", dims=[1, 8, 10, 12],
     sizes=[(10, 12), (6, 8)], says="")(agree_at_even_sizes)
case("Conv Relu", "--input", "x=1x8x10x12", name="sum_at_a_given_size", dims=["n", 8, "h", "w"], free="batch",
     sizes=[(10, 12)])(agree_at_even_sizes)


@case("Conv Conv Relu", says="")
def three_by_three_twice(g, x):
    return g.add("Relu", g.conv(g.conv(x, 6, 8, 3, 3, pads=1, bias=False), 6, 6, 3, 3, pads=1, bias=False))


@case("Conv Relu", "--border", "interior", sizes=[])
def three_by_three_twice_interior(g, x):
    return g.add("Relu", g.conv(g.conv(x, 6, 8, 3, 3, pads=1, bias=False), 6, 6, 3, 3, pads=1, bias=False))


case("Conv Relu", "--border", "interior", sizes=[], name="bn_conv_padded_interior")(bn_conv_padded)


@case("Conv Conv Relu", says="")
def triple_of_exact_pairs(g, x):
    y = g.conv(g.conv(x, 6, 8, 3, 3, pads=1, bias=False), 6, 6, 1, 1, bias=False)
    return g.add("Relu", g.conv(y, 5, 6, 3, 3, pads=1, bias=False))


@case("Conv Relu", dims=[1, 8, 10, 12], free="batch", says=None)
def padding_that_nothing_reads(g, x):
    y = g.conv(x, 6, 8, 1, 1, bias=False)
    return g.add("Relu", g.conv(y, 5, 6, 3, 3, pads=[0, 0, 1, 1], strides=2, bias=False))


@case("Conv Relu", dims=[1, 8, 9, 11], free="batch")
def biased_before_padding_that_nothing_reads(g, x):
    return g.add("Relu", g.conv(g.conv(x, 6, 8, 1, 1), 5, 6, 2, 2, pads=[0, 0, 1, 1], strides=2, bias=False))


CASES["biased_before_padding_that_nothing_reads"].dims = [1, 8, 10, 12]


@case("Conv Relu Concat Conv Relu Concat Conv Relu")
def dense_net(g, x):
    for channels in (8, 12):
        y = g.add("Relu", g.norm(g.conv(x, 4, channels, 3, 3, pads=1, bias=False), 4))
        x = g.add("Concat", x, y, axis=1)
    return g.add("Relu", g.norm(g.conv(x, 6, 16, 1, 1), 6))


@case("Conv Relu")
def dense_net_linear(g, x):
    for channels in (8, 12, 16):
        x = g.add("Concat", x, g.conv(g.norm(x, channels), 4, channels, 1, 1), axis=1)
    return g.add("Relu", g.conv(x, 6, 20, 3, 3))


@case("Conv Relu")
def nested_blocks(g, x):
    y = g.conv(x, 12, 8, 1, 1, pads=1)
    y = g.add("Add", repvgg_block(g, y, 12), g.conv(g.conv(y, 6, 12, 1, 1, pads=1, bias=False), 12, 6, 3, 3))
    return g.add("Relu", g.add("Add", g.conv(y, 8, 12, 3, 3), g.conv(x, 8, 8, 3, 3, pads=1)))


CASES["nested_blocks"].ops = None


@case("Conv Relu")
def nested_skips(g, x):
    y = x
    for _ in range(3):
        z = g.add("Add", y, g.conv(y, 8, 8, 1, 1))
        y = g.add("Add", y, g.conv(z, 8, 8, 1, 1, bias=False))
    return g.add("Relu", g.add("Add", g.norm(x, 8), g.conv(y, 8, 8, 3, 3, pads=1)))


CASES["nested_skips"].ops = None


@case("Conv Relu")
def ladder_of_skips(g, x):
    tensors = [x]
    for _ in range(6):
        y = g.conv(tensors[-1], 8, 8, 1, 1)
        for each in tensors:
            y = g.add("Add", y, each)
        tensors.append(y)
    return g.add("Relu", tensors[-1])


@case("Conv Relu")
def forty_pointwise(g, x):
    for _ in range(40):
        x = g.conv(x, 8, 8, 1, 1)
    return g.add("Relu", x)


@case("Conv Relu", sizes=[(12, 13), (17, 12)])
def forty_convs(g, x):
    for i in range(40):
        x = g.conv(x, 4, 8 if i == 0 else 4, *((2, 1) if i % 8 == 0 else (1, 1)), pads=[1, 1, 0, 1] if i == 0 else 0)
    return g.add("Relu", x)


@case("Conv Relu", sizes=[(9, 11)])
def forty_repvgg(g, x):
    for _ in range(40):
        x = g.add("Relu", repvgg_block(g, x, 4)) if _ else g.conv(x, 4, 8, 1, 1)
    return g.add("Relu", x)


CASES["forty_repvgg"].ops = ["Conv"] + ["Conv", "Relu"] * 39 + ["Relu"]


@case("ReduceMean Sub Pow ReduceMean Add Sqrt Div Add Conv Relu")
def layer_norm_before_padded(g, x):
    centred = g.add("Sub", x, g.mean(x, [1]))
    variance = g.mean(g.add("Pow", centred, g.constant(np.array(2, np.float32))), [1])
    deviation = g.add("Sqrt", g.add("Add", variance, g.constant(np.array(1e-5, np.float32))))
    y = g.add("Mul", g.add("Div", centred, deviation), g.weight(8, 1, 1))
    return g.add("Relu", g.conv(g.add("Add", y, g.weight(8, 1, 1)), 6, 8, 3, 3, pads=1))


@case("ReduceMean Sub Pow ReduceMean Add Sqrt Div Conv Relu")
def layer_norm_before_unpadded(g, x):
    centred = g.add("Sub", x, g.mean(x, [1]))
    variance = g.mean(g.add("Pow", centred, g.constant(np.array(2, np.float32))), [1])
    deviation = g.add("Sqrt", g.add("Add", variance, g.constant(np.array(1e-5, np.float32))))
    y = g.add("Mul", g.add("Div", centred, deviation), g.weight(8, 1, 1))
    return g.add("Relu", g.conv(g.add("Add", y, g.weight(8, 1, 1)), 6, 8, 3, 3))


# ---- left ------------------------------------------------------------------------------------------------------------


def quantisation(g, type=TensorProto.UINT8):
    return g.constant(np.array(0.02, np.float32)), g.constant(np.array(128), type)


@case("QuantizeLinear QLinearConv QLinearConv DequantizeLinear Relu")
def quantised(g, x):
    scale, zero = quantisation(g)
    y = g.add("QuantizeLinear", x, scale, zero)
    for out, given in ((6, 8), (5, 6)):
        w = g.constant(g.random.integers(0, 255, (out, given, 1, 1)), TensorProto.UINT8)
        y = g.add("QLinearConv", y, scale, zero, w, scale, zero, scale, zero)
    return g.add("Relu", g.add("DequantizeLinear", y, scale, zero))


@case("DequantizeLinear Conv QuantizeLinear DequantizeLinear Conv Relu", says="not a constant")
def quantised_in_pairs(g, x):
    scale, zero = quantisation(g)
    w = g.constant(g.random.integers(0, 255, (6, 8, 1, 1)), TensorProto.UINT8)
    y = g.conv(x, 6, 8, 1, 1, weight=g.add("DequantizeLinear", w, scale, zero))
    y = g.add("DequantizeLinear", g.add("QuantizeLinear", y, scale, zero), scale, zero)
    return g.add("Relu", g.norm(g.conv(y, 5, 6, 3, 3), 5))


@case("Conv Relu Sigmoid Mul Conv Relu")
def squeeze_and_excitation(g, x):
    y = g.add("Relu", g.norm(g.conv(x, 8, 8, 1, 1), 8))
    return g.add("Relu", g.norm(g.conv(g.add("Mul", y, g.add("Sigmoid", y)), 5, 8, 1, 1), 5))


# ---- transposed convolutions -----------------------------------------------------------------------------------------


@case("ConvTranspose Relu")
def deconv_scaled(g, x):
    y = g.deconv(x, 8, 6, 3, 3, strides=2, pads=1, output_padding=[1, 1])
    return g.add("Relu", g.add("Add", g.add("Mul", y, g.weight(6, 1, 1)), g.weight(1, 6, 1, 1)))


@case("ConvTranspose Relu")
def deconv_grouped(g, x):
    return g.add("Relu", g.norm(g.deconv(x, 8, 3, 4, 3, group=2, strides=2, pads=[1, 0, 0, 1]), 6))


@case("ConvTranspose Relu")
def deconv_dilated(g, x):
    return g.add("Relu", g.norm(g.deconv(x, 8, 6, 3, 3, dilations=2, strides=3), 6))


@case("ConvTranspose Relu")
def pw_deconv(g, x):
    return g.add("Relu", g.deconv(g.conv(x, 6, 8, 1, 1, bias=False), 6, 5, 2, 2, strides=2))


@case("ConvTranspose Relu")
def deconv_conv(g, x):
    return g.add("Relu", g.conv(g.deconv(x, 8, 6, 2, 2, strides=2, bias=False), 5, 6, 3, 3, pads=1))


@case("ConvTranspose Conv Relu", says="")
def deconv_conv_inexact(g, x):
    return g.add("Relu", g.conv(g.deconv(x, 8, 6, 4, 4, strides=2, pads=1, bias=False), 5, 6, 3, 3, pads=1))


@case("Conv ConvTranspose Relu", says="")
def biased_pw_deconv(g, x):
    return g.add("Relu", g.deconv(g.conv(x, 6, 8, 1, 1), 6, 5, 3, 3, strides=2))


@case("ConvTranspose Relu")
def deconv_deconv(g, x):
    return g.add("Relu", g.deconv(g.deconv(x, 8, 6, 2, 2, strides=2, bias=False), 6, 5, 2, 2, strides=2))


@case("ConvTranspose Relu")
def deconv_sum(g, x):
    return g.add("Relu", g.add("Add", g.deconv(x, 8, 6, 4, 4, strides=2, pads=1), g.deconv(x, 8, 6, 2, 2, strides=2)))


@case("ConvTranspose BatchNormalization Relu", says="output_shape", free="batch")
def deconv_output_shape(g, x):
    return g.add("Relu", g.norm(g.deconv(x, 8, 6, 3, 3, strides=2, output_shape=[18, 22]), 6))


@case("ConvTranspose BatchNormalization Relu", says="auto_pad", free="batch")
def deconv_auto_pad(g, x):
    return g.add("Relu", g.norm(g.deconv(x, 8, 6, 3, 3, strides=2, auto_pad="SAME_UPPER"), 6))


# ---- space and depth, nearest upsampling ----------------------------------------------------------------------------


def sub_pixel(g, x, mode="DCR", bias=None, factor=2):
    y = g.conv(x, 5 * factor**2, 8, 3, 3, pads=1, bias=False)
    if bias is not None:
        y = g.add("Add", y, g.constant(np.asarray(bias, np.float32).reshape(-1, 1, 1)))
    return g.add("DepthToSpace", y, blocksize=factor, mode=mode)


for mode in ("DCR", "CRD"):
    five = [0.5, -1, 2, 0, 3]
    alike = np.tile(five, 4) if mode == "DCR" else np.repeat(five, 4)

    @case("ConvTranspose Relu", name=f"sub_pixel_{mode.lower()}")
    def _(g, x, mode=mode):
        return g.add("Relu", sub_pixel(g, x, mode))

    @case("ConvTranspose Relu", name=f"sub_pixel_{mode.lower()}_by_three")
    def _(g, x, mode=mode):
        return g.add("Relu", sub_pixel(g, x, mode, factor=3))

    @case("ConvTranspose Relu", name=f"sub_pixel_{mode.lower()}_of_one_bias")
    def _(g, x, mode=mode, alike=alike):
        return g.add("Relu", sub_pixel(g, x, mode, alike))

    @case("Conv DepthToSpace Relu", name=f"sub_pixel_{mode.lower()}_of_many_biases", says="the same for all positions")
    def _(g, x, mode=mode):
        return g.add("Relu", sub_pixel(g, x, mode, np.arange(20)))


@case("ConvTranspose Relu")
def sub_pixel_between(g, x):
    return g.add("Relu", g.norm(g.conv(sub_pixel(g, g.conv(x, 8, 8, 1, 1, bias=False)), 4, 5, 1, 1), 4))


@case("ConvTranspose Relu")
def sub_pixel_sum(g, x):
    return g.add("Relu", g.add("Add", sub_pixel(g, x), g.deconv(x, 8, 5, 4, 4, strides=2, pads=1)))


@case("Conv DepthToSpace Relu", when=None, says="cost no less together")
def sub_pixel_if_smaller(g, x):
    return g.add("Relu", sub_pixel(g, g.conv(x, 8, 8, 1, 1, bias=False)))


@case("Conv DepthToSpace Relu", when=None, says="as many multiply-adds")
def one_sub_pixel_if_smaller(g, x):
    return g.add("Relu", sub_pixel(g, x))


@case("SpaceToDepth DepthToSpace Relu", dims=[1, 8, 8, 12], free="batch")
def space_to_depth_and_back(g, x):
    return g.add("Relu", g.add("DepthToSpace", g.add("SpaceToDepth", x, blocksize=2), blocksize=2))


@case("Conv Relu", dims=[1, 3, 8, 12], free="batch")
def space_to_depth_conv(g, x):
    return g.add("Relu", g.norm(g.conv(g.add("SpaceToDepth", x, blocksize=2), 5, 12, 1, 1), 5))


@case("Conv Relu", dims=[1, 3, 8, 12], free="batch")
def focus(g, x):
    return g.add("Relu", g.conv(g.add("SpaceToDepth", x, blocksize=2), 5, 12, 3, 3, pads=1))


@case("SpaceToDepth Conv Relu", dims=["n", 3, "h", "w"], sizes=[(8, 12)], says="")
def focus_of_any_size(g, x):
    return g.add("Relu", g.conv(g.add("SpaceToDepth", x, blocksize=2), 5, 12, 3, 3, pads=1))


def resize(g, x, *scales, coordinates="asymmetric", nearest="floor", mode="nearest"):
    more = {"coordinate_transformation_mode": coordinates, "nearest_mode": nearest, "mode": mode}
    return g.add("Resize", x, "", g.constant(np.array([1, 1, *scales], np.float32)), **more)


for coordinates, nearest in (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"),
                             ("half_pixel", "round_prefer_ceil"), ("tf_half_pixel_for_nn", "floor")):
    @case("ConvTranspose Relu", name=f"upsample_conv_{coordinates}_{nearest}")
    def _(g, x, coordinates=coordinates, nearest=nearest):
        y = resize(g, x, 2, 3, coordinates=coordinates, nearest=nearest)
        return g.add("Relu", g.conv(y, 5, 8, 3, 3, pads=1))

for coordinates, nearest in (("asymmetric", "ceil"), ("align_corners", "floor"), ("half_pixel", "floor")):
    @case("Resize Conv Relu", name=f"resize_conv_{coordinates}_{nearest}", says="does not repeat every position")
    def _(g, x, coordinates=coordinates, nearest=nearest):
        y = resize(g, x, 2, 3, coordinates=coordinates, nearest=nearest)
        return g.add("Relu", g.conv(y, 5, 8, 3, 3, pads=1))


@case("ConvTranspose Relu")
def biased_conv_upsample(g, x):
    return g.add("Relu", resize(g, g.conv(x, 5, 8, 3, 3, pads=1), 2, 2))


@case("Conv ConvTranspose Relu", says="pads with zeros")
def biased_conv_upsample_conv_padded(g, x):
    return g.add("Relu", g.conv(resize(g, g.conv(x, 5, 8, 1, 1), 2, 2), 5, 5, 3, 3, pads=1))


@case("ConvTranspose Relu", dims=[1, 8, 7])
def upsample_conv_1d(g, x):
    return g.add("Relu", g.conv(resize(g, x, 4), 5, 8, 3, pads=1))


@case("ConvTranspose Relu", opset=9)
def upsample_opset_9(g, x):
    y = g.add("Upsample", x, g.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    return g.add("Relu", g.conv(y, 5, 8, 3, 3, pads=1))


@case("ConvTranspose Relu", free="none")
def upsample_to_a_size(g, x):
    y = g.add("Resize", x, "", "", g.constant([1, 8, 18, 33]), coordinate_transformation_mode="asymmetric",
              nearest_mode="floor", mode="nearest")
    return g.add("Relu", g.conv(y, 5, 8, 3, 3, pads=1))


@case("ConvTranspose Relu", opset=18)
def upsample_of_named_axes(g, x):
    y = g.add("Resize", x, "", g.constant(np.array([3, 2], np.float32)), axes=[-1, 2], mode="nearest",
              coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    return g.add("Relu", g.conv(y, 5, 8, 3, 3, pads=1))


@case("ConvTranspose Relu", opset=18, free="none", when="faster")
def upsample_of_named_axes_to_a_size(g, x):
    y = g.add("Resize", x, "", "", g.constant([33, 18]), axes=[3, 2], mode="nearest",
              coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    return g.add("Relu", g.conv(y, 5, 8, 3, 3, pads=1))


@case("Resize Conv Relu", opset=18, free="none", says="keeps the aspect ratio")
def resize_within_a_size(g, x):
    y = g.add("Resize", x, "", "", g.constant([20, 33]), axes=[2, 3], mode="nearest",
              coordinate_transformation_mode="asymmetric", nearest_mode="floor", keep_aspect_ratio_policy="not_larger")
    return g.add("Relu", g.conv(y, 5, 8, 3, 3, pads=1))


@case("Resize Conv Relu", says="scales are not whole")
def resize_by_one_and_a_half(g, x):
    return g.add("Relu", g.conv(resize(g, x, 1.5, 2), 5, 8, 3, 3, pads=1))


@case("Resize Conv Relu", says="it interpolates")
def resize_linear(g, x):
    return g.add("Relu", g.conv(resize(g, x, 2, 2, mode="linear"), 5, 8, 3, 3, pads=1))


@case("Resize Conv Relu", when=None, says="parameters would grow")
def upsample_conv_if_smaller(g, x):
    return g.add("Relu", g.conv(resize(g, x, 2, 2), 5, 8, 3, 3, pads=1))


@case("ConvTranspose Relu", when="faster")
def upsample_conv_if_faster(g, x):
    return g.add("Relu", g.conv(resize(g, x, 2, 2), 5, 8, 3, 3, pads=1))


# ---- what pays -------------------------------------------------------------------------------------------------------

case("Conv Conv Relu", name="dw_then_pw_if_smaller", when=None, says="would grow")(dw_then_pw)
case("Conv Relu", name="cl_chain_if_smaller", when=None)(cl_chain)
case("Conv Relu", name="repvgg_if_smaller", when=None)(repvgg)
case("Conv Relu", name="parallel_concat_if_smaller", when=None)(parallel_concat)
case("Conv AveragePool Relu", name="conv_avgpool_if_smaller", when=None, says="would grow")(conv_avgpool)
case("Conv Conv Relu", name="dw_then_pw_if_faster", when="faster", says="would grow")(dw_then_pw)


@case("Conv Conv Relu", when=None, says="would grow")
def narrow_then_wide(g, x):
    return g.add("Relu", g.conv(g.conv(x, 2, 8, 1, 1), 16, 2, 1, 1))


@case("Conv Relu", when=None)
def wide_then_narrow(g, x):
    return g.add("Relu", g.conv(g.conv(x, 32, 8, 1, 1), 4, 32, 1, 1))


@case("Conv Conv Relu", when=None, says="would grow")
def only_the_second_pair_pays(g, x):
    return g.add("Relu", g.conv(g.conv(g.conv(x, 2, 8, 1, 1), 32, 2, 1, 1), 16, 32, 1, 1))


@case("Conv Conv Relu", when=None, dims=[1, 384, 4, 4])
def bottleneck_tail(g, x):
    return g.add("Relu", g.conv(g.conv(g.conv(x, 48, 384, 1, 1), 384, 48, 1, 1), 96, 384, 1, 1))


@case("Conv Relu Flatten Gemm Relu", when=None, dims=[2, 8, 6, 5], free="batch")
def head_if_smaller(g, x):
    y = g.add("Relu", g.norm(g.conv(x, 6, 8, 3, 3, pads=1), 6))
    return g.add("Relu", gemm(g, gemm(g, g.add("Flatten", y), 16, 180), 4, 16))


@case("Conv GlobalAveragePool Flatten Gemm Relu", when=None, dims=[2, 8, 6, 5], free="batch")
def pooled_head_if_smaller(g, x):
    y = g.add("Flatten", g.add("GlobalAveragePool", g.conv(x, 32, 8, 3, 3, pads=1)))
    return g.add("Relu", gemm(g, y, 4, 32))


CASES["pooled_head_if_smaller"].ops = None
