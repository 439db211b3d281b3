# SPDX-License-Identifier: Apache-2.0
"""expand_, contract_ and report: exact at every geometry, and under what people train with."""

import io
import os
import socket
import unittest

from support import HAVE_TORCH, needs_torch

if HAVE_TORCH:
    import copy

    import torch
    from support import GEOMETRIES, difference, gradients, layered, small_net, with_when
    from torch import nn
    from torch.autograd import forward_ad
    from torch.distributed.fsdp import fully_shard
    from torch.nn.utils import parametrize, prune

    import concertina.torch as ct
    from concertina.torch import operators


def every_geometry(rates=(2, 4)):
    for name, (make, size, strategies) in GEOMETRIES.items():
        for strategy in strategies:
            for rate in rates:
                yield f"{name}, {strategy}, rate {rate}", make, size, strategy, rate


@needs_torch
class Exactness(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)

    def test_gradients_are_those_of_the_layers_in_turn(self):
        for name, make, size, strategy, rate in every_geometry():
            with self.subTest(name):
                model = ct.expand_(make().double(), strategy, rate=rate, when="always")
                x = torch.randn(size, dtype=torch.double)
                self.assertLess(difference(gradients(model, x), gradients(layered(model), x)), 1e-12)

    def test_float_is_as_near_to_double_as_the_layers_in_turn(self):
        for name, make, size, strategy, rate in every_geometry():
            with self.subTest(name):
                model = ct.expand_(make(), strategy, rate=rate, when="always")
                x = torch.randn(size)
                exact = gradients(copy.deepcopy(model).double(), x.double())

                def off(other, x=x, exact=exact):
                    return sum(float((a - b).norm() / b.norm()) for a, b in zip(gradients(other, x), exact))

                self.assertLess(off(model), 2 * off(layered(model)))

    def test_preserving_expansion_keeps_the_function(self):
        for name, make, _, strategy, rate in every_geometry(rates=(8,)):
            with self.subTest(name):
                module = make().double()
                expanded = ct.expand_(copy.deepcopy(module), strategy, rate=rate, preserve=True, when="always")
                off = float((expanded.weight - module.weight).detach().abs().max())
                self.assertLessEqual(off, 0 if strategy == "ck" else 1e-14)
                if module.bias is not None:
                    self.assertTrue(torch.equal(expanded.bias, module.bias))

    def test_contract_gives_plain_modules_with_the_same_names(self):
        for name, make, size, strategy, rate in every_geometry():
            with self.subTest(name):
                plain = make().double()
                model = ct.expand_(copy.deepcopy(plain), strategy, rate=rate)
                x = torch.randn(size, dtype=torch.double)
                y = model(x)
                ct.contract_(model)
                self.assertIs(type(model), type(plain))
                self.assertEqual(list(model.state_dict()), list(plain.state_dict()))
                self.assertEqual([p.shape for p in model.parameters()], [p.shape for p in plain.parameters()])
                self.assertTrue(all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters()))
                torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
                plain.load_state_dict(model.state_dict())

    def test_contraction_is_rounded_once(self):
        model = ct.expand_(nn.Conv2d(16, 8, 7, padding=3), "ck")
        exact = copy.deepcopy(model).double().weight.detach()
        self.assertTrue(torch.equal(ct.contract_(model).weight.detach(), exact.float()))

    def test_integers_contract_without_rounding(self):
        for name, make, size, strategy, rate in every_geometry():
            with self.subTest(name):
                model = ct.expand_(make().double(), strategy, rate=rate, when="always")
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.copy_(torch.randint(-3, 4, parameter.shape))
                x = torch.randint(-3, 4, size).double()
                self.assertTrue(torch.equal(model(x), layered(model)(x)))

    def test_gradient_of_the_gradient(self):
        model = ct.expand_(nn.Conv2d(2, 2, 5, padding=2).double(), "ck", rate=1, when="always")
        parameters = dict(model.named_parameters())
        x = torch.randn(1, 2, 5, 5, dtype=torch.double)

        def outputs(*values):
            return torch.func.functional_call(model, dict(zip(parameters, values)), (x,))

        self.assertTrue(torch.autograd.gradgradcheck(outputs, tuple(parameters.values())))

    def test_transforms_of_functions_and_forward_mode(self):
        model = ct.expand_(nn.Conv2d(2, 2, 3, padding=1).double(), "cl", rate=1, when="always")
        x = torch.randn(1, 2, 4, 4, dtype=torch.double)
        values = {name: value.detach() for name, value in model.named_parameters()}
        slopes = {name: torch.randn_like(value) for name, value in values.items()}
        pairs = {name: torch.stack([value, -2 * value]) for name, value in values.items()}
        together = ct.contract_together_(copy.deepcopy(model))

        def by_dual_numbers(loss, order=0):
            inputs = [value.clone().requires_grad_() for value in values.values()]
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(*each) for each in zip(inputs, slopes.values())]
                results = [loss(dict(zip(values, duals)))]
                if order:
                    results = torch.autograd.grad(results, inputs, create_graph=True)
                return [forward_ad.unpack_dual(each).tangent for each in results]

        for name, transformed in {
            "jvp": lambda loss: torch.func.jvp(loss, (values,), (slopes,)),
            "vjp": lambda loss: torch.func.vjp(loss, values)[1](torch.ones((), dtype=torch.double)),
            "grad": lambda loss: torch.func.grad(loss)(values),
            "vmap": lambda loss: torch.func.vmap(loss)(pairs),
            "gradients of several": lambda loss: torch.func.vmap(torch.func.grad(loss))(pairs),
            "hessian": lambda loss: torch.func.hessian(loss)(values),  # forward over reverse
            "forward": by_dual_numbers,
            "forward over reverse": lambda loss: by_dual_numbers(loss, 1),
        }.items():
            found = [
                torch.utils._pytree.tree_leaves(
                    transformed(lambda p, each=each: torch.func.functional_call(each, p, (x,)).sin().sum())
                )
                for each in (layered(model), model, together)
            ]
            with self.subTest(name):
                self.assertGreater(sum(float(each.detach().norm()) for each in found[0]), 0.1)
                for each in found[1:]:
                    self.assertLess(difference(each, found[0]), 1e-12)


