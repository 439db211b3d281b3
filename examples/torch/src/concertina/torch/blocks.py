# SPDX-License-Identifier: Apache-2.0
"""Re-parameterised blocks of other people's code, found by structure: convolutions, batch norms and sums.

The model is traced by torch.fx. Each tensor has an expression relative to its source, the nearest tensor that is not
a linear function of another one or that is read more than once. What is linear between two such tensors is a region.
"""

import contextlib
import copy
import dis
import functools
import inspect
import itertools
import math
import operator
import os
import pickle
import random
import sys
import types
import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional as F

from .contraction import Contraction
from .expansion import (
    OWN_HOOKS, _forget_hooks, _parts, axes_of, in_format_of, is_alone, is_expanded, require_unwrapped, shape_of,
)  # fmt: skip
from .proofs import Parameters, prove
from .shapes import Chain, ConvShape, Error, InexactError, ShapeError, Sum, contracted_shape, leaves, require_exact

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ZERO_PAD = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
NORMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}  # that takes any rank
POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
CONV_FUNCTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
ADDITIONS = (operator.add, operator.iadd, torch.add)
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# What never passes on the memory of what it reads.
FRESH = set("add sub mul div truediv matmul cat relu tanh sigmoid clone conv1d conv2d conv3d linear batch_norm".split())
FRESH_MODULES = (
    *CONV.values(), *NORMS, *POOLS, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.GroupNorm, nn.LayerNorm,
)  # fmt: skip
# What code that does more than a graph says has among its names.
OPAQUE = set(
    "no_grad enable_grad inference_mode set_grad_enabled is_grad_enabled autocast checkpoint checkpoint_sequential "
    "random rand randn randint randperm rand_like randn_like randint_like bernoulli manual_seed is_tensor setattr "
    "register_buffer register_parameter is_ is_not".split()
)
OPAQUE_STEPS = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "SETUP_FINALLY", "except", "is", "type"}
AUGMENTED = [  # those of x += y and the like that write to x, if that is a tensor
    getattr(operator, name)
    for name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
]
MAY_BE_NONE = ("grad", "grad_fn", "_base", "name", "names")  # attributes of a tensor
INTERNAL = vars(nn.Module()).keys()


class VerificationError(Error):
    """A proof does not hold; the message names the region."""


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
        own = [p.like for p in self.parameters if p.like is not None]
        like = next((each for each in own if each.dim() > 1), own[0])  # norms may be in float where layers are in half
        weight, bias = (None if each is None else each.to(like) for each in (contraction.weight(weights), bias))
        trained = any(each.requires_grad for each in own)
        return contraction.shape, in_format_of(own, weight).requires_grad_(trained), bias


@dataclass(frozen=True)
class Contracted:
    """What a region became."""

    name: str
    form: str
    layer: str
    proofs: list

    def __str__(self):
        return "\n".join([f"{self.name}: {self.form} = {self.layer}", *(f"  {proof}" for proof in self.proofs)])


class Verdict(list):
    """The regions compared, with the proofs of each; `difference` says what else is not the same.

    `holds` is True where every proof of every region was run and holds and all else is the same, False where a proof
    fails or something else is different, and None where nothing is wrong but a proof was too large to run. That one
    is printed as not proved, and its `holds` is None.
    """

    difference = ""

    @property
    def holds(self):
        proofs = [proof.holds for region in self for proof in region.proofs]
        return False if self.difference or False in proofs else None if None in proofs else True

    def __str__(self):
        return "\n".join([*map(str, self), *([f"different: {self.difference}"] if self.difference else [])])


