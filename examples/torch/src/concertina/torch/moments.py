# SPDX-License-Identifier: Apache-2.0
"""Moments of the patches that a kernel reads of a batch, from which batch norms' statistics follow: docs/moments.md."""

import itertools
import math

import torch
from torch import distributed
from torch.nn import functional as F

from .shapes import ShapeError

CHUNK = 2**20  # elements of the workspace


def patch_moments(x, shape):
    """How many patches a layer of this shape reads of `x`, their mean, and the sums of products of what is left
    without it: (int, [groups, patch], [groups, patch, patch]), a patch as a row of the layer's weight, in double.

    x     [batch, channels, ...]; patches hold zeros where they leave the map; of an empty batch all is zero
    Cost  see `multiply_adds`; in double, accumulated about the channels' means, so that a large mean takes no digits
    """
    centre = channel_means(x)
    count, offset, scatter = _about(x, shape, centre)
    return count, _of_patch(centre, shape) + offset, scatter


def channel_means(x):
    """Rounded to `x`'s precision, so that x - mean is as exact as that is; in double. Zeros of an empty batch."""
    return x.detach().sum(0, dtype=torch.double).flatten(1).mean(1).div(max(len(x), 1)).to(x.dtype).double()


def less_means(x, shape, centre):
    """The padded batch less its channels' means."""
    return _padded(x, shape) - centre.to(x.dtype).reshape(-1, *[1] * shape.rank)


def _about(x, shape, centre):
    """The count, what the patches' mean is beyond the channels' means, and the scatter."""
    positions = shape.output_size(x.shape[2:])
    count = len(x) * math.prod(positions)
    scatter, maps = _sums(x, shape, centre)
    sums = [maps[(slice(None), *_window(tap, positions, shape))].flatten(1).sum(1) for tap in _taps(shape.kernel_size)]
    offset = torch.stack(sums, 1).reshape(shape.groups, -1) / max(count, 1)
    scatter -= count * offset[:, :, None] * offset[:, None, :]
    # A tap that reads nothing is zero, which a sum of so many means less that many may not be.
    nothing = ~_reading(shape, x.shape[2:]).to(x.device)
    offset = torch.where(nothing, -_of_patch(centre, shape), offset)
    return count, offset, scatter.masked_fill_(nothing | nothing.unsqueeze(1), 0)


def added(count, mean, scatter, other_count, other_mean, other_scatter):
    """Moments of two batches as those of both, an empty one adds nothing. Source: Chan, Golub, LeVeque, 1983"""
    if not other_count:
        return count, mean, scatter
    share = other_count / (count + other_count)
    apart = other_mean - mean
    products = apart[:, :, None] * apart[:, None, :]
    return count + other_count, mean + share * apart, scatter + other_scatter + count * share * products


def multiply_adds(shape, size):
    """Of an image: of its moments, and of the gradient through them to the image."""
    patches, lags = _of_patches(shape, size), _of_lags(shape, size)
    return patches // shape.kernel_size[0] if _by_rows(shape) else patches, min(patches, lags)


def _of_patches(shape, size):
    patch = shape.in_channels // shape.groups * math.prod(shape.kernel_size)
    return patch**2 * shape.groups * math.prod(shape.output_size(size))


def _of_lags(shape, size):
    if set(shape.stride) != {1}:
        return math.inf
    lags = math.prod([2 * k - 1 for k in shape.kernel_size])  # torch.compile takes no generator here
    return lags * shape.in_channels // shape.groups * shape.in_channels * math.prod(size)


class PatchMoments(torch.autograd.Function):
    """Mean and covariance of patches, of all workers of a group where one is given, and how many patches there are.
    `centre` is channel_means(x).

    The gradient goes to the input, through both: dL/du = (g + 2 G (u - m)) / N for a patch u.
    """

    @staticmethod
    def forward(ctx, x, centre, shape, group):
        count, offset, scatter = _about(x, shape, centre)
        mean = _of_patch(centre, shape) + offset
        if group is not None:
            count, mean, scatter = _of_all(count, mean, scatter, group)
            offset = mean - _of_patch(centre, shape)
        if count < 2:
            raise ShapeError(f"a batch norm in training needs more than 1 value per channel; input {tuple(x.shape)}")
        ctx.save_for_backward(x, centre, offset)
        ctx.shape, ctx.group, ctx.count = shape, group, count
        return mean, scatter / count, count

    @staticmethod
    def backward(ctx, to_mean, to_covariance, _):
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint gives them once
        with torch.no_grad():
            gradient = PatchMoments.to_input(ctx, saved, to_mean, to_covariance)
        return _Once.apply(gradient, saved[0], to_mean, to_covariance), None, None, None

    @staticmethod
    def to_input(ctx, saved, to_mean, to_covariance):
        x, centre, offset = saved
        to_mean, to_covariance = (gradient / ctx.count for gradient in (to_mean, to_covariance))
        if ctx.group is not None:
            distributed.all_reduce(to_mean, group=ctx.group)
            distributed.all_reduce(to_covariance, group=ctx.group)
        slope = to_covariance + to_covariance.transpose(1, 2)
        constant = to_mean - (slope @ offset.unsqueeze(2)).squeeze(2)
        dtype, size = torch.promote_types(x.dtype, torch.float), x.shape[2:]
        apart = less_means(x.to(dtype), ctx.shape, centre)
        run = _by_lags if _of_lags(ctx.shape, size) < _of_patches(ctx.shape, size) else _by_patches
        return run(apart, size, ctx.shape, slope.to(dtype), constant.to(dtype)).to(x.dtype)