@needs_torch
class Choice(unittest.TestCase):
    def test_auto_runs_what_is_cheaper(self):
        wide = ct.expand_(nn.Conv2d(64, 64, 3, padding=1), "cl")
        weight = wide.parametrizations.weight[0]
        self.assertFalse(weight.contracts(torch.empty(1, 64, 4, 4)))
        self.assertTrue(weight.contracts(torch.empty(8, 64, 32, 32)))
        self.assertTrue(weight.contracts(torch.empty(64, 2048, 2048)))  # one image, without the batch axis
        linear = ct.expand_(nn.Linear(64, 64), "fc").parametrizations.weight[0]
        self.assertFalse(linear.contracts(torch.empty(2, 64)))
        self.assertTrue(linear.contracts(torch.empty(2, 500, 64)))

    def test_both_ways_are_taken_and_agree(self):
        model = ct.expand_(nn.Conv2d(8, 8, 3, padding=1).double(), "cl")
        always, never = with_when(copy.deepcopy(model), "always"), layered(model)
        for size, same in ((2, never), (64, always)):
            x = torch.randn(1, 8, size, size, dtype=torch.double)
            self.assertTrue(torch.equal(model(x), same(x)))
            torch.testing.assert_close(always(x), never(x), rtol=0, atol=1e-12)

    def test_layers_are_chosen_by_kernel_and_by_name(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 5), nn.Linear(4, 4))

        def chosen(strategy, **options):
            return [row["name"] for row in ct.report(ct.expand_(copy.deepcopy(model), strategy, **options)).rows]

        self.assertEqual(chosen("cl"), ["1", "2"])
        self.assertEqual(chosen("ck"), ["2"])
        self.assertEqual(chosen("cl+fc"), ["1", "2", "3"])
        self.assertEqual(chosen("ck+fc", only=["[23]"]), ["2", "3"])
        self.assertEqual(chosen("cl", only="0"), ["0"])
        model.add_module("again", model[1])
        self.assertEqual(chosen("cl", only="again"), ["1"])

    def test_report(self):
        report = ct.report(ct.expand_(small_net(), "cl+fc"))
        self.assertEqual([row["name"] for row in report.rows], ["0", "4", "9"])
        self.assertEqual(
            report.rows[1]["layers"], ["conv2d 8->32 @1x1 p3x3", "conv2d 32->64 @7x7", "conv2d 64->16 @1x1"]
        )
        self.assertEqual(report.rows[1]["multiply_adds"], 64 * 32 * 8 * 49 + 16 * 64 * 8 * 49)
        self.assertIn("conv2d 8->16 @7x7 p3x3", str(report))
        self.assertEqual(str(ct.report(small_net())), "nothing is expanded")

    def test_refusals(self):
        tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        tied[1].weight = tied[0].weight
        for pattern, call in {
            "pads with 'reflect'": lambda: ct.expand_(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "cl"),
            "CK expands kernels larger": lambda: ct.expand_(nn.Conv2d(1, 1, 3), "ck"),
            "fc is for Linear": lambda: ct.expand_(nn.Conv2d(1, 1, 3), "fc"),
            "cl does not expand module .linear": lambda: ct.expand_(nn.Linear(2, 2), "cl"),
            "ck does not expand 9 .linear": lambda: ct.expand_(small_net(), "ck", only=["0", "9"]),
            "no module of Sequential is named '1[.]'": lambda: ct.expand_(small_net(), "cl", only=["0", "1."]),
            "no layer of Sequential is one that cl": lambda: ct.expand_(small_net(), "cl", only=[]),
            "wrapped in DataParallel": lambda: ct.expand_(nn.DataParallel(small_net()), "cl"),
            "is not a Linear or Conv": lambda: ct.expand_(nn.ConvTranspose2d(1, 1, 3), "cl"),
            "no layer of Sequential": lambda: ct.expand_(nn.Sequential(nn.ReLU()), "cl"),
            "there is no strategy": lambda: ct.expand_(small_net(), "clx"),
            "0.weight and 1.weight are one tied": lambda: ct.expand_(tied, "fc"),
            "tied": lambda: ct.expand_(tied, "fc", only="1"),
            "parametrized already": lambda: ct.expand_(ct.expand_(nn.Linear(2, 2), "fc"), "fc"),
            "rate 0 is not": lambda: ct.expand_(nn.Linear(2, 2), "fc", rate=0),
            "rate '4' is not": lambda: ct.expand_(nn.Linear(2, 2), "fc", rate="4"),
            "rate None is not": lambda: ct.expand_(nn.Linear(2, 2), "fc", rate=None),
            "no strategy None": lambda: ct.expand_(nn.Linear(2, 2), None),
            "no strategy .'cl'": lambda: ct.expand_(nn.Linear(2, 2), ["cl"]),
            "only is 0, not a pattern": lambda: ct.expand_(small_net(), "cl", only=0),
            "only is .0, 1., not a pattern": lambda: ct.expand_(small_net(), "cl", only=[0, 1]),
            "None is no module": lambda: ct.expand_(None, "cl"),
            "'net' is no module": lambda: ct.contract_("net"),
            "conv2d 0->4 .* has no channels": lambda: ct.expand_(nn.Conv2d(0, 4, 3), "cl"),
            "1 .linear 3->0.* has no channels": lambda: ct.expand_(nn.Sequential(nn.ReLU(), nn.Linear(3, 0)), "fc"),
            "when is": lambda: ct.expand_(nn.Linear(2, 2), "fc", when="often"),
        }.items():
            with self.subTest(pattern), self.assertRaisesRegex(ct.ShapeError, pattern):
                call()
        with self.assertRaisesRegex(ct.ExpansionError, "cannot represent the kernel"):
            ct.expand_(nn.Conv2d(2, 2, 7), "ck", rate=2, preserve=True)
        self.assertIsInstance(tied[1].weight, nn.Parameter)  # refused before anything was changed

    def test_what_is_refused_is_as_it_was(self):
        """A good layer comes first."""
        for message, bad, options in (
            ("1 computes its weight", prune.l1_unstructured(nn.Conv2d(4, 4, 5), "weight", amount=0.5), {}),
            ("1 computes its weight", prune.l1_unstructured(nn.Conv2d(4, 4, 5), "bias", amount=0.5), {}),
            ("1 computes its weight", nn.utils.weight_norm(nn.Conv2d(4, 4, 5)), {}),
            ("1 is parametrized", nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 5)), {"only": ["0", "1"]}),
            ("1 is parametrized", nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 5)), {}),
            ("has no channels", nn.Conv2d(4, 0, 5), {}),
            ("cannot represent", nn.Conv2d(4, 4, 5), {"preserve": True, "rate": 2}),
        ):
            for strategy in ("cl", "ck") if "represent" not in message else ("ck",):
                model = nn.Sequential(nn.Conv1d(4, 4, 5), bad)
                with self.subTest(message, strategy=strategy):
                    names = [name for name, _ in model.named_parameters()]
                    with self.assertRaisesRegex(ct.Error, message):
                        ct.expand_(model, strategy, **options)
                    self.assertEqual([name for name, _ in model.named_parameters()], names)
                    self.assertEqual(str(ct.report(model)), "nothing is expanded")

    def test_another_geometry_than_it_was_expanded_with_is_refused(self):
        changes = {"stride": (2, 1), "padding": (1, 1), "dilation": (2, 2), "groups": 2, "padding_mode": "reflect"}
        for name, value in changes.items():
            for when in ("always", "never"):
                model, x = ct.expand_(nn.Sequential(nn.Conv2d(2, 2, 3)), "cl", when=when), torch.randn(1, 2, 9, 9)
                setattr(model[0], name, value)
                with self.subTest(name, when=when):
                    for call in (
                        lambda: model(x),
                        lambda: ct.contract_together_(model)(x),
                        lambda: ct.contract_(model),
                        lambda: ct.from_blocks(copy.deepcopy(model).eval()),
                    ):
                        with self.assertRaisesRegex(ct.ShapeError, "another stride|pads with"):
                            call()
        layer = ct.expand_(nn.Conv2d(2, 2, 3), "cl")
        layer.padding = (1, 1)
        layer = ct.contract_(setattr(layer, "padding", (0, 0)) or layer)
        layer.padding = (1, 1)
        self.assertEqual(layer(torch.randn(1, 2, 3, 3)).shape, (1, 2, 3, 3))

    def test_contraction_of_copies_frozen_layers_and_without_gradients(self):
        model = ct.expand_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), "cl+fc").double()
        model[0].requires_grad_(False)
        model[1].parametrizations.bias.requires_grad_(False)
        kernel = torch.clone(model[0].weight)
        other = copy.deepcopy(model)
        ct.contract_(model)
        self.assertEqual([each.requires_grad for each in model.parameters()], [False, False, True, False])
        torch.testing.assert_close(other[0].weight, kernel)  # goes on
        with torch.no_grad():
            ct.contract_(other)
        self.assertTrue(torch.equal(other[0].weight, model[0].weight))
        self.assertIs(type(other[1]), nn.Linear)

    def test_a_frozen_bias_stays(self):
        layer = nn.Conv2d(3, 4, 3)
        layer.bias.requires_grad_(False)
        bias = layer.bias.clone()
        ct.expand_(layer, "cl")
        optimizer = torch.optim.SGD([each for each in layer.parameters() if each.requires_grad], lr=0.1)
        layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        self.assertTrue(torch.equal(layer.bias, bias))
        self.assertFalse(ct.contract_(layer).bias.requires_grad)
        self.assertTrue(torch.equal(layer.bias, bias))

    def test_replicas_are_refused(self):
        """nn.DataParallel makes them so for each device."""
        layer = ct.expand_(nn.Conv2d(3, 4, 3), "cl")
        with self.assertRaisesRegex(ct.ShapeError, "nn.DataParallel"):
            layer._replicate_for_data_parallel()(torch.randn(1, 3, 5, 5))

    def test_dtype_device_and_memory_format_stay(self):
        for make in (lambda: nn.Conv2d(4, 6, 5), lambda: nn.Conv3d(2, 4, 3)):
            for change in (
                lambda layer: layer.half(),
                lambda layer: layer.to("meta"),
                lambda layer: layer.to(memory_format=ct.expansion.CHANNELS_LAST[layer.weight.dim()]),
            ):
                for preserve in (False, True):
                    layer = change(make())
                    like = layer.weight
                    ct.expand_(layer, "cl", rate=8, preserve=preserve)
                    middle = layer.parametrizations.weight.original1
                    self.assertEqual((middle.dtype, middle.device), (like.dtype, like.device))
                    self.assertEqual(middle.is_contiguous(), like.is_contiguous())
                    ct.contract_(layer)
                    self.assertEqual((layer.weight.dtype, layer.weight.device), (like.dtype, like.device))
                    self.assertEqual(layer.weight.stride(), like.stride())

    def test_on_the_meta_device(self):
        layer = nn.Conv2d(3, 4, 3)
        weight = layer.weight.detach().clone()
        with torch.device("meta"):  # which says where new tensors are, not these
            ct.expand_(layer, "cl", preserve=True)
        torch.testing.assert_close(layer.weight, weight)
        with torch.device("meta"):
            model = small_net()
        for strategy in ("cl+fc", "ck+fc"):
            expanded = ct.expand_(copy.deepcopy(model), strategy, when="always")
            self.assertIn("conv2d 8->16 @7x7", str(ct.report(expanded)))
            self.assertEqual(expanded(torch.empty(2, 3, 16, 16, device="meta")).shape, (2, 10))
            contracted = ct.contract_(expanded)
            self.assertEqual(
                [(each.shape, each.device) for each in contracted.parameters()],
                [(each.shape, each.device) for each in model.parameters()],
            )

    def test_complex_layers_are_refused(self):
        model = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 3, dtype=torch.cfloat))
        with self.assertRaisesRegex(ct.ShapeError, "1 is torch.complex64"):
            ct.expand_(model, "cl")
        model = ct.expand_(nn.Sequential(nn.Conv2d(2, 2, 3)), "cl").to(torch.cfloat)
        with self.assertRaisesRegex(ct.ShapeError, "0 is torch.complex64"):
            ct.contract_(model)

    def test_what_is_added_is_in_the_mode_of_its_layer(self):
        for training in (True, False):
            model = ct.expand_(nn.Sequential(nn.Conv2d(2, 2, 3)).train(training), "cl")
            self.assertEqual({module.training for module in model.modules()}, {training})

    def test_another_parametrization_on_top_is_refused(self):
        layer = ct.expand_(nn.Conv2d(3, 4, 3), "cl")
        torch.nn.utils.parametrizations.spectral_norm(layer)
        with self.assertRaisesRegex(ct.ShapeError, "another parametrization on top"):
            ct.contract_(layer)

    def test_another_parametrization_on_top_is_run_whatever_is_cheaper(self):
        layer, x = ct.expand_(nn.Conv2d(3, 4, 3), "cl"), torch.randn(1, 3, 5, 5)
        torch.nn.utils.parametrizations.spectral_norm(layer.eval())
        found = [with_when(layer, when)(x) for when in ("always", "never", "auto")]
        self.assertTrue(torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]))

    def test_pruned_layers_of_an_expansion_are_as_they_are_pruned(self):
        """In the contraction, run in turn, and contracted right after a step, which the masks come after."""
        for when in ("always", "never"):
            with self.subTest(when):
                torch.manual_seed(0)
                model = with_when(nn.Sequential(ct.expand_(nn.Conv2d(4, 4, 3, padding=1), "cl")).double(), when)
                other = with_when(copy.deepcopy(model), "never" if when == "always" else "always")
                for each in (model, other):
                    own = each[0].parametrizations
                    for originals, index in (own.weight, 0), (own.weight, 1), (own.bias, 0):
                        prune.l1_unstructured(originals, f"original{index}", 0.3)
                x, outputs = torch.randn(2, 4, 6, 6, dtype=torch.double), []
                for each in (model, other):
                    optimizer = torch.optim.SGD(each.parameters(), 1e-4)
                    for _ in range(3):
                        optimizer.zero_grad()
                        outputs.append(each(x))
                        outputs[-1].square().sum().backward()
                        optimizer.step()
                self.assertLess(difference(outputs[:3], outputs[3:]), 1e-12)
                layer = ct.contract_(model)
                self.assertEqual([name for name, _ in layer.named_parameters()], ["0.weight", "0.bias"])
                self.assertLess(difference([layer(x)], [other(x)]), 1e-12)

    def test_one_number_for_all_axes(self):
        for name in ("stride", "padding", "dilation"):
            layer, x = nn.Conv2d(3, 4, 5, **{name: (2,)}).double(), torch.randn(1, 3, 11, 12).double()
            for strategy in ("cl", "ck"):
                own = ct.expand_(copy.deepcopy(layer), strategy, rate=8, preserve=True, when="never")
                torch.testing.assert_close(own(x), layer(x), rtol=0, atol=1e-13)

    def test_the_input_has_its_name(self):
        layer = ct.expand_(nn.Conv2d(3, 4, 3), "cl")
        x = torch.randn(1, 3, 5, 5)
        self.assertTrue(torch.equal(layer(input=x), layer(x)))

    def test_tied_originals_are_not_contracted_apart(self):
        model = nn.Sequential(ct.expand_(nn.Linear(4, 4), "fc"), ct.expand_(nn.Linear(4, 4), "fc"))
        model[1].parametrizations.weight.original1 = model[0].parametrizations.weight.original1
        with self.assertRaisesRegex(ct.ShapeError, "tied"):
            ct.contract_(model)

    def test_one_module_used_twice_is_expanded_once(self):
        shared = nn.Linear(4, 4).double()
        model = ct.expand_(nn.Sequential(shared, nn.ReLU(), shared), "fc", when="always")
        x = torch.randn(3, 4, dtype=torch.double)
        self.assertLess(difference(gradients(model, x), gradients(layered(model), x)), 1e-12)
        self.assertIs(ct.contract_(model)[0], model[2])

    def test_the_weight_cannot_be_assigned(self):
        with self.assertRaisesRegex(ct.ShapeError, "cannot be assigned"):
            ct.expand_(nn.Linear(2, 2), "fc").weight = torch.zeros(2, 2)


