# SPDX-License-Identifier: Apache-2.0
"""Blocks whose batch norms are in training, each run as one layer: statistics from the moments of the input's patches.

A norm normalises a linear function of the block's input. Its statistics follow from mean and covariance of the
patches that this function reads, so for the batch at hand it is a factor and a shift for each channel, and contracts:
docs/moments.md.
"""

import collections
import functools
import math
import os
import types
import warnings
import weakref
from dataclasses import dataclass, replace

import torch
from torch import distributed, fx, nn

from . import operators
from .contraction import Contraction, apply, full_precision
from .expansion import require_unwrapped, shape_of
from .layers import CONV, NORMS, POOLS, _diagonal, _pool
from .moments import PatchMoments, channel_means, less_means, multiply_adds
from .regions import _Regions
from .shapes import (
    Chain, ContractionWarning, ConvShape, ShapeError, Sum, contracted_shape, leaves, require_exact,
)  # fmt: skip
from .tracing import INTERNAL, _cells, _code, _library, _ours, hooked, trace


def contract_in_training_(model, when="auto"):
    """Blocks of convolutions, average pools, batch norms and sums train as one layer each, exactly; returns `model`.

    A block is one layer in every training step: norms normalise by the batch's statistics, gradients go through these
    to all layers and to the input, running statistics move as PyTorch moves them. In eval() it is the contraction with
    these. Blocks are found by structure, as by from_blocks, where one layer equals them at every border. Modules,
    parameters and the state dict stay as they are, so an optimizer may be made before or after; what changes is the
    forward of the modules whose code runs a block, which are then of a class derived from their own. Their own code
    runs whenever something that it was traced with is no longer as it was: hooks, attributes, modules (docs/torch.md).

    when  "auto" runs the layers in turn where contracting takes no fewer multiply-adds, those in double counted twice;
          "always" contracts all that one layer equals, whatever that costs

    nn.SyncBatchNorm shares its statistics among workers, on any device; the gradient of the parameters is as of
    PyTorch's. On the processor, where PyTorch has none, one beside a single convolution runs so too. Not contracted
    are blocks with dropout, layers with hooks or parametrizations, code that depends on `training`, and what
    from_blocks leaves because a graph would not be the same. Weights are contracted, and moments taken, in double.
    Under torch.func and forward mode the layers run in turn.
    Throws  ShapeError where no block is found, with the reason where there is one, or when called again; in the step,
            where a norm has one value per channel; for a gradient of the gradient through moments
    """
    if when not in ("auto", "always"):
        raise ShapeError(f"when is {when!r}, not auto or always")
    require_unwrapped(model)
    if any(hasattr(type(module), "contractions") for module in model.modules()):
        raise ShapeError(f"{type(model).__name__} is contracted in training already")
    reasons = []
    if not _convert(model, "", when, reasons):
        why = f"; {reasons[0]}" if reasons else ""
        raise ShapeError(
            f"{type(model).__name__} has no block of several layers and batch norms that is one layer{why}"
        )
    return model


