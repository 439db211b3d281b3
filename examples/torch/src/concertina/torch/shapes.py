# SPDX-License-Identifier: Apache-2.0
"""What shapes decide: the one layer that several make, its order of products, its border.

A form is a ConvShape, a Chain of forms (the first one applied first) or a Sum of forms on the same input. The rules
are those of the C++ library: shape.hpp, detail/form.hpp, exactness.hpp.
"""

import math
from dataclasses import dataclass, replace


class Error(ValueError):
    """Base of the package's errors."""


class ShapeError(Error):
    """Shapes that do not fit, or a module that is not one linear layer; the message names it."""


class InexactError(Error):
    """No single layer equals the chain at the border."""


class ExpansionError(Error):
    """The expanded layers cannot represent the layer that is to be preserved."""


class ContractionWarning(UserWarning):
    """A module that contract_in_training_ contracted runs layer by layer, for something in it was changed since."""


@dataclass(frozen=True)
class ConvShape:
    """Everything about a layer except its weights; of rank 0 a Linear layer. Padding is (start, end) on each axis."""

    in_channels: int
    out_channels: int
    kernel_size: tuple = ()
    stride: tuple = ()
    padding: tuple = ()
    dilation: tuple = ()
    groups: int = 1
    bias: bool = False

    @property
    def rank(self):
        return len(self.kernel_size)

    @property
    def weight_shape(self):
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weight_numel(self):
        return math.prod(self.weight_shape)

    @property
    def pointwise(self):
        return math.prod(self.kernel_size) == 1

    @property
    def diagonal(self):
        """One factor for each channel, as a batch norm has."""
        return self.pointwise and self.in_channels == self.out_channels == self.groups

    def output_size(self, size):
        return tuple(
            (n + sum(p) - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, self.kernel_size, self.stride, self.padding, self.dilation)
        )

    def __str__(self):
        def axes(mark, values, trivial):
            return "" if all(v == trivial for v in values) else f" {mark}{'x'.join(map(str, values))}"

        start, end = tuple(zip(*self.padding)) or ((), ())
        return (
            (f"conv{self.rank}d" if self.rank else "linear")
            + f" {self.in_channels}->{self.out_channels}"
            + axes("@", self.kernel_size, None)
            + axes("s", self.stride, 1)
            + (axes("p", start, None) if any(start + end) else "")
            + ("" if start == end else ":" + "x".join(map(str, end)))
            + axes("d", self.dilation, 1)
            + (f" g{self.groups}" if self.groups != 1 else "")
            + (" +bias" if self.bias else "")
        )


class Chain(tuple):
    """Forms one after another."""

    def __str__(self):
        return "(" + ", ".join(map(str, self)) + ")"


class Sum(tuple):
    """Forms on the same input, their outputs added."""

    def __str__(self):
        return "(" + " + ".join(map(str, self)) + ")"


def leaves(form):
    return [form] if isinstance(form, ConvShape) else [leaf for part in form for leaf in leaves(part)]