class _Once(torch.autograd.Function):
    """A gradient that has none."""

    @staticmethod
    def forward(ctx, gradient, *_):
        return gradient

    @staticmethod
    def backward(ctx, _):
        raise ShapeError(
            "the gradient through a batch's moments has no gradient; take it from a model that is not contracted in "
            "training, or by torch.func, under which the layers run in turn"
        )


def _of_all(count, mean, scatter, group):
    """The workers' moments, added in the same order by each."""
    own = torch.cat([mean.new_tensor([count]), mean.flatten(), scatter.flatten()])
    each = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(each, own, group=group)
    total = None
    for values in each:
        count, *parts = values.split([1, mean.numel(), scatter.numel()])
        part = int(count), parts[0].reshape(mean.shape), parts[1].reshape(scatter.shape)
        total = added(*total, *part) if total else part
    return total


def _by_rows(shape):
    return shape.stride[0] == 1 and shape.kernel_size[0] > 1


def _padded(x, shape):
    return F.pad(x, [p for pair in reversed(shape.padding) for p in pair]) if any(map(any, shape.padding)) else x


def _of_patch(channels, shape):
    """A value for each channel as one for each element of a patch."""
    return channels.reshape(shape.groups, -1, 1).expand(-1, -1, math.prod(shape.kernel_size)).flatten(1)


def _window(tap, positions, shape, axes=None):
    """What a tap reads on these axes of the padded map."""
    axes = range(shape.rank) if axes is None else axes
    return tuple(
        slice(t * shape.dilation[a], t * shape.dilation[a] + (positions[a] - 1) * shape.stride[a] + 1, shape.stride[a])
        for t, a in zip(tap, axes)
    )


