# SPDX-License-Identifier: Apache-2.0
"""PyTorch's modules as layers with a shape and elements in double, and a layer as a module."""

import copy
import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from .expansion import axes_of
from .proofs import Parameters
from .shapes import ConvShape

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ZERO_PAD = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
NORMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}  # that takes any rank
POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _parameters(shape, weight, bias):
    like, weight, bias = weight, weight.detach().cpu().double(), None if bias is None else bias.detach().cpu().double()
    return shape, Parameters(weight, bias, None if bias is None else bias.abs(), like)


def _diagonal(rank, channels, bias):
    ones = (1,) * rank
    return ConvShape(channels, channels, ones, ones, ((0, 0),) * rank, ones, channels, bias)


def _kind(module):
    """Its class, or the batch norm of PyTorch that a class derived from one leaves as it is but for its name."""
    kind = type(module)
    for norm in NORMS:
        if issubclass(kind, norm) and not parametrize.is_parametrized(module):
            if all(getattr(kind, each) is getattr(norm, each) for each in ("__call__", "forward", "_check_input_dim")):
                return norm
    return kind


def _norm(norm, rank):
    return _affine(rank, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def _affine(rank, running_mean, running_var, weight, bias, eps):
    """What a batch norm computes in inference, whose tensors these are."""
    shape = _diagonal(rank, running_mean.numel(), True)
    mean, variance = running_mean.cpu().double(), running_var.cpu().double()
    scale, beta = (None if each is None else each.detach().cpu().double() for each in (weight, bias))
    scale = torch.ones_like(mean) if scale is None else scale
    beta = torch.zeros_like(mean) if beta is None else beta
    factor = scale / (variance + eps).sqrt()
    shift = mean * factor
    like = running_mean if weight is None else weight
    return shape, Parameters(factor.reshape(shape.weight_shape), beta - shift, beta.abs() + shift.abs(), like, True)


def _pool(pool, channels):
    rank = POOLS[type(pool)]
    plain = pool.count_include_pad and not pool.ceil_mode and getattr(pool, "divisor_override", None) is None
    if not plain:
        return None
    kernel, stride, padding = (axes_of(value, rank) for value in (pool.kernel_size, pool.stride, pool.padding))
    shape = ConvShape(channels, channels, kernel, stride, tuple((p, p) for p in padding), (1,) * rank, channels, False)
    return [(shape, Parameters(torch.full(shape.weight_shape, 1 / math.prod(kernel), dtype=torch.double), None, None))]


def _pads_with_its_shift(module):
    """A batch norm that pads its output with what it makes of zero, as DBB's BNAndPadLayer: seen by running it."""
    children, pad = list(module.children()), getattr(module, "pad_pixels", None)
    if len(children) != 1 or type(children[0]) not in NORMS or not isinstance(pad, int) or module.training:
        return False
    own = copy.deepcopy(module).double().cpu()
    (norm,), rank = own.children(), NORMS[type(children[0])] or 2
    x = torch.linspace(-1, 1, 2 * norm.num_features * 3**rank).double().reshape(2, -1, *[3] * rank)
    try:
        y, shift = own(x), norm(torch.zeros_like(x[:1, ..., :1]))
        inside = (..., *[slice(pad, pad + 3)] * rank)
        expected = shift.flatten(2)[:, :, :1].reshape(1, -1, *[1] * rank).expand_as(y).clone()
        expected[inside] = norm(x)
    except Exception:  # whatever a model's own code raises
        return False
    alike = y.shape == expected.shape and y.shape[2:] == (3 + 2 * pad,) * rank
    return alike and bool((y - expected).abs().max() <= 1e-12 * y.abs().max())


def _plain_module(shape, weight, bias):
    if shape.rank == 0:
        layer = nn.Linear(shape.in_channels, shape.out_channels, bias is not None, "meta")  # which draws no numbers
    else:
        even = all(start == end >= 0 for start, end in shape.padding)
        layer = CONV[shape.rank](
            shape.in_channels, shape.out_channels, shape.kernel_size, shape.stride,
            tuple(start for start, _ in shape.padding) if even else 0, shape.dilation, shape.groups, bias is not None,
            device="meta",
        )  # fmt: skip
    layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, weight.requires_grad)
    if shape.rank == 0 or even:
        return layer
    return nn.Sequential(ZERO_PAD[shape.rank](tuple(p for pair in reversed(shape.padding) for p in pair)), layer)
