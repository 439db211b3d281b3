# SPDX-License-Identifier: Apache-2.0
"""from_blocks and verify on blocks written as their repositories write them: RepVGG, MobileOne, ACNet, DBB, OREPA."""

import unittest

from support import HAVE_TORCH, needs, needs_torch

if HAVE_TORCH:
    import concurrent.futures
    import contextlib
    import copy
    import cProfile
    import datetime
    import functools
    import itertools
    import math
    import operator
    import os
    import random
    import sys
    import threading
    import time
    import types
    import warnings

    import torch
    from support import small_net
    from torch import nn
    from torch.nn import functional as F
    from torch.nn.utils import parametrize, prune
    from torch.utils.checkpoint import checkpoint

    import concertina.torch as ct
    from concertina.torch.proofs import Parameters, prove
    from concertina.torch.shapes import Chain, ConvShape, Sum, border

    def conv_bn(inside, outside, kernel, padding=0, stride=1, groups=1):
        conv = nn.Conv2d(inside, outside, kernel, stride, padding, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outside))

    class Attention(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x)[0]

    LIBRARY = torch.library.Library("concertina_tests", "DEF")
    LIBRARY.define("doubles(Tensor(a!) x) -> ()")
    LIBRARY.impl("doubles", lambda x: [x.mul_(2)] and None, "CompositeExplicitAutograd")

    class RepVGGBlock(nn.Module):
        def __init__(self, inside, outside, stride=1, groups=1):
            super().__init__()
            self.nonlinearity = nn.ReLU()
            self.rbr_identity = nn.BatchNorm2d(inside) if inside == outside and stride == 1 else None
            self.rbr_dense = conv_bn(inside, outside, 3, 1, stride, groups)
            self.rbr_1x1 = conv_bn(inside, outside, 1, 0, stride, groups)

        def forward(self, inputs):
            identity = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
            return self.nonlinearity(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + identity)

    class MobileOneBlock(nn.Module):
        def __init__(self, channels, branches=3):
            super().__init__()
            self.inference_mode = False
            self.rbr_skip = nn.BatchNorm2d(channels)
            self.rbr_scale = conv_bn(channels, channels, 1, groups=channels)
            self.rbr_conv = nn.ModuleList(conv_bn(channels, channels, 3, 1, groups=channels) for _ in range(branches))
            self.activation = nn.GELU()

        def forward(self, x):
            if self.inference_mode:  # a flag of its own, no mode of PyTorch
                return self.activation(self.reparam_conv(x))
            out = self.rbr_scale(x) + self.rbr_skip(x)
            for conv in self.rbr_conv:
                out += conv(x)
            return self.activation(out)

    class ACBlock(nn.Module):
        def __init__(self, inside, outside):
            super().__init__()
            self.square_conv, self.square_bn = nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside)
            self.ver_conv, self.ver_bn = nn.Conv2d(inside, outside, (3, 1), padding=(1, 0)), nn.BatchNorm2d(outside)
            self.hor_conv, self.hor_bn = nn.Conv2d(inside, outside, (1, 3), padding=(0, 1)), nn.BatchNorm2d(outside)

        def forward(self, x):
            square = self.square_bn(self.square_conv(x))
            return square + self.ver_bn(self.ver_conv(x)) + self.hor_bn(self.hor_conv(x))

    class BNAndPadLayer(nn.Module):
        def __init__(self, pad_pixels, channels):
            super().__init__()
            self.bn, self.pad_pixels = nn.BatchNorm2d(channels), pad_pixels

        def forward(self, x):
            output, p = self.bn(x), self.pad_pixels
            values = self.bn.bias - self.bn.running_mean * self.bn.weight / torch.sqrt(
                self.bn.running_var + self.bn.eps
            )
            output = F.pad(output, [p] * 4)
            values = values.view(1, -1, 1, 1)
            output[:, :, :p, :] = output[:, :, -p:, :] = values
            output[:, :, :, :p] = output[:, :, :, -p:] = values
            return output

    class IdentityBasedConv1x1(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 1, bias=False)
            self.id_tensor = torch.eye(channels).reshape(channels, channels, 1, 1)

        def forward(self, input):
            kernel = self.weight + self.id_tensor.to(self.weight.device)
            return F.conv2d(input, kernel, None, stride=1, padding=0, dilation=self.dilation, groups=self.groups)

    class DiverseBranchBlock(nn.Module):
        def __init__(self, channels, outside, stride=1):
            super().__init__()
            self.dbb_origin = conv_bn(channels, outside, 3, 1, stride)
            self.dbb_avg = nn.Sequential()
            self.dbb_avg.add_module("conv", nn.Conv2d(channels, outside, 1, bias=False))
            self.dbb_avg.add_module("bn", BNAndPadLayer(1, outside))
            self.dbb_avg.add_module("avg", nn.AvgPool2d(3, stride, 0))
            self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(outside))
            self.dbb_1x1 = conv_bn(channels, outside, 1, 0, stride)
            self.dbb_1x1_kxk = nn.Sequential()
            self.dbb_1x1_kxk.add_module("idconv1", IdentityBasedConv1x1(channels))
            self.dbb_1x1_kxk.add_module("bn1", BNAndPadLayer(1, channels))
            self.dbb_1x1_kxk.add_module("conv2", nn.Conv2d(channels, outside, 3, stride, 0, bias=False))
            self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(outside))

        def forward(self, inputs):
            out = self.dbb_origin(inputs)
            out += self.dbb_1x1(inputs)
            out += self.dbb_avg(inputs)
            out += self.dbb_1x1_kxk(inputs)
            return out

    class DepthwiseDiverseBranchBlock(nn.Module):
        """Of as many groups as channels, where the average pool comes first."""

        def __init__(self, channels):
            super().__init__()
            self.dbb_origin = conv_bn(channels, channels, 3, 1, groups=channels)
            self.dbb_avg = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(channels))
            self.dbb_1x1 = conv_bn(channels, channels, 1, groups=channels)

        def forward(self, inputs):
            return self.dbb_origin(inputs) + self.dbb_avg(inputs) + self.dbb_1x1(inputs)

    class BatchNormAct(nn.BatchNorm2d):
        """Calls the function, and then its activation."""

        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x):
            training = self.training or (self.running_mean is None and self.running_var is None)
            x = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
            )
            return self.act(x)

    class OREPA(nn.Module):
        """A kernel made of parameters in every step, as OREPA's weight_gen does."""

        def __init__(self, inside, outside):
            super().__init__()
            self.origin = nn.Parameter(torch.randn(outside, inside, 3, 3))
            self.pointwise, self.spatial = (nn.Parameter(torch.randn(outside, inside, k, k)) for k in (1, 3))
            self.vector = nn.Parameter(torch.rand(2, outside))
            self.bn = nn.BatchNorm2d(outside)

        def weight_gen(self):
            origin = torch.einsum("oihw,o->oihw", self.origin, self.vector[0, :])
            product = torch.einsum("oihw,oijk->oihw", self.spatial, self.pointwise)
            return origin + torch.einsum("oihw,o->oihw", product, self.vector[1, :])

        def forward(self, x):
            return self.bn(F.conv2d(x, self.weight_gen(), bias=None, stride=1, padding=1, dilation=1, groups=1))

    def in_inference(model):
        """In double, with batch norms that do something."""
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    nn.init.normal_(tensor)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return model.double().eval()

    BLOCKS = {
        "RepVGG": lambda: RepVGGBlock(8, 8),
        "RepVGG, stride 2": lambda: RepVGGBlock(8, 6, stride=2),
        "RepVGG, groups": lambda: RepVGGBlock(8, 8, groups=4),
        "RepVGG, wide groups": lambda: RepVGGBlock(128, 128, groups=4),
        "MobileOne": lambda: MobileOneBlock(6),
        "ACNet": lambda: ACBlock(5, 6),
        "DBB": lambda: DiverseBranchBlock(6, 6),
        "DBB, stride 2": lambda: DiverseBranchBlock(6, 5, stride=2),
        "DBB, depthwise": lambda: DepthwiseDiverseBranchBlock(8),
        "OREPA": lambda: OREPA(6, 6),
    }

    def _counts(self, x, y=None):
        self.calls += 1
        return self.block(x) * self.calls

    def _adds_to_buffer(self, x, y=None):
        self.buffer.add_(1)
        return self.block(x) * self.buffer

    def _adds_to_tensor(self, x, y=None):
        self.tensor += 1
        return self.block(x) * self.tensor

    def _asks_what_is_a_tensor(self, x, y=None):
        return self.block(x if isinstance(x, torch.Tensor) else x[0])

    def _first(x):
        return x if isinstance(x, torch.Tensor) else x[0]

    def _writes_to_a_kernel(self, x, y=None):
        kernel = self.kernel * 2
        y = F.conv2d(x, kernel)
        kernel.mul_(3)
        return self.block(y) + F.conv2d(y, kernel)

    TABLE = {"first": _first, "is_tensor": torch.is_tensor, "no_grad": torch.no_grad}
    ENVIRONMENT, DRAWS = [os.environ], [random.Random(0)]
    TOOLS, PARTIAL = types.SimpleNamespace(first=_first), functools.partial(_first)

    class Rounded(torch.autograd.Function):
        """Its gradient is that of the identity."""

        @staticmethod
        def forward(ctx, x):
            return torch.round(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    @torch.fx.wrap
    def _doubles(x):
        return x.mul_(2)

    def Frozen(forward):
        """A class of its own, with that forward."""

        def init(self):
            nn.Module.__init__(self)
            self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
            self.register_buffer("buffer", torch.ones(1))
            self.tensor, self.calls = torch.ones(1), 0
            self.bias = nn.Parameter(torch.ones(1), requires_grad=False)
            self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))

        return type("Frozen", (nn.Module,), {"__init__": init, "forward": forward})

    def layers(model):
        return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.Linear))]


