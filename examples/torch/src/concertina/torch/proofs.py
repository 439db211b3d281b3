# SPDX-License-Identifier: Apache-2.0
"""Three proofs that a layer is the contraction of others, none with a tolerance to choose: docs/proofs.md."""

import itertools
import math
from dataclasses import dataclass, replace

import torch

from .contraction import Contraction, apply, apply_layers, regrouped
from .shapes import Chain, ConvShape, Error, Sum, contracted_shape, leaves, product_shape

PRIME = 2**17 - 1  # products of residues, summed over up to 2^19 terms, are exact in double
LARGEST = 2**11  # rows of a matrix of the third proof


@dataclass(frozen=True)
class Proof:
    """`holds` is None where the proof says neither; the note says why."""

    name: str
    holds: bool | None
    elements: int
    note: str = ""

    def __str__(self):
        if self.holds is None:
            return f"{self.name}: not proved; {self.note}"
        verdict = "holds for" if self.holds else "FAILS for"
        return f"{self.name}: {verdict} {self.elements:,} elements" + (f"; {self.note}" if self.note else "")


@dataclass(frozen=True)
class Parameters:
    """A leaf's elements in double. `magnitude` is of the bias, before what cancels in a batch norm's shift; `like` is
    the model's own tensor, which says what dtype and device it has, and whether it is trained."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None
    like: torch.Tensor | None = None
    norm: bool = False

    def same(self, other):
        return torch.equal(self.weight, other.weight) and (
            self.bias is other.bias is None
            or None not in (self.bias, other.bias)
            and torch.equal(self.bias, other.bias)
        )


@torch.no_grad()
def prove(form, parameters, weight, bias, accumulator=torch.float64):
    """Whether `weight` and `bias` are the form's contraction, accumulated in `accumulator` and rounded once."""
    return [_algebra(form), _rounding(form, parameters, weight, bias, accumulator), _structure(form)]


def _residues(*shape):
    """By a generator of their own, so that a training draws the same numbers with proofs and without."""
    generator = torch.Generator(torch.get_default_device())
    generator.seed()
    return torch.randint(PRIME, shape, generator=generator).double()


def _random(shapes):
    """Residues for each layer: weights, biases."""
    weights = [_residues(*shape.weight_shape) for shape in shapes]
    return weights, [_residues(shape.out_channels) if shape.bias else None for shape in shapes]


def _algebra(form):
    """Contraction and layers, on random residues, agree on random inputs; were they different polynomials, each round
    would miss it with probability (layers + 1) / p at most (Schwartz, Zippel)."""
    shape, layers = contracted_shape(form), leaves(form)
    contraction = Contraction(form)
    rounds = math.ceil(50 / math.log2(PRIME / (len(layers) + 1)))
    size = _least(shape)
    holds, elements = True, 0
    for _ in range(rounds):
        weights, biases = _random(layers)
        x = _residues(1, shape.in_channels, *size)
        y = apply_layers(form, x, iter(zip(weights, biases)), lambda y: y % PRIME)
        mine = apply(shape, x, *contraction.modulo(weights, biases, PRIME)) % PRIME
        holds, elements = holds and torch.equal(y, mine), elements + y.numel()
    return Proof("algebra", holds, elements)


def _structure(form):
    """The layers' matrices [T b; 0 1], multiplied, are the contraction's, over residues, at the smallest map and at as
    many as the stride has residues. Channels are as many as keep all groups different from one another's."""
    form = _fewer_channels(form)
    shape, layers = contracted_shape(form), leaves(form)
    weights, biases = _random(layers)
    weight, bias = Contraction(form).modulo(weights, biases, PRIME)
    least = _least(shape)
    strides = max(shape.stride, default=1)
    rows = max(s.in_channels for s in layers) * math.prod(
        n + strides + 2 * max(p) for n, p in zip(least, shape.padding)
    )
    if rows > LARGEST:
        return Proof("structure", None, 0, f"its matrices would have {rows:,} rows, more than {LARGEST:,}")
    holds, elements = True, 0
    for more in range(strides):
        size = tuple(n + more for n in least)
        chain = _matrix(form, size, iter(zip(weights, biases)))
        mine = _matrix(shape, size, iter([(weight, bias)]))
        holds = holds and all(map(torch.equal, chain, mine))
        elements += mine[0].numel()
    return Proof("structure", holds, elements)