@needs_torch
class Training(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.model = ct.expand_(small_net(), "cl+fc", when="always")
        self.x = torch.randn(4, 3, 16, 16)

    def test_deepcopy_is_its_own(self):
        other = copy.deepcopy(self.model)
        before = self.model(self.x)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        self.assertTrue(torch.equal(self.model(self.x), before))
        self.assertEqual(float(other(self.x).detach().abs().max()), 0)
        ct.contract_(other)
        self.assertEqual(len(ct.report(self.model).rows), 3)

    def test_state_dict_and_save(self):
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        other = ct.expand_(small_net(), "cl+fc", when="always")
        other.load_state_dict(torch.load(file))
        self.assertTrue(torch.equal(other.eval()(self.x), self.model.eval()(self.x)))

    def test_autocast_keeps_weights_float(self):
        model, x = ct.expand_(nn.Conv2d(3, 4, 5, padding=2), "ck", when="always"), self.x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            weight, bias, y = model.weight, model.bias, model(x)
        self.assertEqual((weight.dtype, bias.dtype, y.dtype), (torch.float, torch.float, torch.bfloat16))
        self.assertTrue(torch.equal(weight, model.weight))
        y.float().sum().backward()
        self.assertTrue(all(p.grad.dtype == torch.float for p in model.parameters()))

    def test_channels_last(self):
        model = copy.deepcopy(self.model).double()
        other = copy.deepcopy(model).to(memory_format=torch.channels_last)
        x = self.x.double()
        self.assertFalse(other[0].parametrizations.weight.original1.is_contiguous())
        y = gradients(other, x.to(memory_format=torch.channels_last))
        self.assertLess(difference(y, gradients(model, x)), 1e-12)

    def test_together(self):
        together = ct.contract_together_(copy.deepcopy(self.model))
        self.assertTrue(all(map(torch.equal, gradients(together, self.x), gradients(self.model, self.x))))
        weight = together[0].parametrizations.weight[0]
        self.assertIsNone(weight.together)  # each call forgets what it contracted, with an error too
        with self.assertRaises(RuntimeError):
            together(self.x[:, :2])
        self.assertIsNone(weight.together)
        ct.contract_(together)
        self.assertFalse(together._forward_pre_hooks or together._forward_hooks)
        with self.assertRaisesRegex(ct.ShapeError, "no layer of Sequential is expanded"):
            ct.contract_together_(together)

    @unittest.skipUnless(HAVE_TORCH and operators.AVAILABLE, "the operators are not compiled (pip -C operators=on)")
    def test_together_is_one_call(self):
        together, calls = ct.contract_together_(self.model), []
        original = operators.contract_many
        self.addCleanup(setattr, operators, "contract_many", original)
        operators.contract_many = lambda chains: calls.append(len(chains)) or original(chains)
        together(self.x)
        self.assertEqual(calls, [3])

    def test_weight_decay_of_the_contraction(self):
        model = ct.expand_(nn.Linear(3, 2).double(), "fc")
        x = self.x[0, 0, :, :3].double()
        with parametrize.cached():
            model(x).sum().backward()
            plain = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
        with parametrize.cached():
            (model(x).sum() + 0.05 * model.weight.square().sum()).backward()
        w0, w1, w2 = (p.detach() for p in ct.expansion.originals(model.parametrizations.weight))
        decay = 0.1 * w2 @ w1 @ w0  # the gradient of 0.05 |F|^2 with respect to F
        torch.testing.assert_close(model.parametrizations.weight.original0.grad - plain[0], (w2 @ w1).T @ decay)

    def test_compile(self):
        for strategy, change in (("cl+fc", ct.contract_together_), ("ck+fc", lambda model: model)):
            model = change(ct.expand_(small_net().double(), strategy, when="auto"))
            x = self.x.double()
            expected = gradients(copy.deepcopy(model), x)
            for backend in ("aot_eager", "inductor"):
                with self.subTest(strategy=strategy, backend=backend):
                    torch.compiler.reset()
                    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
                    found = gradients(compiled, x)
                    if backend == "aot_eager":
                        self.assertTrue(all(map(torch.equal, found, expected)))
                    self.assertLess(difference(found, expected), 1e-12)

    def test_two_processes(self):
        model, x = copy.deepcopy(self.model).double(), self.x.double()
        model = nn.Sequential(*(m for m in model if not isinstance(m, nn.BatchNorm2d)))  # of a batch's statistics
        expected = gradients(model, x)[1:]
        for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
            with self.subTest(wrap.__name__), socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
                free.close()  # for the workers
                context = torch.multiprocessing.get_context("fork")
                queue = context.Queue()
                arguments = port, model, x, wrap, queue
                workers = [context.Process(target=_one_of_two, args=(rank, *arguments)) for rank in range(2)]
                for worker in workers:
                    worker.start()
                found = [[torch.tensor(g, dtype=torch.double) for g in queue.get(timeout=60)] for _ in workers]
                for worker in workers:
                    worker.join(60)
                    self.assertEqual(worker.exitcode, 0)
                for each in found:
                    self.assertLess(difference(each, expected), 1e-12)


def _one_of_two(rank, port, model, x, wrap, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    model.zero_grad()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    parallel = wrap(model.eval()).train()
    for change in (ct.contract_, ct.contract_together_, ct.from_blocks, lambda m: ct.expand_(m, "cl")):
        with unittest.TestCase().assertRaisesRegex(ct.ShapeError, "the model is wrapped in"):
            change(parallel)
    half = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
    y = parallel(x[half])
    whole = torch.arange(2 * y.numel(), dtype=y.dtype).reshape(2, *y.shape)[rank]
    (2 * torch.sin(whole + y).sum()).backward()  # gradients are averaged over the processes
    found = [parameter.grad for parameter in model.parameters()]
    queue.put([(each.full_tensor() if hasattr(each, "full_tensor") else each).tolist() for each in found])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    unittest.main()