@needs_torch
class Blocks(unittest.TestCase):
    def test_each_block_is_one_layer(self):
        for name, make in BLOCKS.items():
            with self.subTest(name):
                block = in_inference(make())
                before, draws = copy.deepcopy(block.state_dict()), torch.get_rng_state()
                plain, verdict = ct.from_blocks(block)
                self.assertTrue(torch.equal(draws, torch.get_rng_state()))
                self.assertEqual([type(layer) for layer in layers(plain)], [nn.Conv2d])
                self.assertEqual(len(verdict), 1)
                self.assertEqual([p.name for p in verdict[0].proofs], ["algebra", "rounding", "structure"])
                self.assertTrue(all(proof.holds and proof.elements > 0 for proof in verdict[0].proofs))
                for size in ((7, 7), (8, 9), (3, 4)):
                    channels = layers(plain)[0].in_channels
                    x = torch.randn(2, channels, *size, dtype=torch.double)
                    torch.testing.assert_close(plain(x), block(x), rtol=0, atol=1e-12)
                self.assertTrue(all(torch.equal(before[key], value) for key, value in block.state_dict().items()))
                self.assertTrue(ct.verify(block, plain).holds)

    def test_a_network_of_blocks(self):
        network = in_inference(
            nn.Sequential(
                conv_bn(3, 8, 3, 1, 2), nn.ReLU(), RepVGGBlock(8, 8), MobileOneBlock(8), DiverseBranchBlock(8, 8),
                nn.ReLU(), ACBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 4),
            )
        )  # fmt: skip
        for dtype, atol in ((torch.double, 1e-12), (torch.float, 1e-4)):
            network.to(dtype)
            plain, verdict = ct.from_blocks(network)
            self.assertEqual([type(layer) for layer in layers(plain)], [nn.Conv2d] * 5 + [nn.Linear])
            self.assertEqual(len(verdict), 6)
            x = torch.randn(2, 3, 16, 16, dtype=dtype)
            torch.testing.assert_close(plain(x), network(x), rtol=0, atol=atol)
            self.assertEqual(next(plain.parameters()).dtype, dtype)
            self.assertTrue(ct.verify(network, plain).holds)
            self.assertIn("structure: holds", str(verdict))

    def test_what_does_not_pay_or_is_not_exact_stays(self):
        for name, model in {
            "depthwise, pointwise": nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1)),
            "border": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)),
            "low rank": nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 16)),
            "nonlinear": nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)),
            "shift before padding": nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)),
            "reflect": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
        }.items():
            with self.subTest(name):
                model.eval()
                plain, verdict = ct.from_blocks(model)
                self.assertEqual(list(verdict), [])
                self.assertEqual([type(layer) for layer in layers(plain)], [type(layer) for layer in layers(model)])

    def test_a_tensor_that_is_read_twice_stays(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

            def forward(self, x):
                y = self.one(x)
                return self.two(y) + torch.relu(y)

        model = Twice().double().eval()
        plain, verdict = ct.from_blocks(model)
        self.assertEqual(list(verdict), [])
        x = torch.randn(1, 4, 3, 3, dtype=torch.double)
        self.assertTrue(torch.equal(plain(x), model(x)))

    def test_a_tensor_that_is_written_to_stays(self):
        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
                self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

            def forward(self, x):
                x = torch.tanh(x)
                kept = x
                x += self.one(x)
                y = self.norm(self.two(x))
                return self.relu(x) + kept + y

        model = in_inference(InPlace())
        plain, verdict = ct.from_blocks(model)
        self.assertEqual(list(verdict), [])
        x = torch.randn(1, 4, 3, 3, dtype=torch.double)
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)

    def test_regions_that_read_regions(self):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Sequential(conv_bn(4, 8, 1), nn.ReLU6(), conv_bn(8, 8, 3, 1, groups=8), nn.ReLU6(),
                                          conv_bn(8, 4, 1))  # fmt: skip

            def forward(self, x):
                return x + self.conv(x)

        model = in_inference(nn.Sequential(conv_bn(3, 4, 3, 1), Residual(), Residual(), conv_bn(4, 8, 1)))
        self.assert_contracted(model, torch.randn(2, 3, 5, 5, dtype=torch.double), 8)

    def test_modules_and_names_that_several_regions_use(self):
        class Head(nn.Module):
            def __init__(self):
                super().__init__()
                self.shared, self.plain = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
                self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
                self.c0, self.c1, self.c2, self.c3 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

            def forward(self, x):
                levels = [norm(self.shared(y)).relu() for norm, y in zip(self.norms, (x, -x))]
                y = (self.c0(x) + self.c1(x)).relu()
                return levels[0] + levels[1] + self.shared(x).relu() + (self.c2(y) + self.c3(y)).relu()

        self.assert_contracted(in_inference(Head()), torch.randn(2, 4, 5, 5, dtype=torch.double), 4)

    def test_what_writes_to_a_tensor_stays(self):
        for name, write in {
            "method": lambda y: y.relu_(),
            "function": lambda y: F.relu(y, inplace=True),
            "view": lambda y: y[:, :2].mul_(3),
        }.items():

            class Written(nn.Module):
                def __init__(self, write=write):
                    super().__init__()
                    self.write, self.last = write, nn.Conv2d(4, 4, 1)
                    self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

                def forward(self, x):
                    y = self.one(x) + self.two(x)
                    self.write(y)
                    return self.last(y)

            with self.subTest(name):
                self.assert_contracted(in_inference(Written()), torch.randn(2, 4, 5, 5, dtype=torch.double), 0)

    def test_writes_to_what_something_else_reads(self):
        """Through views, aliases and arguments: all is left, whatever reads before or after."""

        def sliced(self, x):
            v = x[:, :4]
            a = self.one(v)
            x.mul_(2)
            return a + self.two(v)

        def sibling(self, x):
            v, w = x[:, :4], x[:, 1:]
            a = self.one(v)
            w.mul_(2)
            return a + self.two(v)

        def through(alias):
            def forward(self, x):
                a = self.one(x)
                alias(self, x).mul_(2)
                return a + self.two(x)

            return forward

        def relu(call):
            def forward(self, x):
                a = self.one(x)
                call(self, x)
                return a + self.two(x)

            return forward

        for name, forward in {
            "slice": sliced,
            "sibling": sibling,
            "dropout": through(lambda self, x: self.dropout(x)),
            "identity": through(lambda self, x: self.identity(x)),
            "F.dropout": through(lambda self, x: F.dropout(x, training=False)),
            "data": through(lambda self, x: x.data),
            "mT": through(lambda self, x: x.mT),
            "ravel": through(lambda self, x: x.ravel()),
            "moveaxis": through(lambda self, x: torch.moveaxis(x, 0, 1)),
            "swapdims": through(lambda self, x: x.swapdims(0, 1)),
            "double": through(lambda self, x: x.double()),
            "type_as": through(lambda self, x: x.type_as(x)),
            "flatten": through(lambda self, x: self.flatten(x)),
            "out": relu(lambda self, x: torch.mul(x, 2, out=x)),
            "module": relu(lambda self, x: self.relu(x)),
            "module after dropout": relu(lambda self, x: self.relu(self.dropout(x))),
            "positional": relu(lambda self, x: F.relu(x, True)),
            "keyword": relu(lambda self, x: F.relu(input=x, inplace=True)),
            "augmented": relu(lambda self, x: operator.imul(x, 2)),
            "power": relu(lambda self, x: operator.ipow(x, 2)),
            "augmented attribute": relu(lambda self, x: operator.iadd(x.mT, 2)),
            "out of another": relu(lambda self, x: torch.mul(self.one(x).detach(), 2, out=x.data)),
            "positional out": relu(lambda self, x: F.normalize(self.one(x).detach(), 2.0, 1, 1e-12, x.data)),
            "wrapped": relu(lambda self, x: _doubles(x)),
            "operator": relu(lambda self, x: torch.ops.concertina_tests.doubles(x)),
        }.items():

            class Written(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
                    self.dropout, self.identity, self.relu = nn.Dropout(), nn.Identity(), nn.ReLU(inplace=True)
                    self.flatten = nn.Flatten()

            Written.forward = forward
            with self.subTest(name):
                model, x = in_inference(Written()), torch.randn(2, 5 if name == "sibling" else 4, 4, 4).double()
                plain, verdict = ct.from_blocks(model)
                self.assertEqual(len(verdict), 0)
                self.assertTrue(torch.equal(plain(x.clone()), model(x.clone())))

    def test_writes_to_what_nothing_else_reads_do_not_matter(self):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two, self.relu = conv_bn(4, 4, 3, 1), conv_bn(4, 4, 3, 1), nn.ReLU(inplace=True)

            def forward(self, x):
                out = self.two(self.relu(self.one(x)))
                out += x
                return F.relu(out, inplace=True)

        self.assert_contracted(in_inference(Residual()), torch.randn(2, 4, 5, 5, dtype=torch.double), 2)

    def test_code_that_does_more_than_a_graph_stays(self):
        held = []

        def draws(x):
            return x if random.random() < 1 else 2 * x

        def without_gradient(self, x):
            with torch.no_grad():
                return self.two(self.one(x))

        def kept(self, x):
            self.held.append(0)
            return self.two(self.one(x))

        def assigned(self, x):
            self.seen = self.one(x)
            return self.two(self.seen)

        def asks(self, x):
            return _first(self.two(self.one(x)))

        for name, forward in {
            "no_grad": without_gradient,
            "decorator": torch.no_grad()(lambda self, x: self.two(self.one(x))),
            "mode": lambda self, x: self.two(self.one(x)) * (1 + torch.is_grad_enabled()),
            "checkpoint": lambda self, x: checkpoint(self.two, self.one(x), use_reentrant=False),
            "a function that draws": lambda self, x: draws(self.two(self.one(x))),
            "a draw by another name": lambda self, x: self.two(self.one(x)) + float(torch.empty(1).normal_() > 99),
            "attribute": assigned,
            "container": kept,
            "a function that asks": asks,
        }.items():

            class Opaque(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
                    self.held, self.seen = held, None

            Opaque.forward = forward
            with self.subTest(name):
                model = in_inference(Opaque())
                plain, verdict = ct.from_blocks(model)
                self.assertIs(type(plain), Opaque)
                self.assertEqual((len(verdict), model.held, model.seen), (0, [], None))
                self.assertIs(verdict.holds, True)

    def test_a_profiler_in_c_is_named(self):
        profiler = cProfile.Profile()
        profiler.enable()
        try:
            named = not callable(sys.getprofile() or print)  # from Python 3.12 on it does not stand in the way
            with self.assertRaisesRegex(ct.Error, "Profile") if named else contextlib.nullcontext():
                ct.from_blocks(RepVGGBlock(4, 4).eval())
        finally:
            profiler.disable()

    def test_code_that_asks_what_no_graph_has_stays(self):
        def reads(self, x):
            import os

            return 2 * x if os.environ.get("CONCERTINA") else x

        def says(self, x):
            warnings.warn("said", stacklevel=1)
            with torch.profiler.record_function("said"):
                torch._assert(not torch.jit.is_scripting(), "said")
                return x * len([*itertools.repeat(1, math.prod((1, 1)))])

        asks = {
            "autocast": lambda self, x: 2 * x if torch.is_autocast_enabled("cpu") else x,
            "dtype of autocast": lambda self, x: 2 * x if torch.get_autocast_dtype("cpu") == torch.half else x,
            "inference": lambda self, x: 2 * x if torch.is_inference_mode_enabled() else x,
            "default dtype": lambda self, x: 2 * x if torch.get_default_dtype() == torch.double else x,
            "default device": lambda self, x: x.to(torch.get_default_device()),
            "deterministic": lambda self, x: 2 * x if torch.are_deterministic_algorithms_enabled() else x,
            "traced by jit": lambda self, x: 2 * x if torch.jit.is_tracing() else x,
            "traced, as pybind11 says": lambda self, x: 2 * x if torch._C._get_tracing_state() else x,
            "traced by torch.fx": lambda self, x: 2 * x if torch.fx._symbolic_trace.is_fx_symbolic_tracing() else x,
            "compiled": lambda self, x: 2 * x if torch.compiler.is_compiling() else x,
            "workers": lambda self, x: 2 * x if torch.distributed.is_initialized() else x,
            "threads": lambda self, x: x / torch.get_num_threads(),
            "a setting": lambda self, x: x if torch.backends.cudnn.enabled else 2 * x,
            "sets": lambda self, x: x * (1 + torch.set_flush_denormal(False)),
            "environment": reads,
            "environment by a function": lambda self, x: 2 * x if os.getenv("CONCERTINA") else x,
            "environment by a container": lambda self, x: 2 * x if "CONCERTINA" in ENVIRONMENT[0] else x,
            "time": lambda self, x: x * (time.time() > 0),
            "date": lambda self, x: x * (datetime.datetime.now().year > 0),
            "file": lambda self, x: x * (not os.path.exists("/nonexistent")),
            "draw of an object": lambda self, x: x * (DRAWS[0].random() < 1),
            "asked by a function": lambda self, x: 2 * x if all(map(lambda f: f(), [torch.jit.is_tracing])) else x,
            "asked by a partial": lambda self, x: 2 * x if functools.partial(torch.jit.is_tracing)() else x,
        }
        pure = {
            "says": says,
            "sizes": lambda self, x: x.reshape(x.size(0), *torch.broadcast_shapes((4, 1, 1), (3, 3))),
            "made": lambda self, x: x + torch.zeros(4, 1, 1) + F.pad(self.one.bias, (0, 0)).sum(),
            "names": lambda self, x: sorted({"a": x}.items())[0][1] * len("a,b".split(",")),
        }
        for regions, forwards in enumerate((asks, pure)):
            for name, forward in forwards.items():

                class Asks(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

                    def forward(self, x):
                        return self.after(self.two(self.one(x)))

                Asks.after = forward
                with self.subTest(name):
                    self.assert_contracted(in_inference(Asks()), torch.randn(1, 4, 3, 3).double(), regions)

    def test_answers_that_code_keeps_are_no_answers(self):
        """While it is traced, code gets none that it could keep."""

        def is_mixed():
            return torch.is_autocast_enabled("cpu")

        class Kept(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

            def forward(self, x):
                return self.after(self.two(self.one(x)))

        kept = {}
        in_a_cell = types.SimpleNamespace(mixed=None)

        def of_a_dictionary(self, x):
            if "mixed" not in kept:
                kept["mixed"] = is_mixed()
            return 2 * x if kept["mixed"] else x

        def of_an_object(self, x):
            if in_a_cell.mixed is None:
                vars(in_a_cell).update(mixed=is_mixed())
            return 2 * x if in_a_cell.mixed else x

        def asks(_):
            return is_mixed()

        cached = functools.cache(is_mixed)

        def of_a_list(self, x):
            return 2 * x if self.asks[0][0]() else x

        for name, after, attributes in (
            ("dictionary", of_a_dictionary, {}),
            ("object", of_an_object, {}),
            ("cache", lambda self, x: 2 * x if cached() else x, {}),
            ("cache that no code names", of_a_list, {"asks": [[functools.cache(is_mixed)]]}),
            ("property", lambda self, x: 2 * x if self.mixed else x, {"mixed": property(functools.cache(asks))}),
            ("cached property", lambda self, x: 2 * x if self.kept else x, {"kept": functools.cached_property(asks)}),
        ):
            with self.subTest(name):
                kind = type("Kept", (Kept,), {"after": after, **attributes})
                if isinstance(kind.__dict__.get("kept"), functools.cached_property):
                    kind.kept.__set_name__(kind, "kept")
                model, x = in_inference(nn.Sequential(kind(), nn.Conv2d(4, 4, 1))), torch.randn(1, 4, 3, 3).double()
                found = [ct.from_blocks(model) for _ in range(2)]
                self.assertEqual([(len(verdict), verdict.holds) for _, verdict in found], [(0, True)] * 2)
                with torch.autocast("cpu", dtype=torch.bfloat16):  # what the code asks is asked here first
                    expected = model(x)
                    self.assertTrue(torch.equal(found[0][0](x), expected))
                plain, _ = ct.from_blocks(model)  # keeps what a copy does from here on
                torch.testing.assert_close(plain(x), copy.deepcopy(model)(x), rtol=0, atol=1e-12)

    @needs("numpy")
    def test_draws_are_no_constants(self):
        import numpy

        generator, rng = torch.Generator(), random.Random(0)

        def by(draw):
            return lambda self, x: self.two(self.one(x)) * draw(x)

        for name, forward in {
            "generator": by(lambda x: torch.rand(1, generator=generator)),
            "generator in place": by(lambda x: torch.empty(1).uniform_(generator=generator)),
            "generator of a list": by(lambda x, held=[generator]: torch.normal(0.0, 1.0, (1,), generator=held[0])),
            "seed": by(lambda x: torch.manual_seed(0) and 1),
            "seed of a generator": by(lambda x: generator.manual_seed(3).initial_seed()),
            "seed of an alias": by(lambda x, seed=torch.manual_seed: float(seed(0).initial_seed())),
            "Python": by(lambda x: random.random()),
            "an object": by(lambda x: rng.random()),
            "a choice": by(lambda x: random.choice([1.0, 2.0])),
            "NumPy": by(lambda x: float(numpy.random.rand())),
            "a generator of NumPy": by(lambda x, rng=numpy.random.default_rng(0): float(rng.random())),
            "dropout": by(lambda x: F.dropout(torch.ones(1), 0.5, True)),
            "state": by(lambda x: float(torch.get_rng_state().sum())),
        }.items():

            class Draws(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

            Draws.forward = forward
            with self.subTest(name):
                model = in_inference(Draws())
                states = torch.get_rng_state(), generator.get_state(), random.getstate(), rng.getstate()
                plain, verdict = ct.from_blocks(model)
                self.assertEqual((type(plain), len(verdict), verdict.holds), (Draws, 0, True))
                now = torch.get_rng_state(), generator.get_state(), random.getstate(), rng.getstate()
                self.assertTrue(torch.equal(states[0], now[0]) and torch.equal(states[1], now[1]))
                self.assertEqual(states[2:], now[2:])

    def test_threads_contract_at_once_and_others_run_models(self):
        """One traces after another; what runs meanwhile is no part of it."""
        models = [in_inference(nn.Sequential(RepVGGBlock(4, 4), MobileOneBlock(4))) for _ in range(4)]
        x = torch.randn(1, 4, 5, 5).double()
        expected, other = [model(x).detach() for model in models], in_inference(RepVGGBlock(4, 4))
        same, done = other(x).detach(), threading.Event()

        def runs():
            while not done.is_set():
                torch.testing.assert_close(other(x), same, rtol=0, atol=0)

        before = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, before)
        sys.setswitchinterval(1e-5)
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            running = pool.submit(runs)
            contracted = [pool.submit(ct.from_blocks, model) for model in models]
            try:
                found = [each.result(300) for each in contracted]
            finally:
                done.set()
            running.result()
        for (plain, verdict), y in zip(found, expected):
            self.assertEqual((len(verdict), verdict.holds), (2, True))
            torch.testing.assert_close(plain(x), y, rtol=0, atol=1e-12)
        self.assertIs(sys.getprofile(), None)
        self.assertNotIn("__getattribute__", vars(nn.Module))

    def test_inner_hooks_stay(self):
        seen = []
        model = in_inference(nn.Sequential(conv_bn(4, 4, 1), nn.Conv2d(4, 4, 1)))
        model[0].register_forward_hook(lambda module, arguments, output: seen.append(output))
        plain, verdict = ct.from_blocks(model)
        self.assertEqual((len(verdict), seen), (0, []))
        plain(torch.randn(1, 4, 3, 3, dtype=torch.double))
        self.assertEqual(len(seen), 1)

    def test_a_forward_of_the_instance_stays(self):
        x = torch.randn(1, 4, 3, 3, dtype=torch.double)
        for inner in (False, True):
            model = in_inference(nn.Sequential(conv_bn(4, 4, 1), nn.Identity()))
            other = copy.deepcopy(model)
            where = model[0] if inner else model
            where.forward = types.MethodType(lambda self, x: self[1](self[0](x)).relu() + 1, where)
            plain, verdict = ct.from_blocks(model)
            self.assertIs(verdict.holds, True)
            self.assertEqual(len(verdict), 0 if inner else 1)
            self.assertTrue(torch.allclose(plain(x), model(x)))
            self.assertIs(ct.verify(model, other).holds, False)
            with self.assertRaisesRegex(ct.ShapeError, "no chain that torch.fx can trace"):
                ct.save(model, "/nonexistent")

    def test_hooks_and_norms_of_unknown_rank_stay(self):
        hooked = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        hooked[0].register_forward_hook(lambda module, input, output: 2 * output)
        self.assert_contracted(in_inference(hooked), torch.randn(2, 4, 5, 5, dtype=torch.double), 0)
        norms = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.assert_contracted(in_inference(norms), torch.randn(4, 4, dtype=torch.double), 0)

    def test_what_has_no_maps_is_no_convolution(self):
        """Norms and pools after a Linear layer, and synchronised norms of what no convolution reads."""
        norm, pool, sync = nn.BatchNorm1d, nn.AvgPool1d, nn.SyncBatchNorm
        for size, layers_ in {
            (5, 4): [nn.Linear(4, 4), norm(4), norm(4)],
            (4, 4): [nn.Linear(4, 4), norm(4), nn.Dropout(), norm(4)],
            (2, 8, 8): [nn.Linear(8, 8), pool(2, 1), pool(3, 1)],
            (6, 4): [nn.Linear(4, 4), sync(4), sync(4)],
            (7, 4): [sync(4), sync(4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1)],
        }.items():
            with self.subTest(str(layers_)):
                self.assert_contracted(in_inference(nn.Sequential(*layers_)), torch.randn(size).double(), 0)
        mixed = nn.Sequential(nn.Conv2d(3, 4, 3), sync(4), sync(4), nn.Flatten(2), nn.Conv1d(4, 4, 1))
        self.assert_contracted(in_inference(mixed), torch.randn(2, 3, 6, 6).double(), 1)

    def test_complex_layers_stay(self):
        model = nn.Sequential(*(nn.Conv2d(4, 4, 1, bias=False, dtype=torch.cfloat) for _ in range(2))).eval()
        plain, verdict = ct.from_blocks(model)
        x = torch.randn(1, 4, 3, 3, dtype=torch.cfloat)
        self.assertEqual(len(verdict), 0)
        self.assertTrue(torch.equal(plain(x), model(x)))

    def test_a_parameter_with_the_name_of_a_layer(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.factor = (nn.Parameter(torch.randn(size)) for size in ((4, 4, 1, 1), 1))
                self.other = nn.Conv2d(4, 4, 1)

            def forward(self, x):
                return F.conv2d(x, self.conv * self.factor) + self.other(x)

        self.assert_contracted(in_inference(Named()), torch.randn(2, 4, 5, 5, dtype=torch.double), 1)

    def assert_contracted(self, model, x, regions):
        plain, verdict = ct.from_blocks(model)
        self.assertEqual(len(verdict), regions, str(verdict))
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)

    def test_dropout_is_passed(self):
        model = in_inference(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 3), nn.ReLU(), nn.Dropout(),
                                           nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 2)))  # fmt: skip
        plain, verdict = ct.from_blocks(model)
        self.assertEqual(len(verdict), 2)
        x = torch.randn(5, 4, dtype=torch.double)
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)
        self.assertTrue(ct.verify(model, plain).holds)

    def test_what_cannot_be_traced_is_contracted_child_by_child(self):
        class Dynamic(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = RepVGGBlock(4, 4)

            def forward(self, x):
                return self.block(x) if x.sum() > 0 else x

        model = in_inference(Dynamic())
        plain, verdict = ct.from_blocks(model)
        self.assertIs(type(plain), Dynamic)
        self.assertEqual([region.name for region in verdict], ["block.conv"])
        x = torch.rand(1, 4, 5, 5, dtype=torch.double)
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)

    def test_what_stays_is_named_with_the_reason(self):
        class Dynamic(nn.Module):
            def __init__(self):
                super().__init__()
                self.padded = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
                self.narrow = nn.Sequential(nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1))

            def forward(self, x):
                return self.padded(x) if x.sum() > 0 else x

        plain, verdict = ct.from_blocks(in_inference(Dynamic()))
        self.assertEqual([each.partition(":")[0] for each in verdict.left],
                         ["the model (Dynamic)", "padded.1", "narrow.1"])  # fmt: skip
        self.assertRegex(verdict.left[0], "cannot be traced")
        self.assertRegex(verdict.left[1], "no single layer equals this chain: layer 2")
        self.assertRegex(verdict.left[2], "one layer would have 72 parameters and 64 multiply-adds a position, these "
                                          "layers have 25 and 16")  # fmt: skip
        self.assertEqual(str(verdict), "\n".join(f"left: {each}" for each in verdict.left))
        self.assertTrue(verdict.holds)
        self.assertFalse(ct.from_blocks(in_inference(RepVGGBlock(4, 4)))[1].left)
        for reason, *row in (
            ("1: nothing before or after it says over how many axes", nn.Linear(4, 4), nn.BatchNorm1d(4)),
            ("1: it normalises by the statistics of each batch", nn.Conv2d(4, 4, 1),
             nn.BatchNorm2d(4, track_running_stats=False)),
            ("0: neither what is before it nor a norm after it says", nn.AvgPool2d(2), nn.Conv2d(4, 4, 1)),
            ("1: its divisor is not its kernel's size", nn.Conv2d(4, 4, 1), nn.AvgPool2d(2, ceil_mode=True)),
            ("1: 1 pads with 'reflect'", nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        ):  # fmt: skip
            with self.subTest(reason):
                _, verdict = ct.from_blocks(nn.Sequential(*row).eval())
                self.assertRegex(" ".join(verdict.left), f"^{reason}")

    def test_pools_before_norms_pay_with_what_they_join(self):
        alone = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4))
        self.assert_contracted(in_inference(alone), torch.randn(1, 4, 6, 6).double(), 0)

    def test_what_tracing_would_freeze_stays(self):
        x = torch.randn(1, 4, 3, 3, dtype=torch.double)
        for name, forward in {
            "argument": lambda self, x, y=None: self.block(x) if y is None else self.block(x) * y,
            "argument that is not read": lambda self, x, y=None: self.block(x),
            "argument that is passed on": lambda self, x, y=None: torch.clamp(self.block(x), -9, y),
            "draw": lambda self, x, y=None: self.block(x) + torch.randn(1),
            "draw of that size": lambda self, x, y=None: self.block(x) + torch.randn_like(x),
            "counter": _counts,
            "buffer that is written to": _adds_to_buffer,
            "tensor that is written to": _adds_to_tensor,
            "value of a buffer": lambda self, x, y=None: self.block(x) if self.buffer > 0 else x,
            "kind of an argument": _asks_what_is_a_tensor,
            "bias that is written to": lambda self, x, y=None: self.block(x) + self.bias.mul_(2),
            "kernel that is written to": _writes_to_a_kernel,
        }.items():
            with self.subTest(name):
                torch.manual_seed(0)
                model = in_inference(Frozen(forward)())
                other = copy.deepcopy(model)
                plain, verdict = ct.from_blocks(model)
                self.assertEqual(len(verdict), 1, str(verdict))
                self.assertTrue(ct.verify(model, plain).holds)
                self.assertEqual(vars(model)["calls"], 0)  # nothing that it would do was done
                self.assertTrue(all(map(torch.equal, model.state_dict().values(), other.state_dict().values())))
                for arguments in ([x], [2 * x], [x, torch.ones(())], [x, torch.zeros(())], [x]):
                    torch.manual_seed(2)
                    y = plain(*arguments)
                    torch.manual_seed(2)
                    torch.testing.assert_close(y, other(*arguments), rtol=0, atol=1e-12)

    def test_what_a_proxy_answers_otherwise_than_a_tensor_stays(self):
        def tries(self, x):
            try:
                return self.block(x) if x.sum() > -1e9 else x
            except Exception:
                return self.other(x)

        def unpacked(self, x):
            a, b = x
            return self.block(a) if b is None else self.other(a)

        def named(self, x, **others):
            return self.block(x) if others.get("mask") is None else self.other(x)

        def attends(self, x):
            _, weights = self.attention(*[x.flatten(2)] * 3, need_weights=False)
            return self.block(x) if weights is None else self.other(x)

        def without_gradient(self, x):
            with TABLE["no_grad"]():
                return self.block(x)

        def in_training(self, x):
            self.dropout.train()
            return self.block(self.dropout(x))

        x = torch.randn(1, 4, 3, 3, dtype=torch.double)
        for name, (forward, *calls) in {
            "default": (lambda s, x, y=False: s.block(x) if y is False else s.other(x), [x], [x, True]),
            "kind of a default": (lambda s, x, y=2: (s.block if isinstance(y, int) else s.other)(x), [x], [x, x]),
            "None": (lambda s, x, y: s.block(x) if y is None else s.other(x), [x, None], [x, x]),
            "one of two": (lambda s, x, y, z: s.block(x) if y is z is None else s.other(x), [x, None, None], [x, x, x]),
            "kind": (lambda s, x: (s.other if isinstance(x, (list, tuple)) else s.block)(x), [x]),
            "class": (lambda s, x: s.block(x) if x.__class__ == torch.Tensor else s.other(x), [x]),
            "type": (lambda s, x: s.block(x) if type(x) == torch.Tensor else s.other(x), [x]),  # noqa: E721
            "dtype": (lambda s, x: s.block(x) if x.dtype is torch.double else s.other(x), [x]),
            "key": (lambda s, x: {torch.double: s.block}.get(x.dtype, s.other)(x), [x]),
            "text": (lambda s, x: s.block(x) if str(x.dtype) == "torch.float64" else s.other(x), [x]),
            "formatted": (lambda s, x: s.block(x) if f"{x.dtype}" == "torch.float64" else s.other(x), [x]),
            "gradient": (lambda s, x: s.block(x) if x.grad is None else s.other(x), [x]),
            "no attribute": (lambda s, x: s.other(x) if hasattr(x, "tensors") else s.block(x), [x]),
            "table": (lambda s, x: s.block(x) if TABLE["is_tensor"](x) else s.other(x), [x]),
            "function of a table": (lambda s, x: TABLE["first"](s.block(x)), [x]),
            "function of an object": (lambda s, x: TOOLS.first(s.block(x)), [x]),
            "partial": (lambda s, x: PARTIAL(s.block(x)), [x]),
            "handled error": (tries, [x]),
            "element": (unpacked, [(x, None)], [(x, x)]),
            "keyword": (named, [x]),
            "element of a result": (attends, [x]),
            "mode of gradients": (without_gradient, [x]),
            "mode of a module": (in_training, [x]),
            "gradient of its own": (lambda s, x: s.block(Rounded.apply(x)), [x]),
        }.items():

            class Asks(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.block, self.other = (nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(2))) for _ in range(2))
                    self.dropout, self.attention = nn.Dropout(), nn.MultiheadAttention(9, 1)

            Asks.forward = forward
            with self.subTest(name):
                model = in_inference(Asks())
                plain, verdict = ct.from_blocks(model)
                self.assertEqual((type(plain), len(verdict), verdict.holds), (Asks, 2, True))
                for arguments in calls:
                    torch.manual_seed(0)
                    y = plain(*arguments)
                    torch.manual_seed(0)
                    torch.testing.assert_close(y, model(*arguments), rtol=0, atol=1e-12)

    def test_a_call_that_is_not_the_forward_stays(self):
        class Called(nn.Sequential):
            def __call__(self, x):
                return 2 * super().__call__(x)

        model = Called(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.assert_contracted(in_inference(model), torch.randn(1, 4, 3, 3).double(), 0)

    def test_a_parametrized_model_is_of_its_own_class(self):
        model = Frozen(_asks_what_is_a_tensor)()
        parametrize.register_parametrization(model, "kernel", Doubled())
        self.assert_contracted(in_inference(model), torch.randn(1, 4, 3, 3).double(), 1)

    def test_kernels_that_are_drawn_stay(self):
        def bayesian(self, x):
            return self.block(F.conv2d(x, torch.normal(self.kernel, self.kernel.abs())))

        torch.manual_seed(0)
        model, x = in_inference(Frozen(bayesian)()), torch.randn(1, 4, 3, 3, dtype=torch.double)
        plain, verdict = ct.from_blocks(model)
        self.assertEqual(len(verdict), 1)
        torch.manual_seed(0)
        y = plain(x)
        self.assertFalse(torch.equal(y, plain(x)))
        torch.manual_seed(0)
        torch.testing.assert_close(y, model(x), rtol=0, atol=1e-12)

    def test_a_norm_that_pads_otherwise_stays(self):
        class PadsWithZeros(BNAndPadLayer):
            def forward(self, x):
                return F.pad(self.bn(x), [self.pad_pixels] * 4)

        layers_ = nn.Conv2d(4, 4, 1, bias=False), PadsWithZeros(1, 4), nn.Conv2d(4, 4, 3)
        self.assert_contracted(in_inference(nn.Sequential(*layers_)), torch.randn(1, 4, 5, 5).double(), 1)

    def test_norms_of_derived_classes(self):
        """As PyTorch's where they leave its code as it is, else as what they call."""
        derived = type("Norm", (nn.BatchNorm2d,), {})
        doubling = type("Doubling", (nn.BatchNorm2d,), {"forward": lambda self, x: 2 * nn.BatchNorm2d.forward(self, x)})
        functional = nn.Sequential(conv_bn(4, 4, 1)[0], BatchNormAct(4), nn.Conv2d(4, 4, 3), BatchNormAct(4))
        for model, contracted in (
            (nn.Sequential(nn.Conv2d(4, 4, 3), derived(4)), 1),
            (nn.Sequential(nn.Conv2d(4, 4, 3), doubling(4)), 0),
            (functional, 2),
        ):
            with self.subTest(str(model)):
                self.assert_contracted(in_inference(model), torch.randn(2, 4, 6, 6).double(), contracted)

    def test_padding_by_name_in_a_function(self):
        class Same(nn.Conv2d):
            def forward(self, input):
                return F.conv2d(input, self.weight, self.bias, padding="same", dilation=self.dilation)

        model = nn.Sequential(Same(4, 4, (4, 3), dilation=(1, 2)), nn.BatchNorm2d(4))
        self.assert_contracted(in_inference(model), torch.randn(2, 4, 6, 6).double(), 1)

    def test_norms_as_they_are_set(self):
        for name, change in {
            "affine": lambda norm: setattr(norm, "affine", False),  # which nothing reads after __init__
            "no bias": lambda norm: setattr(norm, "bias", None),
            "no weight": lambda norm: setattr(norm, "weight", None),
        }.items():
            with self.subTest(name):
                model = in_inference(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
                change(model[1])
                self.assert_contracted(model, torch.randn(1, 4, 5, 5).double(), 1)

    def test_another_parametrization_on_top_stays(self):
        for name in ("weight", "bias"):
            layer = ct.expand_(nn.Conv2d(4, 4, 3), "cl")
            parametrize.register_parametrization(layer, name, Doubled())
            self.assert_contracted(in_inference(nn.Sequential(layer, nn.ReLU())), torch.randn(1, 4, 5, 5).double(), 0)

    def test_one_number_for_all_axes(self):
        for name, *layers_ in (
            ("stride", nn.Conv2d(4, 4, 3, stride=(2,))),
            ("padding", nn.Conv2d(4, 4, 3, padding=(2,))),
            ("dilation", nn.Conv2d(4, 4, 3, dilation=(2,))),
            ("pool", nn.Conv2d(4, 4, 3), nn.AvgPool2d((1,), (2,)), nn.Conv2d(4, 4, 1)),
        ):
            with self.subTest(name):
                model = in_inference(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), *layers_))
                self.assert_contracted(model, torch.randn(1, 4, 9, 9).double(), 1)

    def test_pools_that_nothing_with_parameters_precedes_stay(self):
        model = nn.Sequential(nn.Conv1d(4, 4, 1, padding=2), nn.AvgPool1d(3, 1), nn.AvgPool1d(2, 1))
        self.assert_contracted(in_inference(model), torch.randn(1, 4, 9).double(), 0)

    def test_what_is_cropped_within(self):
        model = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ZeroPad2d((2, 0, -1, -1)), nn.Conv2d(2, 4, 1, (1, 2)),
                              nn.Conv2d(4, 4, (2, 1), dilation=(2, 1)))  # fmt: skip
        plain, verdict = ct.from_blocks(in_inference(model))
        x = torch.randn(1, 4, 9, 9).double()
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)
        self.assertIs(verdict.holds, True)

    def test_hooks_of_the_model_stay(self):
        model = in_inference(nn.Sequential(conv_bn(4, 4, 1), RepVGGBlock(4, 4)))
        model.register_forward_hook(lambda module, arguments, output: 2 * output)
        self.assert_contracted(model, torch.randn(2, 4, 5, 5, dtype=torch.double), 2)

    def test_a_source_that_only_the_sum_reads(self):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.strided = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 2, 2)
                self.one, self.two = nn.Conv2d(4, 4, 1), conv_bn(4, 4, 1)

            def forward(self, x):
                y = self.strided(self.first(x))
                z = self.one(y) + y
                return self.two(z) + z

        class Skip(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
                self.skip, self.unused = nn.Identity(), nn.Conv2d(4, 4, 1)

            def forward(self, x):
                y = self.first(x)
                self.unused(y)
                return self.conv(y) + self.skip(y)

        self.assert_contracted(in_inference(Skip()), torch.randn(2, 3, 9, 9, dtype=torch.double), 1)
        model = in_inference(Branches())
        self.assert_contracted(model, torch.randn(2, 3, 9, 9, dtype=torch.double), 1)
        plain, _ = ct.from_blocks(model)
        self.assertEqual(layers(plain)[0].kernel_size, (4, 4))
        self.assertIs(ct.from_blocks(plain)[1].holds, True)

    def test_what_passes_a_source_on_is_read_elsewhere(self):
        for kind in (nn.Identity, nn.Dropout):

            class Passes(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.first, self.after, self.passes = conv_bn(4, 4, 1), nn.BatchNorm2d(4), kind()

                def forward(self, x):
                    y = self.first(x)
                    z = self.passes(y)
                    return torch.cat([z, self.after(z) + y])

            with self.subTest(str(kind)):
                self.assert_contracted(in_inference(Passes()), torch.randn(2, 4, 5, 5).double(), 2)

    def test_a_rank_is_known_before_as_after(self):
        """That of a norm, by what reads the same: a pad, a norm, an expanded layer and a function become a layer."""
        conv, norm, sync = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)
        for reader in (
            nn.Sequential(nn.ZeroPad2d(1), conv, norm), nn.Sequential(norm, conv), nn.Conv2d(4, 4, 4, padding="same"),
            ct.expand_(nn.Conv2d(4, 4, 3), "cl"), OREPA(4, 4),
        ):  # fmt: skip

            class Read(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.reader, self.sync = copy.deepcopy(reader), sync
                    self.after = copy.deepcopy(norm)

                def forward(self, x):
                    x = torch.relu(x)
                    return self.after(self.reader(x)), self.sync(x)

            with self.subTest(str(reader)):
                plain, verdict = ct.from_blocks(in_inference(Read()))
                self.assertIs(verdict.holds, True)
                self.assertIs(ct.from_blocks(plain)[1].holds, True)

    def test_pads_in_a_row_and_of_branches(self):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.pad = nn.Conv2d(4, 4, 1, bias=False), nn.ZeroPad2d((1, 2, 0, 1))
                self.one, self.two = conv_bn(4, 4, 3), conv_bn(4, 4, 3)

            def forward(self, x):
                y = self.pad(self.first(x))
                return self.one(y) + self.two(y)

        pad, identity, norm = nn.ZeroPad2d, nn.Identity, nn.BatchNorm2d
        x = torch.randn(2, 4, 5, 5).double()
        for size, model in {
            (3, 4): nn.Sequential(pad(1), pad((1, 0, 2, -2)), nn.Conv2d(4, 4, 5), norm(4)),
            (5, 5): nn.Sequential(pad(1), identity(), pad(1), identity(), nn.Conv2d(4, 4, 5), norm(4)),
            (4, 4): nn.Sequential(pad(-1), pad(1), nn.Conv2d(4, 4, 2), norm(4)),
            (6, 6): nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), pad(1), norm(4), nn.Conv2d(4, 4, 2)),
            (4, 6): Branches(),
        }.items():
            with self.subTest(str(model)):
                self.assertEqual(in_inference(model)(x).shape[2:], size)
                self.assert_contracted(model, x, 1)
                self.assertIs(ct.from_blocks(ct.from_blocks(model)[0])[1].holds, True)
        plain, _ = ct.from_blocks(in_inference(Branches()))
        self.assertEqual(plain(x).shape, (2, 4, 4, 6))
        self.assertEqual(sum(isinstance(each, pad) for each in plain.modules()), 1)

    def test_dtype_device_format_and_what_is_trained_stay(self):
        model = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1).half(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1),
            nn.ReLU(), OREPA(6, 6),
        ).eval()  # fmt: skip
        model.to(memory_format=torch.channels_last)[0].requires_grad_(False)
        model[1].requires_grad_(False)
        model[6].double().requires_grad_(False)
        plain, verdict = ct.from_blocks(model)
        self.assertIs(verdict.holds, True)
        found = [(c.weight.dtype, c.weight.requires_grad, c.bias.requires_grad, c.weight.is_contiguous())
                 for c in layers(plain)]  # fmt: skip
        self.assertEqual(found[0], (torch.half, False, False, False))
        self.assertEqual(found[1], (torch.float, True, True, False))
        self.assertEqual(found[2][:3], (torch.double, False, False))
        model[6].vector.requires_grad_(True)
        self.assertTrue(layers(ct.from_blocks(model)[0])[2].weight.requires_grad)

    def test_tied_layers_stay_tied(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2))
        model[2].weight = model[0].weight
        plain, verdict = ct.from_blocks(model.eval())
        self.assertEqual(len(verdict), 1)
        a, b, _ = layers(plain)
        self.assertIs(a.weight, b.weight)

    def test_padding_that_is_not_even(self):
        for name, layers_ in {
            "same": [nn.Conv2d(3, 4, 4, padding="same"), nn.BatchNorm2d(4)],
            "pad": [nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(3, 4, 4, padding=1), nn.BatchNorm2d(4)],
            "crop": [nn.ZeroPad2d((-1, 2, 0, -1)), nn.Conv2d(3, 4, 4), nn.BatchNorm2d(4)],
        }.items():
            with self.subTest(name):
                self.assert_contracted(
                    in_inference(nn.Sequential(*layers_)), torch.randn(2, 3, 7, 7, dtype=torch.double), 1
                )
        cropped = in_inference(nn.Sequential(nn.ZeroPad2d(-1), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
        self.assert_contracted(cropped, torch.randn(2, 3, 7, 7, dtype=torch.double), 1)

    def test_refusals(self):
        with self.assertRaisesRegex(ct.ShapeError, "the model is in training mode"):
            ct.from_blocks(RepVGGBlock(4, 4))
        for compiled in (torch.compile(RepVGGBlock(4, 4), backend="eager"), torch.jit.script(nn.ReLU())):
            with self.assertRaisesRegex(ct.ShapeError, "0 .* is compiled; give the module"):
                ct.from_blocks(nn.Sequential(compiled).eval())
        with self.assertRaisesRegex(ct.ShapeError, "rbr_identity.weight is on the meta device"):
            ct.from_blocks(RepVGGBlock(4, 4).to("meta").eval())
        with self.assertRaisesRegex(ct.ShapeError, "0.weight has no shape before the first input; run the model once"):
            ct.from_blocks(nn.Sequential(nn.LazyConv2d(4, 3)).eval())
        for norm in (nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)):
            with self.assertRaisesRegex(ct.ShapeError, "0 .Conv2d. has .* 'weight' that cannot be .*prune.remove"):
                model = nn.Sequential(norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))
                model(torch.randn(1, 4, 5, 5))
                ct.from_blocks(model.eval())
        with self.assertRaisesRegex(ct.ShapeError, "the model .Sequential. has an attribute 'lines' that cannot be"):
            model = nn.Sequential(nn.Conv2d(4, 4, 3)).eval()
            model.lines = (line for line in "ab")
            ct.from_blocks(model)
        with self.assertRaisesRegex(ct.ShapeError, "the model is wrapped in DataParallel"):
            ct.verify(nn.DataParallel(RepVGGBlock(4, 4)).eval(), RepVGGBlock(4, 4).eval())

    def test_expanded_layers_are_contracted_with_their_norms(self):
        model = in_inference(ct.expand_(small_net(), "ck+fc"))
        plain, verdict = ct.from_blocks(model)
        self.assertEqual(len(verdict), 3)
        self.assertEqual([type(layer) for layer in layers(plain)], [nn.Conv2d, nn.Conv2d, nn.Linear])
        x = torch.randn(2, 3, 16, 16, dtype=torch.double)
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)