def _least(shape):
    """A map with outputs, of which every layer's map has some, whatever is cropped."""
    geometry = zip(shape.kernel_size, shape.dilation, shape.stride, shape.padding)
    return [d * (k - 1) + 1 + s - sum(min(side, 0) for side in p) for k, d, s, p in geometry]


def _matrix(form, size, layers):
    """T and b, from the definition."""
    if isinstance(form, Sum):
        branches = [_matrix(part, size, layers) for part in form]
        return tuple(sum(parts) % PRIME for parts in zip(*branches))
    if isinstance(form, Chain):
        matrix, shift = None, None
        for part in form:
            outer, own = _matrix(part, size, layers)
            matrix = outer if matrix is None else outer @ matrix % PRIME
            shift = own if shift is None else (outer @ shift + own) % PRIME
            size = contracted_shape(part).output_size(size)
        return matrix, shift
    weight, bias = next(layers)
    outputs = form.output_size(size)
    dense = regrouped(weight, form.groups, 1)
    matrix = torch.zeros(form.out_channels, *outputs, form.in_channels, *size, dtype=torch.double)
    for at in itertools.product(*map(range, outputs)):
        for tap in itertools.product(*map(range, form.kernel_size)):
            reads = [j * s - p + t * d for j, s, (p, _), t, d in zip(at, form.stride, form.padding, tap, form.dilation)]
            if all(0 <= i < n for i, n in zip(reads, size)):
                matrix[(slice(None), *at, slice(None), *reads)] = dense[(..., *tap)]
    positions = math.prod(outputs)
    shift = torch.zeros(form.out_channels) if bias is None else bias
    rows = form.out_channels * positions
    return matrix.reshape(rows, -1), shift.double().repeat_interleave(positions)


