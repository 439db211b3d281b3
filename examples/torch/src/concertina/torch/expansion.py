# SPDX-License-Identifier: Apache-2.0
"""Layers expanded into several for training, and contracted again."""

import fnmatch
import itertools
import math
import numbers
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import operators
from .contraction import Contraction, apply_layers, full_precision
from .shapes import Chain, ConvShape, ExpansionError, ShapeError, require_exact

STRATEGIES = ("cl", "ck", "fc")
CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def shape_of(module, name=""):
    """The shape of an nn.Linear or nn.ConvNd. Throws ShapeError naming a module that is something else."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    complex_ = next((each.dtype for each in module.parameters() if each.is_complex()), None)
    if complex_ and (kind is nn.Linear or kind in CONVOLUTIONS):
        raise ShapeError(f"{name or 'module'} is {complex_}; only real layers are contracted")
    if kind is nn.Linear:
        shape = ConvShape(module.in_features, module.out_features, bias=module.bias is not None)
        return _with_channels(shape, name)
    if kind not in CONVOLUTIONS:
        raise ShapeError(f"{name or 'module'} ({kind.__name__}) is not a Linear or Conv1d to 3d")
    if module.padding_mode != "zeros":
        raise ShapeError(f"{name or 'module'} pads with {module.padding_mode!r}; only zeros are linear in one layer")
    rank = CONVOLUTIONS[kind]
    stride, dilation = axes_of(module.stride, rank), axes_of(module.dilation, rank)
    shape = ConvShape(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        stride,
        padding_of(module.padding, module.kernel_size, dilation),
        dilation,
        module.groups,
        module.bias is not None,
    )
    return _with_channels(shape, name)


def _with_channels(shape, name):
    if not (shape.in_channels and shape.out_channels):
        raise ShapeError(f"{name or 'module'} ({shape}) has no channels")
    return shape


def padding_of(padding, kernel_size, dilation):
    """At the start and the end of each axis, of a number, several, "valid" or "same"."""
    if padding == "same":  # PyTorch puts the odd one at the end
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in axes_of(0 if padding == "valid" else padding, len(kernel_size)))


def axes_of(value, rank):
    """A number for each axis, where PyTorch takes one for all of them too."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def expanded_shapes(shape, strategy, rate=4, inner_bias=True, name=""):
    """The layers into which one expands; the first has all padding, so that no border differs.

    CL and FC are 1x1, kxk, 1x1 of widths m, rm, rn, n; CK is 3x3, 3x3, ... of widths m, rm, rn, ..., n.
    Throws ShapeError where the strategy does not apply. Source: ExpandNets (NeurIPS 2020), Section 3.1
    """
    if not isinstance(rate, numbers.Real) or not 0 < rate < 1e6:
        raise ShapeError(f"expansion rate {rate!r} is not in (0, 1e6)")
    if (strategy == "fc") != (shape.rank == 0):
        raise ShapeError(
            f"{strategy} does not expand {name or 'module'} ({shape}); fc is for Linear, cl and ck are for convolutions"
        )
    ones = (1,) * shape.rank
    if strategy == "ck":
        if max(shape.kernel_size) <= 3:
            raise ShapeError(
                f"CK expands kernels larger than 3 into 3x3 layers; expand {name or 'module'} ({shape}) with CL"
            )
        kernels, left = [], shape.kernel_size
        while max(left) > 1:
            kernels.append(tuple(min(k, 3) for k in left))
            left = tuple(k - min(k, 3) + 1 for k in left)
        strided = len(kernels) - 1
    else:
        kernels, strided = [ones, shape.kernel_size, ones], 1

    def wide(channels):
        return max(math.floor(rate * channels / shape.groups + 0.5), 1) * shape.groups

    widths = [shape.in_channels, wide(shape.in_channels)]
    widths += [wide(shape.out_channels)] * (len(kernels) - 2) + [shape.out_channels]
    return [
        ConvShape(
            widths[layer],
            widths[layer + 1],
            kernel,
            shape.stride if layer == strided else ones,
            shape.padding if layer == 0 else tuple((0, 0) for _ in ones),
            tuple(d if k > 1 else 1 for d, k in zip(shape.dilation, kernel)),
            shape.groups,
            shape.bias and (inner_bias or layer == len(kernels) - 1),
        )
        for layer, kernel in enumerate(kernels)
    ]


