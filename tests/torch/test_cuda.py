# SPDX-License-Identifier: Apache-2.0
"""The operators on a CUDA device. Skipped, and named, where there is none or they are not built."""

import threading
import unittest

from support import HAVE_TORCH, needs_torch

if HAVE_TORCH:
    import copy

    import torch
    from support import GEOMETRIES, difference, gradients, layered, small_net
    from torch import nn

    import concertina.torch as ct
    from concertina.torch import operators
    from concertina.torch.expansion import originals

READY = HAVE_TORCH and operators.CUDA_AVAILABLE and torch.cuda.is_available()
OPS = torch.ops.concertina if HAVE_TORCH else None


def chains(names=None, rate=2):
    """Each geometry's contraction, and its layers' weights in double on the processor."""
    torch.manual_seed(0)
    for name, (make, _, strategies) in GEOMETRIES.items():
        for strategy in strategies if names is None or name in names else ():
            own = ct.expand_(make().double(), strategy, rate=rate).parametrizations.weight
            yield f"{name}, {strategy}", own[0].contraction, [weight.detach() for weight in originals(own)]


def whole(weights, most=3):
    return [torch.randint(-most, most + 1, weight.shape).double() for weight in weights]


def both_passes(contract, weights, gradient):
    weights = [weight.clone().requires_grad_() for weight in weights]
    result = contract(weights)
    return [result.detach(), *torch.autograd.grad(result, weights, gradient)]