def _fewer_channels(form):
    """The same form with few channels: two in each of two groups, where all layers that do more than scale each
    channel have as many groups, or none; else all channels and groups divided alike, two of each kept."""
    shapes = leaves(form)
    numbers = {shape.groups for shape in shapes if shape.groups > 1 and not shape.diagonal} or {1}
    channels = [c for shape in shapes for c in (shape.in_channels, shape.out_channels)]
    alike = len(numbers) == 1 and all(c % max(numbers) == 0 for c in channels)
    common = math.gcd(*channels, *(shape.groups for shape in shapes if shape.groups > 1))
    by = next(f for f in range(max(common // 2, 1), 0, -1) if common % f == 0)

    def few(channels):
        return min(max(numbers), 2) * min(channels // max(numbers), 2) if alike else channels // by

    def fewer(part):
        if not isinstance(part, ConvShape):
            return type(part)(map(fewer, part))
        inside, outside = few(part.in_channels), few(part.out_channels)
        groups = min(part.groups, 2) if alike else max(part.groups // by, 1)
        return replace(part, in_channels=inside, out_channels=outside, groups=inside if part.diagonal else groups)

    return fewer(form)


def _rounding(form, parameters, weight, bias, accumulator):
    """Each element is within gamma_n(u) |F| of the layers' product by its definition, and half an ulp."""
    exact = _by_definition(form, iter([(p.weight, p.bias) for p in parameters]))
    sizes = _by_definition(form, iter([(p.weight.abs(), p.magnitude) for p in parameters]))
    norms = sum(p.norm for p in parameters)
    terms, bias_terms = _terms(form)
    worst, where, elements = 0.0, "", 0
    if (bias is None) != (exact[1] is None):
        return Proof("rounding", False, 0, "one has a bias, the other has none")
    given = [("weight", weight, 4 * norms + terms)]
    if bias is not None:
        given.append(("bias", bias, 7 * norms + bias_terms))
    for (name, ours, n), value, size in zip(given, exact, sizes):
        stored, used = torch.finfo(ours.dtype), torch.finfo(accumulator)
        bound = sum(_gamma(n, torch.finfo(dtype).eps / 2) for dtype in (accumulator, torch.float64)) * size
        bound += n * used.smallest_normal
        if stored.eps > used.eps:
            bound += stored.eps / 2 * ours.double().abs().reshape(size.shape) + stored.smallest_normal * stored.eps
        error = (ours.double().reshape(size.shape) - value).abs()
        share = torch.where(error == 0, 0.0, (error / bound).nan_to_num(nan=math.inf))
        elements += share.numel()
        if float(share.max()) > worst:
            index = [int(i) for i in torch.unravel_index(share.argmax(), share.shape)]
            worst, where = float(share.max()), f"{name}{index}"
    return Proof("rounding", worst <= 1, elements, f"worst {where}: {worst:.2g} of its bound")


def _gamma(n, u):
    if n * u >= 1:
        raise Error(f"a sum of {n} terms is too long for this precision to bound; use a wider accumulator")
    return n * u / (1 - n * u)


def _terms(form):
    """Roundings on the way to an element of the weight, and of the bias, in whatever order a chain is multiplied."""
    if isinstance(form, ConvShape):
        return 0, 0
    own = [_terms(part) for part in form]
    weight, bias = (sum(counts) for counts in zip(*own))
    if isinstance(form, Sum):
        return weight + len(form) - 1, bias + len(form) - 1
    shapes = [contracted_shape(part) for part in form]
    for boundary in range(1, len(shapes)):
        inner, outer = contracted_shape(Chain(shapes[:boundary])), contracted_shape(Chain(shapes[boundary:]))
        hidden = min(outer.in_channels // outer.groups, inner.out_channels // inner.groups)
        weight += hidden * math.prod(map(min, outer.kernel_size, inner.kernel_size))
        bias += outer.in_channels // outer.groups * math.prod(outer.kernel_size) + 1
    return weight, bias + weight


def _by_definition(form, layers):
    """Weight [out][in / groups][kernel] and bias in double: one matrix product for each pair of taps."""
    if isinstance(form, ConvShape):
        return next(layers)
    shapes = [contracted_shape(part) for part in form]
    parts = [_by_definition(part, layers) for part in form]
    if isinstance(form, Sum):
        shape = contracted_shape(form)
        weight = torch.zeros(shape.weight_shape, dtype=torch.double)
        for part, (own, _) in zip(shapes, parts):
            own = regrouped(own, part.groups, shape.groups)
            for tap in itertools.product(*map(range, part.kernel_size)):
                at = [
                    (t * d - p + start) // n
                    for t, d, (p, _), (start, _), n in zip(
                        tap, part.dilation, part.padding, shape.padding, shape.dilation
                    )
                ]
                weight[(..., *at)] += own[(..., *tap)]
        biases = [bias for _, bias in parts if bias is not None]
        return weight, sum(biases[1:], biases[0]) if biases else None
    shape, (weight, bias) = shapes[0], parts[0]
    for outer, (w2, b2) in zip(shapes[1:], parts[1:]):
        product = product_shape(outer, shape)
        groups = product.groups
        rows, columns = (
            regrouped(w, s.groups, groups).reshape(
                groups, s.out_channels // groups, s.in_channels // groups, *s.kernel_size
            )
            for w, s in ((w2, outer), (weight, shape))
        )
        result = torch.zeros(groups, *rows.shape[1:2], *columns.shape[2:3], *product.kernel_size, dtype=torch.double)
        if bias is not None:
            reached = rows.reshape(*rows.shape[:3], -1).sum(3) @ bias.reshape(groups, -1, 1)
            bias = reached.reshape(-1) if b2 is None else reached.reshape(-1) + b2
        else:
            bias = b2
        for b in itertools.product(*map(range, outer.kernel_size)):
            for a in itertools.product(*map(range, shape.kernel_size)):
                at = [
                    (t2 * d2 * s1 + t1 * d1) // d
                    for t2, d2, s1, t1, d1, d in zip(
                        b, outer.dilation, shape.stride, a, shape.dilation, product.dilation
                    )
                ]
                result[(..., *at)] += rows[(..., *b)] @ columns[(..., *a)]
        weight, shape = result.reshape(product.weight_shape), product
    return weight, bias
