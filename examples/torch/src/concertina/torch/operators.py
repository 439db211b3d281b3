# SPDX-License-Identifier: Apache-2.0
"""The compiled operators, where they are built: torch.ops.concertina.contract and contract_backward (csrc/)."""

import pathlib
import warnings

import torch

from .shapes import Chain, ConvShape, contracted_shape

LIBRARY = pathlib.Path(__file__).with_name("_operators.so")
CUDA_LIBRARY = pathlib.Path(__file__).with_name("_operators_cuda.so")
AVAILABLE = LIBRARY.exists()
AXES = 3  # a layer of lower rank is one of rank 3 with leading axes of 1


def encoded(form):
    """A chain as the operators take it: twelve integers a layer. None for what they do not take."""
    if not AVAILABLE or not all(isinstance(part, ConvShape) for part in form):
        return None
    numbers = []
    for layer in form:
        numbers += [layer.in_channels, layer.out_channels, layer.groups]
        for axes in (layer.kernel_size, layer.stride, layer.dilation):
            numbers += [1] * (AXES - layer.rank) + list(axes)
    return numbers


def decoded(form, rank):
    shapes = []
    for at in range(0, len(form), 3 + 3 * AXES):
        axes = [tuple(form[at + 3 + AXES * i :][AXES - rank : AXES]) for i in range(3)]
        shapes.append(ConvShape(form[at], form[at + 1], axes[0], axes[1], ((0, 0),) * rank, axes[2], form[at + 2]))
    return shapes


def transformed():
    """Whether torch.func transforms what runs, or there are forward-mode gradients."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def takes(weights):
    """Whether they contract these weights, now: they have no forward-mode gradient, and no rules for torch.func."""
    if transformed():
        return False
    device = weights[0].device
    if device.type == "cuda":
        built = CUDA_AVAILABLE and torch.cuda.get_device_properties(device).major >= 8
    else:
        built = device.type == "cpu"
    return built and all(w.device == device and w.dtype in (torch.float, torch.double) for w in weights)


def _chains(weights, counts, form):
    """Each chain's weights and shapes, of several that follow each other."""
    length, first = 3 + 3 * AXES, 0
    for count in counts:
        last = first + count
        part = weights[first:last]
        yield part, Chain(decoded(form[length * first : length * last], part[0].dim() - 2))
        first = last


def contract(weights, form):
    return torch.ops.concertina.contract(weights, form)


def contract_many(chains):
    """The contractions of several chains, each a pair of its weights and what `encoded` gives, of one device and
    dtype: on a CUDA device in a few launches for as many as fit a plan, some 128 chains of three layers."""
    results = []
    for part in parts(chains):
        weights = [weight for own, _ in part for weight in own]
        form = [number for _, own in part for number in own]
        results += torch.ops.concertina.contract_many(weights, [len(own) for own, _ in part], form)
    return results


MOST_TENSORS = 2048  # concertina::cuda::ContractionPlan::most_tensors: weights, biases and the gradients of each


def parts(chains):
    """As many chains at a time as one plan takes."""
    part, tensors = [], 0
    for chain in chains:
        more = 4 * (len(chain[0]) + 1)
        if part and tensors + more > MOST_TENSORS:
            yield part
            part, tensors = [], 0
        part.append(chain)
        tensors += more
    if part:
        yield part


def _load_cuda():
    if not (AVAILABLE and CUDA_LIBRARY.exists() and torch.version.cuda):
        return False
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:  # built for another major version of CUDA
        warnings.warn(f"PyTorch's operations are used on CUDA devices, as {CUDA_LIBRARY.name} does not load: {error}")
        return False
    return True


if AVAILABLE:
    torch.ops.load_library(LIBRARY)

    @torch.library.register_fake("concertina::contract_many")
    def _fake(weights, counts, form):
        return [
            part[0].new_empty(contracted_shape(chain).weight_shape) for part, chain in _chains(weights, counts, form)
        ]

    @torch.library.register_fake("concertina::contract")
    def _(weights, form):
        return _fake(weights, [len(weights)], form)[0]

    @torch.library.register_fake("concertina::contract_backward")
    def _(gradient, weights, form):
        return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]

    @torch.library.register_fake("concertina::contract_many_backward")
    def _(gradients, weights, counts, form):
        return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]

    def _save(ctx, inputs, output):
        weights, *ctx.form = inputs
        ctx.save_for_backward(*weights)

    def _pull_back(gradients, weights, counts, form):
        """By PyTorch's operations, whose gradients have gradients."""
        from .contraction import Contraction

        result = []
        for gradient, (part, chain) in zip(gradients, _chains(weights, counts, form), strict=True):
            contraction = Contraction(chain)
            _, pull_back = torch.func.vjp(lambda *each, c=contraction: c.weight_by_steps(each), *part)
            result += pull_back(gradient)
        return result

    def _backward(ctx, gradient):
        weights, (form,) = list(ctx.saved_tensors), ctx.form
        if torch.is_grad_enabled():  # with create_graph
            return _pull_back([gradient], weights, [len(weights)], form), None
        return torch.ops.concertina.contract_backward(gradient, weights, form), None

    def _backward_many(ctx, gradients):
        weights, (counts, form) = list(ctx.saved_tensors), ctx.form
        if torch.is_grad_enabled():
            return _pull_back(gradients, weights, counts, form), None, None
        return torch.ops.concertina.contract_many_backward(gradients, weights, counts, form), None, None

    for name, backward in (("contract", _backward), ("contract_many", _backward_many)):
        torch.library.register_autograd(f"concertina::{name}", backward, setup_context=_save)
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(f"concertina::{name}", device, torch.float)

CUDA_AVAILABLE = _load_cuda()