def expand_(model, strategy, *, rate=4, preserve=False, only=None, inner_bias=True, when="auto"):
    """Expands layers of `model`, or `model` itself, in place, and returns it.

    strategy    "cl", "ck" or "fc", or several as "cl+fc": CL for convolutions whose kernel is larger than 1, CK for
                those larger than 3, FC for Linear layers
    preserve    whether the layers contract to the weight that is there; else they are initialised as PyTorch does
    only        patterns (fnmatch) of modules' names: these alone, 1x1 convolutions too; what does not fit, and a
                pattern that no name matches, is refused
    inner_bias  whether layers before the last have biases too, where the layer has one
    when        "auto" runs the layers in turn where contracting takes no fewer multiply-adds, as for few positions;
                "always" contracts; "never" runs the layers

    A layer's parameters become parametrizations (torch.nn.utils.parametrize): parametrizations.weight.original0, the
    layer applied first, and so on, of the dtype, device and memory format that the weight has. Make the optimizer and
    wrappers after this, and initialise before, with preserve=True, or the originals. A model in which nothing was
    expanded, a weight that is tied to another layer's (of `model`: ties to what is outside are not seen, and come
    apart) or is no parameter, as of a pruned layer, a parametrized layer, a wrapped model, and padding that is not
    zeros are refused: ShapeError. Nothing is changed then. Stride, padding and the like stay as they are while a layer
    is expanded: it raises ShapeError otherwise.
    """
    require_unwrapped(model)
    kinds = str(strategy).split("+")
    if not set(kinds) <= set(STRATEGIES) or {"cl", "ck"} <= set(kinds):
        raise ShapeError(f"there is no strategy {strategy!r}; there are cl, ck, fc, and with fc cl+fc, ck+fc")
    if when not in ("auto", "always", "never"):
        raise ShapeError(f"when is {when!r}, not auto, always or never")
    named = None
    if only is not None:
        names = dict(model.named_modules(remove_duplicate=False))
        patterns = [only] if isinstance(only, str) or not isinstance(only, Iterable) else list(only)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise ShapeError(f"only is {only!r}, not a pattern or several")
        matches = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
        for pattern in (pattern for pattern, matching in matches.items() if not matching):
            raise ShapeError(f"no module of {type(model).__name__} is named {pattern!r}")
        named = {names[name] for name in itertools.chain(*matches.values())}
    chosen = []
    for name, module in model.named_modules():
        alone = module is model and (is_expanded(model) or not list(model.children()))
        if module in named if named is not None else alone or _applies(module, kinds):
            shape = shape_of(module, name)
            kind = next((kind for kind in kinds if (kind == "fc") == (shape.rank == 0)), kinds[0])
            chosen.append((name, module, shape, kind, expanded_shapes(shape, kind, rate, inner_bias, name)))
    if not chosen:
        raise ShapeError(f"no layer of {type(model).__name__} is one that {strategy} expands")
    _refuse_tied(model, [module for _, module, *_ in chosen])
    for name, module, *_ in chosen:
        if parametrize.is_parametrized(module):
            raise ShapeError(f"{name or 'module'} is parametrized already; remove that first, or choose with `only`")
        own = module._parameters
        if own.get("weight") is None or own.get("bias") is not module.bias:
            raise ShapeError(
                f"{name or 'module'} computes its weight or bias from other parameters, as with weight_norm or when "
                "pruned; remove that first"
            )
    weights = [
        preserving_weights(module.weight, shape, layers) if preserve else None for _, module, shape, _, layers in chosen
    ]  # before anything is changed, as not every kernel can be represented
    for (_, module, _, kind, layers), own in zip(chosen, weights):
        _parametrize(module, kind, layers, own, preserve, when)
    return model


