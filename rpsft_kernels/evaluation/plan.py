"""What a set of weights and anchors needs, prepared once; a call with the same ones only looks whether they are.

A plan keeps nothing alive that its user has dropped: neither weights nor anchors nor modules.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..anchors.anchor import Anchor
from ..distributed import LocalWeight, ModuleSnapshot, ParameterRef, find_parameters, locate_tensor
from ..distributed.dtensor import is_dtensor
from ..private_names import is_traced
from .agreement import describe_call
from .bucket import Bucket, make_buckets
from .pairing import AnchoredWeight, pair


class Group(NamedTuple):
    """A process group that holds shards of a call's weights, and the device that its traffic uses."""

    process_group: Any
    device: torch.device


class Plan:
    """Buckets and programs for weights and anchors of these facts.

    Attributes:
        facts: what they were made for.
        buckets: in the order of their first weights.
        descriptions: by the name of a process group, the digest of everything about its weights that all ranks must
            share.
        tied: whether a weight is listed twice, by identity.
        looked_for_foreign_blocks: whether a call with this plan has.
    """

    def __init__(self, weights: Sequence[AnchoredWeight], facts: Hashable) -> None:
        self.facts = facts
        self.buckets = make_buckets(weights)
        self.tied = len({one.weight.identity for one in weights}) < len(weights)
        self.programs: list[ops.Program] = []
        self.looked_for_foreign_blocks = False
        if not torch.compiler.is_compiling():
            # Another anchor may have the address of one that is gone.
            self._anchors = [weakref.ref(one.anchor) for one in weights]
            for bucket in self.buckets:
                # Here, where all ranks hear of a failure, not in the middle of a step.
                ops.make_ready(bucket.backend, bucket.device)
            if not is_traced() and all(_has_memory(one.weight) for one in weights):
                self._prepare_programs()
        names = dict.fromkeys(one.weight.group_name for one in weights if one.weight.group is not None)
        self.descriptions = {name: describe_call(weights, self.buckets, name) for name in names}

    def serves(self, weights: Sequence[AnchoredWeight], facts: Hashable) -> bool:
        """Whether it was made for these very anchors, and for weights like these."""
        return facts == self.facts and all(
            reference() is one.anchor for reference, one in zip(self._anchors, weights, strict=True)
        )

    def _prepare_programs(self) -> None:
        placed: dict[tuple[str, torch.device], list[Bucket]] = {}
        for bucket in self.buckets:
            if bucket.matrices:
                placed.setdefault((bucket.backend, bucket.device), []).append(bucket)
        for (backend, device), buckets in placed.items():
            program = ops.prepare_program(backend, device, [bucket.matrices for bucket in buckets])
            for batch, bucket in enumerate(buckets):
                bucket.program, bucket.batch = len(self.programs), batch
            self.programs.append(program)


def _has_memory(weight: LocalWeight) -> bool:
    """Whether kernels can be given addresses: not of tensors that only stand for others, such as fake ones."""
    try:
        values = weight.values().detach()
        # A view that stands for its memory's negative is read by operators alone.
        return (values.data_ptr() != 0 or not values.numel()) and not values.is_neg()
    except RuntimeError:
        return False


class Sighting:
    """How a plan's weights were found, and what each was like."""

    def __init__(self, weights: object, found: Sequence[AnchoredWeight], plan: Plan, groups: Sequence[Group]) -> None:
        self.plan, self.groups = plan, list(groups)
        self.watches: list[weakref.ref[Any]] = []
        # How FSDP1 and ZeRO-3 hold a weight changes within a step.
        self._lasting = all(one.weight.lasting for one in found)
        if not self._lasting:
            return
        self._names = [one.name for one in found]
        self._weights = [one.weight.without_parameter() for one in found]
        # No weak references: torch cannot swap a tensor that has one, which is how ``model.to`` converts DTensors. One
        # that is at the address of another, of its type and in its state, is as good to the plan.
        parameters = [one.weight.parameter for one in found]
        self._ids, self._types = list(map(id, parameters)), list(map(type, parameters))
        self._anchors = [weakref.ref(one.anchor) for one in found]
        self._states = [one.weight.state() for one in found]
        self._snapshot = ModuleSnapshot(weights, parameters) if isinstance(weights, nn.Module) else None

    def find(self, weights: object, anchors: object) -> list[AnchoredWeight] | None:
        """The same weights and anchors as they are now; None where anything differs that the plan rests on."""
        if not self._lasting:
            return None
        parameters: Sequence[Tensor] | None
        if self._snapshot is not None:
            parameters = self._snapshot.find()
        else:
            parameters = [weights] if isinstance(weights, Tensor) else list(weights)  # type: ignore[call-overload]
        if parameters is None or list(map(id, parameters)) != self._ids or list(map(type, parameters)) != self._types:
            return None
        found_anchors = self._find_anchors(anchors)
        if found_anchors is None:
            return None
        found = [
            AnchoredWeight(name, weight.with_parameter(parameter), anchor)
            for name, weight, parameter, anchor in zip(
                self._names, self._weights, parameters, found_anchors, strict=True
            )
        ]
        if [one.weight.state() for one in found] != self._states:
            return None
        return found

    def _find_anchors(self, anchors: object) -> list[Anchor] | None:
        if self._snapshot is not None:
            assert isinstance(anchors, Mapping)
            if list(anchors) != self._names:
                return None
            given = [anchors[name] for name in self._names]
        else:
            given = [anchors] if isinstance(anchors, Anchor) else list(anchors)  # type: ignore[call-overload]
        if len(given) != len(self._anchors):
            return None
        return given if all(reference() is one for reference, one in zip(self._anchors, given, strict=True)) else None


