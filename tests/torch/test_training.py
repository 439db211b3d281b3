# SPDX-License-Identifier: Apache-2.0
"""Batch norms in training, contracted, beside the layers run in turn: statistics, outputs, gradients, steps."""

import collections
import math
import operator
import os
import socket
import sys
import types
import unittest
import warnings
from unittest import mock

from support import HAVE_TORCH, needs_torch

if HAVE_TORCH:
    import copy

    import torch
    from support import difference, gradients
    from test_blocks import ACBlock, MobileOneBlock, RepVGGBlock, Rounded, conv_bn
    from torch import nn
    from torch.autograd import forward_ad
    from torch.nn import functional as F
    from torch.nn.utils import prune
    from torch.utils.checkpoint import checkpoint

    import concertina.torch as ct
    from concertina.torch.moments import PatchMoments, added, channel_means, patch_moments
    from concertina.torch.shapes import Chain, ConvShape
    from concertina.torch.training import TrainingContraction

    class ReadAndWritten(nn.Module):
        """A block whose output another block reads, and one that is written to before it is read."""

        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = (Branches(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1)) for _ in range(3))

        def forward(self, x):
            y = self.one(x)
            y = self.two(y).relu() + y
            y.relu_()
            z = self.last(y)
            F.relu(z[:, :2], inplace=True)
            return z * 2

    FACTOR, SCALE, SETTINGS, constants = 1.0, 1.0, {"factor": 1.0}, types.ModuleType("constants")
    constants.factor = 1.0

    class Constants:
        factor, of_class, steps = 1.0, 1.0, 1

    OBJECT = Constants()
    OBJECT.inner = Constants()

    def _scaled(x):
        return x * SCALE

    class Branches(nn.Module):
        def __init__(self, *branches):
            super().__init__()
            self.branches = nn.ModuleList(branches)

        def forward(self, x):
            return sum(branch(x) for branch in self.branches)

    def norms(*channels, rank=2):
        return [(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](c) for c in channels]

    def cl(inside=4, outside=6, rate=2, stride=1):
        """CL with a norm after each layer."""
        first = nn.Conv2d(inside, rate * inside, 1, padding=1, bias=False)
        middle = nn.Conv2d(rate * inside, rate * outside, 3, stride, bias=False)
        last = nn.Conv2d(rate * outside, outside, 1, bias=False)
        each = norms(rate * inside, rate * outside, outside)
        return nn.Sequential(first, each[0], middle, each[1], last, each[2])

    def diverse(channels, outside):
        """The branches of DBB, each padded in its first layer."""
        one, three = (nn.Conv2d(channels, outside, 1, padding=1, bias=False) for _ in range(2))
        middle = nn.Conv2d(outside, outside, 3, bias=False)
        return Branches(
            conv_bn(channels, outside, 3, 1), conv_bn(channels, outside, 1),
            nn.Sequential(one, *norms(outside), nn.AvgPool2d(3, 1), *norms(outside)),
            nn.Sequential(three, *norms(outside), middle, *norms(outside)),
        )  # fmt: skip

    def conv3d_bn(kernel, padding):
        return nn.Sequential(nn.Conv3d(2, 2, kernel, (2, 1, 1), padding, bias=False), *norms(2, rank=3))

    def conv1d_bn(kernel, padding, dilation=1):
        return nn.Sequential(nn.Conv1d(3, 4, kernel, 1, padding, dilation, bias=False), *norms(4, rank=1))

    # Blocks and their inputs.
    BLOCKS = {
        "CL": (cl, (3, 4, 7, 6)),
        "CL, stride 2": (lambda: cl(stride=2), (3, 4, 7, 6)),
        "RepVGG": (lambda: RepVGGBlock(4, 4), (3, 4, 7, 6)),
        "RepVGG, stride 2": (lambda: RepVGGBlock(4, 6, stride=2), (3, 4, 7, 6)),
        "RepVGG, groups": (lambda: RepVGGBlock(6, 6, groups=3), (3, 6, 5, 6)),
        "MobileOne, depthwise": (lambda: MobileOneBlock(5), (3, 5, 6, 4)),
        "MobileOne, 1x1": (lambda: Branches(*(conv_bn(4, 4, 1) for _ in range(4)), *norms(4)), (3, 4, 5, 5)),
        "ACNet": (lambda: ACBlock(5, 6), (3, 5, 6, 7)),
        "DBB": (lambda: diverse(4, 5), (2, 4, 6, 7)),
        "a residual within": (
            lambda: nn.Sequential(Branches(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1), nn.Identity()), *norms(4)),
            (3, 4, 5, 6),
        ),
        "branches, then a norm": (
            lambda: nn.Sequential(Branches(conv_bn(4, 4, 5, 2), conv_bn(4, 4, 3, 1)), *norms(4, 4)),
            (3, 4, 7, 6),
        ),
        "a small map": (lambda: RepVGGBlock(4, 4), (5, 4, 2, 1)),
        "dilation, 1d": (lambda: Branches(conv1d_bn(3, 3, 3), conv1d_bn(5, 2), conv1d_bn(1, 0)), (3, 3, 9)),
        "even kernel, 1d": (lambda: Branches(conv1d_bn(4, "same"), conv1d_bn(1, 0)), (3, 3, 9)),
        "3d": (lambda: Branches(conv3d_bn(3, 1), conv3d_bn((1, 3, 1), (0, 1, 0))), (2, 2, 4, 3, 5)),
    }

    def made(name):
        """A block in double whose norms do something, gamma negative too, and an input whose channels differ."""
        torch.manual_seed(0)
        make, size = BLOCKS[name]
        block = make().double()
        for module in block.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(module.weight).sign())
                    module.bias.normal_()
        channels = (1, size[1], *[1] * (len(size) - 2))
        x = torch.randn(size, dtype=torch.double) * (0.5 + torch.rand(channels)) + torch.randn(channels)
        return block, x

    def step(block, x):
        """Output, the gradients of all parameters as one, that of the input, and the buffers as one."""
        x = x.clone().requires_grad_()
        output, *others = gradients(block, x)
        buffers = [buffer.double().flatten() for buffer in block.buffers()]
        return [output, torch.cat([gradient.flatten() for gradient in others]), x.grad, torch.cat(buffers)]

    def contracted(block, when="always"):
        return ct.contract_in_training_(copy.deepcopy(block), when)

    def contractions(model):
        return [each for module in model.modules() for each in getattr(type(module), "contractions", ())]