def contract_together_(model):
    """Lets each call of `model` contract all its expanded layers at once, before its forward, and returns the model.

    By the compiled operators, on a CUDA device in a few launches for every hundred layers; what these do not take is
    contracted as before. All layers contract in every call, as with when="always", but for those of when="never".
    A part of the model that is run again for its gradient (checkpointing) is not for this. contract_ takes it back.
    Throws ShapeError where nothing is expanded
    """
    require_unwrapped(model)
    if not any(True for _ in _expanded(model)):
        raise ShapeError(f"no layer of {type(model).__name__} is expanded")
    _forget_hooks(model)
    model.register_forward_pre_hook(_contract_all)
    model.register_forward_hook(_forget_all, always_call=True)
    return model


def _forget_hooks(model):
    for hooks, own in ((model._forward_pre_hooks, _contract_all), (model._forward_hooks, _forget_all)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]


def _contract_all(model, _):
    groups = defaultdict(list)
    for _, module in _expanded(model):
        own = module.parametrizations.weight
        weights, encoded = originals(own), own[0].contraction.encoded
        if own[0].when != "never" and encoded and operators.takes(weights):
            groups[weights[0].device, weights[0].dtype].append((own[0], weights, encoded))
    for group in groups.values():
        with full_precision(group[0][1][0]):
            results = operators.contract_many([(weights, encoded) for _, weights, encoded in group])
        for (own, *_), result in zip(group, results, strict=True):
            own.together = result


def _forget_all(model, *_):
    for _, module in _expanded(model):
        module.parametrizations.weight[0].together = None


def contract_(model):
    """Contracts in place what expand_ expanded, in double and rounded once, and returns the model.

    Modules and state dict are as before the expansion; dtype, device and memory format are the originals'. Layers
    whose originals are tied, or that have another parametrization on top, and wrapped models are refused: ShapeError.
    """
    require_unwrapped(model)
    expanded = list(_expanded(model))
    _refuse_tied(model, [module for _, module in expanded])
    for name, module in expanded:
        shape_of(module, name)
        _require_geometry(module)
        if not is_alone(module):
            raise ShapeError(f"{name or 'the layer'} has another parametrization on top; remove that first")
    for _, module in expanded:
        own = {
            name: nn.Parameter(value, requires_grad=any(each.requires_grad for each in originals(parametrization)))
            for name, value in zip(("weight", "bias"), contracted(module))
            if value is not None
            for parametrization in [module.parametrizations[name]]
        }
        # Not remove_parametrizations: copies of the module share its class, whose properties that deletes.
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        for name, value in own.items():
            module._parameters.pop(name, None)
            module.register_parameter(name, value)
    for module in model.modules():
        _forget_hooks(module)
    return model


@torch.no_grad()
def contracted(module):
    """Weight and bias of an expanded module, computed in double and rounded once."""
    contraction, weights, biases = _parts(module)
    dtype = weights[0].dtype
    wide = [weight.double() for weight in weights]
    bias = contraction.bias(wide, [None if bias is None else bias.double() for bias in biases])
    weight = in_format_of(weights, contraction.weight(wide).to(dtype))
    return weight, None if bias is None else bias.to(dtype)


OWN_HOOKS = (_contract_all, _forget_all)


def report(model):
    """What is expanded, and what that costs: an object that prints as a table; its `rows` are dicts."""
    rows = []
    for name, module in _expanded(model):
        own = module.parametrizations.weight[0]
        shapes = own.contraction.leaves
        rows.append(
            {
                "name": name,
                "strategy": own.strategy,
                "layer": str(own.contraction.shape),
                "layers": [str(shape) for shape in shapes],
                "parameters": _parameters(own.contraction.shape),
                "expanded_parameters": sum(map(_parameters, shapes)),
                "multiply_adds": own.contraction.multiply_adds,
            }
        )
    return Report(rows)


