# SPDX-License-Identifier: Apache-2.0
"""Code of other people's modules as a graph of torch.fx, where a graph says all that it does."""

import contextlib
import copy
import dis
import functools
import inspect
import itertools
import operator
import pickle
import sys
import threading
import types
import weakref
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from .expansion import OWN_HOOKS, _forget_hooks
from .layers import CONV, IDENTITIES, NORMS, POOLS, _kind, _pads_with_its_shift
from .shapes import Error

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
# Modules of Python whose functions know nothing but their arguments, others that only tell something, and modules and
# functions of PyTorch that know nothing else, or tell something.
PURE = set(
    "abc bisect builtins cmath collections collections_abc contextlib copy copyreg dataclasses decimal enum fractions "
    "functools heapq itertools math numbers operator re statistics string struct types typing typing_extensions weakref"
    .split()
)
DRAWING = ("torch.random", "torch.nn.init", "torch.cuda")
TELLING = {"frozen_importlib", "importlib", "warnings"}
PURE_OF_TORCH = (
    "torch._library", "torch._ops", "torch._tensor", "torch.autograd.profiler", "torch.functional", "torch.nn",
)  # fmt: skip
PURE_FUNCTIONS = [each.__code__ for each in (torch._assert, torch._check, torch.jit.is_scripting)]
OPERATIONS = set(itertools.chain(*torch.overrides.get_overridable_functions().values()))
AUGMENTED = [  # those of x += y and the like that write to x, if that is a tensor
    getattr(operator, name)
    for name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
]
METHODS = (types.MethodDescriptorType, types.ClassMethodDescriptorType)
MAY_BE_NONE = ("grad", "grad_fn", "_base", "name", "names")  # attributes of a tensor
INTERNAL = vars(nn.Module()).keys()
ONE_AT_A_TIME = threading.RLock()  # while tracing, classes of PyTorch are other than they are
GETATTR, READERS = nn.Module.__getattr__.__code__, ("torch.fx", "concertina.")  # who reads for others


@dataclass
class Reads:
    """What code read while it was traced."""

    attributes: dict = field(default_factory=lambda: defaultdict(set))  # names, by the id of a module and then by name
    code: dict = field(default_factory=dict)  # that ran and is neither Python's nor PyTorch's, with its globals


@dataclass
class Traced:
    """A copy of a module, which shares its tensors, its graph, the tensors that its code makes, and what it reads."""

    root: nn.Module
    graph: fx.Graph
    made: dict
    reads: Reads


class _Proxy(fx.Proxy):
    """Records x += y as what it is; torch.fx would make it x + y, which leaves x as it was.

    It answers nothing that a graph has not: whether it is a list or None, what it prints as, which key it is, and
    whether it has what a tensor has not, are errors. torch.fx would go on with what is true of a proxy.
    """

    @property
    def __class__(self):
        names, steps, _ = _code(sys._getframe(1).f_code)  # PyTorch's compiled functions ask too
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
        self.leaves, self.given, self.modes, self.thread = leaves, dict(given), _modes(), threading.get_ident()

    def proxy(self, node):
        if node.op == "placeholder" and node.target in self.given:
            return self.given[node.target]
        return _Proxy(node, self)

    def create_node(self, *args, **kwargs):
        if self.modes != _modes():
            raise TraceError("gradients or autocast are switched on or off")
        return super().create_node(*args, **kwargs)

    def call_module(self, module, forward, args, kwargs):
        if threading.get_ident() != self.thread:  # which runs a model while this one traces
            return forward(*args, **kwargs)
        return super().call_module(module, forward, args, kwargs)

    def getattr(self, name, value, parameters):
        return super().getattr(name, value, parameters) if threading.get_ident() == self.thread else value

    def is_leaf_module(self, module, name):
        return name in self.leaves or super().is_leaf_module(module, name)


def _modes():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(torch.is_autocast_enabled, ("cpu", "cuda"))


def trace(module, modes=(False, False)):
    """The module as Traced, or None; one thread at a time.

    It is traced in training mode or not, with and without gradients, and with what its arguments may be beside
    tensors: their default, or None. None where torch.fx cannot trace it, or where the graphs differ: the code depends
    on what no graph has, such as a counter or a missing argument. None too where its code is opaque, changes what its
    modules hold, or their mode, draws random numbers, takes elements of its arguments, which may be None, has a
    gradient of its own, or writes to a tensor that something else may read; and where a module within it has hooks.
    """
    if not (sys.getprofile() is None or callable(sys.getprofile())):
        raise Error(f"{type(sys.getprofile()).__name__} is running: what a model calls is watched here as a profiler "
                    "does, so start it later")  # fmt: skip
    with ONE_AT_A_TIME:
        return None if _opaque(module) else _traced(module, modes)