@torch.no_grad()
def from_blocks(model):
    """A copy of `model` whose re-parameterised blocks are plain layers, and the Verdict of verify(model, copy).

    Contracted are convolutions, Linear layers, batch norms (as in inference), average pools, expanded layers, and sums
    of these, where neither parameters nor multiply-adds grow and one layer equals them at every border, in double and
    rounded once. The result is a torch.fx.GraphModule. A module whose code torch.fx cannot trace, or not as it is,
    stays, and its children are contracted one by one; so its code must call these, and use nothing that is in them.
    Requires  model.eval()
    Throws    ShapeError for a model in training, wrapped, compiled, or on the meta device; VerificationError where a
              proof fails. One that is too large to run is no failure: see Verdict.holds
    """
    _require_elements(model)
    plain = _contract_blocks(copy.deepcopy(model))
    verdict = verify(model, plain)
    if verdict.holds is False:
        raise VerificationError(f"a contraction is wrong:\n{verdict}")
    return plain, verdict


@torch.no_grad()
def verify(model, other, accumulator=torch.float64):
    """Whether `other` is `model` with linear layers contracted, or the other way round: a Verdict.

    Each region of one must be that of the other, whose layers are taken as accumulated in `accumulator` and rounded
    once; a region is of all layers that are one, or of those that from_blocks would contract. Everything else must be
    the same. Modules whose code torch.fx cannot trace must have the same class, attributes and hooks, where what
    cannot be compared is different, and children for which all this holds. Code is traced in copies of the models,
    which share their tensors.
    Requires  eval() of both
    Throws    ShapeError for models in training, wrapped, compiled or on the meta device, and where only one has such a
              module
    """
    for each in (model, other):
        _require_elements(each)
    verdict = None
    for joined in ("all", "all"), ("cheaper", "none"), ("none", "cheaper"):  # other layers may have been joined
        found = Verdict()
        _compare((model, other), joined, accumulator, found)
        if not found.difference:
            return found
        verdict = verdict or found
    return verdict


def _require_elements(model):
    require_unwrapped(model)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "OptimizedModule" or isinstance(module, torch.jit.ScriptModule):
            raise ShapeError(f"{name or 'the model'} ({kind}) is compiled; give the module of which it was compiled")
        if module.training:
            raise ShapeError(
                f"{name or 'the model'} is in training mode, where batch norms are not linear; call eval() first"
            )
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ShapeError(f"{name} is on the meta device and has no elements; load the model's state dict first")


def _contract_blocks(module):
    regions = _traced(module)
    if regions is None:
        for name, child in list(module.named_children()):
            setattr(module, name, _contract_blocks(child))
        return module
    return regions.replaced() if any(not regions.plain(region) for _, region in regions.ends()) else module


class _NotLinear(Exception):
    """Of a node: an operand that is no constant."""


class _Proxy(fx.Proxy):
    """Records x += y as what it is; torch.fx would make it x + y, which leaves x as it was.

    It answers nothing that a graph has not: whether it is a list or None, what it prints as, which key it is, and
    whether it has what a tensor has not, are errors. torch.fx would go on with what is true of a proxy.
    """

    @property
    def __class__(self):
        names, steps = _code(sys._getframe(1).f_code)  # PyTorch's compiled functions ask too
        asks = names & {"isinstance", "__class__"} or "MATCH_CLASS" in steps
        return _known_to_torch(type(self), "is asked for its class") if asks else type(self)

    def __hash__(self):
        return _known_to_torch(id(self), "is looked up")

    def __repr__(self):
        return _known_to_torch(super().__repr__(), "is printed")

    def __format__(self, _):
        return _known_to_torch(super().__repr__(), "is printed")

    def __len__(self):
        raise TraceError("a proxy has no length")

    def __getattr__(self, name):
        if not hasattr(torch.Tensor, name) or name in MAY_BE_NONE:
            raise TraceError(f"a proxy has no {name}")
        return _Attribute(self, name)


class _Attribute(_Proxy, fx.proxy.Attribute):
    pass


def _in_place(operation):
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _operation in AUGMENTED:
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))


def _known_to_torch(value, question):
    """The value, if PyTorch's own code asks, and not on behalf of other code."""
    frame = sys._getframe(2)
    if _root(frame.f_globals.get("__name__")) not in ("torch", "concertina") or frame.f_code.co_name == "is_tensor":
        raise TraceError(f"a proxy {question}")
    return value


