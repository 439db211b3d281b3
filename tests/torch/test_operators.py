# SPDX-License-Identifier: Apache-2.0
"""The compiled operators beside PyTorch's operations. Skipped, and named, where they are not built."""

import unittest

from support import HAVE_TORCH, needs_torch

if HAVE_TORCH:
    import torch
    from support import GEOMETRIES

    import concertina.torch as ct
    from concertina.torch import operators


@needs_torch
@unittest.skipUnless(HAVE_TORCH and operators.AVAILABLE, "the operators are not compiled (pip -C operators=on)")
class Operators(unittest.TestCase):
    def chains(self):
        torch.manual_seed(0)
        for name, (make, _, strategies) in GEOMETRIES.items():
            for strategy in strategies:
                model = ct.expand_(make().double(), strategy, rate=2)
                own = model.parametrizations.weight
                yield f"{name}, {strategy}", own[0].contraction, [w.detach() for w in ct.expansion.originals(own)]

    def test_integers_contract_to_the_same_bits(self):
        for name, contraction, weights in self.chains():
            for dtype in (torch.float, torch.double):
                with self.subTest(name, dtype=dtype):
                    whole = [torch.randint(-3, 4, w.shape, dtype=dtype).requires_grad_() for w in weights]
                    compiled, by_steps = contraction.weight(whole), contraction.weight_by_steps(whole)
                    self.assertTrue(torch.equal(compiled, by_steps))
                    gradient = torch.randint(-3, 4, compiled.shape, dtype=dtype)
                    pairs = (torch.autograd.grad(each, whole, gradient) for each in (compiled, by_steps))
                    self.assertTrue(all(map(torch.equal, *pairs)))

    def test_opcheck(self):
        for name, contraction, weights in self.chains():
            with self.subTest(name):
                weights = [w.requires_grad_() for w in weights]
                torch.library.opcheck(torch.ops.concertina.contract.default, (weights, contraction.encoded))
                gradient = contraction.weight(weights).detach()
                weights = [w.detach() for w in weights]
                backward = torch.ops.concertina.contract_backward.default
                torch.library.opcheck(backward, (gradient, weights, contraction.encoded))

    def test_many_are_what_each_is(self):
        every = [(contraction, weights) for _, contraction, weights in self.chains()]
        found = operators.contract_many([(weights, contraction.encoded) for contraction, weights in every])
        for (contraction, weights), each in zip(every, found, strict=True):
            self.assertTrue(torch.equal(each, contraction.weight(weights)))

    def test_more_than_a_plan_takes_are_several_calls(self):
        shapes = ct.expansion.expanded_shapes(ct.expansion.shape_of(torch.nn.Conv2d(1, 1, 1)), "cl", 1, False)
        encoded = operators.encoded(shapes)
        chains = [([torch.full((1, 1, 1, 1), float(i), dtype=torch.double)] * len(shapes), encoded) for i in range(300)]
        self.assertEqual([len(part) for part in operators.parts(chains)], [128, 128, 44])
        found = operators.contract_many(chains)
        self.assertEqual([int(weight) for weight in found], [i ** len(shapes) for i in range(300)])

    def test_many_under_autograd(self):
        (_, first, a), *_, (_, last, b) = self.chains()
        weights = [weight.requires_grad_() for weight in a + b]
        arguments = (weights, [len(a), len(b)], first.encoded + last.encoded)
        many = torch.ops.concertina.contract_many
        torch.library.opcheck(many.default, arguments)
        self.assertTrue(torch.autograd.gradgradcheck(lambda *w: many(list(w), *arguments[1:]), weights, fast_mode=True))
        gradients = torch.autograd.grad(many(*arguments)[1].sum(), weights)  # of a loss that one does not enter
        self.assertEqual([bool(each.any()) for each in gradients], [False] * len(a) + [True] * len(b))
        for counts in ([len(a)], [len(a), len(b) + 1], [0, len(a) + len(b)]):
            with self.assertRaisesRegex(RuntimeError, "in no chain|other lengths"):
                many(weights, counts, arguments[2])

    def test_memory_format_does_not_matter(self):
        for name, contraction, weights in self.chains():
            if weights[0].dim() == 4:
                with self.subTest(name):
                    other = [w.contiguous(memory_format=torch.channels_last) for w in weights]
                    self.assertTrue(torch.equal(contraction.weight(other), contraction.weight(weights)))

    def test_autocast_keeps_float(self):
        weights = [torch.randn(4, 4, dtype=torch.bfloat16), torch.randn(4, 4, dtype=torch.bfloat16)]
        form = [4, 4, 1] + [1] * 9
        with torch.autocast("cpu", dtype=torch.bfloat16):
            self.assertEqual(torch.ops.concertina.contract(weights, form * 2).dtype, torch.float)

    def test_refusals(self):
        weights = [torch.zeros(4, 4), torch.zeros(4, 4)]
        form = [4, 4, 1] + [1] * 9
        for pattern, arguments in {
            "not an encoded chain": (weights, [1]),
            "1 layers, 2 weights": (weights, form),
            "elements instead of": ([torch.zeros(4, 3)] * 2, form * 2),
            "float or double": ([weight.half() for weight in weights], form * 2),
            "dtypes differ": ([weights[0], weights[1].double()], form * 2),
        }.items():
            with self.subTest(pattern), self.assertRaisesRegex(RuntimeError, pattern):
                torch.ops.concertina.contract(*arguments)


if __name__ == "__main__":
    unittest.main()