@needs_torch
class Verify(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.expanded = ct.expand_(small_net(), "cl+fc").eval()
        self.compact = ct.contract_(copy.deepcopy(self.expanded))

    def test_a_contraction_is_proved(self):
        verdict = ct.verify(self.expanded, self.compact)
        self.assertIs(verdict.holds, True, str(verdict))
        self.assertEqual(len(verdict), 3)

    def test_an_ulp_is_found(self):
        weight = self.compact[4].weight
        with torch.no_grad():
            weight[3, 2, 1, 0] = torch.nextafter(weight[3, 2, 1, 0], torch.tensor(torch.inf))
        verdict = ct.verify(self.expanded, self.compact)
        self.assertFalse(verdict.holds)
        self.assertTrue(ct.verify(self.expanded, self.compact, accumulator=torch.float).holds)
        with torch.no_grad():
            weight[3, 2, 1, 0] += 1e-2
        verdict = ct.verify(self.expanded, self.compact, accumulator=torch.float)
        self.assertFalse(verdict.holds)
        self.assertIn("weight[3, 2, 1, 0]", str(verdict))

    def test_what_is_too_large_to_run_is_not_proved(self):
        model = nn.Sequential(nn.Conv3d(2, 2, 1, padding=6), nn.Conv3d(2, 2, 9)).eval()
        plain, verdict = ct.from_blocks(model)  # nothing is wrong
        self.assertIs(verdict.holds, None)
        self.assertEqual([proof.holds for proof in verdict[0].proofs], [True, True, None])
        self.assertRegex(str(verdict), r"structure: not proved; its matrices would have [\d,]+ rows, more than 2,048")
        with torch.no_grad():
            next(plain.parameters())[0, 0, 0, 0, 0] += 1
        self.assertIs(ct.verify(model, plain).holds, False)  # found by another proof
        plain, _ = ct.from_blocks(model)
        self.assertIs(ct.verify(nn.Sequential(model, nn.ReLU()).eval(), plain).holds, False)

    def test_other_models_are_different(self):
        for what, change in {
            "activation": lambda m: setattr(m, "2", nn.GELU()),
            "pool": lambda m: setattr(m, "3", nn.MaxPool2d(3)),
            "stride": lambda m: setattr(m[0], "stride", (2, 2)),
            "bias": lambda m: setattr(m[9], "bias", None),
        }.items():
            with self.subTest(what):
                other = copy.deepcopy(self.compact)
                change(other)
                self.assertFalse(ct.verify(self.expanded, other.eval()).holds)
        self.assertFalse(ct.verify(self.expanded, self.compact[:-1].eval()).holds)

    def test_what_a_module_does_not_print_counts(self):
        model = nn.MultiheadAttention(8, 2).eval()
        other = nn.MultiheadAttention(8, 4).eval()
        other.load_state_dict(model.state_dict())
        for each, holds in ((copy.deepcopy(model), True), (other, False)):
            networks = [copy.deepcopy(Attention(attention)).eval() for attention in (model, each)]
            self.assertIs(ct.verify(*networks).holds, holds)

    def test_code_that_cannot_be_traced(self):
        class Dynamic(nn.Module):
            def __init__(self, scale=1.0):
                super().__init__()
                self.scale, self.block = scale, nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
                self.register_buffer("shift", torch.zeros(4))

            def forward(self, x):
                return self.block(x) if x.sum() > self.scale else x

        model = Dynamic().eval()
        plain, verdict = ct.from_blocks(model)
        self.assertEqual([region.name for region in verdict], ["block.0"])
        self.assertIs(ct.verify(model, plain).holds, True)
        other = Dynamic(2.0).eval()
        other.load_state_dict(model.state_dict())
        shifted, trained, more = copy.deepcopy(plain), copy.deepcopy(plain), copy.deepcopy(plain)
        shifted.shift[1] = 1
        with torch.no_grad():
            next(trained.parameters())[0, 0] += 1
        more.add_module("more", nn.ReLU())
        for each in (other, shifted, trained, more.eval()):
            self.assertIs(ct.verify(model, each).holds, False)
        for name, a, b in (
            ("listed", [1.0, 2.0], [1.0, 3.0]),
            ("mapped", {"a": torch.ones(2)}, {"a": torch.zeros(2)}),
            ("tensor", torch.ones(2), torch.zeros(2)),
            ("_private", 1.0, 3.0),
            ("unknown", (i for i in "a"), (i for i in "a")),  # which nothing can compare
            ("module", [nn.Conv2d(1, 1, 1)], [nn.Conv2d(1, 1, 1)]),
        ):
            mine, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
            setattr(mine, name, a), setattr(theirs, name, b)
            with self.subTest(name):
                self.assertIs(ct.verify(mine, theirs).holds, False)
                setattr(theirs, name, a)
                self.assertIs(ct.verify(mine, theirs).holds, True)
        theirs = copy.deepcopy(plain)
        theirs.register_forward_hook(lambda module, arguments, output: 2 * output)
        self.assertIs(ct.verify(plain, theirs).holds, False)
        with self.assertRaisesRegex(ct.ShapeError, "cannot trace 0 .Dynamic and Conv2d. to compare it"):
            ct.verify(nn.Sequential(model, Attention(plain)).eval(), nn.Sequential(nn.Conv2d(4, 4, 1), plain).eval())

    def test_what_a_parametrization_does_not_save_counts(self):
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("mask", torch.ones(4, 4, 1, 1), persistent=False)
                self.sizes = torch.ones(2)

            def forward(self, weight):
                return weight * self.mask

        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
        parametrize.register_parametrization(model[0], "weight", Masked())
        other = copy.deepcopy(model.eval())
        self.assertIs(ct.verify(model, other).holds, True)
        other[0].parametrizations.weight[0].mask.zero_()
        self.assertIs(ct.verify(model, other).holds, False)

    def test_what_paid_is_other_than_what_is_joined_first(self):
        """From the first on, two layers are one but not all three; contracted are the last two."""
        model = in_inference(nn.Sequential(
            nn.Conv3d(4, 4, (1, 2, 1), (1, 2, 2), (1, 0, 2), (1, 1, 2), 4, bias=False),
            nn.Conv3d(4, 4, (1, 1, 2), (1, 2, 1), (1, 0, 2), (2, 2, 1), bias=False),
            nn.Conv3d(4, 2, (1, 2, 1), padding=1, bias=False),
        ))  # fmt: skip
        plain, verdict = ct.from_blocks(model)
        self.assertIs(verdict.holds, True)
        self.assertIs(ct.verify(plain, model).holds, True)
        with torch.no_grad():
            next(plain.parameters())[0, 0, 0, 0, 0] += 1
        self.assertIs(ct.verify(model, plain).holds, False)

    def test_an_identity_before_branches(self):
        block = nn.Sequential(nn.Identity(), RepVGGBlock(4, 4).rbr_dense)
        self.assertIs(ct.from_blocks(in_inference(block))[1].holds, True)
        model = in_inference(nn.Sequential(nn.Identity(), ACBlock(4, 4)))
        plain, verdict = ct.from_blocks(model)
        self.assertEqual((len(verdict), verdict.holds), (1, True))

        class Ranked(nn.Module):
            """A norm that takes its rank from a convolution which reads the same."""

            def __init__(self):
                super().__init__()
                self.norm, self.conv = nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, padding=1)
                self.after = nn.Sequential(nn.Conv1d(4, 4, 1, bias=False), nn.BatchNorm1d(4))

            def forward(self, x):
                return self.norm(x) + self.conv(x) + self.after(x)

        plain, verdict = ct.from_blocks(nn.Sequential(nn.Identity(), Ranked()).eval())
        self.assertEqual((len(verdict), verdict.holds), (1, True))

    def test_other_regions_than_those_that_pay(self):
        """Both have the same linear regions, whatever was contracted in one of them."""
        model = in_inference(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 2), nn.Linear(2, 8)))
        plain, verdict = ct.from_blocks(model)
        self.assertEqual([type(layer) for layer in layers(plain)], [nn.Linear] * 2)
        self.assertIs(verdict.holds, True)
        whole = nn.Sequential(nn.Linear(8, 8)).double().eval()
        with torch.no_grad():
            a, b, c = (layer.weight for layer in model)
            whole[0].weight.copy_(c @ b @ a)
            whole[0].bias.copy_(model(torch.zeros(8, dtype=torch.double)))
        self.assertIs(ct.verify(model, whole).holds, True)

    def test_equal_layers_of_one_precision(self):
        self.expanded.double()
        self.assertIs(ct.verify(self.expanded[0], copy.deepcopy(self.expanded[0])).holds, True)
        self.compact.double()
        self.assertIs(ct.verify(self.compact, copy.deepcopy(self.compact)).holds, True)

    def test_nan_fails(self):
        with torch.no_grad():
            self.compact[0].weight[0, 0, 0, 0] = torch.nan
        self.assertFalse(ct.verify(self.expanded, self.compact).holds)