class _Tracer(fx.Tracer):
    """`given` has values for some arguments by name, which take the place of proxies."""

    proxy_buffer_attributes = True  # so that nothing is computed of them, or written to them, while tracing

    def __init__(self, leaves=(), given=()):
        super().__init__()
        self.leaves, self.given, self.modes = leaves, dict(given), _modes()

    def proxy(self, node):
        if node.op == "placeholder" and node.target in self.given:
            return self.given[node.target]
        return _Proxy(node, self)

    def create_node(self, *args, **kwargs):
        if self.modes != _modes():
            raise TraceError("gradients or autocast are switched on or off")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module, name):
        return name in self.leaves or super().is_leaf_module(module, name)


def _modes():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(torch.is_autocast_enabled, ("cpu", "cuda"))


def trace(module, modes=(False, False)):
    """A copy of the module, which shares its tensors, its graph, and the tensors that its code makes; or None.

    It is traced in training mode or not, with and without gradients, and with what its arguments may be beside
    tensors: their default, or None. None where torch.fx cannot trace it, or where the graphs differ: the code depends
    on what no graph has, such as a counter or a missing argument. None too where its code is opaque, changes what its
    modules hold, their mode, or the state of random numbers, takes elements of its arguments, which may be None, has a
    gradient of its own, or writes to a tensor that something else may read; and where a module within it has hooks.
    """
    if _opaque(module):
        return None
    draws = _draws()
    try:
        root = copy.deepcopy(module, {id(each): each for each in (*module.parameters(), *module.buffers())})
        for each in root.modules():
            _forget_hooks(each)
        leaves = {name for name, each in root.named_modules() if name and _pads_with_its_shift(each)}
        tracer = _Tracer(leaves)
        if any(hooked(each) for name, each in root.named_modules() if name and not tracer.is_leaf_module(each, name)):
            return None
        held = _held(root)
        torch.autograd.Function.apply = classmethod(_apply)
        found = [_pass(root, leaves, mode, index == 0) for index, mode in enumerate(modes)]
        for given in _alternatives(type(root).forward):
            try:
                found.append(_pass(root, leaves, modes[-1], False, given))
            except Exception as error:
                if "NoneType" not in str(error):  # which says that it cannot be None
                    raise
        if held != _held(root) or not _equal(draws, _draws()):
            return None
    except Exception:  # whatever a model's own code raises when it meets a proxy
        return None
    finally:
        torch.autograd.Function.apply = APPLY
        _restore(draws)
    graph, values, made, _ = found[0]
    for other, other_values, _, given in found[1:]:
        if not _equal(_described(graph, given), _described(other, given)) or not _equal(values, other_values):
            return None
    written = itertools.chain(*(_written(node, root) for node in graph.nodes))
    if any(map(_takes_elements, graph.nodes)) or not all(_owned(each, root) for each in written):
        return None
    for name, value in made.items():
        root.register_buffer(name, value, persistent=False)
    return root, graph, made


def _pass(root, leaves, mode, gradients, given=()):
    """A graph, the values that it has beside the module's state, the tensors among these that code made, `given`."""
    root.train(mode)
    known, trained = set(vars(root)), [each.training for each in root.modules()]
    try:
        with torch.set_grad_enabled(gradients):
            graph = _Tracer(leaves, given).trace(root)
        state = dict(itertools.chain(root.named_parameters(), root.named_buffers()))
        names = {node.target for node in graph.nodes if node.op == "get_attr"} - state.keys()
        values = {name: copy.deepcopy(operator.attrgetter(name)(root)) for name in names}
    finally:
        made = {name: vars(root).pop(name) for name in vars(root).keys() - known}
    if trained != [each.training for each in root.modules()]:
        raise TraceError("modules are put in training mode, or in inference")
    return graph, values, {name: value for name, value in made.items() if torch.is_tensor(value)}, given


def _alternatives(forward):
    """What arguments may be beside tensors, each alone and all at once: their defaults, or None, but for the first."""
    alone = {}
    for index, (name, each) in enumerate([*inspect.signature(forward).parameters.items()][1:]):
        required = each.default is each.empty
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) and (index or not required):
            alone[name] = None if required else each.default
    alone = {name: value for name, value in alone.items() if not isinstance(value, (tuple, list, dict))}
    return [{name: value} for name, value in alone.items()] + ([alone] if len(alone) > 1 else [])