@needs_torch
@unittest.skipUnless(READY, "no CUDA device, or the operators for it are not compiled (pip -C operators=on)")
class Operators(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)

    def assert_same(self, found, expected):
        for a, b in zip(found, expected, strict=True):
            self.assertTrue(torch.equal(a.double().cpu(), b.double().cpu()))

    def test_integers_contract_to_the_same_bits(self):
        for name, contraction, weights in chains():
            weights = whole(weights)
            gradient = torch.randint(-3, 4, contraction.shape.weight_shape).double()
            expected = both_passes(contraction.weight_by_steps, weights, gradient)
            for dtype in (torch.float, torch.double):
                with self.subTest(name, dtype=dtype):
                    on_device = [weight.to("cuda", dtype) for weight in weights]
                    self.assertTrue(operators.takes(on_device))
                    found = both_passes(contraction.weight, on_device, gradient.to("cuda", dtype))
                    self.assert_same(found, expected)

    def test_large_products(self):
        """On tensor cores and by cuBLAS; sums of integers are below 2^24."""
        for kernel, width in ((3, 256), (3, 128), (1, 512)):
            module = ct.expand_(nn.Conv2d(width, width, kernel, device="cuda"), "cl", only="", rate=4)
            own = module.parametrizations.weight
            contraction = own[0].contraction
            weights = [weight.cuda() for weight in whole(originals(own), most=1)]
            gradient = torch.randint(-1, 2, contraction.shape.weight_shape, device="cuda").double()
            expected = both_passes(contraction.weight_by_steps, weights, gradient)
            for dtype in (torch.float, torch.double):
                with self.subTest(kernel=kernel, width=width, dtype=dtype):
                    on_device = [weight.to(dtype) for weight in weights]
                    self.assert_same(both_passes(contraction.weight, on_device, gradient.to(dtype)), expected)

    def test_opcheck(self):
        for name, contraction, weights in chains(("conv2d", "groups", "linear")):
            with self.subTest(name):
                weights = [weight.cuda().requires_grad_() for weight in weights]
                form, counts = contraction.encoded, [len(weights)] * 2
                torch.library.opcheck(OPS.contract.default, (weights, form))
                torch.library.opcheck(OPS.contract_many.default, (weights * 2, counts, form * 2))
                gradient = contraction.weight(weights).detach()
                weights = [weight.detach() for weight in weights]
                torch.library.opcheck(OPS.contract_backward.default, (gradient, weights, form))

    def test_many_at_once_are_what_each_is(self):
        every = [(contraction, [weight.cuda() for weight in weights]) for _, contraction, weights in chains()]
        together = operators.contract_many([(weights, contraction.encoded) for contraction, weights in every])
        for (contraction, weights), found in zip(every, together, strict=True):
            self.assertEqual(found.shape, contraction.shape.weight_shape)
            torch.testing.assert_close(found, contraction.weight(weights), rtol=0, atol=1e-13)

    def test_memory_format_does_not_matter(self):
        for name, contraction, weights in chains(("conv2d", "groups")):
            with self.subTest(name):
                weights = [weight.cuda() for weight in weights]
                other = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
                self.assertTrue(torch.equal(contraction.weight(other), contraction.weight(weights)))

    def test_other_streams_and_threads(self):
        _, contraction, weights = next(chains(("conv2d",)))
        each = [[weight.to("cuda", torch.float) * (i + 1) for weight in weights] for i in range(4)]
        expected, wrong = [contraction.weight(own) for own in each], []
        torch.cuda.synchronize()

        def work(own, result):
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(200):
                    if not torch.equal(contraction.weight(own), result):
                        wrong.append(own)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(each, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_more_plans_than_are_kept(self):
        first = [torch.full((1, 1), 2.0, device="cuda"), torch.full((1, 1), 3.0, device="cuda")]
        for channels in (*range(1, 300), 1):
            form = [1, channels, 1] + [1] * 9 + [channels, 1, 1] + [1] * 9
            weights = [first[0].repeat(channels, 1), first[1].repeat(1, channels)]
            self.assertEqual(float(OPS.contract(weights, form)), 6 * channels)

    def test_refusals(self):
        form = [4, 4, 1] + [1] * 9
        weights = [torch.zeros(4, 4, device="cuda")] * 2
        for pattern, arguments in {
            "on several devices": ([weights[0], weights[0].cpu()], form * 2),
            "dtypes differ": ([weights[0], weights[0].double()], form * 2),
            "float or double": ([weight.half() for weight in weights], form * 2),
            "not an encoded chain": (weights, [1]),
            "in no chain|other lengths|layers": (weights, form),
            "elements, where the plan has": ([weights[0][:3]] * 2, form * 2),
        }.items():
            with self.subTest(pattern), self.assertRaisesRegex(RuntimeError, pattern):
                OPS.contract(*arguments)
        if torch.cuda.device_count() > 1:
            with self.assertRaisesRegex(RuntimeError, "on several devices"):
                OPS.contract([weights[0], weights[0].to("cuda:1")], form * 2)

    def test_half_precision_takes_pytorchs_operations(self):
        _, contraction, weights = next(chains(("conv2d",)))
        weights = [weight.to("cuda", torch.bfloat16) for weight in weights]
        self.assertFalse(operators.takes(weights))
        self.assertTrue(torch.equal(contraction.weight(weights), contraction.weight_by_steps(weights)))


@needs_torch
@unittest.skipUnless(READY, "no CUDA device, or the operators for it are not compiled (pip -C operators=on)")
class Training(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False

    def tearDown(self):
        torch.backends.cudnn.deterministic = False
        torch.backends.cudnn.allow_tf32 = True

    def test_gradients_are_those_of_the_layers_in_turn(self):
        for name, (make, size, strategies) in GEOMETRIES.items():
            for strategy in strategies:
                with self.subTest(name, strategy=strategy):
                    model = ct.expand_(make().double().cuda(), strategy, when="always")
                    x = torch.randn(size, dtype=torch.double, device="cuda")
                    self.assertLess(difference(gradients(model, x), gradients(layered(model), x)), 1e-12)

    def test_float_is_as_near_to_double_as_the_layers_in_turn(self):
        for name, (make, size, strategies) in GEOMETRIES.items():
            for strategy in strategies:
                with self.subTest(name, strategy=strategy):
                    model = ct.expand_(make().cuda(), strategy, when="always")
                    x = torch.randn(size, device="cuda")
                    exact = gradients(copy.deepcopy(model).double(), x.double())

                    def off(other, x=x, exact=exact):
                        pairs = zip(gradients(other, x), exact, strict=True)
                        return sum(float((a - b).norm() / b.norm()) for a, b in pairs)

                    self.assertLess(off(model), 2 * off(layered(model)))

    def test_together(self):
        model = ct.expand_(small_net().double().cuda(), "cl+fc", when="always")
        together = ct.contract_together_(copy.deepcopy(model))
        x = torch.randn(4, 3, 16, 16, dtype=torch.double, device="cuda")
        self.assertLess(difference(gradients(together, x), gradients(model, x)), 1e-12)

    def test_autocast_keeps_weights_float(self):
        model = ct.expand_(nn.Conv2d(3, 4, 5, padding=2).cuda(), "ck", when="always")
        x = torch.randn(4, 3, 16, 16, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            weight, bias, y = model.weight, model.bias, model(x)
            cast = OPS.contract([torch.ones(4, 4, device="cuda").half()] * 2, ([4, 4, 1] + [1] * 9) * 2)
        self.assertEqual((weight.dtype, bias.dtype, y.dtype), (torch.float, torch.float, torch.bfloat16))
        self.assertEqual(cast.dtype, torch.float)
        self.assertTrue(torch.equal(weight, model.weight))
        y.float().sum().backward()
        self.assertTrue(all(p.grad.dtype == torch.float for p in model.parameters()))

    def test_compile(self):
        for change in (lambda model: model, ct.contract_together_):
            model = change(ct.expand_(small_net().double().cuda(), "cl+fc", when="always"))
            x = torch.randn(4, 3, 16, 16, dtype=torch.double, device="cuda")
            expected = gradients(copy.deepcopy(model), x)
            torch.compiler.reset()
            compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
            self.assertLess(difference(gradients(compiled, x), expected), 1e-13)

    def test_graph(self):
        """Captured once, for other weights in every replay: what is computed without a graph."""
        for change in (lambda model: model, ct.contract_together_):
            model = change(ct.expand_(small_net().cuda(), "cl", when="always").eval())
            x = torch.randn(4, 3, 16, 16, device="cuda")
            parameters = [p for p in model.parameters() if p.requires_grad]

            def step(model=model, x=x, parameters=parameters):
                y = model(x)
                return [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            for _ in range(3):
                with torch.no_grad():
                    for parameter in parameters:
                        parameter.uniform_(-0.1, 0.1)
                graph.replay()
                found = [each.clone() for each in captured]
                self.assertLess(difference(found, step()), 1e-5)

    def test_a_graphs_first_call_is_refused(self):
        form = [5, 7, 1] + [1] * 9 + [7, 11, 1] + [1] * 9
        weights = [torch.ones(7, 5, device="cuda"), torch.ones(11, 7, device="cuda")]
        torch.cuda.synchronize()
        with self.assertRaisesRegex(RuntimeError, "run the model once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            OPS.contract(weights, form)
        self.assertEqual(float(OPS.contract(weights, form)[0, 0]), 7)


if __name__ == "__main__":
    unittest.main()