class Report:
    def __init__(self, rows):
        self.rows = rows

    def __str__(self):
        if not self.rows:
            return "nothing is expanded"
        lines = [["layer", "", "expanded by", "parameters", "expanded", "multiply-adds to contract"]]
        for row in self.rows:
            counts = (f"{row[key]:,}" for key in ("parameters", "expanded_parameters", "multiply_adds"))
            lines.append([row["name"], row["layer"], row["strategy"], *counts])
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


# ---- a parametrized layer ----------------------------------------------------------------------------


class ExpandedWeight(nn.Module):
    """The parametrization of an expanded layer's weight; its originals are the layers' weights."""

    def __init__(self, strategy, layers, weights, when, geometry):
        super().__init__()
        self.geometry = geometry  # of the module: see _require_geometry
        form = Chain(layers)
        require_exact(form)
        self.strategy, self.when, self.contraction = strategy, when, Contraction(form)
        self.together = None  # the contraction, while the model runs that computed it with others
        self._initial = weights

    def forward(self, *weights):
        return self.contraction.weight(weights) if self.together is None else self.together

    def right_inverse(self, weight):
        if self._initial is None:
            raise ShapeError("an expanded layer's weight cannot be assigned; expand_(..., preserve=True) starts there")
        initial, self._initial = self._initial, None
        return initial

    def contracts(self, x):
        """Whether this takes fewer multiply-adds than running the layers on `x`; forward and backward alike."""
        if self.together is not None:
            return True
        if self.when != "auto":
            return self.when == "always"
        rank, layered = self.contraction.shape.rank, 0
        size = tuple(x.shape[x.dim() - rank :])
        batch = x.numel() // (x.shape[-rank - 1] * math.prod(size)) if rank else x.numel() // x.shape[-1]
        for shape in self.contraction.leaves:
            size = shape.output_size(size)
            layered += shape.weight_numel * math.prod(size)
        compact = self.contraction.shape.weight_numel * math.prod(size)
        return self.contraction.multiply_adds + batch * compact < batch * layered


class ExpandedBias(nn.Module):
    """The parametrization of its bias; its originals are the layers' biases."""

    def __init__(self, weight, biases):
        super().__init__()
        self._weight = (weight,)  # in a tuple: the weight's parametrizations are another module's
        self._initial = biases

    def forward(self, *biases):
        weights = originals(self._weight[0])
        biases = [None] * (len(weights) - len(biases)) + list(biases)
        return self._weight[0][0].contraction.bias(weights, biases)

    right_inverse = ExpandedWeight.right_inverse


def originals(parametrizations):
    """As they are in a forward, which hooks may make of others: torch.nn.utils.prune."""
    for hook in parametrizations._forward_pre_hooks.values():
        hook(parametrizations, ())
    return [getattr(parametrizations, f"original{i}") for i in range(parametrizations.ntensors)]


def _parametrize(module, strategy, layers, weights, preserve, when):
    like = {"dtype": module.weight.dtype, "device": module.weight.device}
    bounds = [1 / math.sqrt(math.prod(shape.weight_shape[1:])) for shape in layers]  # as PyTorch initialises
    if weights is None:
        weights = [torch.empty(shape.weight_shape, **like).uniform_(-b, b) for shape, b in zip(layers, bounds)]
    biases = [torch.empty(s.out_channels, **like).uniform_(-b, b) for s, b in zip(layers, bounds) if s.bias]
    if biases and (preserve or not module.bias.requires_grad):  # a frozen one stays what it is
        biases = [torch.zeros_like(bias) for bias in biases[:-1]] + [module.bias.detach().clone()]
    weights = [in_format_of([module.weight], weight) for weight in weights]
    trained = module.weight.requires_grad
    own = ExpandedWeight(strategy, layers, weights, when, _geometry(module))
    parametrize.register_parametrization(module, "weight", own, unsafe=True)
    weight = module.parametrizations.weight
    if biases:
        parametrize.register_parametrization(module, "bias", ExpandedBias(weight, biases), unsafe=True)
    weight.requires_grad_(trained)
    module.parametrizations.train(module.training)

    # The class is this module's own, so its forward may be too.
    contracted_forward = type(module).forward

    def forward(self, input):  # as PyTorch's layers name it
        _require_geometry(self)
        if getattr(self, "_is_replica", False):  # whose bias would be of the weights on another device
            raise ShapeError("expanded layers do not run under nn.DataParallel; use DistributedDataParallel")
        if not is_alone(self) or self.parametrizations.weight[0].contracts(input):
            return contracted_forward(self, input)
        contraction, weights, biases = _parts(self)
        return apply_layers(contraction.form, input, iter(zip(weights, biases)))

    type(module).forward = forward