APPLY = vars(torch.autograd.Function)["apply"]


def _apply(kind, *args, **kwargs):
    """torch.autograd.Function.apply, while tracing."""
    if any(isinstance(each, _Proxy) for each in args):
        raise TraceError(f"{kind.__name__} has a gradient of its own, which a graph of what it computes has not")
    return APPLY.__func__(kind, *args, **kwargs)


def _draws():
    """The states of random numbers."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), random.getstate(), devices


def _restore(draws):
    torch.set_rng_state(draws[0])
    random.setstate(draws[1])
    if draws[2]:
        torch.cuda.set_rng_state_all(draws[2])


def _takes_elements(node):
    """Whether it takes one element of an argument, or of what a module returned: a tuple or the like may have None."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    source, index = node.args
    return isinstance(index, str) or isinstance(index, int) and source.op in ("placeholder", "call_module")


def hooked(module):
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _written(node, root):
    """The tensors that a node writes to, or may write to."""
    if node.op == "call_module":
        inplace = any(getattr(each, "inplace", False) for each in root.get_submodule(node.target).modules())
        return node.args[:1] or node.all_input_nodes if inplace else ()
    if node.op not in ("call_function", "call_method"):
        return ()
    name, given = _name(node), node.kwargs
    if _unknown(node):
        return node.all_input_nodes
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # a method's name, or a function of PyTorch's that says nothing about itself
        pass
    if given.get("out") is not None:
        return (given["out"],)
    writes = node.target in AUGMENTED or name.endswith("_") or name == "setitem" or bool(given.get("inplace"))
    return (node.args[:1] or node.all_input_nodes) if writes else ()


def _unknown(node):
    """Whether it calls what may write to anything: a function that is not PyTorch's, or an operator that says so."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet = getattr(node.target, "overloadpacket", node.target)
        return any(getattr(packet, name)._schema.is_mutable for name in packet.overloads())
    return not _ours(node.target)


def _owned(node, root):
    """Whether a node's memory is its own, and one other alone reads it."""
    if not isinstance(node, fx.Node) or len(node.users) != 1 or "out" in node.kwargs or _unknown(node):
        return False
    module = root.get_submodule(node.target) if node.op == "call_module" else None
    if module is not None and hooked(module):
        return False
    if _written(node, root) or type(module) in IDENTITIES:
        return bool(node.args) and _owned(node.args[0], root)
    name = _name(node)
    known = node.op == "call_method" or any(getattr(each, name, None) is node.target for each in (operator, torch, F))
    return isinstance(module, FRESH_MODULES) if module is not None else known and name in FRESH


def _held(root):
    """What the modules hold in containers of their own, by identity."""
    values = [value for each in root.modules() for key, value in vars(each).items() if key not in INTERNAL]
    values = [value.values() if isinstance(value, dict) else value for value in values]
    return [[*map(id, value)] for value in values if isinstance(value, (list, set, type({}.values())))]


def _root(name):
    return (name or "").partition(".")[0]


def _ours(kind):
    """Whether a class or function is Python's, PyTorch's or this package's, whose code is known."""
    known = ("torch", "concertina", "builtins", "_operator", "math")
    return _root(getattr(kind, "__module__", None)) in known