@needs_torch
class Proofs(unittest.TestCase):
    """Each proof finds a mistake of its own kind."""

    def setUp(self):
        torch.manual_seed(0)

        def conv(inside, outside, kernel, padding=0, dilation=1, groups=1):
            both = (kernel, kernel), (1, 1), ((padding, padding),) * 2, (dilation, dilation)
            return ConvShape(inside, outside, *both, groups)

        self.form = Chain([conv(2, 4, 3, 2), Sum([conv(4, 4, 3, 0, 2), conv(4, 4, 1, -2)]), conv(4, 2, 1, groups=2)])
        shapes = ct.shapes.leaves(self.form)
        self.parameters = [Parameters(torch.randn(s.weight_shape).double(), None, None) for s in shapes]
        self.contraction = ct.contraction.Contraction(self.form)
        self.weight = self.contraction.weight([p.weight for p in self.parameters])

    def proofs(self):
        return {proof.name: proof.holds for proof in prove(self.form, self.parameters, self.weight, None)}

    def test_what_is_right_is_proved(self):
        self.assertEqual(self.proofs(), {"algebra": True, "rounding": True, "structure": True})

    def test_a_wrong_step_is_found(self):
        steps = ct.contraction.Contraction.weight_by_steps

        def wrong(self, weights, reduce=lambda x: x):
            return steps(self, weights, reduce).flip(-1)

        ct.contraction.Contraction.weight_by_steps = wrong
        try:
            self.assertEqual(self.proofs(), {"algebra": False, "rounding": True, "structure": False})
        finally:
            ct.contraction.Contraction.weight_by_steps = steps

    def test_a_wrong_weight_is_found(self):
        self.weight[1, 0, 2, 2] += 1e-12
        self.assertEqual(self.proofs(), {"algebra": True, "rounding": False, "structure": True})

    def test_a_border_is_found(self):
        """The borders of random chains, by running them: nonzero just where outputs differ, as deep as stated."""
        generator = torch.Generator().manual_seed(0)

        def draw(low, high):
            return int(torch.randint(low, high, (), generator=generator))

        inexact = 0
        for _ in range(150):
            chain, channels = [], 2
            for _ in range(draw(2, 5)):
                kernel, dilation = draw(1, 4), draw(1, 3)
                padding = ((draw(0, 3), draw(0, 3)),)
                chain.append(ConvShape(channels, 2, (kernel,), (draw(1, 3),), padding, (dilation,), 1, draw(0, 2) == 1))
            form = Chain(chain)
            contraction = ct.contraction.Contraction(form)
            weights = [torch.randint(1, 1000, s.weight_shape, generator=generator).double() for s in chain]
            biases = [torch.randint(1, 1000, (2,), generator=generator).double() if s.bias else None for s in chain]
            ((start, end),) = border(form)
            deepest = [0, 0]
            for size in range(60, 60 + contraction.shape.stride[0]):
                x = torch.randint(1, 1000, (1, 2, size), generator=generator).double()
                layered = ct.contraction.apply_layers(form, x, iter(zip(weights, biases)))
                whole = ct.contraction.apply(
                    contraction.shape, x, contraction.weight(weights), contraction.bias(weights, biases)
                )
                relative = ((layered - whole).abs() / layered.abs().clamp_min(1)).amax((0, 1)) > 1e-9
                differing = relative.nonzero().flatten().tolist()
                count = layered.shape[-1]
                self.assertTrue(all(i < start or i >= count - end for i in differing), str(form))
                deepest[0] = max([deepest[0], *(i + 1 for i in differing if i < count // 2)])
                deepest[1] = max([deepest[1], *(count - i for i in differing if i >= count // 2)])
            self.assertEqual(deepest, [start, end], str(form))
            inexact += (start, end) != (0, 0)
        self.assertGreater(inexact, 20)

    def test_an_inexact_chain_is_refused(self):
        layer = ConvShape(2, 2, (3, 3), (1, 1), ((1, 1),) * 2, (1, 1))
        with self.assertRaisesRegex(ct.InexactError, "layer 2 .conv2d 2->2 @3x3 p1x1. pads with zeros where its input"):
            ct.shapes.require_exact(Chain([layer, layer]))


if __name__ == "__main__":
    unittest.main()
