# SPDX-License-Identifier: Apache-2.0
"""Re-parameterised blocks of other people's code, found by structure: convolutions, batch norms and sums.

The model is traced by torch.fx, and what is linear between two tensors is a region.
"""

import copy
import itertools
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.nn.parameter import is_lazy

from .expansion import require_unwrapped
from .proofs import Parameters, prove
from .regions import _traced
from .shapes import Chain, ConvShape, Error, ShapeError
from .tracing import INTERNAL, _equal, _settings


class VerificationError(Error):
    """A proof does not hold; the message names the region."""


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
    """The regions compared, with the proofs of each; `difference` says what else is not the same, `left` of from_blocks
    what stays as it is and why.

    `holds` is True where every proof of every region was run and holds and all else is the same, False where a proof
    fails or something else is different, and None where nothing is wrong but a proof was too large to run. That one
    is printed as not proved, and its `holds` is None.
    """

    difference = ""
    left = ()

    @property
    def holds(self):
        proofs = [proof.holds for region in self for proof in region.proofs]
        return False if self.difference or False in proofs else None if None in proofs else True

    def __str__(self):
        different = [f"different: {self.difference}"] if self.difference else []
        return "\n".join([*map(str, self), *(f"left: {each}" for each in self.left), *different])


@torch.no_grad()
def from_blocks(model):
    """A copy of `model` whose re-parameterised blocks are plain layers, and the Verdict of verify(model, copy), which
    says in `left` what stays.

    Contracted are convolutions, Linear layers, batch norms (as in inference), average pools, expanded layers, and sums
    of these, where neither parameters nor multiply-adds grow and one layer equals them at every border, in double and
    rounded once. The result is a torch.fx.GraphModule. A module whose code torch.fx cannot trace, or not as it is,
    stays, and its children are contracted one by one; so its code must call these, and use nothing that is in them.
    Requires  model.eval(), and inputs with a batch: of one sequence alone nn.BatchNorm1d and nn.SyncBatchNorm would
              normalise another axis
    Throws    ShapeError for a model in training, wrapped, compiled, lazy, on the meta device, or that cannot be copied;
              VerificationError where a proof fails. One that is too large to run is no failure: see Verdict.holds
    """
    _require_elements(model)
    left = []
    plain = _contract_blocks(_copied(model), left)
    verdict = verify(model, plain)
    verdict.left = left
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
    Throws    ShapeError for models in training, wrapped, compiled, lazy or on the meta device, and where only one has
              such a module
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
        if is_lazy(tensor):
            raise ShapeError(f"{name} has no shape before the first input; run the model once first")
        if tensor.is_meta:
            raise ShapeError(f"{name} is on the meta device and has no elements; load the model's state dict first")


def _copied(model):
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever objects of a model's own raise
        for name, module in model.named_modules():
            own = {key: value for key, value in vars(module).items() if key not in INTERNAL}
            for key, value in {**own, **module._parameters, **module._buffers}.items():
                _require_copy(value, f"{name or 'the model'} ({type(module).__name__})", key)
        raise


def _require_copy(value, where, key):
    try:
        copy.deepcopy(value)
    except Exception as error:
        raise ShapeError(
            f"{where} has an attribute {key!r} that cannot be copied: {error}. Remove it; if it is pruned, "
            "torch.nn.utils.prune.remove leaves the pruned one; if weight_norm or spectral_norm made it, take those of "
            "torch.nn.utils.parametrizations"
        ) from error


def _contract_blocks(module, left, prefix=""):
    regions = _traced(module)
    if regions is None:
        children = list(module.named_children())
        if children:
            where = f"{prefix[:-1] or 'the model'} ({type(module).__name__})"
            left.append(f"{where}: its code cannot be traced as it is, so its children were taken one by one")
        for name, child in children:
            setattr(module, name, _contract_blocks(child, left, f"{prefix}{name}."))
        return module
    for node, reason in regions.reasons.items():
        left.append(f"{prefix}{node.target if node.op == 'call_module' else node}: {reason}")
    return regions.replaced() if any(not regions.plain(region) for _, region in regions.ends()) else module


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