def _reading(shape, size):
    """Of each element of a patch, whether any reads the map with it."""
    positions = shape.output_size(size)
    axes = zip(shape.kernel_size, shape.stride, shape.dilation, shape.padding, size, positions, strict=True)
    reading = torch.ones((), dtype=torch.bool)
    for k, s, d, (p, _), n, m in axes:
        own = torch.tensor([any(0 <= t * s + tap * d - p < n for t in range(m)) for tap in range(k)])
        reading = reading.unsqueeze(-1) & own
    return reading.flatten().repeat(shape.in_channels // shape.groups)


def _taps(kernel_size):
    return itertools.product(*map(range, kernel_size))


def _sums(x, shape, centre):
    """Sums of products of patches less the channels' means, and the sum of the padded maps less these.

    Two taps meet the same products as two that are as many rows apart, but in other rows at the border: rows are cut
    where windows start and end, products are summed in each piece for each distance, and pieces added. Nothing is
    subtracted. Other axes, and all where rows are strided, are unfolded.
    """
    groups, rank = shape.groups, shape.rank
    positions, first = shape.output_size(x.shape[2:]), shape.kernel_size[0]
    by_rows = _by_rows(shape)
    rest = shape.kernel_size[1:] if by_rows else shape.kernel_size
    axes = range(1, rank) if by_rows else range(rank)
    rows = positions[0] + (first - 1) * shape.dilation[0] if by_rows else positions[0]
    starts = [tap * shape.dilation[0] for tap in range(first)] if by_rows else [0]
    width = shape.in_channels // groups * math.prod(rest)
    pieces = {}  # distance in taps: the pieces of rows
    for apart in range(len(starts)):
        cuts = sorted({cut for start in starts[: len(starts) - apart] for cut in (start, start + positions[0])})
        pieces[apart] = list(itertools.pairwise(cuts))
    products, maps = {}, 0
    chunk = max(CHUNK // (groups * width * rows * math.prod(positions[1:])), 1)
    for images in x.split(chunk):
        apart = less_means(images.double(), shape, centre)
        maps = maps + apart.sum(0)
        apart = apart.transpose(0, 1)  # [channels, batch, ...]
        unfolded = apart.new_empty(shape.in_channels, math.prod(rest), rows, len(images), *positions[1:])
        for index, tap in enumerate(_taps(rest)):
            window = apart[(..., *_window(tap, positions, shape, axes))]
            unfolded[:, index] = window.transpose(1, 2)
        row = len(images) * math.prod(positions[1:])
        unfolded = unfolded.reshape(groups, width, rows * row)
        for distance, cuts in pieces.items():
            step = starts[distance] * row
            for start, end in cuts:
                inner = unfolded[:, :, start * row : end * row]
                outer = unfolded[:, :, start * row + step : end * row + step]
                sums = products.setdefault((distance, start, end), inner.new_zeros(groups, width, width))
                sums.baddbmm_(inner, outer.transpose(1, 2))
    channels, taps = shape.in_channels // groups, len(starts)
    result = x.new_empty(
        groups, channels, taps, width // channels, channels, taps, width // channels, dtype=torch.double
    )
    for inner, start in enumerate(starts):
        for outer in range(inner, taps):
            within = [
                products[outer - inner, *cut]
                for cut in pieces[outer - inner]
                if start <= cut[0] and cut[1] <= start + positions[0]
            ]
            block = sum(within[1:], within[0]).reshape(groups, channels, -1, channels, width // channels)
            result[:, :, inner, :, :, outer] = block
            result[:, :, outer, :, :, inner] = block.permute(0, 3, 4, 1, 2)
    patch = channels * math.prod(shape.kernel_size)
    return result.reshape(groups, patch, patch), maps


def _by_patches(apart, size, shape, slope, constant):
    """Each patch's gradient, added where the patch lies."""
    kernel = slope.reshape(-1, shape.in_channels // shape.groups, *shape.kernel_size)
    patches = _convolution(apart, kernel, constant.flatten(), shape.groups, shape.stride, shape.dilation)
    patches = patches.unflatten(1, (shape.in_channels, -1))
    result = torch.zeros_like(apart)
    for index, tap in enumerate(_taps(shape.kernel_size)):
        result[(..., *_window(tap, patches.shape[3:], shape))] += patches[:, :, index]
    return result[(..., *(slice(p, p + n) for (p, _), n in zip(shape.padding, size)))]


def _by_lags(apart, size, shape, slope, constant):
    """A convolution over the distances between taps, in each box of pixels that the same taps read."""
    positions = shape.output_size(size)
    width, groups = shape.in_channels // shape.groups, shape.groups
    slope = slope.reshape(groups, width, *shape.kernel_size, width, *shape.kernel_size)
    constant = constant.reshape(shape.in_channels, *shape.kernel_size)
    cuts = []  # on each axis (first pixel, end, first tap, end)
    for n, m, k, (p, _), d in zip(size, positions, shape.kernel_size, shape.padding, shape.dilation):
        at = {min(max(t * d - p + edge, 0), n) for t in range(k) for edge in (0, m)} | {0, n}
        own = []
        for start, end in itertools.pairwise(sorted(at)):
            taps = [t for t in range(k) if 0 <= start + p - t * d < m]
            if taps:
                own.append((start, end, taps[0], taps[-1] + 1))
        cuts.append(own)
    result = apart.new_zeros(len(apart), shape.in_channels, *size)
    for box in itertools.product(*cuts):
        lags = [k - 1 + last - first for k, (_, _, first, last) in zip(shape.kernel_size, box)]
        kernel = slope.new_zeros(groups, width, width, *lags)
        for tap in itertools.product(*(range(first, last) for *_, first, last in box)):
            at = [slice(last - 1 - t, last - 1 - t + k) for t, k, (*_, last) in zip(tap, shape.kernel_size, box)]
            kernel[(..., *at)] += slope[(slice(None), slice(None), *tap)]
        shift = constant[(slice(None), *(slice(first, last) for *_, first, last in box))].flatten(1).sum(1)
        read = [
            slice(start + p - (last - 1) * d, end + p + (k - 1 - first) * d)
            for (start, end, first, last), (p, _), d, k in zip(box, shape.padding, shape.dilation, shape.kernel_size)
        ]
        part = _convolution(apart[(..., *read)], kernel.flatten(0, 1), shift, groups, (1,) * shape.rank, shape.dilation)
        result[(..., *(slice(start, end) for start, end, *_ in box))] = part
    return result


def _convolution(x, kernel, bias, groups, stride, dilation):
    return getattr(F, f"conv{x.dim() - 2}d")(x, kernel, bias, stride, 0, dilation, groups)
