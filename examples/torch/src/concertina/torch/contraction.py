# SPDX-License-Identifier: Apache-2.0
"""The one layer that a form is, as a differentiable function of its layers' weights and biases."""

import contextlib
import math

import torch
from torch.nn import functional as F

from . import operators
from .shapes import Chain, ConvShape, Sum, chain_order, contracted_shape, leaves, multiply_adds, product_shape

CONV = (F.linear, F.conv1d, F.conv2d, F.conv3d)
CONV_TRANSPOSE = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class Contraction:
    """Planned once for a form: the order of products by multiply-adds, then computed again and again.

    Any floating-point dtype, any device, under autograd, to any order. Autocast does not touch it: weights are
    contracted in their own dtype. `weights` and `biases` are lists in the order of `leaves(form)`, None where a layer
    has no bias. Where the compiled operators are built they contract chains in float and double, on the processor or a
    CUDA device.
    """

    def __init__(self, form):
        self.form = form
        self.leaves = leaves(form)
        self.shape = contracted_shape(form)
        self.multiply_adds = 0
        self.steps = []
        self._add(form, iter(range(len(self.leaves))))
        self.encoded = operators.encoded(form) if isinstance(form, Chain) else None

    def _add(self, form, leaf):
        """Appends what computes the form; its value's index and shape."""
        if isinstance(form, ConvShape):
            return next(leaf), form
        values, shapes = zip(*(self._add(part, leaf) for part in form))
        if isinstance(form, Sum):
            return self._emit(_Sum(shapes, contracted_shape(form)), values, contracted_shape(form))
        order = chain_order(shapes)

        def run(first, last):
            if first == last:
                return values[first], shapes[first]
            middle = order[first, last][1]
            (inner, inner_shape), (outer, outer_shape) = run(first, middle - 1), run(middle, last)
            product = product_shape(outer_shape, inner_shape)
            self.multiply_adds += multiply_adds(outer_shape, inner_shape)
            return self._emit(_Product(outer_shape, inner_shape, product), (outer, inner), product)

        return run(0, len(shapes) - 1)

    def _emit(self, step, operands, shape):
        self.steps.append((step, operands))
        return len(self.leaves) + len(self.steps) - 1, shape

    def weight(self, weights):
        with full_precision(weights[0]):
            if self.encoded and operators.takes(weights):
                return operators.contract(weights, self.encoded)
            return self.weight_by_steps(weights)

    def weight_by_steps(self, weights, reduce=lambda x: x):
        values = list(weights)
        for step, operands in self.steps:
            values.append(reduce(step([values[operand] for operand in operands])))
        return values[-1]

    def bias(self, weights, biases):
        """What the layers make of zeros: None where no layer has a bias."""
        with full_precision(weights[0]):
            return _constant(self.form, None, iter(zip(self.leaves, weights, biases)))

    def modulo(self, weights, biases, prime):
        """Weight and bias over the integers modulo a prime, which are exact: the same steps, a remainder after each."""
        bias = _constant(self.form, None, iter(zip(self.leaves, weights, biases)), lambda x: x % prime)
        return self.weight_by_steps(weights, lambda x: x % prime), bias


def full_precision(tensor):
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def apply(shape, x, weight, bias=None):
    """One layer, by PyTorch."""
    if shape.rank == 0:
        return F.linear(x, weight, bias)
    if all(start == end >= 0 for start, end in shape.padding):
        padding = tuple(start for start, _ in shape.padding)
    else:  # F.pad counts axes from the last
        x, padding = F.pad(x, [p for pair in reversed(shape.padding) for p in pair]), 0
    return CONV[shape.rank](x, weight, bias, shape.stride, padding, shape.dilation, shape.groups)


def apply_layers(form, x, parameters, reduce=lambda x: x):
    """The form's layers in turn on a batch. `parameters` is an iterator of pairs weight, bias."""
    if isinstance(form, ConvShape):
        return reduce(apply(form, x, *next(parameters)))
    if isinstance(form, Sum):
        return reduce(sum(apply_layers(part, x, parameters, reduce) for part in form))
    for part in form:
        x = apply_layers(part, x, parameters, reduce)
    return x