class TrainingContraction:
    """A form with batch norms in training as one layer. Planned once; holds no tensors.

    `norms` says which leaves of the form are batch norms, as layers that scale each channel. Calling it with an input
    and the leaves' modules in their order, None for an identity, is the block.
    Throws  InexactError where a norm's prefix, or the form, is not one layer
    """

    def __init__(self, form, norms, when="auto"):
        self.form, self.norms, self.when = form, norms, when
        self.leaves = leaves(form)
        self.shape = contracted_shape(form)
        self.steps, self.geometries, self.once = [], [], 0
        self._at = 0
        require_exact(form)
        self.result = self._plan(form, _Value(None, None, Chain())).index
        self._share()

    # ---- the plan: values are first the leaves, then what each step makes

    def _plan(self, form, before):
        """Steps that make one layer of `before`, whose index is None where that is the input, and a form after it."""
        if isinstance(form, ConvShape) and self.norms[self._at]:
            if before.form:
                require_exact(before.form)
            diagonal = self._emit(_Statistics(self._at, before, form))
            self._at += 1
            return self._joined(before, [_Value(diagonal, form, form)])
        count = len(leaves(form))
        if not any(self.norms[self._at : self._at + count]):
            values = [_Value(self._at + i, shape, shape) for i, shape in enumerate(leaves(form))]
            self._at += count
            return self._joined(before, values, form)
        if isinstance(form, Sum):
            parts = [self._plan(part, before) for part in form]
            own = Sum(part.shape for part in parts)
            return self._contract(own, parts, Chain([Sum(part.form for part in parts)]))
        run = []  # parts without norms, contracted with what is before them in the cheapest order
        for part in form:
            count = len(leaves(part))
            if not any(self.norms[self._at + sum(len(leaves(each)) for each in run) :][:count]):
                run.append(part)
                continue
            if run:
                before, run = self._plan(_chain(run), before), []
            before = self._plan(part, before)
        return self._plan(_chain(run), before) if run else before

    def _joined(self, before, values, form=None):
        form = values[0].shape if form is None else form
        whole = Chain((*before.form, form))
        if before.index is None:
            return replace(values[0], form=whole) if form is values[0].shape else self._contract(form, values, whole)
        parts = form if isinstance(form, Chain) else [form]
        return self._contract(Chain((before.shape, *parts)), [before, *values], whole)

    def _contract(self, form, operands, whole):
        contraction = Contraction(form)
        self.once += 3 * contraction.multiply_adds
        step = _Contract(contraction, [operand.index for operand in operands])
        return _Value(self._emit(step), contraction.shape, whole)

    def _emit(self, step):
        self.steps.append(step)
        return len(self.leaves) + len(self.steps) - 1

    def _share(self):
        """Kernels that read at the same positions share moments where that takes no more work than two."""
        statistics = [step for step in self.steps if isinstance(step, _Statistics)]
        for step in statistics:
            own = step.geometry
            for index, other in enumerate(self.geometries):
                both = _united(other, own)
                if both and _work(both) <= _work(other) + _work(own):
                    self.geometries[index], step.patches = both, index
                    break
            else:
                self.geometries.append(own)
                step.patches = len(self.geometries) - 1
        for step in statistics:
            whole = self.geometries[step.patches]
            step.whole = None if whole == step.geometry else whole
            patch = step.geometry.weight_numel // step.geometry.out_channels
            self.once += 2 * step.out_channels * patch**2

    # ---- a step

    def __call__(self, x, *modules):
        if isinstance(x, fx.Proxy) or not self._takes(x) or not self._contracts(x, modules):
            return self._layered(self.form, x, iter(modules))
        centre = channel_means(x) if any(map(_by_batch, modules)) else None
        with full_precision(x):
            weight, bias = self._layer(x, modules, centre)
            shape = self.shape
            if centre is not None:  # F x + b = F (x - c) + (F c + b), of which the former is better in few digits
                taps = weight.reshape(shape.groups, -1, shape.in_channels // shape.groups, math.prod(shape.kernel_size))
                shift = (taps.sum(3) @ centre.reshape(shape.groups, -1, 1)).flatten()
                bias = shift if bias is None else shift + bias
                x = less_means(x, shape, centre)
                shape = replace(shape, padding=((0, 0),) * shape.rank)
        y = apply(shape, x, weight.to(x.dtype))
        # Not by the convolution, which sums a bias's gradient one after another: that errs 8 times as much in float.
        return y if bias is None else y.add_(bias.to(y.dtype).reshape(-1, *[1] * shape.rank))

    def multiply_adds(self, batch, size, dtype=torch.float, training=True):
        """Of a step on a batch, or of inference: layer by layer, and contracted; those in double count twice."""
        passes = 3 if training else 1
        layered = _layered_multiply_adds(self.form, size, iter(self.norms))[0]
        double = 1 if dtype == torch.double else 2
        own = passes * self.shape.weight_numel * math.prod(self.shape.output_size(size))
        if training:
            for geometry in self.geometries:
                moments, backward = multiply_adds(geometry, size)
                own += double * moments + backward
        return passes * layered * batch, own * batch + double * self.once * passes // 3

    def _takes(self, x):
        """Whether it is a batch, and PyTorch differentiates it backward, once: moments have no other derivatives."""
        return x.dim() == self.shape.rank + 2 and not operators.transformed()

    def _contracts(self, x, modules):
        if x.device.type == "cpu" and any(map(_synchronised, modules)):  # where PyTorch has no SyncBatchNorm
            return True
        shared = any(_group(module) is not None for module in modules)
        if not (shared or len(x)):  # the layers take an empty batch, and leave their statistics
            return False
        if self.when == "always":
            return True
        batch = 2**30 if shared else len(x)  # workers decide alike, whatever their batches
        layered, contracted = self.multiply_adds(batch, x.shape[2:], x.dtype, any(map(_by_batch, modules)))
        return contracted < layered

    def _layered(self, form, x, modules):
        if isinstance(form, ConvShape):
            module = next(modules)
            return x if module is None else module(x)
        if isinstance(form, Sum):
            parts = [self._layered(part, x, modules) for part in form]
            return sum(parts[1:], parts[0])
        for part in form:
            x = self._layered(part, x, modules)
        return x

    def _layer(self, x, modules, centre):
        """The one layer, for this batch, in double; moves running statistics."""
        values = [_of_module(shape, module, x) for shape, module in zip(self.leaves, modules)]
        moments = {}
        for step in self.steps:
            if isinstance(step, _Contract):
                weights, biases = zip(*(values[operand] for operand in step.operands))
                values.append((step.contraction.weight(weights), step.contraction.bias(weights, biases)))
                continue
            norm = modules[step.leaf]
            if not _by_batch(norm):
                values.append(_factors(step.shape, norm, norm.running_mean.double(), norm.running_var.double()))
                continue
            key = step.patches, _group(norm)
            if key not in moments:
                moments[key] = PatchMoments.apply(x, centre, self.geometries[step.patches], key[1])
            before = None if step.before.index is None else values[step.before.index]
            mean, variance = step.of(before, *moments[key][:2])
            _move(norm, mean, variance, moments[key][2])
            values.append(_factors(step.shape, norm, mean, variance))
        return values[self.result]


@dataclass(frozen=True)
class _Value:
    index: int | None
    shape: ConvShape | None
    form: Chain


@dataclass
class _Contract:
    contraction: Contraction
    operands: list


class _Statistics:
    """Mean and variance of what a norm normalises, a layer `before` on the input."""

    def __init__(self, leaf, before, norm):
        self.leaf, self.before, self.shape = leaf, before, norm
        self.patches = self.whole = None  # which moments, and the patches of these where they are larger than its own
        shape = norm if before.shape is None else before.shape
        self.geometry = replace(shape, out_channels=shape.in_channels, bias=False)
        self.out_channels = shape.out_channels

    def of(self, before, mean, covariance):
        groups = self.geometry.groups
        if self.whole:
            group, elements = _elements(self.geometry, self.whole, mean.device)
            mean = mean[group, elements]
            covariance = covariance[group[:, :, None], elements[:, :, None], elements[:, None, :]]
        if before is None:
            return mean.flatten(), covariance.flatten()
        weight, bias = before
        weight = weight.reshape(groups, -1, mean.shape[1])
        own = (weight @ mean.unsqueeze(2)).flatten()
        variance = (weight @ covariance * weight).sum(2).flatten()
        return own if bias is None else own + bias, variance


def _elements(own, whole, device):
    """Where the patches of one geometry lie in those of a larger one: groups [own's, 1], elements [own's, patch]."""
    taps = torch.zeros((), dtype=torch.long, device=device)
    for k, d, (p, _), n, e, (q, _) in zip(
        own.kernel_size, own.dilation, own.padding, whole.kernel_size, whole.dilation, whole.padding
    ):
        at = (torch.arange(k, device=device) * d + q - p) // e
        taps = taps.unsqueeze(-1) * n + at
    channels = torch.arange(own.in_channels, device=device).reshape(own.groups, -1)
    width = whole.in_channels // whole.groups
    elements = (channels % width).unsqueeze(2) * math.prod(whole.kernel_size) + taps.flatten()
    return channels[:, :1] // width, elements.flatten(1)


def _united(f, g):
    """The patches that hold those of both, or None where these are read at other positions."""
    alike = all(
        sum(p) - d * (k - 1) == sum(q) - e * (j - 1)
        for p, d, k, q, e, j in zip(f.padding, f.dilation, f.kernel_size, g.padding, g.dilation, g.kernel_size)
    )
    if f.stride != g.stride or not alike:
        return None
    both = contracted_shape(Sum([f, g]))
    return replace(both, bias=False)


def _work(geometry):
    """Multiply-adds on a map large enough that its border does not decide."""
    size = [
        max(d * (k - 1) + 1 - sum(p), 1) + 64
        for d, k, p in zip(geometry.dilation, geometry.kernel_size, geometry.padding)
    ]
    return sum(multiply_adds(geometry, size))


def _chain(parts):
    return parts[0] if len(parts) == 1 else Chain(parts)


def _layered_multiply_adds(form, size, norms):
    if isinstance(form, ConvShape):
        size = form.output_size(size)
        return 0 if next(norms) else form.weight_numel * math.prod(size), size
    total, at = 0, size
    for part in form:
        own, after = _layered_multiply_adds(part, at if isinstance(form, Chain) else size, norms)
        total, at = total + own, after
    return total, at


# ---- modules -----------------------------------------------------------------------------------------


def _of_module(shape, module, like):
    """A leaf's weight and bias in double; a norm's come later."""
    kind = {"dtype": torch.double, "device": like.device}
    if isinstance(module, tuple(NORMS)):
        return None
    if module is None:
        return torch.ones(shape.weight_shape, **kind), None
    if isinstance(module, tuple(POOLS)):
        return torch.full(shape.weight_shape, 1 / math.prod(shape.kernel_size), **kind), None
    bias = module.bias
    return module.weight.double(), None if bias is None else bias.double()


def _by_batch(module):
    """Whether it is a batch norm that normalises by the batch's statistics."""
    return isinstance(module, tuple(NORMS)) and (module.training or module.running_mean is None)


def _synchronised(norm):
    """Whether it is one that asks for other workers, even where there are none."""
    sync = isinstance(norm, nn.SyncBatchNorm) and norm.training
    return sync and distributed.is_available() and distributed.is_initialized()


def _group(norm):
    if not _synchronised(norm):
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _factors(shape, norm, mean, variance):
    """A norm as a layer that scales each channel: weight and bias."""
    factor = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = norm.weight.double() * factor
    shift = -mean * factor
    if norm.bias is not None:
        shift = norm.bias.double() + shift
    return factor.reshape(shape.weight_shape), shift


@torch.no_grad()
def _move(norm, mean, variance, count):
    """Running statistics, as torch.nn.BatchNorm moves them: the variance unbiased."""
    if not (norm.training and norm.track_running_stats):
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
    if norm.running_mean is not None:
        for running, value in ((norm.running_mean, mean), (norm.running_var, variance * (count / (count - 1)))):
            # As PyTorch's own, a write that autograd does not see: what was saved of a norm run before is not read.
            running.data.copy_((1 - momentum) * running.double() + momentum * value)


# ---- blocks of a model -------------------------------------------------------------------------------


class _TrainingRegions(_Regions):
    """Regions of a model in training. A leaf's parameters are its module's name, or None for an identity."""

    def __init__(self, traced, when):
        self.traced, self.when, self.steps = traced, when, set()
        super().__init__(fx.GraphModule(traced.root, traced.graph), "all" if when == "always" else "cheaper")

    def constant(self, node):
        if node.op != "get_attr" and not self.of_constants(node):
            return False
        self.constants[node] = None
        return True

    def acts(self, node):
        return super().acts(node) or node.op == "call_module" or node in self.steps  # norms move their statistics

    def with_source(self, region, node):
        return region  # norms would need the moments of larger patches

    def of_convolution(self, node):
        return None

    def of_module(self, node, module):
        if len(node.args) != 1 or node.kwargs or not self.varies(node.args[0]):
            return None
        base, kind = self.before(node.args[0]), type(module)
        if kind is nn.Identity:
            if base.parameters:
                self.absorbed.add(node.args[0])
            return replace(base, nodes=base.nodes + [node])
        if hooked(module) or module._backward_hooks:
            return None
        if kind in CONV.values():
            try:
                shape = shape_of(module, node.target)
            except ShapeError as error:
                self.reasons[node] = str(error)
                return None
        elif kind in NORMS:
            readers = [*map(self.kind, self.readers(node))]
            rank = self.rank_of(kind, base) or next((rank for rank, conv in CONV.items() if conv in readers), 0)
            if not rank:
                return None
            shape = _diagonal(rank, module.num_features, True)
        elif kind in POOLS and base.parameters and contracted_shape(base.form).rank == POOLS[kind]:
            pool = _pool(module, contracted_shape(base.form).out_channels)
            if not pool:
                return None
            shape = pool[0][0]
        else:
            return None
        return self.chained(node, [(shape, node.target)])

    def identity(self, like):
        return Chain([_diagonal(like.rank, like.in_channels, False)]), [None]

    def blocks(self):
        """Those with norms and more than one layer, or with norms that PyTorch does not run on the processor, which
        contract only there: (node, region, which leaves are norms, when)."""
        for node, region in self.ends():
            kinds = [type(self.modules.get(name)) for name in region.parameters]
            norms = [kind in NORMS for kind in kinds]
            several = sum(kind in CONV.values() or kind in POOLS for kind in kinds) > 1
            if any(norms) and (several or nn.SyncBatchNorm in kinds) and not self.out_of_turn(node, region):
                yield node, region, norms, self.when if several else "auto"

    def out_of_turn(self, end, region):
        """Whether one of its norms runs again before its end: running statistics would move in another order."""
        at = {node: index for index, node in enumerate(self.nodes)}
        calls = [(each.target, at[each]) for each in self.nodes if each.op == "call_module"]
        norms = [each for each in region.nodes if each.op == "call_module" and type(self.modules[each.target]) in NORMS]
        return any(name == each.target and at[each] < where < at[end] for each in norms for name, where in calls)

    def contracted(self):
        """The forward that runs each block as one layer, and the contractions."""
        graph, contractions, made, gone = self.model.graph, [], {}, set()
        for node, region, norms, when in list(self.blocks()):
            contraction = TrainingContraction(region.form, norms, when)
            contractions.append(contraction)
            gone.update(region.nodes)
            with graph.inserting_before(node):
                modules = [None if name is None else graph.get_attr(name) for name in region.parameters]
                source = made.get(region.source, region.source)
                made[node] = graph.call_function(_function(contraction), (source, *modules))
            node.replace_all_uses_with(made[node])
            self.steps.add(made[node])
        self.drop_dead(gone)
        self.model.recompile()
        return type(self.model).forward, contractions


def _function(contraction):
    """fx wants a function: it takes its name."""

    def contracted_in_training(x, *modules):
        return contraction(x, *modules)

    contracted_in_training.is_contraction = True
    return contracted_in_training


def _traced(module, when):
    """Its regions; None where torch.fx cannot trace it, or where its code depends on `training`."""
    traced = trace(module, (True, False))
    if traced is None:
        return None
    return _TrainingRegions(traced, when)


def _names(region, prefix=""):
    return frozenset(prefix + name for name in region.parameters if name is not None)


def _convert(module, at, when, reasons):
    """Whether there were blocks. `at` is the module's name in the model, with a dot behind it."""
    regions = _traced(module, when)
    if regions is None:
        return any([_convert(child, f"{at}{name}.", when, reasons) for name, child in module.named_children()])
    reasons += regions.reasons.values()
    converted = []
    blocks = [_names(region) for _, region, *_ in regions.blocks()]
    paths = {names: os.path.commonprefix([name.split(".")[:-1] for name in names]) for names in blocks}
    for names, path in sorted(paths.items(), key=lambda item: len(item[1])):  # code that runs others first
        if any(path[: len(each)] == each for each in converted):
            continue
        while not _convert_module(module, at, path, names, when) and path:
            path = path[:-1]  # the code that runs the block is further out
        converted.append(path)
    return bool(converted)


def _convert_module(model, at, path, names, when):
    """Gives the module at that path the forward that runs its blocks, if the one of these layers is among them."""
    module, prefix = model.get_submodule(".".join(path)), "".join(f"{name}." for name in path)
    regions = _traced(module, when)
    if regions is None or not any(_names(region, prefix) == names for _, region, *_ in regions.blocks()):
        return False
    contracted, contractions = regions.contracted()
    for name, tensor in regions.traced.made.items():
        module.register_buffer(name, tensor, persistent=False)
    kind, state = type(module), _State(module, at + prefix, regions.traced.reads, regions.model.graph)

    def forward(self, *args, **kwargs):
        traced = any(isinstance(each, fx.Proxy) for each in (*args, *kwargs.values()))
        own = kind.forward if traced or state.differs(self) else contracted
        return own(self, *args, **kwargs)

    forward.__wrapped__ = kind.forward  # whose arguments it has
    module.__class__ = type(f"Contracted{kind.__name__}", (kind,), {"forward": forward, "contractions": contractions})
    return True


class _State:
    """What the code of a module was traced with, beside tensors: of the modules within it classes, hooks, and what the
    code read of attributes and parameters' shapes; classes; globals. But not what each step reads of the norms of
    blocks, nor hooks of modules that the graph calls. It holds no module, as a module that is copied shares it."""

    def __init__(self, module, name, reads, graph):
        blocks = (node.args[1:] for node in graph.nodes if getattr(node.target, "is_contraction", False))
        names = {leaf.target for leaves in blocks for leaf in leaves if leaf is not None}
        self.called = {node.target for node in graph.nodes if node.op == "call_module"} - names
        self.norms = {name: type(module.get_submodule(name)) for name in names}
        self.norms = {name: kind for name, kind in self.norms.items() if kind in NORMS}
        self.classes = {kind for each in module.modules() for kind in type(each).__mro__ if not _ours(kind)}
        self.code = {kind: _code_of(kind) for kind in {*map(type, module.modules())} if _ours(kind)}
        self.reads, code = reads.attributes, reads.code
        self.names = frozenset().union(*(_code(each)[0] for each in code))
        self.globals = {
            (f"the global {name}", own.get("__name__")): (own, name)
            for each, own in code.items() for name in _code(each)[0] & own.keys()
        }  # fmt: skip
        self.where, self.said = f"{name[:-1] or 'the model'} ({type(module).__name__})", weakref.WeakKeyDictionary()
        self.before = self.of(module)

    def differs(self, module):
        """Whether anything is not as it was, of which the module warns once; again if it is something else."""
        try:
            now = self.of(module)
            if now == self.before:
                if self.said:
                    self.said.pop(module, None)
                return False
            what, where = next(key for key in {**self.before, **now} if _differ(self.before, now, key))
            what = f"{what} of {where}" if where else what
        except Exception as error:  # whatever comparing objects of a model's own raises
            what = f"something that cannot be compared ({error})"
        if self.said.get(module) != what:
            self.said[module] = what
            warnings.warn(
                f"{self.where} runs layer by layer: {what} is not as it was when it was contracted. Set that before "
                "contract_in_training_, or back",
                ContractionWarning,
                stacklevel=2,
            )
        return True

    def of(self, module):
        found = {("a hook of all modules", ""): bool(nn.modules.module._has_any_global_hook())}
        self.add(module, "", found)
        for kind in self.classes:
            for name, value in vars(kind).items():
                if not name.startswith("__"):
                    found[name, kind] = _value(value, self.names)
        for key, (own, name) in self.globals.items():
            found[key] = _named(own.get(name, MISSING), self.names)
        return found

    def add(self, module, name, found):
        kind, where = type(module), name or "the model"
        if name in self.norms and kind in NORMS:
            found["the norm", where] = self.norms[name] if kind is nn.SyncBatchNorm else kind, module.num_features
            found["the hooks", where] = hooked(module)
            return
        if name:  # what is around the model's code is run by nn.Module.__call__, and its class is derived
            found["the class", where] = kind
            found["the hooks", where] = name not in self.called and hooked(module)
        read = self.reads.get(name, set())
        if name and name not in self.called:  # what nn.Module.__call__ reads, and PyTorch's code that did not run
            read = read | CALL | self.code.get(kind, set())

        def those(values, *names):
            return values.items() if read & {*names} else ((key, values[key]) for key in values.keys() & read)

        for key, value in those(vars(module), "__dict__"):
            if key not in IGNORED:
                found[key, where] = _value(value, self.names)
        for key, each in those(module._parameters, "__dict__", "_parameters"):
            found[key, where] = "a parameter", None if each is None else each.shape
        for key, each in those(module._buffers, "__dict__", "_buffers"):
            found[key, where] = "a buffer", each is None
        if read & {"__dict__", "_modules"}:
            found["the modules", where] = [*module._modules]
        for key, child in those(module._modules, "__dict__", "_modules"):
            found[key, where] = "a module", child is None
            if child is not None and name not in self.called:
                self.add(child, f"{name}.{key}" if name else key, found)


def _differ(before, now, key):
    return [before.get(key, MISSING)] != [now.get(key, MISSING)]  # in lists, as what is the same object is equal


def _code_of(kind):
    """The names in the code of a class of PyTorch, but for what only prints it."""
    own = [item for each in kind.__mro__ if each not in nn.Module.__mro__ for item in vars(each).items()]
    functions = [getattr(value, "fget", value) for name, value in own if name != "extra_repr"]
    return frozenset().union(*(_code(each.__code__)[0] for each in functions if isinstance(each, types.FunctionType)))


IGNORED = INTERNAL | {"_compiled_call_impl", "_is_torch_compile", "_is_fsdp_managed_module", "_fsdp_use_orig_params"}
PLAIN = {
    int, float, bool, str, type(None), torch.dtype, torch.device, types.BuiltinFunctionType, property, staticmethod,
    classmethod,
}  # fmt: skip
CALL = {"forward", "_call_impl"}
DEEP, MISSING = 3, object()


@dataclass(eq=False)
class _Same:
    """Equal to what holds the same object: elements may have been written to since, in both."""

    each: object

    def __eq__(self, other):
        return isinstance(other, _Same) and self.each is other.each


def _value(each, names, depth=0):
    """What is compared of an attribute: its value, in containers and objects of a model's own too, as DEEP as that;
    of functions what they close over, as of globals; else which object it is."""
    kind = type(each)
    if kind in PLAIN:
        return each
    if depth > DEEP:
        return kind

    def inner(value):
        return _value(value, names, depth + 1)

    if isinstance(each, types.FunctionType):
        return each, [_named(cell, names, depth + 1) for cell in _cells(each)]
    if isinstance(each, nn.Module):  # those of the model itself are compared by name
        return kind, inner({name: value for name, value in vars(each).items() if name not in INTERNAL})
    if isinstance(each, (tuple, list, collections.deque)):
        return kind, [*map(inner, each)]
    if isinstance(each, dict):
        return kind, {key: inner(value) for key, value in each.items()}
    if isinstance(each, (set, frozenset)):
        return kind, set(each)
    if isinstance(each, torch.Tensor):
        return _Same(each), each._version
    if isinstance(each, types.MethodType):
        return inner(each.__func__)
    if isinstance(each, functools.partial):
        return kind, inner((each.func, each.args, each.keywords))
    named = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    slots = [name for own in named for name in ((own,) if isinstance(own, str) else own)]
    if isinstance(each, type) or _ours(kind) or not (slots or hasattr(each, "__dict__")):
        return each
    held = {name: getattr(each, name) for name in slots if hasattr(each, name)}
    return kind, _value({**held, **getattr(each, "__dict__", {})}, names, depth)


def _named(each, names, depth=0):
    """What is compared of a global, and of what a function closes over: of modules, classes and objects what the names
    in code may read, as DEEP as that; else as of an attribute."""
    kind = type(each)
    if kind in PLAIN or kind is types.FunctionType or depth > DEEP or not hasattr(each, "__dict__"):
        return _value(each, names, depth)
    if isinstance(each, types.ModuleType):
        known, kinds = _library(each.__name__), ()
    else:
        kinds = [kind for kind in (each if isinstance(each, type) else kind).__mro__ if not _ours(kind)]
        known = not kinds or isinstance(each, (nn.Module, tuple, list, dict, set, frozenset))
    if known:
        return _value(each, names, depth)
    own = {**{name: value for base in reversed(kinds) for name, value in vars(base).items()}, **vars(each)}
    return _Same(each) if isinstance(each, type) else kind, {
        name: _named(own[name], names, depth + 1) for name in names & own.keys()
    }