class Found(NamedTuple):
    """A call's weights and their plan."""

    weights: list[AnchoredWeight]
    plan: Plan


# The newest first. All of a key go with the first anchor or module of any that goes.
_known: OrderedDict[Hashable, list[Sighting]] = OrderedDict()
_lock = threading.Lock()
# A list of anchors has plans of its own; so many may be in use at a time.
_MOST = 1024
# FSDP2 shows sharded and gathered parameters in turn; adapters are switched on and off.
_MOST_SIGHTINGS = 4


def known(weights: object, anchors: object) -> tuple[Found, list[Group]] | None:
    """The plan of an earlier call with the same weights and anchors, if they are still the same."""
    key = _key(weights, anchors)
    if key is None:
        return None
    for sighting in _sightings_of(key):
        found = sighting.find(weights, anchors)
        if found is not None:
            return Found(found, sighting.plan), sighting.groups
    return None


def prepare(
    weights: object, anchors: object, parameters: Mapping[str, ParameterRef] | None, groups: Sequence[Group]
) -> Found:
    """Pair weights with anchors and plan their computation, or take the plan of an earlier call of equal facts.

    Args:
        parameters: those of a module.

    Raises:
        ValueError: weights and anchors do not match, or a backend cannot serve them.
        RuntimeError: the GPU's kernels have failed their self-test.
    """
    found = pair(weights, anchors, parameters)
    key = _key(weights, anchors)
    if key is None or not found:
        return Found(found, Plan(found, None))
    facts = _facts(found)
    same = [sighting.plan for sighting in _sightings_of(key) if sighting.plan.serves(found, facts)]
    plan = same[0] if same else Plan(found, facts)
    _remember(key, Sighting(weights, found, plan, groups), weights, found)
    return Found(found, plan)


def _facts(weights: Sequence[AnchoredWeight]) -> Hashable:
    found = []
    firsts: dict[int, int] = {}
    for i, one in enumerate(weights):
        weight = one.weight
        place = type(weight), weight.shard, weight.group_name, weight.grad_scale
        # Which weights are tied, not which they are.
        kind = type(weight.parameter), _has_memory(weight)
        found.append((one.name, firsts.setdefault(weight.identity, i), kind, place, weight.state()))
    return tuple(found)


def _sightings_of(key: Hashable) -> list[Sighting]:
    return list(_known.get(key, ()))


def _key(weights: object, anchors: object) -> Hashable:
    """By which objects a call is known; None where it must be looked at anew."""
    if torch.compiler.is_compiling() or is_traced():
        return None
    try:
        requested = ops.requested_backend()
    except ValueError:
        # Preparing says so, where all ranks hear of it.
        return None
    if isinstance(weights, nn.Module):
        return (id(weights), id(anchors), requested) if isinstance(anchors, Mapping) else None
    if isinstance(weights, Tensor):
        return (id(anchors), requested) if isinstance(anchors, Anchor) else None
    if not isinstance(weights, Sequence) or not isinstance(anchors, Sequence):
        return None
    # Not by the weights, which may be others at every step.
    return tuple(map(id, anchors)), requested


def _remember(key: Hashable, sighting: Sighting, weights: object, found: Sequence[AnchoredWeight]) -> None:
    def forget(_: object) -> None:
        _known.pop(key, None)

    owners: list[Any] = [one.anchor for one in found]
    owners += [weights] if isinstance(weights, nn.Module) else []
    sighting.watches = [weakref.ref(owner, forget) for owner in owners]
    with _lock:
        # What is forgotten is forgotten at any moment, without the lock: it may be this thread that collects garbage.
        _known[key] = [sighting, *_known.pop(key, ())][:_MOST_SIGHTINGS]
        while len(_known) > _MOST:
            _known.popitem(last=False)


def groups_of(weights: object, parameters: Mapping[str, ParameterRef] | None) -> list[Group]:
    """Every process group that holds shards of the weights, in the same order on every rank.

    They are those of all weights, not only of anchored ones: a rank that raises must still answer where others wait.
    """
    groups: dict[str, Group] = {}
    if not (dist.is_available() and dist.is_initialized()):
        return []
    # Weights that are placed alike on one mesh have one group.
    seen: set[Any] = set()
    for name, tensor, locate in _located(weights, parameters):
        kind = (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else id(tensor)  # type: ignore[attr-defined]
        if kind in seen:
            continue
        seen.add(kind)
        try:
            weight = locate(name)
        except ValueError:
            # Pairing says what is wrong with it, where it has an anchor.
            continue
        if weight.group is not None and weight.group_name not in groups:
            groups[weight.group_name] = Group(weight.group, weight.device)
    return list(groups.values())


def _located(
    weights: object, parameters: Mapping[str, ParameterRef] | None
) -> Iterable[tuple[str, Tensor, Callable[[str], LocalWeight]]]:
    """Name and tensor of each weight that may lie on several ranks, and a function that finds out."""
    if parameters is not None:
        for name, found in parameters.items():
            if len(found.shape) == 2 and found.dtype.is_floating_point:
                yield name, found.parameter, found.locate
        return
    for tensor in weights if isinstance(weights, Sequence) else [weights]:
        if isinstance(tensor, Tensor) and is_dtensor(tensor):
            yield "weights", tensor, partial(locate_tensor, tensor)


__all__ = ["Found", "Group", "Plan", "find_parameters", "groups_of", "known", "prepare"]