@needs_torch
class Moments(unittest.TestCase):
    def shapes(self):
        def shape(channels, kernel, stride, padding, dilation, groups):
            return ConvShape(channels, channels, kernel, stride, padding, dilation, groups)

        yield shape(4, (3, 3), (1, 1), ((1, 1),) * 2, (1, 1), 1), (5, 6)
        yield shape(4, (3, 3), (2, 1), ((1, 1),) * 2, (1, 1), 2), (5, 6)
        yield shape(4, (3, 2), (1, 1), ((2, 1), (0, 1)), (2, 3), 4), (9, 6)
        yield shape(3, (1, 3), (1, 1), ((0, 0), (1, 1)), (1, 1), 1), (4, 5)
        yield shape(6, (1, 1), (2, 2), ((0, 0),) * 2, (1, 1), 6), (4, 5)
        yield shape(6, (7, 7), (1, 1), ((3, 3),) * 2, (1, 1), 3), (3, 4)  # no pixel is read by all taps
        yield shape(2, (5,), (1,), ((2, 2),), (1,), 1), (4,)
        yield shape(2, (2,), (1,), ((0, 0),), (5,), 1), (7,)  # pixels that no tap reads
        yield shape(2, (2, 3, 2), (1, 1, 1), ((1, 1), (0, 0), (2, 1)), (1, 1, 2), 2), (4, 5, 6)

    def by_definition(self, x, shape):
        """Mean and covariance from all patches, element by element."""
        columns = []
        for image in x:
            for at in torch.cartesian_prod(*map(torch.arange, shape.output_size(x.shape[2:]))).reshape(-1, shape.rank):
                rows = []
                for channel in range(shape.in_channels):
                    for tap in torch.cartesian_prod(*map(torch.arange, shape.kernel_size)).reshape(-1, shape.rank):
                        geometry = zip(at.tolist(), shape.stride, shape.padding, tap.tolist(), shape.dilation)
                        pixel = [t * s - p + k * d for t, s, (p, _), k, d in geometry]
                        inside = all(0 <= i < n for i, n in zip(pixel, x.shape[2:]))
                        rows.append(image[(channel, *pixel)] if inside else image.new_zeros(()))
                columns.append(torch.stack(rows))
        patches = torch.stack(columns).reshape(len(columns), shape.groups, -1).transpose(0, 1)
        mean = patches.mean(1)
        apart = patches - mean.unsqueeze(1)
        return len(columns), mean, apart.transpose(1, 2) @ apart / len(columns)

    def test_moments_and_their_gradient_are_those_of_the_patches(self):
        torch.manual_seed(0)
        for shape, size in self.shapes():
            with self.subTest(str(shape)):
                x = torch.randn(2, shape.in_channels, *size, dtype=torch.double, requires_grad=True)
                count, mean, covariance = self.by_definition(x, shape)
                own = PatchMoments.apply(x, channel_means(x), shape, None)
                self.assertEqual(own[2], count)
                self.assertLess(difference(own[:2], (mean, covariance)), 1e-13)
                gradient = torch.randn_like(mean), torch.randn_like(covariance)
                found, expected = (torch.autograd.grad(each, x, gradient) for each in (own[:2], (mean, covariance)))
                self.assertLess(difference(found, expected), 1e-12)

    def test_those_of_parts_are_added(self):
        torch.manual_seed(0)
        for shape, size in self.shapes():
            x = torch.randn(5, shape.in_channels, *size, dtype=torch.double) + 3
            whole = patch_moments(x, shape)
            parts = added(*patch_moments(x[:2], shape), *patch_moments(x[2:], shape))
            self.assertEqual(whole[0], parts[0])
            self.assertLess(difference(parts[1:], whole[1:]), 1e-13)

    def test_those_of_an_empty_batch_add_nothing(self):
        torch.manual_seed(0)
        for shape, size in self.shapes():
            x = torch.randn(3, shape.in_channels, *size, dtype=torch.double)
            some, none = patch_moments(x, shape), patch_moments(x[:0], shape)
            self.assertEqual(none[0], 0)
            for total in (added(*some, *none), added(*none, *some)):
                self.assertEqual(total[0], some[0])
                self.assertTrue(all(map(torch.equal, total[1:], some[1:])))
            for parts in (none, added(*none, *none)):
                self.assertTrue(all(torch.equal(part, torch.zeros_like(part)) for part in parts[1:]))

    def test_taps_that_read_nothing_have_no_variance(self):
        shape = ConvShape(1, 1, (3, 3), (1, 1), ((1, 1),) * 2, (1, 1))
        for count in range(2, 60):  # of 41 * 1e4 / 41 and the like, some are not 1e4
            _, mean, scatter = patch_moments(1e4 + torch.rand(count, 1, 1, 1, dtype=torch.double), shape)
            scatter[0, 4, 4] = mean[0, 4] = 0
            self.assertEqual(scatter.abs().max(), 0)
            self.assertEqual(mean.abs().max(), 0)

    def test_a_large_mean_takes_no_digits(self):
        torch.manual_seed(0)
        shape, size = next(self.shapes())
        shape = ConvShape(*[4] * 2, (3, 3), (1, 1), ((0, 0),) * 2, (1, 1))
        x = torch.randint(-9, 10, (3, 4, *size)).double() / 1024
        x[:, 1] = 0  # constant
        here, there = (patch_moments(each, shape)[2] for each in (x, x + 2**20))
        self.assertLess(difference([there], [here]), 1e-12)
        self.assertEqual(float(there.reshape(4, 9, 4, 9)[1].abs().max()), 0)