def _constant(form, x, layers, reduce=lambda x: x):
    """The value of each output channel where input channel c is x[c] at every position; None is zeros."""
    if isinstance(form, Chain):
        for part in form:
            x = _constant(part, x, layers, reduce)
        return x
    if isinstance(form, Sum):
        values = [v for v in (_constant(part, x, layers, reduce) for part in form) if v is not None]
        return reduce(sum(values[1:], values[0])) if values else None
    shape, weight, bias = next(layers)
    if x is None:
        return bias
    taps = weight.reshape(shape.groups, shape.out_channels // shape.groups, -1, math.prod(shape.kernel_size))
    y = (reduce(taps.sum(3)) @ x.reshape(shape.groups, -1, 1)).reshape(-1)
    return reduce(y if bias is None else y + bias)


class _Product:
    """The weight of the product of two layers, by the shapes' cheapest algorithm."""

    def __init__(self, outer, inner, product):
        self.outer_groups, self.inner_groups, self.groups = outer.groups, inner.groups, product.groups
        self.shape, self.rank = product.weight_shape, product.rank
        if outer.diagonal:
            self.run = self.outer_diagonal
        elif inner.diagonal:
            self.run = self.inner_diagonal
        elif outer.pointwise:
            self.run = self.outer_pointwise
        elif inner.pointwise:
            self.run = self.inner_pointwise
        else:
            self.run = self.general
            self.stride = tuple(d * s // n for d, s, n in zip(outer.dilation, inner.stride, product.dilation))
            self.dilation = tuple(max(d // n, 1) for d, n in zip(inner.dilation, product.dilation))
            # A kernel of one tap has no spacing, and where both have, none is needed.
            self.stride = tuple(s if k > 1 else 1 for s, k in zip(self.stride, outer.kernel_size))
            self.dilation = tuple(d if k > 1 else 1 for d, k in zip(self.dilation, inner.kernel_size))

    def __call__(self, operands):
        return self.run(*operands)

    def outer_diagonal(self, outer, inner):
        return outer.reshape(-1, *[1] * (inner.dim() - 1)) * inner

    def inner_diagonal(self, outer, inner):
        columns = inner.reshape(self.outer_groups, 1, outer.shape[1], *[1] * self.rank)
        return (outer.reshape(self.outer_groups, -1, *outer.shape[1:]) * columns).reshape(outer.shape)

    def grouped(self, outer, inner):
        outer = regrouped(outer, self.outer_groups, self.groups)
        inner = regrouped(inner, self.inner_groups, self.groups)
        return (w.reshape(self.groups, w.shape[0] // self.groups, w.shape[1], -1) for w in (outer, inner))

    def outer_pointwise(self, outer, inner):
        outer, inner = self.grouped(outer, inner)
        return (outer.squeeze(3) @ inner.flatten(2)).reshape(self.shape)

    def inner_pointwise(self, outer, inner):
        outer, inner = self.grouped(outer, inner)
        return torch.einsum("gomk,gmc->gock", outer, inner.squeeze(3)).reshape(self.shape)

    def general(self, outer, inner):
        """A transposed convolution: the outer kernel as a batch of maps, the inner as the kernel."""
        groups = self.groups
        outer = regrouped(outer, self.outer_groups, groups)
        inner = regrouped(inner, self.inner_groups, groups)
        maps = outer.reshape(groups, -1, *outer.shape[1:]).transpose(0, 1).flatten(1, 2)
        product = CONV_TRANSPOSE[self.rank](maps, inner, None, self.stride, 0, 0, groups, self.dilation)
        columns = product.reshape(product.shape[0], groups, self.shape[1], *product.shape[2:])
        return columns.transpose(0, 1).reshape(self.shape)


class _Sum:
    """The weight of a sum of layers: kernels united where their taps land."""

    def __init__(self, branches, shape):
        self.shape, self.groups = shape.weight_shape, shape.groups
        self.branch_groups = [branch.groups for branch in branches]
        self.places = [
            (
                ...,
                *(
                    slice((start - p[0]) // n, (start - p[0] + d * (k - 1)) // n + 1, max(d // n, 1) if k > 1 else 1)
                    for k, p, d, (start, _), n in zip(
                        branch.kernel_size, branch.padding, branch.dilation, shape.padding, shape.dilation
                    )
                ),
            )
            for branch in branches
        ]

    def __call__(self, operands):
        total = operands[0].new_zeros(self.shape)
        for place, groups, weight in zip(self.places, self.branch_groups, operands):
            total[place] += regrouped(weight, groups, self.groups)
        return total


def regrouped(weight, groups, fewer):
    """The same layer with fewer groups: zeros between the blocks."""
    if groups == fewer:
        return weight
    blocks = groups // fewer
    out, width, *kernel = weight.shape
    ones = torch.eye(blocks, dtype=weight.dtype, device=weight.device).reshape(blocks, 1, blocks, 1, *[1] * len(kernel))
    apart = weight.reshape(fewer, blocks, out // groups, 1, width, *kernel)
    return (apart * ones).reshape(out, blocks * width, *kernel)
