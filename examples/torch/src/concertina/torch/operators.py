# SPDX-License-Identifier: Apache-2.0
"""The compiled operators, where they are built: torch.ops.concertina.contract and contract_backward (csrc/)."""

import pathlib

import torch

from .shapes import Chain, ConvShape, contracted_shape

LIBRARY = pathlib.Path(__file__).with_name("_operators.so")
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


def takes(weights):
    return all(w.device.type == "cpu" and w.dtype in (torch.float, torch.double) for w in weights)


def contract(weights, form):
    return torch.ops.concertina.contract(weights, form)


if AVAILABLE:
    torch.ops.load_library(LIBRARY)

    @torch.library.register_fake("concertina::contract")
    def _(weights, form):
        shape = contracted_shape(Chain(decoded(form, weights[0].dim() - 2)))
        return weights[0].new_empty(shape.weight_shape)

    @torch.library.register_fake("concertina::contract_backward")
    def _(gradient, weights, form):
        return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]

    def _save(ctx, inputs, output):
        weights, ctx.form = inputs
        ctx.save_for_backward(*weights)

    def _backward(ctx, gradient):
        weights = list(ctx.saved_tensors)
        if torch.is_grad_enabled():  # with create_graph: by PyTorch's operations, whose gradients have gradients
            from .contraction import Contraction

            form = Chain(decoded(ctx.form, gradient.dim() - 2))
            _, pull_back = torch.func.vjp(lambda *each: Contraction(form).weight_by_steps(each), *weights)
            return list(pull_back(gradient)), None
        return torch.ops.concertina.contract_backward(gradient, weights, ctx.form), None

    torch.library.register_autograd("concertina::contract", _backward, setup_context=_save)
    torch.library.register_autocast("concertina::contract", "cpu", torch.float)