def _traced(module, modes):
    reads = Reads()
    try:
        root = copy.deepcopy(module, {id(each): each for each in (*module.parameters(), *module.buffers())})
        for each in root.modules():
            _forget_hooks(each)
        leaves = {name for name, each in root.named_modules() if _kind(each) in NORMS or _pads_with_its_shift(each)}
        tracer = _Tracer(leaves)
        if any(hooked(each) for name, each in root.named_modules() if name and not tracer.is_leaf_module(each, name)):
            return None
        held = _held(root)
        torch.autograd.Function.apply = classmethod(_apply)
        found = [_pass(root, leaves, reads, mode, index == 0) for index, mode in enumerate(modes)]
        for given in _alternatives(type(root).forward):
            try:
                found.append(_pass(root, leaves, reads, modes[-1], False, given))
            except Exception as error:
                if "NoneType" not in str(error):  # which says that it cannot be None
                    raise
        if held != _held(root):
            return None
    except Exception:  # whatever a model's own code raises when it meets a proxy
        return None
    finally:
        torch.autograd.Function.apply = APPLY
    graph, values, made, _ = found[0]
    for other, other_values, _, given in found[1:]:
        if not _equal(_described(graph, given), _described(other, given)) or not _equal(values, other_values):
            return None
    written = itertools.chain(*(_written(node, root) for node in graph.nodes))
    if any(map(_takes_elements, graph.nodes)) or not all(_owned(each, root) for each in written):
        return None
    for name, value in made.items():
        root.register_buffer(name, value, persistent=False)
    modules = root.named_modules(remove_duplicate=False)
    reads.attributes = {name: reads.attributes[id(each)] for name, each in modules}
    return Traced(root, graph, made, reads)


def _pass(root, leaves, reads, mode, gradients, given=()):
    """A graph, the values that it has beside the module's state, the tensors among these that code made, `given`."""
    root.train(mode)
    known, trained = set(vars(root)), [each.training for each in root.modules()]
    try:
        with torch.set_grad_enabled(gradients), _watched(reads), NoDraws():
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


class NoDraws(TorchDispatchMode):
    """TraceError where this thread draws random numbers, by whatever generator."""

    _should_skip_dynamo = classmethod(lambda _: False)  # which would import it

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in operation.tags:
            raise TraceError(f"{operation} draws")
        return operation(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watched(reads):
    """Notes what code reads; TraceError where it calls what may know more than its arguments, which gives no answer.

    Code is what is neither Python's nor PyTorch's. What may know more are functions of Python but for the PURE ones, of
    PyTorch that neither are operations on tensors nor return what these compute, and of other libraries in C: they know
    modes, settings, the environment or the time.
    """
    found, before, thread = [], sys.getprofile(), threading.get_ident()

    def watch(frame, event, value):
        name, asked = frame.f_globals.get("__name__"), None
        if event == "call" and not _library(name):
            reads.code[frame.f_code] = frame.f_globals
        elif event == "call" and name.startswith(DRAWING) and _foreign(frame.f_back):
            asked = frame.f_code
        elif event == "c_call" and _foreign(frame) and _knows_more(value):
            asked = value
        elif event == "return" and _foreign(frame.f_back) and _said_more(frame, value):
            asked = frame.f_code
        if asked and not _imported(frame):
            found.append(asked)
            raise TraceError(f"{asked} may know more than its arguments")  # in place of its answer

    def read(module, name):
        caller = sys._getframe(1)
        if threading.get_ident() == thread and caller.f_code is not GETATTR:
            while caller.f_globals is vars(nn.modules.module):
                caller = caller.f_back
            if not (caller.f_globals.get("__name__") or "").startswith(READERS):
                reads.attributes[id(module)].add(name)
        return object.__getattribute__(module, name)

    nn.Module.__getattribute__ = read
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)
        del nn.Module.__getattribute__
    if found:  # and what was raised came no further
        raise TraceError(f"{found[0]} may know more than its arguments")


@functools.lru_cache(maxsize=None)
def _library(name):
    """Whose module has that name: of torch, pure, telling, another of Python's library, or nobody's of these ("")."""
    root = _root(name)
    if root in ("torch", "concertina"):
        return root
    if root.startswith("namedtuple_"):  # as which collections.namedtuple has code run
        return "pure"
    kinds = {"pure": PURE, "telling": TELLING}
    other = "library" if root in sys.stdlib_module_names else ""
    return next((kind for kind, roots in kinds.items() if root.lstrip("_") in roots), other)


def _foreign(frame):
    """Whether the code on whose behalf a frame runs is neither Python's nor PyTorch's."""
    found = None
    while (library := _library(frame.f_globals.get("__name__"))) in ("pure", ""):
        found, frame = found or not library, frame.f_back
    return found and library in ("torch", "concertina")