def _opaque(module):
    """Whether code of the module does more than a graph says, or other than its class says.

    Looked at is the bytecode of `forward`, and of what it names in classes, globals, modules and objects of these,
    closures, attributes and containers: whether it names something that is OPAQUE, or has one of OPAQUE_STEPS.
    """
    if any("forward" in vars(each) for each in module.modules()):
        return True
    if any("__call__" in vars(kind) for kind in type(module).__mro__ if not _ours(kind)):
        return True
    own = [each for each in module.modules() if not all(map(_ours, type(each).__mro__))]
    waiting = [type(each).forward for each in own] + [value for each in own for value in vars(each).values()]
    holders, seen = [*own, *waiting], set()
    while waiting:
        function = waiting.pop()
        for inner in ("fget", "__func__", "func"):  # of properties, of methods, static ones too, and of partial
            function = getattr(function, inner, function)
        if isinstance(function, (list, tuple, dict)) and id(function) not in seen:
            seen.add(id(function))
            waiting += function.values() if isinstance(function, dict) else function
        if _ours(function):
            continue
        if hasattr(function, "__wrapped__"):  # by a decorator, such as no_grad()
            return True
        if not isinstance(function, types.FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        names, steps = _code(function.__code__)
        values = [function.__globals__[name] for name in names & function.__globals__.keys()]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                values.append(cell.cell_contents)
        called = names.union(str(getattr(value, "__name__", "")).rpartition(".")[2] for value in values)
        if called & OPAQUE or steps & OPAQUE_STEPS:
            return True
        waiting += values
        for each in (*holders, *values):
            kinds = [each] if isinstance(each, (type, types.ModuleType)) else type(each).__mro__
            waiting += [vars(kind)[name] for kind in kinds if not _ours(kind) for name in names & vars(kind).keys()]
    return False


@functools.lru_cache(maxsize=None)
def _code(code):
    """The names and kinds of steps of code and of what is nested in it, with those of OPAQUE_STEPS that are no kinds:
    handlers of errors, the operator `is` with anything but None, and the function `type`."""
    names, steps, before = {*code.co_names, *code.co_freevars}, set(), None
    for step in dis.get_instructions(code):
        steps.add(step.opname)
        if step.opname == "IS_OP" and not (before.opname.startswith("LOAD_") and before.argval is None):
            steps.add("is")
        if step.opname == "LOAD_GLOBAL" and step.argval == "type":
            steps.add("type")
        if before and before.opname == "PUSH_EXC_INFO" and step.opname != "WITH_EXCEPT_START":
            steps.add("except")
        before = step
    for inner in (each for each in code.co_consts if isinstance(each, types.CodeType)):
        more, further = _code(inner)
        names, steps = names | more, steps | further
    return names, steps


def _described(graph, given):
    """What a graph computes, without its arguments, where some of these are given."""

    def value(node):
        return given[node.target] if node.op == "placeholder" and node.target in given else node

    return [
        (node.op, str(node.target), *(str(fx.node.map_arg(each, value)) for each in (node.args, node.kwargs)))
        for node in graph.nodes
        if node.op != "placeholder"
    ]


def _equal(a, b, pairs=frozenset()):
    """Whether both are the same, as far as that can be told; else False. `pairs` are ids of modules taken as such."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y, pairs) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key], pairs) for key in a)
    if type(a) is not type(b) or isinstance(a, fx.Node):
        return a is b
    if isinstance(a, slice):
        return _equal((a.start, a.stop, a.step), (b.start, b.stop, b.step), pairs)
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and _equal(a.__self__, b.__self__, pairs)
    if isinstance(a, nn.Module):
        both = (id(a), id(b))
        own, others = ((_settings(each), each._parameters, each._buffers, each._modules) for each in (a, b))
        return both in pairs or _equal(own, others, pairs | {both})
    if isinstance(a, weakref.ref):
        return _equal(a(), b(), pairs)
    try:
        return a is b or (a == b) is True or pickle.dumps(a) == pickle.dumps(b)
    except Exception:  # whatever objects of a model's own raise
        return False


def _traced(module, joined="cheaper"):
    if is_expanded(module) or (type(module).__module__.startswith("torch.nn.modules") and not list(module.children())):
        module = nn.Sequential(module)  # what is one layer already
    traced = trace(module)
    if traced is None or hooked(traced[0]):
        return None
    return _Regions(fx.GraphModule(*traced[:2]), joined)


def _name(node):
    """Of what it calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


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
            draws = _draws()
            with torch.enable_grad():  # so that it is known whether it is trained
                value = (
                    getattr(args[0], target)(*args[1:], **kwargs)
                    if node.op == "call_method"
                    else target(*args, **kwargs)
                )
            if not _equal(draws, _draws()):
                _restore(draws)
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
        base, kind = self.before(node.args[0]), type(module)
        if kind in IDENTITIES:
            if base.parameters:
                self.absorbed.add(node.args[0])
            return replace(base, nodes=base.nodes + [node])
        if is_expanded(module):
            contraction, weights, biases = _parts(module)
            if weights[0].is_complex() or not is_alone(module):
                return None
            return self.chained(node, [_parameters(*each) for each in zip(contraction.leaves, weights, biases)])
        if kind is nn.Linear or kind in CONV.values():
            try:
                shape = shape_of(module, node.target)
            except ShapeError:
                return None
            shape, input = self.with_zero_pad(node, shape)
            return self.chained(node, [_parameters(shape, module.weight, module.bias)], input)
        if kind in NORMS and module.running_mean is not None:
            rank = self.rank_of(module, base)
            return self.chained(node, [_norm(module, rank)]) if rank else None
        if _pads_with_its_shift(module):
            return self.padded_norm(node, *module.children(), module.pad_pixels)
        if kind in POOLS and base.parameters and contracted_shape(base.form).rank == POOLS[kind]:
            joined = self.chained(node, _pool(module, contracted_shape(base.form).out_channels))
            return joined if joined and any(each.like is not None for each in joined.parameters) else None
        return None

    def with_zero_pad(self, node, shape):
        """A layer's shape and what it reads, with the padding of an nn.ZeroPad before it, if there is one."""
        pad = node.args[0]
        module = self.modules.get(pad.target) if pad.op == "call_module" else None
        found = type(module) is ZERO_PAD.get(shape.rank) and len(pad.args) == 1
        if not found or len(pad.users) > 1 or hooked(module):
            return shape, pad
        sides = [*zip(module.padding[::2], module.padding[1::2])][::-1]  # the last axis comes first
        if any(map(any, shape.padding)) and any(p < 0 for pair in sides for p in pair):
            return shape, pad  # what is cropped is zero afterwards
        self.absorbed.add(pad)
        both = tuple((p + start, q + end) for (p, q), (start, end) in zip(shape.padding, sides))
        return replace(shape, padding=both), pad.args[0]

    def rank_of(self, norm, base):
        """The rank of the maps that a norm normalises, of which nn.BatchNorm1d and nn.SyncBatchNorm say nothing: that
        of the region before it, or of a convolution that reads the same; 0 where there is none."""
        if type(norm) in (nn.BatchNorm2d, nn.BatchNorm3d):
            return NORMS[type(norm)]
        if base.parameters:
            return contracted_shape(base.form).rank
        readers = [*map(self.kind, self.readers(base.source))]
        return next((rank for rank, kind in CONV.items() if kind in readers), 0)

    def readers(self, node):
        for user in node.users:
            yield from self.readers(user) if self.kind(user) in IDENTITIES else (user,)

    def kind(self, node):
        return type(self.modules.get(node.target)) if node.op == "call_module" else None

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

        if isinstance(given.get("padding"), str):
            return None
        groups = self.value(given.get("groups", 1))
        padding = tuple((p, p) for p in axes("padding", 0))
        shape = ConvShape(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), axes("stride", 1), padding,
            axes("dilation", 1), groups, bias is not None,
        )  # fmt: skip
        return self.chained(node, [_parameters(shape, weight, bias)], input=given["input"])

    def chained(self, node, layers, input=None):
        """The layers after the region of the node's input, or after that tensor where this would cost more."""
        if not layers:
            return None
        input = node.args[0] if input is None else input
        form, parameters = Chain(shape for shape, _ in layers), [each for _, each in layers]
        for base in (self.before(input), Region(input))[self.joined == "none" :]:
            parts = base.form if isinstance(base.form, Chain) else Chain([base.form])
            cost = tuple(map(operator.add, base.cost, _cost(form, base.form)))
            joined = Region(
                base.source, Chain((*parts, *form)), base.parameters + parameters, base.nodes + [node], cost
            )
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
        padded = replace(base.form[0], padding=tuple((p + padding, q + padding) for p, q in base.form[0].padding))
        self.regions[node.args[0]] = replace(base, form=Chain((padded, *base.form[1:])))
        joined = self.chained(node, [_norm(norm, contracted_shape(base.form).rank)])
        if joined.source is base.source:
            return joined
        self.regions[node.args[0]] = base
        return None

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
        """A sum's region, with that of its source where nothing else reads this."""
        source, base = region.source, self.regions[region.source]
        if not base or not base.parameters or not set(source.users) <= set(region.nodes):
            return region
        parts = base.form if isinstance(base.form, Chain) else [base.form]
        stride = math.prod(contracted_shape(base.form).stride)
        cost = base.cost[0] + region.cost[0], base.cost[1] + region.cost[1] / stride
        form, nodes = Chain((*parts, region.form)), base.nodes + region.nodes
        joined = Region(base.source, form, base.parameters + region.parameters, nodes, cost)
        if not self.fits(joined, node):
            return region
        self.absorbed.add(source)
        return joined

    def fits(self, region, node):
        """Whether one layer equals the region; of a frugal node, at no more cost, which is then the region's."""
        try:
            require_exact(region.form)
        except (ShapeError, InexactError):
            return False
        if node not in self.frugal:
            return True
        if not self.pays(region):
            return False
        region.cost = _cost(contracted_shape(region.form))
        return True

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
        """Whether it is one nn module already."""
        return len(region.parameters) == 1 and bool(self.layers_of(region))

    def layers_of(self, region):
        names = [node.target for node in region.nodes if node.op == "call_module"]
        return [name for name in names if not isinstance(self.modules[name], IDENTITIES)]

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