def _geometry(module):
    return [getattr(module, name, None) for name in ("stride", "padding", "dilation", "groups", "padding_mode")]


def _require_geometry(module):
    """Throws ShapeError where it is not what it was when the module was expanded, which its layers have."""
    own = module.parametrizations.weight[0].geometry
    if _geometry(module) != own:
        raise ShapeError(
            f"an expanded {type(module).__bases__[0].__name__} has another stride, padding, dilation, groups or "
            f"padding mode than when it was expanded ({own}); set these before expand_, or after contract_"
        )


def _parts(module):
    _require_geometry(module)
    weights = originals(module.parametrizations.weight)
    biases = originals(module.parametrizations.bias) if "bias" in module.parametrizations else []
    contraction = module.parametrizations.weight[0].contraction
    return contraction, weights, [None] * (len(weights) - len(biases)) + biases


def is_expanded(module):
    return parametrize.is_parametrized(module, "weight") and isinstance(
        module.parametrizations.weight[0], ExpandedWeight
    )


def is_alone(module):
    """Whether an expanded module has no other parametrization on top."""
    return all(len(each) == 1 for each in module.parametrizations.values())


def _expanded(model):
    return ((name, module) for name, module in model.named_modules() if is_expanded(module))


def _parameters(shape):
    return shape.weight_numel + shape.bias * shape.out_channels


def _applies(module, kinds):
    kind = type(module)
    if parametrize.is_parametrized(module) and not is_expanded(module):
        kind = kind.__bases__[0]
    if kind is nn.Linear:
        return "fc" in kinds
    if kind not in CONVOLUTIONS:
        return False
    return max(module.kernel_size) > 3 if "ck" in kinds else "cl" in kinds and max(module.kernel_size) > 1


def require_unwrapped(model):
    if not isinstance(model, nn.Module):
        raise ShapeError(f"{model!r} is no module")
    for name, module in model.named_modules():
        for wrapper in WRAPPERS & {kind.__name__ for kind in type(module).__mro__}:
            raise ShapeError(
                f"{name or 'the model'} is wrapped in {wrapper}, which goes on with the parameters that it was given. "
                "Expand before wrapping; afterwards take the .module of it, or of FSDP load the full state dict into "
                "an unwrapped model that is expanded alike"
            )


def in_format_of(tensors, weight):
    """The weight in channels_last where one of these tensors is, else contiguous."""
    last = CHANNELS_LAST.get(weight.dim())
    is_last = last and any(each.is_contiguous(memory_format=last) and not each.is_contiguous() for each in tensors)
    return weight.contiguous(memory_format=last if is_last else torch.contiguous_format)


def _refuse_tied(model, modules):
    """Throws ShapeError where parameters of these modules are also another module's."""
    owners = defaultdict(dict)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)][f"{name}.{key}".lstrip(".")] = module
    of_interest = {id(parameter) for module in modules for parameter in module.parameters()}
    for parameter, names in owners.items():
        if parameter in of_interest and len(names) > 1:
            raise ShapeError(f"{' and '.join(names)} are one tied parameter, which would come apart; untie it first")


# ---- function-preserving expansion -------------------------------------------------------------------