@needs_torch
class Training(unittest.TestCase):
    def test_each_block_is_its_layers(self):
        for name in BLOCKS:
            with self.subTest(name):
                block, x = made(name)
                own = contracted(block)
                self.assertEqual(len(contractions(own)), 1)
                self.assertEqual(list(own.state_dict()), list(block.state_dict()))
                self.assertIsInstance(own, type(block))
                self.assertLess(difference(step(own, x), step(block, x)), 1e-12)
                self.assertTrue(all(torch.equal(a, b) for a, b in zip(counts(own), counts(block), strict=True)))
                own.eval(), block.eval()
                self.assertLess(difference([own(x)], [block(x)]), 1e-12)
                plain, verdict = ct.from_blocks(own)
                self.assertIs(verdict.holds, True)
                self.assertLess(difference([plain(x)], [block(x)]), 1e-12)

    def test_blocks_that_read_blocks_and_what_is_written_to(self):
        torch.manual_seed(0)
        block, x = ReadAndWritten().double(), torch.randn(3, 4, 5, 6, dtype=torch.double)
        own = contracted(block)
        self.assertGreaterEqual(len(contractions(own)), 2)
        for ours, theirs in zip(step(own, x), step(block, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)

    def test_blocks_that_nobody_reads_move_their_statistics(self):
        class Unread(nn.Module):
            def __init__(self):
                super().__init__()
                self.unread, self.read = (Branches(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1)) for _ in range(2))

            def forward(self, x):
                self.unread(x)
                return self.read(x) + x

        torch.manual_seed(0)
        block, x = Unread().double(), torch.randn(3, 4, 5, 6, dtype=torch.double)
        own = contracted(block)
        own(x), block(x)
        buffers = [[buffer.double() for buffer in model.buffers()] for model in (own, block)]
        self.assertLess(difference(*buffers), 1e-12)

    def test_norms_that_nobody_reads_and_tensors_that_the_code_makes(self):
        class Own(Branches):
            def __init__(self):
                super().__init__(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1))
                self.unread = nn.BatchNorm2d(4, affine=False)

            def forward(self, x):
                self.unread(x)
                return super().forward(x) * torch.full((1,), 2.0)

        torch.manual_seed(0)
        block, x = Own().double(), torch.randn(3, 4, 5, 6, dtype=torch.double)
        own = contracted(block)
        self.assertEqual(len(contractions(own)), 1)
        self.assertEqual(list(own.state_dict()), list(block.state_dict()))
        for ours, theirs in zip(step(copy.deepcopy(own), x)[:3], step(block, x)[:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
        own(x)
        torch.testing.assert_close(own.unread.running_mean, block.unread.running_mean)

    def test_twenty_steps(self):
        for name in BLOCKS:
            with self.subTest(name):
                block, x = made(name)
                own = contracted(block)
                target = torch.randn_like(block(x)).detach()
                own.load_state_dict(block.state_dict())
                for model in (block, own):
                    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
                    for index in range(20):
                        optimizer.zero_grad()
                        batch = x + 0.1 * index
                        (model(batch) - target).square().mean().backward()
                        optimizer.step()
                states = ([t.double() for t in model.state_dict().values()] for model in (own, block))
                self.assertLess(difference(*([torch.cat([t.flatten() for t in state])] for state in states)), 1e-9)

    def test_in_float_no_further_from_double_than_the_layers(self):
        def hard(x):
            yield "", x
            yield "mean 1e4, deviation 1e-2", 1e4 + 0.01 * x
            constant = x.clone()
            constant[:, 0] = 3
            yield "a constant channel", constant
            yield "one image", x[:1]

        for name in BLOCKS:
            block, inputs = made(name)
            block.float()
            for what, x in hard(inputs.float()):
                with self.subTest(name, input=what):
                    exact = step(copy.deepcopy(block).double(), x.double())[:3]
                    errors = []
                    for model in (contracted(block), copy.deepcopy(block)):
                        found = [t.double() for t in step(model, x)[:3]]
                        errors.append([float((f - e).norm()) for f, e in zip(found, exact, strict=True)])
                    for own, layered, value in zip(*errors, exact, strict=True):
                        self.assertLessEqual(own, 4 * layered + 2**-24 * float(value.norm()))

    def test_norms_as_they_are_set(self):
        def each(block, change):
            for module in block.modules():
                if isinstance(module, nn.BatchNorm2d):
                    change(module)

        def untracked(norm):
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None

        changes = {
            "frozen": lambda block: block.rbr_1x1[1].eval(),
            "cumulative": lambda block: each(block, lambda norm: setattr(norm, "momentum", None)),
            "not tracked": lambda block: each(block, lambda norm: setattr(norm, "track_running_stats", False)),
            "no statistics": lambda block: each(block, untracked),
            "eps": lambda block: each(block, lambda norm: setattr(norm, "eps", 0.5)),
            "not affine": lambda block: setattr(block, "rbr_identity", nn.BatchNorm2d(4, affine=False).double()),
            "no gradient": lambda block: block.rbr_dense.requires_grad_(False),
        }
        for name, change in changes.items():
            with self.subTest(name):
                block, x = made("RepVGG")
                change(block)
                own = contracted(block)
                results = []
                for model in (own, block):
                    outputs = []
                    for batch in (x, x * 2 + 1):
                        model.zero_grad()
                        batch = batch.clone().requires_grad_()
                        outputs.append(model(batch))
                        outputs[-1].square().sum().backward()
                        outputs.append(batch.grad)
                    some = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                    outputs.append(torch.cat(some))
                    outputs += [buffer.double() for buffer in model.buffers()]
                    model.eval()
                    results.append([*outputs, model(x)])
                self.assertLess(difference(*results), 1e-12)

    def test_automatic_by_counts(self):
        def makes(block, x):
            """Whether it contracts: then its layers are not called."""
            own = contracted(block, "auto")
            with mock.patch.object(nn.Conv2d, "forward", autospec=True, side_effect=nn.Conv2d.forward) as called:
                own(x)
            return not called.called

        torch.manual_seed(0)
        x = torch.randn(8, 16, 16, 16)
        self.assertTrue(makes(Branches(*(conv_bn(16, 16, 1) for _ in range(4))), x))
        self.assertTrue(makes(cl(16, 16, 4), x))
        self.assertFalse(makes(RepVGGBlock(16, 16), x))
        self.assertFalse(makes(cl(16, 16, 4), x[:1, :, :4, :4]))  # not enough positions
        (mobile,) = contractions(contracted(Branches(*(conv_bn(16, 16, 1) for _ in range(4)))))
        layered, own = mobile.multiply_adds(8, (16, 16), torch.double)
        self.assertEqual(layered, 3 * 4 * 256 * 256 * 8)
        # The layer's passes, moments and their gradient for each pixel; four kernels times the covariance, to and fro.
        self.assertEqual(own - (3 + 1 + 1) * 256 * 256 * 8, 4 * 2 * 16 * 256 + 3 * 4 * 256)

    def test_a_network(self):
        torch.manual_seed(0)
        make = nn.Sequential(
            conv_bn(3, 4, 3, 1), nn.ReLU(), RepVGGBlock(4, 4), MobileOneBlock(4), nn.Dropout(0), diverse(4, 4),
            nn.Conv2d(4, 4, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        ).double()  # fmt: skip
        own = contracted(make)
        self.assertEqual(
            [type(module).__name__ for module in own][2:6:3], ["ContractedRepVGGBlock", "ContractedBranches"]
        )
        ct.expand_(own, "ck", when="always", preserve=True, rate=8)  # what is left
        x = torch.randn(4, 3, 8, 8, dtype=torch.double)
        self.assertLess(difference([own(x)], [make(x)]), 1e-12)
        copied = copy.deepcopy(own)
        self.assertTrue(torch.equal(copied(x), own(x)))
        ct.contract_(own)
        make.load_state_dict(own.state_dict())
        self.assertLess(difference([own.eval()(x)], [make.eval()(x)]), 1e-12)

    def test_what_is_not_exact_is_refused(self):
        def refused(message, model):
            with self.assertRaisesRegex(ct.ShapeError, message):
                ct.contract_in_training_(model)

        between = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        refused("no block .*Pad the first layer instead", between)
        reflect = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4))
        refused("pads with 'reflect'", Branches(reflect, conv_bn(4, 4, 1)))
        refused("no block", nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
        dropout = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(), nn.BatchNorm2d(4))
        refused("no block", dropout)
        hooked = conv_bn(4, 4, 1)
        hooked[0].register_forward_hook(lambda *_: None)
        refused("no block", Branches(hooked, conv_bn(4, 4, 3, 1)[0]))
        refused("already", contracted(RepVGGBlock(4, 4)))
        refused("wrapped in DataParallel", nn.DataParallel(RepVGGBlock(4, 4)))
        with self.assertRaisesRegex(ct.ShapeError, "when is 'never'"):
            ct.contract_in_training_(RepVGGBlock(4, 4), "never")
        ones = ConvShape(4, 4, (1, 1), (1, 1), ((0, 0),) * 2, (1, 1), 4, True)
        conv = ConvShape(4, 4, (3, 3), (1, 1), ((1, 1),) * 2, (1, 1))
        with self.assertRaisesRegex(ct.InexactError, "layer 2 .* pads with zeros"):
            TrainingContraction(Chain([ones, conv]), [True, False])

    def assert_same_steps(self, own, block, x):
        """To the bit, as the layers run in turn."""
        with mock.patch.object(TrainingContraction, "__call__", side_effect=AssertionError("contracts")):
            for _ in range(2):
                for ours, theirs in zip(step(own, x), step(block, x), strict=True):
                    self.assertTrue(torch.equal(ours, theirs))

    def test_hooks_that_come_later_run(self):
        """On whatever the block was made of: layers, norms and what holds them."""
        hooks = {
            "prune": lambda module: prune.l1_unstructured(module[0], "weight", amount=0.5),
            "container": lambda module: module.register_forward_hook(lambda _, inputs, output: output * 0.5),
            "layer": lambda module: module[0].register_forward_hook(lambda _, inputs, output: output * 0.5),
            "norm": lambda module: module[1].register_forward_pre_hook(lambda _, inputs: inputs[0].relu()),
            "backward": lambda module: module.register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] * 2,)),
        }
        for name, hook in hooks.items():
            with self.subTest(name):
                block, x = made("MobileOne, 1x1")
                own = contracted(block)
                for model in (own, block):
                    hook(model.branches[0])
                self.assert_same_steps(own, block, x)

    def test_hooks_of_all_modules_run(self):
        block, x = made("MobileOne, 1x1")
        own, seen = contracted(block), []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        self.addCleanup(handle.remove)
        own(x)
        self.assertIn(nn.Conv2d, seen)

    def test_hooks_on_what_still_runs_are_no_reason(self):
        block, x = made("RepVGG")
        own, seen = contracted(block), []
        own.nonlinearity.register_forward_hook(lambda *_: seen.append(1))
        own.register_forward_hook(lambda *_: seen.append(2))
        with mock.patch.object(nn.Conv2d, "forward", side_effect=AssertionError("runs the layers")):
            own(x)
        self.assertEqual(seen, [1, 2])

    def test_what_is_set_later_counts(self):
        """The model does what its code says of how it is now, and contracts when it is again as it was."""

        class Slots:
            __slots__ = ("offset",)

            def __init__(self):
                self.offset = 0.0

        class Setting:
            def __init__(self):
                self.factors, self.parts, self.slots = [1.0], {"bias": 0.0}, Slots()
                self.last, self.beside = collections.deque([0.0]), [Offset()]

        class Offset(nn.Module):
            offset = 0.0

        class Written(Branches):
            factor, slope = 1.0, 0.5

            def __init__(self, *branches):
                super().__init__(*branches)
                self.between, self.act, self.setting, self.way = nn.Identity(), F.relu, Setting(), {"scaled": [True]}
                self.shift = torch.zeros(())
                self.register_parameter("gain", None)

            def forward(self, x):
                y = super().forward(self.between(x))
                y = y if self.gain is None else y * self.gain
                y = y + self.setting.slots.offset + self.setting.last[0] + self.setting.beside[0].offset
                y = y * self.setting.factors[0] * self.factor if self.way["scaled"][0] else -y
                y = self.act(y + self.setting.parts["bias"] + self.shift) * self.slope
                return self.deployed(y) if hasattr(self, "deployed") else y

        def deploy(m):
            m.deployed = nn.Conv2d(4, 4, 1, bias=False).double()
            nn.init.ones_(m.deployed.weight)
            del m.branches[1:]

        def appended(m):
            branch = conv_bn(4, 4, 1).double()
            nn.init.ones_(branch[0].weight)
            m.branches.append(branch)

        class Wrapper(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                return self.layer(x).relu()

        def forwards(module, forward):
            module.forward = types.MethodType(forward, module)

        def larger(m):
            m.branches[0][0] = nn.Conv2d(4, 4, 5, padding=2, bias=False).double()
            nn.init.constant_(m.branches[0][0].weight, 0.1)

        changes = {
            "an attribute": lambda m: setattr(m, "factor", 0.5),
            "a function": lambda m: setattr(m, "act", torch.tanh),
            "an object's": lambda m: setattr(m.setting, "factors", [0.5]),
            "of slots": lambda m: setattr(m.setting.slots, "offset", 1.0),
            "a queue's": lambda m: m.setting.last.__setitem__(0, 1.0),
            "of a module in a list": lambda m: setattr(m.setting.beside[0], "offset", 1.0),
            "a list's": lambda m: m.setting.factors.__setitem__(0, 0.5),
            "a dictionary's": lambda m: m.setting.parts.update(bias=1.0),
            "a nested list's": lambda m: m.way["scaled"].__setitem__(0, False),
            "a tensor": lambda m: setattr(m, "shift", torch.ones(())),
            "a tensor in place": lambda m: m.shift.add_(1),
            "a parameter": lambda m: setattr(m, "gain", nn.Parameter(torch.full((), 2.0, dtype=torch.double))),
            "a new attribute": deploy,
            "appended": appended,
            "removed": lambda m: m.branches.__delitem__(0),
            "wrapped": lambda m: m.branches[0].__setitem__(0, Wrapper(m.branches[0][0])),
            "geometry": lambda m: [setattr(m.branches[0][0], *each) for each in (("dilation", 2), ("padding", 2))],
            "padding mode": lambda m: setattr(m.branches[0][0], "padding_mode", "circular"),
            "a forward": lambda m: forwards(m.branches[0], lambda s, x: 2 * s[1](s[0](x))),
            "of a layer": lambda m: forwards(m.branches[0][0], lambda s, x: F.conv2d(x, s.weight.abs(), None, 1, 1)),
            "no norm": lambda m: m.branches[0].__setitem__(1, nn.Identity()),
            "another norm": lambda m: m.branches[0].__setitem__(1, nn.GroupNorm(2, 4).double()),
            "a kernel": larger,
            "no identity": lambda m: setattr(m, "between", nn.ReLU()),
            "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m.branches[0][0]),
        }
        for name, change in changes.items():
            with self.subTest(name):
                torch.manual_seed(0)
                block = Written(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1), conv_bn(4, 4, 1)).double()
                x = torch.randn(3, 4, 6, 5, dtype=torch.double)
                own = contracted(block)
                self.assertLess(difference([own(x)], [block(x)]), 1e-12)
                own.load_state_dict(block.state_dict())
                before = block(x)
                for model in (own, block):
                    change(model)
                self.assertGreater(float((block(x) - before).abs().max()), 0.01) if name != "parametrized" else None
                own.load_state_dict(block.state_dict())
                self.assert_same_steps(own, block, x)
                copied = copy.deepcopy(own)
                self.assert_same_steps(copied, copy.deepcopy(block), x)
        block = Written(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1)).double()
        del block.shift
        block.register_buffer("shift", torch.zeros(()))  # so that a copy has it too
        own = contracted(block)
        with mock.patch.object(Written, "slope", 2.0):
            self.assert_same_steps(own, block, x)
        own.factor = own.setting.factors[0] = 0.5
        own.setting.factors[0] = 1.0
        del own.factor
        with mock.patch.object(nn.Conv2d, "forward", side_effect=AssertionError("runs the layers")):
            own(x)
            copy.deepcopy(own)(x)

    def test_what_no_code_reads_does_not_matter(self):
        class Counted(Branches):
            def __init__(self, *branches):
                super().__init__(*branches)
                self.epoch, self.losses, self.beside = 0, [], nn.Conv2d(4, 4, 1)

            def set_epoch(self, epoch):
                self.epoch = epoch

        changes = {
            "a new attribute": lambda m: setattr(m, "note", "seen"),
            "one that other code reads": lambda m: m.set_epoch(2),
            "a list": lambda m: m.losses.append(0.5),
            "of a layer": lambda m: setattr(m.branches[0][0], "epoch", 2),
            "of a norm": lambda m: setattr(m.branches[0][1], "epoch", 2),
            "of a container": lambda m: setattr(m.branches, "epoch", 2),
            "a buffer": lambda m: m.register_buffer("seen", torch.zeros(())),
            "a parameter": lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(()))),
            "a module": lambda m: m.add_module("head", nn.Conv2d(4, 4, 1)),
            "of a module that does not run": lambda m: setattr(m.beside, "stride", 2),
            "no module that does not run": lambda m: delattr(m, "beside"),
        }
        for name, change in changes.items():
            with self.subTest(name):
                torch.manual_seed(0)
                own = contracted(Counted(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1)))
                change(own)
                with mock.patch.object(nn.Conv2d, "forward", side_effect=AssertionError("runs the layers")):
                    with warnings.catch_warnings():
                        warnings.simplefilter("error", ct.ContractionWarning)
                        own(torch.randn(2, 4, 5, 5))

    def test_what_is_read_by_another_name_counts(self):
        def by_getattr(self, x):
            return self.sum(x) * getattr(self, "fac" + "tor")

        def by_dictionary(self, x):
            return self.sum(x) * vars(self).get("factor", 1)

        def asked_for(self, x):
            return self.sum(x) * (self.factor if hasattr(self, "factor") else 1)

        def by_a_function(self, x):
            return self.sum(x) * operator.attrgetter("factor")(self)

        def of_another(self, x):
            return self.sum(x) * self.branches[0].factor

        for forward in (by_getattr, by_dictionary, asked_for, by_a_function, of_another):

            class Named(Branches):
                sum = Branches.forward

            Named.forward = forward
            with self.subTest(forward.__name__):
                torch.manual_seed(0)
                block, x = Named(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1)).double(), torch.randn(2, 4, 5, 5).double()
                block.factor = block.branches[0].factor = 1
                own = contracted(block)
                for model in (own, block):
                    model.factor = model.branches[0].factor = 3
                self.assert_same_steps(own, block, x)

    def test_globals_and_what_is_closed_over_count(self):
        closed = 1.0

        class Global(Branches):
            def forward(self, x):
                y = super().forward(x) * FACTOR * SETTINGS["factor"] * OBJECT.factor * OBJECT.inner.factor
                return _scaled(y) * Constants.factor * constants.factor * closed * OBJECT.of_class

        def rebind(value):
            nonlocal closed
            closed = value

        module = sys.modules[__name__]
        changes = {
            "the global FACTOR": lambda: mock.patch.object(module, "FACTOR", 2.0),
            "the global SETTINGS": lambda: mock.patch.dict(SETTINGS, factor=2.0),
            "the global OBJECT": lambda: mock.patch.object(OBJECT, "factor", 2.0),
            "the global OBJECT ": lambda: mock.patch.object(OBJECT.inner, "factor", 2.0),
            "the global (OBJECT|Constants) ": lambda: mock.patch.object(type(OBJECT), "of_class", 2.0),
            "the global SCALE": lambda: mock.patch.object(module, "SCALE", 2.0),
            "the global (OBJECT|Constants)": lambda: mock.patch.object(Constants, "factor", 2.0),
            "the global constants": lambda: mock.patch.object(module.constants, "factor", 2.0),
        }
        torch.manual_seed(0)
        block, x = Global(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1)).double(), torch.randn(2, 4, 5, 5).double()
        own = contracted(block)

        def contracts():
            with mock.patch.object(nn.Conv2d, "forward", side_effect=AssertionError("runs the layers")):
                own(x)

        for name, change in changes.items():
            with self.subTest(name), change():
                with self.assertWarnsRegex(ct.ContractionWarning, name.strip()):
                    own(x)
                own.load_state_dict(block.state_dict())
                self.assert_same_steps(own, block, x)
            contracts()
        rebind(2.0)
        with self.assertWarnsRegex(ct.ContractionWarning, "forward"):
            own(x)
        own.load_state_dict(block.state_dict())
        self.assert_same_steps(own, block, x)
        rebind(1.0)
        with mock.patch.object(OBJECT, "steps", 2), mock.patch.dict(vars(module.constants), other=3):  # not named
            contracts()

    def test_a_module_that_no_longer_contracts_says_so_once(self):
        own = contracted(nn.Sequential(nn.ReLU(), nn.Sequential(RepVGGBlock(4, 4))))
        x, layer = torch.randn(2, 4, 5, 5), own[1][0].rbr_dense[0]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                own(x)
            self.assertEqual([], said)
            for mode, dilation in (("circular", (1, 1)), ("zeros", (2, 2)), ("zeros", (1, 1)), ("zeros", (2, 2))):
                layer.padding_mode, layer.dilation, layer.padding = mode, dilation, dilation
                for _ in range(3):
                    own(x)
        self.assertEqual([each.category for each in said], [ct.ContractionWarning] * 3)
        self.assertRegex(str(said[0].message), r"^1\.0 \(RepVGGBlock\) runs .*: padding_mode of rbr_dense\.0 is not as")

    def test_from_blocks_sees_what_is_set_later(self):
        class Scaled(Branches):
            factor = 1.0

            def forward(self, x):
                return super().forward(x) * self.factor

        own, x = contracted(Scaled(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1)).double()), torch.randn(2, 4, 5, 5).double()
        own.eval().factor = 0.5
        plain, verdict = ct.from_blocks(own)
        self.assertIs(verdict.holds, True)
        self.assertLess(difference([plain(x)], [own(x)]), 1e-12)

    def test_norms_that_change_later_are_taken_as_they_are(self):
        def each(block, change):
            for module in block.modules():
                if isinstance(module, nn.BatchNorm2d):
                    change(module)

        for name, value in {"momentum": 0.5, "eps": 0.1, "track_running_stats": False}.items():
            with self.subTest(name):
                block, x = made("RepVGG")
                own = contracted(block)
                for model in (own, block):
                    each(model, lambda norm, name=name, value=value: setattr(norm, name, value))
                with mock.patch.object(TrainingContraction, "_layered", side_effect=AssertionError("runs the layers")):
                    results = step(own, x)
                self.assertLess(difference(results, step(block, x)), 1e-12)

    def test_a_gradient_of_its_own_is_left(self):
        class Quantised(Branches):
            def forward(self, x):
                return super().forward(Rounded.apply(x))

        torch.manual_seed(0)
        model, x = Quantised(conv_bn(4, 4, 1), conv_bn(4, 4, 3, 1)), torch.randn(2, 4, 5, 5)
        with self.assertRaisesRegex(ct.ShapeError, "has no block"):
            contracted(model)
        own = contracted(nn.Sequential(model, nn.ReLU(), Branches(conv_bn(4, 4, 1), conv_bn(4, 4, 3, 1))))
        x.requires_grad_()
        own(x).sum().backward()
        self.assertGreater(float(x.grad.abs().max()), 0)

    def test_an_image_without_a_batch_is_refused_as_by_the_norms(self):
        block, x = made("RepVGG")
        for model in (contracted(block), block):
            with self.assertRaisesRegex(ValueError, "expected 4D input"):
                model(x[0])

    def test_one_value_for_each_channel_is_refused(self):
        block = RepVGGBlock(4, 4)
        own = contracted(block)
        for model in (own, block):
            with self.assertRaisesRegex(ValueError, "more than 1 value per channel"):
                model(torch.randn(1, 4, 1, 1))
        own.eval()(torch.randn(1, 4, 1, 1))

    def test_an_empty_batch_is_taken_as_by_the_norms(self):
        block, x = made("RepVGG")
        before = [buffer.clone() for buffer in block.buffers() if buffer.is_floating_point()]
        model = contracted(block)
        y = model(x[:0].requires_grad_())
        self.assertEqual(y.shape, block(x[:0]).shape)
        y.sum().backward()
        self.assertTrue(all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters()))
        after = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.assertTrue(all(map(torch.equal, after, before)))

    def test_code_that_depends_on_training_is_left_to_its_parts(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = RepVGGBlock(4, 4)

            def forward(self, x):
                return self.block(x) * (2 if self.training else 1)

        block, x = Scaled(), torch.randn(2, 4, 5, 5)
        own = contracted(block)
        self.assertIs(type(own), Scaled)
        for model in (own, block):
            model.block.rbr_dense[1].momentum = 1
        self.assertLess(difference([own(x)], [block(x)]), 1e-5)
        self.assertLess(difference([own.eval()(x)], [block.eval()(x)]), 1e-5)

    def test_a_norm_that_runs_twice_moves_its_statistics_in_turn(self):
        def doubled(self, x):
            y = self.b(self.c(x))
            return y + y + self.e(self.d(x))

        def other_order(self, x):
            p = self.b(self.d(x))
            return self.b(self.c(x)) + p + self.e(x)

        def between(self, x):
            p = self.b(self.d(x))
            z = self.b(2 * x).relu()
            return self.e(self.c(x)) + p + z

        def after(self, x):
            y = self.b(self.c(x)) + self.e(self.d(x))
            return y + self.b(2 * x).relu()

        for forward, blocks in ((doubled, 0), (other_order, 0), (between, 0), (after, 1)):

            class Shared(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
                    self.b, self.e = norms(4, 4)

            Shared.forward = forward
            with self.subTest(forward.__name__):
                torch.manual_seed(0)
                model, x = Shared().double(), torch.randn(3, 4, 5, 5, dtype=torch.double)
                own = copy.deepcopy(model)
                if blocks:
                    ct.contract_in_training_(own, "always")
                else:
                    with self.assertRaisesRegex(ct.ShapeError, "has no block"):
                        ct.contract_in_training_(own, "always")
                for ours, theirs in zip(step(own, x), step(model, x), strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)

    def test_a_norm_that_ran_by_itself_before(self):
        """In the same graph, which saved its running statistics."""
        block, x = made("RepVGG")
        own = contracted(block)
        found = []
        for model in (own, block):
            (model.rbr_dense(2 * x).square().sum() + model(x).square().sum()).backward()
            found.append([*(p.grad for p in model.parameters()), *(b.double() for b in model.buffers())])
        self.assertLess(difference(*found), 1e-11)

    def test_code_that_does_more_than_a_graph_is_left(self):
        class Opaque(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two, self.seen = conv_bn(4, 4, 1), conv_bn(4, 4, 3, 1), None

        def sees(self, x):
            self.seen = self.one(x) + self.two(x)
            return self.seen

        def without_gradient(self, x):
            with torch.no_grad():
                return self.one(x) + self.two(x)

        def writes(self, x):
            y = self.one(x)
            x.data.mul_(2)
            return y + self.two(x)

        def of_the_instance(self, x):
            return (self.one(x) + self.two(x)).relu()

        for forward in (sees, without_gradient, writes, of_the_instance):
            with self.subTest(forward.__name__):
                model = Opaque()
                if forward is of_the_instance:
                    model.forward = types.MethodType(forward, model)
                else:
                    Opaque.forward = forward
                with self.assertRaisesRegex(ct.ShapeError, "has no block"):
                    ct.contract_in_training_(model)
        model = Branches(conv_bn(4, 4, 1), conv_bn(4, 4, 3, 1))
        model.branches[0].register_forward_hook(lambda module, arguments, output: 2 * output)
        with self.assertRaisesRegex(ct.ShapeError, "has no block"):
            ct.contract_in_training_(model)

    def test_autocast_and_channels_last(self):
        block, x = made("RepVGG")
        own = contracted(block.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = own(x.float())
        self.assertEqual(y.dtype, torch.bfloat16)
        y.float().sum().backward()
        self.assertTrue(all(p.grad.dtype == torch.float for p in own.parameters()))
        block, x = made("RepVGG")
        other = contracted(block).to(memory_format=torch.channels_last)
        y = step(other, x.to(memory_format=torch.channels_last))
        self.assertLess(difference(y, step(block, x)), 1e-12)

    def test_checkpoints(self):
        for reentrant in (False, True):
            with self.subTest(reentrant=reentrant):
                block, x = made("MobileOne, depthwise")
                own, found = contracted(block), []
                for model in (own, block):
                    y = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
                    x.grad = None
                    y.sin().sum().backward()
                    state = [*(p.grad for p in model.parameters()), *(b.double() for b in model.buffers())]
                    found.append([y.detach(), x.grad, *state])
                self.assertLess(difference(*found), 1e-11)

    def test_gradients_have_no_gradients(self):
        block, x = made("RepVGG")
        own = contracted(block)
        (gradient,) = torch.autograd.grad(own(x.requires_grad_()).square().sum(), x, create_graph=True)
        with self.assertRaisesRegex(ct.ShapeError, "the gradient through a batch's moments has no gradient"):
            gradient.sum().backward()
        with self.assertRaisesRegex(ct.ShapeError, "the gradient through a batch's moments has no gradient"):
            torch.autograd.functional.hessian(lambda x: own(x).square().sum(), x.detach())

    def test_transforms_of_functions_and_forward_mode_run_the_layers(self):
        block, x = made("MobileOne, 1x1")
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):  # such norms PyTorch transforms
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        values = {name: value.detach() for name, value in block.named_parameters()}
        pairs = {name: torch.stack([value, -2 * value]) for name, value in values.items()}

        def by_dual_numbers(loss):
            with forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(value, value.cos()) for name, value in values.items()}
                return forward_ad.unpack_dual(loss(duals)).tangent

        for name, transformed in {
            "grad": lambda loss: torch.func.grad(loss)(values),
            "jvp": lambda loss: torch.func.jvp(loss, (values,), (values,)),
            "vmap": lambda loss: torch.func.vmap(loss)(pairs),
            "hessian": lambda loss: torch.func.hessian(loss)(values),
            "forward": by_dual_numbers,
        }.items():
            with self.subTest(name):
                found = []
                for model in (contracted(block), block):

                    def loss(p, model=model):
                        return torch.func.functional_call(model, p, (x,)).sin().sum()

                    found.append(torch.utils._pytree.tree_leaves(transformed(loss)))
                self.assertTrue(all(map(torch.equal, *found)))

    def test_compile(self):
        block, x = made("RepVGG")
        expected = step(copy.deepcopy(block), x)
        for options in ({}, {"dynamic": True}, {"fullgraph": True}):
            with self.subTest(options):
                torch.compiler.reset()
                own = contracted(block)
                compiled = torch.compile(own, backend="eager", **options)
                with mock.patch.object(TrainingContraction, "_layered", side_effect=AssertionError("runs the layers")):
                    self.assertLess(difference(step(compiled, x), expected), 1e-12)

    def test_in_float_a_shift_errs_as_by_the_norms(self):
        torch.manual_seed(0)
        block, x = RepVGGBlock(32, 32), torch.randn(16, 32, 14, 14)
        own, double = contracted(block), copy.deepcopy(block).double()
        exact, layered, found = gradients(double, x.double()), gradients(block, x), gradients(own, x)
        for (name, _), value, *both in zip(block.named_parameters(), exact[1:], layered[1:], found[1:]):
            if name.endswith("bias"):
                error, other = (float((each - value).norm()) for each in both)
                self.assertLess(other, 3 * error, name)

    def test_synchronised_norms_on_the_processor_without_other_workers(self):
        """They are run, wherever a convolution is near them; PyTorch has none."""
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.addCleanup(torch.distributed.destroy_process_group)
        grouped = Branches(conv_bn(4, 4, 3, 1, groups=4), conv_bn(4, 4, 1))  # more parameters as one layer
        blocks = {
            "with a norm": Branches(conv_bn(4, 4, 3, 1), conv_bn(4, 4, 1), *norms(4)),
            "after one convolution": nn.Sequential(conv_bn(4, 4, 3, 1), nn.ReLU(), RepVGGBlock(4, 4)),
            "before one": nn.Sequential(*norms(4), nn.Conv2d(4, 4, 3), nn.ReLU(), RepVGGBlock(4, 4)),
            "that costs more": nn.Sequential(RepVGGBlock(4, 4), nn.ReLU(), grouped),
            "no block": conv_bn(4, 4, 3, 1),
        }
        for name, block in blocks.items():
            for when in ("auto", "always"):
                with self.subTest(name, when=when):
                    torch.manual_seed(0)
                    block, x = block.double(), torch.randn(3, 4, 6, 5, dtype=torch.double)
                    own = contracted(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block)), when)
                    for ours, theirs in zip(step(own, x), step(copy.deepcopy(block), x), strict=True):
                        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)

    def test_always_contracts_what_costs_more(self):
        block = Branches(conv_bn(4, 4, 3, 1, groups=4), conv_bn(4, 4, 1)).double()
        x = torch.randn(3, 4, 6, 5, dtype=torch.double)
        self.assertEqual(len(contractions(contracted(block, "always"))), 1)
        with self.assertRaisesRegex(ct.ShapeError, "has no block"):
            contracted(block, "auto")
        for ours, theirs in zip(step(contracted(block), x), step(block, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)

    def test_synchronised_over_two_processes(self):
        names = ["RepVGG", "CL", "MobileOne, depthwise", "RepVGG" + EMPTY]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = torch.multiprocessing.get_context("spawn")  # threads of this process do not outlive a fork
        queue = context.Queue()
        workers = [context.Process(target=_one_of_two, args=(r, port, names, queue), daemon=True) for r in range(2)]
        for worker in workers:
            worker.start()
        found = dict(queue.get(timeout=300) for _ in workers)
        for worker in workers:
            worker.join(60)
            self.assertEqual(worker.exitcode, 0)
        for index, name in enumerate(names):
            with self.subTest(name):
                block, halves = two_halves(name)
                expected = step(block, torch.cat(halves))
                results = [[torch.tensor(v, dtype=torch.double) for v in found[rank][index]] for rank in range(2)]
                for part in (0, 2):  # outputs, gradients of the input
                    joined = torch.cat([result[part] for result in results])
                    self.assertLess(difference([joined], [expected[part]]), 1e-12)
                for result in results:  # gradients of parameters, buffers
                    self.assertLess(difference([result[1], result[3]], [expected[1], expected[3]]), 1e-12)


EMPTY = ", one worker empty"


def two_halves(name):
    """A block, and the batches of two processes, of different size."""
    block, x = made(name.removesuffix(EMPTY))
    if name.endswith(EMPTY):
        return block, (x, x[:0])
    return block, (x[:2], torch.cat([x[2:], x.flip(2) * 2 + 1]))


def counts(model):
    return [m.num_batches_tracked for m in model.modules() if hasattr(m, "num_batches_tracked")]


def _one_of_two(rank, port, names, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    results = []
    for name in names:
        block, halves = two_halves(name)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(contracted(block, "auto"))
        x = halves[rank].clone().requires_grad_()
        y = model(x)  # DistributedDataParallel takes SyncBatchNorm on devices only
        start = rank * len(halves[0]) * math.prod(y.shape[1:])
        phases = torch.arange(start, start + y.numel(), dtype=y.dtype).reshape(y.shape)
        torch.sin(phases + y).sum().backward()  # this half of the loss that `gradients` takes
        total = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        torch.distributed.all_reduce(total)
        buffers = torch.cat([buffer.double().flatten() for buffer in model.buffers()])
        results.append([t.detach().tolist() for t in (y, total, x.grad, buffers)])
    queue.put((rank, results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    unittest.main()