def _compare(models, joined, accumulator, verdict, prefix="", pairs=frozenset()):
    """Appends to the verdict what the models' regions prove, and states what is different."""
    mine, theirs = map(_traced, models, joined)
    if mine is not None and theirs is not None:
        return _compare_traced(mine, theirs, accumulator, verdict, prefix)
    where, kind, other = prefix[:-1] or "the model", *map(type, models)
    if kind is not other:
        raise ShapeError(f"torch.fx cannot trace {where} ({kind.__name__} and {other.__name__}) to compare it")
    own, others = ((_settings(each), each._parameters, each._buffers) for each in models)
    pairs |= {tuple(map(id, models))}
    if not _equal(own, others, pairs) or models[0]._modules.keys() != models[1]._modules.keys():
        verdict.difference = where
    for name, *children in zip(models[0]._modules, *(each._modules.values() for each in models)):
        if children[0] is not None and not verdict.difference:
            _compare(children, joined, accumulator, verdict, f"{prefix}{name}.", pairs)


def _compare_traced(mine, theirs, accumulator, verdict, prefix):
    same, kept = {}, (mine.kept(), theirs.kept())
    if len(kept[0]) != len(kept[1]):
        verdict.difference = f"{prefix}: {len(kept[0])} operations and regions beside {len(kept[1])}".lstrip(": ")
        return
    for node, other in zip(*kept):
        same[node] = other
        region, others = mine.regions[node], theirs.regions[other]
        where = f"{prefix}{node} and {prefix}{other}"
        if bool(region.parameters) != bool(others.parameters):
            verdict.difference = f"{where}: one is linear"
        elif not region.parameters:
            verdict.difference = "" if _same_operation(mine, node, theirs, other, same) else where
        elif same.get(region.source) is not others.source:
            verdict.difference = f"{where} read different tensors"
        else:
            verdict.difference = _prove(mine, region, theirs, others, accumulator, verdict, prefix)
        if verdict.difference:
            return