@torch.no_grad()
def preserving_weights(weight, shape, layers):
    """Weights that contract to `weight`: CL and FC with random orthonormal ends, CK by shifted copies of channels.

    Ensures  equality up to rounding; for CK to the last bit
    Throws   ExpansionError where these widths cannot represent the kernel
    """
    if layers[0].pointwise and layers[-1].pointwise:
        weights = _orthonormal_ends(weight, shape, layers)
    else:  # one layer takes the kernel's elements, the nearer to the middle the more it can reach
        frees = sorted(range(len(layers)), key=lambda layer: abs(layer - len(layers) // 2))
        weights = next(filter(None, (_shifted_copies(weight, shape, layers, free) for free in frees)), None)
    if weights is None:
        raise ExpansionError(
            f"layers of these widths cannot represent the kernel ({shape} into {', '.join(map(str, layers))}); expand "
            "at a higher rate, or another way"
        )
    return weights


def _orthonormal_ends(weight, shape, layers):
    groups = shape.groups
    m, rm, rn, n = (width // groups for width in (shape.in_channels, *(s.out_channels for s in layers)))
    if rm < m or rn < n:
        return None
    first, last = (torch.randn(groups, *each, dtype=torch.float64, device="cpu") for each in ((rm, m), (rn, n)))
    first, last = (torch.linalg.qr(end).Q.to(weight.device) for end in (first, last))  # orthonormal columns
    target = weight.double().reshape(groups, n, m, -1)
    middle = torch.einsum("gpn,gnmk,gqm->gpqk", last, target, first)
    parts = (first, middle, last.transpose(1, 2))
    return [part.reshape(s.weight_shape).to(weight.dtype) for part, s in zip(parts, layers)]


def _shifted_copies(weight, shape, layers, free):
    """Layers before the free one copy each channel, shifted or not along each axis; those after it add such copies.

    A tap of the kernel is then one of the free layer, between one copy of its input and one of its output.
    None where there are not as many channels, or a tap is out of reach.
    """
    rank, groups = shape.rank, shape.groups
    sides = layers[:free], layers[free + 1 :]
    reach = [[sum(s.kernel_size[axis] - 1 for s in side) for axis in range(rank)] for side in sides]
    copies = [list(itertools.product(*((0, 1) if r else (0,) for r in side))) for side in reach]
    m, n = shape.in_channels // groups, shape.out_channels // groups
    widths = [layer.out_channels // groups for layer in layers[:-1]]
    if any(w < m * len(copies[0]) for w in widths[:free]) or any(w < n * len(copies[1]) for w in widths[free:]):
        return None
    weights = [weight.new_zeros(groups, s.out_channels // groups, *s.weight_shape[1:]) for s in layers]
    for index, (layer, new) in enumerate(zip(layers, weights)):
        if index == free:
            continue
        after = index > free
        for channel, (copy, shifted) in itertools.product(range(n if after else m), enumerate(copies[after])):
            wide = channel * len(copies[after]) + copy
            out = channel if index == len(layers) - 1 else wide
            tap = [on * (k - 1) for on, k in zip(shifted, layer.kernel_size)]
            new[:, out, channel if index == 0 else wide, *tap] = 1
    target = weight.reshape(groups, n, m, *shape.kernel_size)
    for tap in itertools.product(*map(range, shape.kernel_size)):
        for (before, b), (after, a) in itertools.product(*map(enumerate, copies)):
            left = [t - on * r - also * q for t, on, r, also, q in zip(tap, b, reach[0], a, reach[1])]
            if all(0 <= t < k for t, k in zip(left, layers[free].kernel_size)):
                rows = slice(after, n * len(copies[1]), len(copies[1]))
                columns = slice(before, m * len(copies[0]), len(copies[0]))
                weights[free][:, rows, columns, *left] = target[..., *tap]
                break
        else:
            return None
    return [new.reshape(s.weight_shape) for new, s in zip(weights, layers)]