def product_shape(outer, inner):
    """The serial rule: `inner`, then `outer`."""
    if inner.out_channels != outer.in_channels or inner.rank != outer.rank:
        raise ShapeError(f"layers do not fit: {outer} reads what {inner} writes")
    kernel, padding, dilation = [], [], []
    for k2, k1, s1, p2, p1, d2, d1 in zip(
        outer.kernel_size, inner.kernel_size, inner.stride, outer.padding, inner.padding, outer.dilation, inner.dilation
    ):
        spacing = math.gcd(d2 * s1 if k2 > 1 else 0, d1 if k1 > 1 else 0) or 1
        kernel.append(((k2 - 1) * d2 * s1 + (k1 - 1) * d1) // spacing + 1)
        padding.append((p2[0] * s1 + p1[0], p2[1] * s1 + p1[1]))
        dilation.append(spacing)
    return ConvShape(
        inner.in_channels,
        outer.out_channels,
        tuple(kernel),
        tuple(s2 * s1 for s2, s1 in zip(outer.stride, inner.stride)),
        tuple(padding),
        tuple(dilation),
        math.gcd(outer.groups, inner.groups),
        outer.bias or inner.bias,
    )


def sum_shape(branches):
    """The sum rule: kernels aligned by their paddings and united."""
    first = branches[0]
    for branch in branches[1:]:
        alike = all(
            sum(p) - d * (k - 1) == sum(q) - e * (j - 1)
            for p, k, d, q, j, e in zip(
                first.padding, first.kernel_size, first.dilation, branch.padding, branch.kernel_size, branch.dilation
            )
        )
        ends = [(shape.in_channels, shape.out_channels, shape.stride) for shape in (first, branch)]
        if ends[0] != ends[1] or not alike:
            raise ShapeError(f"branches ({first}) and ({branch}) cannot be added: channels, strides or sizes differ")
    kernel, padding, dilation = [], [], []
    for axis in range(first.rank):
        spans = [(b.kernel_size[axis], b.dilation[axis], *b.padding[axis]) for b in branches]
        start = max(p for _, _, p, _ in spans)
        last = max(d * (k - 1) - p for k, d, p, _ in spans)
        spacing = math.gcd(*(d for k, d, _, _ in spans if k > 1), *(start - p for _, _, p, _ in spans)) or 1
        k, d, p, q = spans[0]
        kernel.append((last + start) // spacing + 1)
        padding.append((start, p + q - d * (k - 1) + last))
        dilation.append(spacing)
    return replace(
        first,
        kernel_size=tuple(kernel),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=math.gcd(*(branch.groups for branch in branches)),
        bias=any(branch.bias for branch in branches),
    )


def contracted_shape(form):
    """The one layer that acts as the form does, off the border. Throws ShapeError where parts do not fit."""
    if isinstance(form, ConvShape):
        return form
    parts = [contracted_shape(part) for part in form]
    if isinstance(form, Sum):
        return sum_shape(parts)
    product = parts[0]
    for part in parts[1:]:
        product = product_shape(part, product)
    return product


def multiply_adds(outer, inner):
    """Of the product of two layers."""
    taps = math.prod(outer.kernel_size) * math.prod(inner.kernel_size)
    return taps * outer.out_channels // outer.groups * (inner.in_channels // inner.groups) * inner.out_channels


def chain_order(shapes):
    """For runs (first, last) of a chain, the layer before which the last product splits; the shapes; the cost of all.

    Source  Cormen et al., Introduction to Algorithms, "Matrix-chain multiplication"
    """
    count = len(shapes)
    best = {(i, i): (0, i, shapes[i]) for i in range(count)}
    for length in range(1, count):
        for i in range(count - length):
            choices = []
            for middle in range(i + 1, i + length + 1):
                inner, outer = best[i, middle - 1], best[middle, i + length]
                choices.append((inner[0] + outer[0] + multiply_adds(outer[2], inner[2]), middle))
            cost, middle = min(choices)
            product = product_shape(best[middle, i + length][2], best[i, middle - 1][2])
            best[i, i + length] = (cost, middle, product)
    return best


# ---- the border ------------------------------------------------------------------------------------

SEES, TAPS_START, TAPS_END, BIAS_START, BIAS_END, BIASED = (1 << bit for bit in range(6))


class _AxisPaths:
    """Paths from an output through one tap of every layer down to the input, along one axis: docs/exactness.md.

    A contraction sums over all that end on the input; the chain drops those that leave a map on the way.
    """

    def __init__(self, form, axis):
        self.form, self.axis = form, axis

    def of(self, shape):
        a = self.axis
        return shape.kernel_size[a], shape.stride[a], *shape.padding[a], shape.dilation[a]

    def positions(self, form, size):
        if isinstance(form, ConvShape):
            k, s, start, end, d = self.of(form)
            return (size + start + end - d * (k - 1) - 1) // s + 1
        if isinstance(form, Sum):
            return self.positions(form[0], size)
        for part in form:
            size = self.positions(part, size)
        return size

    def read(self, form, first, last):
        """The input positions that outputs first .. last read."""
        if isinstance(form, ConvShape):
            k, s, start, _, d = self.of(form)
            return first * s - start, last * s - start + d * (k - 1)
        if isinstance(form, Chain):
            for part in reversed(form):
                first, last = self.read(part, first, last)
            return first, last
        ranges = [self.read(part, first, last) for part in form]
        return min(r[0] for r in ranges), max(r[1] for r in ranges)

    def lead(self, form, below, size, first, last):
        """The kinds of path from outputs first .. last, given those from each input position."""
        if isinstance(form, ConvShape):
            k, s, start, _, d = self.of(form)
            here = {}
            for i in range(first, last + 1):
                here[i] = BIASED if form.bias else 0
                for tap in range(k):
                    here[i] |= below[i * s - start + tap * d]
            return here
        if isinstance(form, Sum):
            branches = [self.lead(part, below, size, first, last) for part in form]
            return {i: _united(branch[i] for branch in branches) for i in range(first, last + 1)}
        ranges = [(first, last)]
        for part in reversed(form[1:]):
            ranges.append(self.read(part, *ranges[-1]))
        for index, (part, range_) in enumerate(zip(form, reversed(ranges))):
            if index:
                for i, paths in below.items():  # a chain drops what lies off the map, unless it is zero
                    if i < 0 or i >= size:
                        below[i] |= (TAPS_START if i < 0 else TAPS_END) if paths & SEES else 0
                        below[i] |= (BIAS_START if i < 0 else BIAS_END) if paths & BIASED else 0
            below, size = self.lead(part, below, size, *range_), self.positions(part, size)
        return below

    def widths(self, size):
        outputs = self.positions(self.form, size)
        first, last = self.read(self.form, 0, outputs - 1)
        below = {i: SEES if 0 <= i < size else 0 for i in range(first, last + 1)}
        paths = self.lead(self.form, below, size, 0, outputs - 1)
        start = max((i + 1 for i in paths if paths[i] & (TAPS_START | BIAS_START)), default=0)
        end = max((outputs - i for i in paths if paths[i] & (TAPS_END | BIAS_END)), default=0)
        return start, end

    def extent(self, form, scale=1):
        if isinstance(form, ConvShape):
            k, s, start, end, d = self.of(form)
            return scale * (d * (k - 1) + abs(start) + abs(end) + s)
        if isinstance(form, Sum):
            return max(self.extent(part, scale) for part in form)
        total = 0
        for part in form:
            total += self.extent(part, scale)
            scale *= contracted_shape(part).stride[self.axis]
        return total

    def worst(self):
        """Over all input sizes: from a size on the ends no longer meet, and only the strides' residue matters."""
        settled = 4 * (1 + self.extent(self.form))
        widths = [self.widths(settled + i) for i in range(contracted_shape(self.form).stride[self.axis])]
        return max(start for start, _ in widths), max(end for _, end in widths)


def _united(kinds):
    united = 0
    for kind in kinds:
        united |= kind
    return united


def _pads_between(form, first=True):
    if isinstance(form, ConvShape):
        return not first and any(p > 0 for pair in form.padding for p in pair)
    for part in form:
        if _pads_between(part, first):
            return True
        first = first and isinstance(form, Sum)
    return False


def border(form):
    """Widths (start, end) on each axis of the outputs at which the contraction may differ; all zero where exact."""
    rank = contracted_shape(form).rank
    if not _pads_between(form):
        return [(0, 0)] * rank
    return [_AxisPaths(form, axis).worst() for axis in range(rank)]


def require_exact(form):
    """Throws InexactError, with the widths and what to do, unless one layer equals the form at every input size."""
    widths = border(form)
    if not any(map(any, widths)):
        return
    at = 0
    if isinstance(form, Chain):
        while not any(map(any, border(Chain(form[: at + 1])))):
            at += 1
    start, end = ("x".join(str(width[side]) for width in widths) for side in (0, 1))
    raise InexactError(
        f"no single layer equals this chain: layer {at + 1} ({form[at]}) pads with zeros where its input, continued "
        f"beyond its border, is not zero; a border of {start} outputs at the start and {end} at the end differs. Pad "
        "the first layer instead"
    )