def _prove(mine, region, theirs, others, accumulator, verdict, prefix):
    """Appends the proofs, but for equal layers, which need none; what is different."""
    region, others = _without_common_ends(region, others)
    if region.form == others.form and all(map(Parameters.same, region.parameters, others.parameters)):
        return ""
    if len(region.parameters) < len(others.parameters):
        region, others, mine, theirs = others, region, theirs, mine
    (shape, *_), (other_shape, weight, bias) = region.contracted(), others.contracted()
    if shape != other_shape:
        return f"{prefix}{mine.name_of(region)} ({shape}) and {prefix}{theirs.name_of(others)} ({other_shape})"
    proofs = prove(region.form, region.parameters, weight.cpu(), None if bias is None else bias.cpu(), accumulator)
    verdict.append(Contracted(prefix + theirs.name_of(others), str(region.form), str(shape), proofs))
    return ""


def _without_common_ends(region, other):
    """Both regions without layers that stand at the same end of each with the same elements, such as batch norms."""
    for end in (-1, 0):
        while all(isinstance(each.form, Chain) and len(each.form) > 1 for each in (region, other)):
            equal = isinstance(region.form[end], ConvShape) and region.form[end] == other.form[end]
            if not equal or not region.parameters[end].same(other.parameters[end]):
                break
            kept = slice(None, -1) if end else slice(1, None)
            region, other = (
                replace(each, form=Chain(each.form[kept]), parameters=each.parameters[kept]) for each in (region, other)
            )
    return region, other


