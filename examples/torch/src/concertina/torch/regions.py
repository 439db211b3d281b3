# SPDX-License-Identifier: Apache-2.0
"""What is linear in a traced model, as regions: each between two tensors that are not.

Each tensor has an expression relative to its source, the nearest tensor that is not a linear function of another one
or that is read more than once.
"""

import inspect
import math
import operator
import os
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional as F

from .contraction import Contraction
from .expansion import _parts, axes_of, in_format_of, is_alone, is_expanded, padding_of, shape_of
from .layers import (
    CONV, IDENTITIES, NORMS, POOLS, ZERO_PAD, _affine, _diagonal, _kind, _norm, _pads_with_its_shift, _parameters,
    _plain_module, _pool,
)  # fmt: skip
from .proofs import Parameters
from .shapes import Chain, ConvShape, InexactError, ShapeError, Sum, contracted_shape, leaves, require_exact
from .tracing import NoDraws, _name, _unknown, _written, hooked, trace

CONV_FUNCTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
RANKS = {kind: rank for kinds in (CONV, ZERO_PAD) for rank, kind in kinds.items()}
RANKS |= {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, **POOLS}
ADDITIONS = (operator.add, operator.iadd, torch.add)
UNKNOWN_RANK = "nothing before or after it says over how many axes it normalises"


@dataclass
class Region:
    """A linear function of `source`."""

    source: fx.Node
    form: Chain | Sum | ConvShape = Chain()
    parameters: list = field(default_factory=list)
    nodes: list = field(default_factory=list)  # that it is made of
    cost: tuple = (0, 0)  # parameters and multiply-adds of these

    def contracted(self):
        """Shape, weight and bias of its layer, of the dtype, device and memory format of the tensors it is made of."""
        contraction = Contraction(self.form)
        weights, biases = [p.weight for p in self.parameters], [p.bias for p in self.parameters]
        bias = contraction.bias(weights, biases)
        own = [p.like for p in self.parameters if p.like is not None] or [torch.empty(())]
        like = next((each for each in own if each.dim() > 1), own[0])  # norms may be in float where layers are in half
        weight, bias = (None if each is None else each.to(like) for each in (contraction.weight(weights), bias))
        trained = any(each.requires_grad for each in own)
        return contraction.shape, in_format_of(own, weight).requires_grad_(trained), bias

    def after(self, base):
        """This region of what `base` makes of its source."""
        stride = math.prod(contracted_shape(base.form).stride) if base.form else 1
        cost = base.cost[0] + self.cost[0], base.cost[1] + self.cost[1] / stride
        form, parameters = Chain((*_row(base.form), *_row(self.form))), base.parameters + self.parameters
        return Region(base.source, form, parameters, base.nodes + self.nodes, cost)


def _row(form):
    return form if isinstance(form, Chain) else (form,)


class _NotLinear(Exception):
    """Of a node: an operand that is no constant."""


def _traced(module, joined="cheaper"):
    if is_expanded(module) or (type(module).__module__.startswith("torch.nn.modules") and not list(module.children())):
        module = nn.Sequential(module)  # what is one layer already
    traced = trace(module)
    if traced is None or hooked(traced.root):
        return None
    return _Regions(fx.GraphModule(traced.root, traced.graph), joined)