def _imported(frame):
    """Whether a frame runs in an import that began while tracing."""
    while frame.f_globals is not globals():
        if (frame.f_globals.get("__name__") or "").startswith("importlib."):
            return True
        frame = frame.f_back
    return False


def _knows_more(function):
    """Whether a function in C may know more than its arguments."""
    owner, name = function.__self__, function.__name__
    kinds = (owner if isinstance(owner, type) else type(owner)).__mro__
    homes = [each for each in kinds if isinstance(vars(each).get(name), (*METHODS, types.BuiltinFunctionType))]
    home = function.__module__ or (homes or kinds)[0].__module__
    if _library(home) != "torch":
        return not (_library(home) in ("pure", "telling") or _root(home) == "numpy") or home.startswith("numpy.random")
    if isinstance(owner, torch.Generator):
        return True
    free = owner is None or isinstance(owner, (type, types.ModuleType))
    free = free or type(owner).__module__ == "pybind11_builtins" or type(owner).__name__ == "PyCapsule"
    if function in OPERATIONS or not free:
        return False
    packet = getattr(torch.ops.aten, name, None)  # of those that make a tensor of numbers
    schemas = [getattr(packet, each)._schema for each in packet.overloads()] if packet else []
    return not any("Tensor" in str(each.type) for schema in schemas for each in schema.returns)


def _said_more(frame, value):
    """Whether a function in Python may have known more than its arguments when it returned the value."""
    name = frame.f_globals.get("__name__")
    if _library(name) != "torch":
        return _library(name) == "library"
    if name.startswith("torch.fx"):
        return isinstance(value, bool)  # whether this is tracing
    return not (name.startswith(PURE_OF_TORCH) or frame.f_code in PURE_FUNCTIONS or _computed(value))


def _computed(value):
    """Whether it is a tensor, or made of tensors alone."""
    if isinstance(value, (fx.Proxy, torch.Tensor)):
        return True
    values = value.values() if isinstance(value, dict) else value
    return isinstance(value, (tuple, list, dict)) and len(value) > 0 and all(map(_computed, values))


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
    if any("__getattribute__" in vars(kind) for each in module.modules() for kind in type(each).__mro__[:-1]):
        return True
    own = [each for each in module.modules() if not all(map(_ours, type(each).__mro__))]
    waiting = [type(each).forward for each in own] + [value for each in own for value in vars(each).values()]
    holders, seen = [*own, *waiting], set()
    flags = {name for each in own for name, value in vars(each).items() if isinstance(value, (bool, int, float))}
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
        names, steps, of_locals = _code(function.__code__)
        values = [function.__globals__[name] for name in names & function.__globals__.keys()]
        values += _cells(function)
        called = names.union(str(getattr(value, "__name__", "")).rpartition(".")[2] for value in values)
        if called & OPAQUE - (of_locals & flags) or steps & OPAQUE_STEPS:  # MobileOne has self.inference_mode
            return True
        waiting += values
        for each in (*holders, *values):
            kinds = [each] if isinstance(each, (type, types.ModuleType)) else type(each).__mro__
            waiting += [vars(kind)[name] for kind in kinds if not _ours(kind) for name in names & vars(kind).keys()]
    return False


def _cells(function):
    """What a function closes over."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty one
            yield cell.cell_contents


@functools.lru_cache(maxsize=None)
def _code(code):
    """The names and kinds of steps of code and of what is nested in it, and the names of what is but an attribute of
    its arguments and other local variables. Kinds are those of OPAQUE_STEPS too that are none: handlers of errors, the
    operator `is` with anything but None, and the function `type`."""
    names, steps, before = {*code.co_names, *code.co_freevars}, set(), None
    of_locals, others = set(), set()
    for step in dis.get_instructions(code):
        steps.add(step.opname)
        if step.opname == "IS_OP" and not (before.opname.startswith("LOAD_") and before.argval is None):
            steps.add("is")
        if step.opname == "LOAD_GLOBAL" and step.argval == "type":
            steps.add("type")
        if step.opname == "LOAD_ATTR" and before.opname.startswith("LOAD_FAST"):
            of_locals.add(step.argval)
        elif step.opcode in (*dis.hasname, *dis.hasfree):
            others.add(step.argval)
        if before and before.opname == "PUSH_EXC_INFO" and step.opname != "WITH_EXCEPT_START":
            steps.add("except")
        before = step
    for inner in (each for each in code.co_consts if isinstance(each, types.CodeType)):
        more, further, of_inner = _code(inner)
        others |= more - of_inner
        names, steps, of_locals = names | more, steps | further, of_locals | of_inner
    return names, steps, of_locals - others


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


def _settings(module):
    """Its class, its attributes but for what it has as a module, and its hooks."""
    own = {name: value for name, value in vars(module).items() if name not in INTERNAL}
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module), own, [[hook for hook in each.values() if hook not in OWN_HOOKS] for each in hooks]


def _name(node):
    """Of what it calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