def _same_operation(mine, node, theirs, other, same):
    def arguments(side, each, known):
        def value(argument):
            if argument in side.constants:
                return side.constants[argument]
            source = side.seen(argument)
            return known.get(source, source)

        return fx.node.map_arg((each.args, each.kwargs), value)

    if node.op != other.op or not _equal(arguments(mine, node, same), arguments(theirs, other, {})):
        return False
    if node.op != "call_module":
        return node.op in ("placeholder", "output") or node.target == other.target
    return _equal(mine.modules[node.target], theirs.modules[other.target])


def _settings(module):
    """Its class, its attributes but for what it has as a module, and its hooks."""
    own = {name: value for name, value in vars(module).items() if name not in INTERNAL}
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module), own, [[hook for hook in each.values() if hook not in OWN_HOOKS] for each in hooks]


# ---- leaves ------------------------------------------------------------------------------------------


def _parameters(shape, weight, bias):
    like, weight, bias = weight, weight.detach().cpu().double(), None if bias is None else bias.detach().cpu().double()
    return shape, Parameters(weight, bias, None if bias is None else bias.abs(), like)


def _diagonal(rank, channels, bias):
    ones = (1,) * rank
    return ConvShape(channels, channels, ones, ones, ((0, 0),) * rank, ones, channels, bias)


def _norm(norm, rank):
    shape = _diagonal(rank, norm.num_features, True)
    mean, variance = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    scale, beta = (None if each is None else each.detach().cpu().double() for each in (norm.weight, norm.bias))
    scale = torch.ones_like(mean) if scale is None else scale
    beta = torch.zeros_like(mean) if beta is None else beta
    factor = scale / (variance + norm.eps).sqrt()
    shift = mean * factor
    like = norm.running_mean if norm.weight is None else norm.weight
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


def _cost(form, before=()):
    """Parameters of layers, and multiply-adds for each position along each axis of the input of `before`."""
    share = math.prod(contracted_shape(before).stride) if before else 1
    parameters = multiply_adds = 0
    for layer in leaves(form):
        share *= math.prod(layer.stride)
        parameters += layer.weight_numel + layer.bias * layer.out_channels
        multiply_adds += layer.weight_numel / share
    return parameters, multiply_adds


def _plain_module(shape, weight, bias):
    if shape.rank == 0:
        layer = nn.Linear(shape.in_channels, shape.out_channels, bias=bias is not None)
    else:
        even = all(start == end >= 0 for start, end in shape.padding)
        layer = CONV[shape.rank](
            shape.in_channels, shape.out_channels, shape.kernel_size, shape.stride,
            tuple(start for start, _ in shape.padding) if even else 0, shape.dilation, shape.groups, bias is not None,
        )  # fmt: skip
    layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, weight.requires_grad)
    if shape.rank == 0 or even:
        return layer
    return nn.Sequential(ZERO_PAD[shape.rank](tuple(p for pair in reversed(shape.padding) for p in pair)), layer)