class _Regions:
    """Of a traced model."""

    def __init__(self, graph_module, joined="cheaper"):
        """A region is of "all" layers that are one, of these as far as that costs no more ("cheaper"), or of one."""
        self.model, self.joined = graph_module, joined
        self.modules = dict(graph_module.named_modules())
        self.drop_dead()
        self.nodes = list(graph_module.graph.nodes)
        self.frugal = set()  # nodes that go on from a region only where that costs no more
        self.find()
        costly = [region for _, region in self.ends() if not self.pays(region)]
        if joined == "cheaper" and costly:  # as a whole; parts of it may pay
            self.frugal = {node for region in costly for node in region.nodes}
            self.find()

    def find(self):
        self.constants, self.regions, self.absorbed = {}, {}, set()
        self.reasons = {}  # why nodes are not one layer with what is before them
        for node in self.nodes:
            self.regions[node] = None if self.constant(node) else self.linear(node) or Region(node)

    # ---- constants: what depends on parameters alone, such as kernels that are generated

    def constant(self, node):
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(self.model)
        elif not self.of_constants(node):
            return False
        else:
            args = fx.node.map_arg(node.args, self.constants.get)
            kwargs = fx.node.map_arg(node.kwargs, self.constants.get)
            target = self.modules[node.target] if node.op == "call_module" else node.target
            try:
                with torch.enable_grad(), NoDraws():  # so that it is known whether it is trained
                    value = (
                        getattr(args[0], target)(*args[1:], **kwargs)
                        if node.op == "call_method"
                        else target(*args, **kwargs)
                    )
            except TraceError:
                return False
        self.constants[node] = value
        return True

    def of_constants(self, node):
        """Whether a node computes something of constants alone, and draws no numbers."""
        inputs = node.all_input_nodes
        computes = node.op not in ("placeholder", "output") and inputs and not _written(node, self.model)
        return computes and "dropout" not in _name(node) and all(each in self.constants for each in inputs)

    def varies(self, argument):
        return isinstance(argument, fx.Node) and argument not in self.constants

    def value(self, argument):
        def known(node):
            if node not in self.constants:
                raise _NotLinear
            return self.constants[node]

        return fx.node.map_arg(argument, known)

    # ---- expressions

    def linear(self, node):
        """The region of a linear node, or None."""
        try:
            if node.op == "call_module":
                return self.of_module(node, self.modules[node.target])
            if node.op == "call_function" and node.target in CONV_FUNCTIONS:
                return self.of_convolution(node)
            if node.op == "call_function" and node.target is F.batch_norm:
                return self.of_batch_norm(node)
            if node.op == "call_function" and node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs:
                return self.of_sum(node)
        except _NotLinear:
            pass
        return None

    def before(self, node):
        """The region that a linear operation on `node` goes on from."""
        region = self.regions[node]
        whole = region.source is node or len(node.users) == 1 or not region.parameters
        return region if whole else Region(node)

    def of_module(self, node, module):
        if len(node.args) != 1 or node.kwargs or not self.varies(node.args[0]) or hooked(module):
            return None
        base, kind = self.before(node.args[0]), _kind(module)
        if kind in IDENTITIES:
            if base.parameters:
                self.absorbed.add(node.args[0])
            return replace(base, nodes=base.nodes + [node])
        if is_expanded(module):
            contraction, weights, biases = _parts(module)
            if weights[0].is_complex() or not is_alone(module):
                return None
            return self.after_pads(node, [_parameters(*each) for each in zip(contraction.leaves, weights, biases)])
        if kind is nn.Linear or kind in CONV.values():
            try:
                shape = shape_of(module, node.target)
            except ShapeError as error:
                return self.stays(node, str(error))
            return self.after_pads(node, [_parameters(shape, module.weight, module.bias)])
        if kind in NORMS:
            rank = self.rank_of(kind, base)
            if module.running_mean is None:
                return self.stays(node, "it normalises by the statistics of each batch")
            return self.after_pads(node, [_norm(module, rank)]) if rank else self.stays(node, UNKNOWN_RANK)
        if _pads_with_its_shift(module):
            return self.padded_norm(node, *module.children(), module.pad_pixels)
        if kind in POOLS:
            channels = self.channels_of(POOLS[kind], base, node)
            if not channels:
                return self.stays(node, "neither what is before it nor a norm after it says how many channels it has")
            pool = _pool(module, channels)
            return self.chained(node, pool) if pool else self.stays(node, "its divisor is not its kernel's size")
        return None

    def stays(self, node, reason):
        self.reasons[node] = reason

    def channels_of(self, rank, base, pool):
        """Of a pool: those of the region before it, or of the norms that alone read it; or 0."""
        if base.parameters:
            shape = contracted_shape(base.form)
            return shape.out_channels if shape.rank == rank else 0
        norms = [self.modules[each.target] if self.kind(each) in NORMS else None for each in self.readers(pool)]
        return norms[0].num_features if norms and all(norms) else 0

    def of_batch_norm(self, node):
        given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        mean, variance, weight, bias, training, _, eps = map(self.value, [*given.arguments.values()][1:])
        input = given.arguments["input"]
        if training or mean is None or not self.varies(input):
            return None
        base = self.before(input)
        rank = contracted_shape(base.form).rank if base.parameters else self.rank_of(None, base)
        if not rank:
            return self.stays(node, UNKNOWN_RANK)
        return self.after_pads(node, [_affine(rank, mean, variance, weight, bias, eps)], input)

    def with_zero_pads(self, form, input, readers):
        """A form and what it reads, with the zeros of each nn.ZeroPad before it that only these read; and the pads."""
        kind, pads = ZERO_PAD.get(contracted_shape(form).rank, False), []
        while self.kind(pad := self.seen(input)) is kind and set(self.readers(pad)) <= {*readers}:
            module = self.modules[pad.target]
            sides = [*zip(module.padding[::2], module.padding[1::2])][::-1]  # the last axis comes first
            padded = _padded(form, sides)
            if len(pad.args) != 1 or hooked(module) or not padded or self.inexact(padded):
                break
            form, input, readers, pads = padded, pad.args[0], [pad], [pad, *pads]
        self.absorbed.update(pads)
        return form, input, pads

    def rank_of(self, kind, base):
        """The rank of the maps that a norm of this kind normalises, of which nn.BatchNorm1d and nn.SyncBatchNorm say
        nothing: that of the region before it, or of what else reads the same; 0 where that says nothing either."""
        if kind in (nn.BatchNorm2d, nn.BatchNorm3d):
            return NORMS[kind]
        if base.parameters:
            return contracted_shape(base.form).rank
        return max(map(self.rank_read_by, self.readers(base.source)))

    def rank_read_by(self, node):
        """The rank of the maps that a node reads, or 0: what regions begin with says it as does what they become."""
        if node.op == "call_function":
            return CONV_FUNCTIONS.get(node.target, 0)
        module = self.modules.get(node.target) if node.op == "call_module" else None
        return next((rank for kind, rank in RANKS.items() if isinstance(module, kind)), 0)

    def readers(self, node):
        for user in node.users:
            yield from self.readers(user) if self.kind(user) in IDENTITIES else (user,)

    def kind(self, node):
        return _kind(self.modules.get(node.target)) if node.op == "call_module" else None

    def identity(self, like):
        shape = _diagonal(like.rank, like.in_channels, False)
        return Chain([shape]), [Parameters(torch.ones(shape.weight_shape).double(), None, None)]

    def of_convolution(self, node):
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {**dict(zip(names, node.args)), **node.kwargs}
        weight, bias = self.value(given["weight"]), self.value(given.get("bias"))
        if weight.is_complex():
            return None
        rank = CONV_FUNCTIONS[node.target]

        def axes(name, default):
            value = self.value(given.get(name, default))
            return axes_of(value, rank)

        groups, kernel_size, dilation = self.value(given.get("groups", 1)), tuple(weight.shape[2:]), axes("dilation", 1)
        padding = padding_of(self.value(given.get("padding", 0)), kernel_size, dilation)
        shape = ConvShape(
            weight.shape[1] * groups, weight.shape[0], kernel_size, axes("stride", 1), padding, dilation, groups,
            bias is not None,
        )  # fmt: skip
        return self.after_pads(node, [_parameters(shape, weight, bias)], given["input"])

    def after_pads(self, node, layers, input=None):
        """The layers with the zeros before them, after the region of what these are put around."""
        shapes, parameters = zip(*layers)
        form, input, pads = self.with_zero_pads(Chain(shapes), node.args[0] if input is None else input, [node])
        return self.chained(node, [*zip(form, parameters)], input, pads)

    def chained(self, node, layers, input=None, pads=(), base=None):
        """The layers after the region of the node's input, or after that tensor where this would cost more.

        `input` is what they read instead of that, for the pads between are theirs; `base` a region instead of its own.
        """
        if not layers:
            return None
        input = node.args[0] if input is None else input
        form, parameters = zip(*layers)
        own = Region(input, Chain(form), [*parameters], [*pads, node], _cost(Chain(form)))
        if self.kind(node) in POOLS:  # which hold nothing
            own.cost = 0, own.cost[1]
        for base in (base or self.before(input), Region(input))[self.joined == "none" :]:
            joined = own.after(base)
            if not base.parameters or self.fits(joined, node):
                if base.source is not input:
                    self.absorbed.add(input)
                return joined

    def padded_norm(self, node, norm, padding):
        """A batch norm padded with what it makes of zero: zeros placed before unbiased 1x1 layers (DBB)."""
        base = self.before(node.args[0])
        ones = all(s.pointwise and not s.bias and set(s.stride) == {1} for s in leaves(base.form))
        if not base.parameters or not isinstance(base.form, Chain) or not ones:
            return None
        layer = _norm(norm, contracted_shape(base.form).rank)
        base = replace(base, form=_padded(base.form, [(padding, padding)] * len(base.form[0].kernel_size)))
        joined = self.chained(node, [layer], base=base)
        return joined if joined.source is base.source else None

    def of_sum(self, node):
        operands = [arg for arg in node.args if not (isinstance(arg, (int, float)) and arg == 0)]
        if self.joined == "none" or not all(map(self.varies, operands)):
            return None
        regions = [self.before(arg) for arg in operands]
        if len({region.source for region in regions}) > 1 or not any(region.parameters for region in regions):
            return None
        if len({*operands}) < len(operands):
            return None  # norms in training would be run for each
        like = next(region for region in regions if region.parameters)
        branches, parameters, nodes = [], [], []
        for region in regions:
            form, own = region.form, region.parameters
            if not own:
                form, own = self.identity(contracted_shape(like.form))
            branches += form if isinstance(form, Sum) else [form]
            parameters, nodes = parameters + own, nodes + region.nodes
        form = Sum(branches) if len(branches) > 1 else branches[0]
        cost = tuple(sum(costs) for costs in zip(*(region.cost for region in regions)))
        joined = Region(like.source, form, parameters, nodes + [node], cost)
        if not self.fits(joined, node):
            return None
        self.absorbed.update(arg for arg, region in zip(operands, regions) if region.parameters)
        return self.with_source(joined, node)

    def with_source(self, region, node):
        """A sum's region, with zeros before it and the region of its source where nothing else reads these."""
        form, input, pads = self.with_zero_pads(region.form, region.source, region.nodes)
        region = replace(region, source=self.seen(input), form=form, nodes=pads + region.nodes)
        base = self.regions[region.source]
        if not base.parameters or not set(self.readers(region.source)) <= {*region.nodes}:
            return region
        joined = region.after(base)
        if not self.fits(joined, node):
            return region
        self.absorbed.add(region.source)
        return joined

    def fits(self, region, node):
        """Whether one layer equals the region; of a frugal node, at no more cost, which is then the region's."""
        reason = self.inexact(region.form)
        if not reason and node in self.frugal:
            one = _cost(contracted_shape(region.form))
            if self.pays(region):
                region.cost = one
            else:
                reason = "one layer would have {:,} parameters and {:,.0f} multiply-adds a position, these layers have "
                reason = (reason + "{:,} and {:,.0f}").format(*one, *region.cost)
        if reason:
            self.reasons[node] = reason
        return not reason

    def inexact(self, form):
        """Why no single layer equals it; empty where one does."""
        try:
            require_exact(form)
        except (ShapeError, InexactError) as error:
            return str(error)
        return ""

    def pays(self, region):
        """Whether its contraction has no more parameters and multiply-adds than what it is made of."""
        return all(map(operator.le, _cost(contracted_shape(region.form)), region.cost))

    # ---- results

    def seen(self, node):
        """The node, or what it passes on."""
        region = self.regions[node]
        return node if region.parameters else region.source

    def kept(self):
        """Nodes that compute something, in order."""
        return [
            node for node in self.nodes if self.regions[node] and node not in self.absorbed and self.seen(node) is node
        ]

    def ends(self):
        """Nodes whose regions are computed, in order: (node, region)."""
        return [
            (node, region)
            for node, region in self.regions.items()
            if region and region.parameters and node not in self.absorbed
        ]

    def name_of(self, region):
        """The module with the first of its parameters, or the last node."""
        names = {id(tensor): name for name, tensor in self.model.named_parameters()}
        found = [names[id(each.like)] for each in region.parameters if id(each.like) in names]
        return found[0].rpartition(".")[0] if found else str(region.nodes[-1])

    def plain(self, region):
        """Whether it is one nn module already, or pools alone."""
        one = len(region.parameters) == 1 and bool(self.layers_of(region))
        return one or all(each.like is None for each in region.parameters)

    def layers_of(self, region):
        names = [node.target for node in region.nodes if node.op == "call_module"]
        return [name for name in names if not isinstance(self.modules[name], (*IDENTITIES, *ZERO_PAD.values()))]

    def only_in(self, region, name):
        """Whether nothing but the region reads the module of that name, or what it has."""
        reads = (node for node in self.nodes if isinstance(node.target, str))
        return all(node in region.nodes for node in reads if f"{node.target}.".startswith(f"{name}."))

    def has(self, name):
        """Whether the model has something of that name, a module or a tensor."""
        try:
            operator.attrgetter(name)(self.model)
        except AttributeError:
            return False
        return True

    def drop_dead(self, gone=()):
        """Erases what nobody reads, but for what does something else too and is not among the nodes that are gone."""
        self.model.graph.eliminate_dead_code(lambda node: node.is_impure() or (node not in gone and self.acts(node)))

    def acts(self, node):
        return _unknown(node)

    def replaced(self):
        """The model, with one layer for each region."""
        made, gone = {}, set()  # regions' layers by the nodes that they replace; all nodes of these
        for node, region in self.ends():
            if self.plain(region):
                continue
            names = self.layers_of(region)
            if names and isinstance(region.form, Chain):
                name = names[0]
            else:  # a block
                name = ".".join([*os.path.commonprefix([name.split(".")[:-1] for name in names]), "conv"])
            while self.has(name) and not (name in names and self.only_in(region, name)):
                name += "_"
            self.modules[name] = _plain_module(*region.contracted())
            self.model.add_submodule(name, self.modules[name])
            gone.update(region.nodes)
            with self.model.graph.inserting_before(node):
                made[node] = self.model.graph.call_module(name, (made.get(region.source, region.source),))
            node.replace_all_uses_with(made[node])
        self.drop_dead(gone)
        self.model.delete_all_unused_submodules()
        self.model.recompile()
        return self.model.eval()


def _padded(form, sides):
    """A form of its input with zeros around it, or cropped; None where zeros take the place of what is cropped."""
    if isinstance(form, Sum):
        branches = [_padded(each, sides) for each in form]
        return Sum(branches) if all(branches) else None
    if isinstance(form, Chain):
        first = _padded(form[0], sides)
        return first and Chain((first, *form[1:]))
    pairs = [*zip(form.padding, sides)]
    if any(q < 0 < p for both in pairs for p, q in zip(*both)):
        return None
    return replace(form, padding=tuple((p + start, q + end) for (p, q), (start, end) in pairs))


def _cost(form):
    """Parameters of layers, and multiply-adds for each position along each axis of the input."""
    share, parameters, multiply_adds = 1, 0, 0
    for layer in leaves(form):
        share *= math.prod(layer.stride)
        parameters += layer.weight_numel + layer.bias * layer.out_channels
        multiply_adds += layer.weight_numel / share
    return parameters, multiply_adds
