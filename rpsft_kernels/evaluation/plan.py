"""Plans: the buckets and programs of a set of weights and anchors, prepared once. The next call with the same ones only
verifies that they are the same.

The cache of plans keeps nothing alive that the user has dropped: neither weights nor anchors nor modules.
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
from ..anchors.collection import Anchors
from ..anchors.fingerprint import Fingerprint
from ..anchors.together import recall_groups
from ..distributed import LocalWeight, ModuleSnapshot, ParameterRef, locate_tensor, remembered_device
from ..distributed.dtensor import is_dtensor
from ..low_rank import Factor
from ..private_names import is_traced
from .adapted import AdaptedWeights
from .agreement import describe_call
from .bucket import Bucket, make_buckets
from .pairing import AnchoredWeight, pair


class Group(NamedTuple):
    """A process group that holds shards of a call's weights, and the device that its traffic uses."""

    process_group: Any
    device: torch.device


class Plan:
    """The buckets and programs of a set of weights and anchors.

    Attributes:
        facts: everything about the weights that the plan depends on.
        buckets: in the order of their first weights.
        programs: one for each device and backend; a bucket has its program's index.
        descriptions: for each process group, by name, the digest of everything about its weights that all ranks must
            share.
        tied: whether one and the same weight is listed twice.
        looked_for_foreign_blocks: whether a call with this plan has searched for them.
        measured_distances: whether a call with this plan has measured how far its weights are from W0.
    """

    def __init__(
        self,
        weights: Sequence[AnchoredWeight],
        facts: Hashable,
        fingerprints: Mapping[str, Fingerprint] | None = None,
    ) -> None:
        self.facts = facts
        self.buckets = make_buckets(weights)
        self.tied = len({anchored.weight.identity for anchored in weights}) < len(weights)
        self.programs: list[ops.Program] = []
        self.looked_for_foreign_blocks = False
        self.measured_distances = False
        if not torch.compiler.is_compiling():
            # References, not ids: a new anchor may have the address of one that is gone.
            self._anchors = [weakref.ref(anchored.anchor) for anchored in weights]
            for bucket in self.buckets:
                # A failure is raised here, where all ranks learn of it, and not in the middle of a step.
                ops.make_ready(bucket.backend, bucket.device)
            if not is_traced() and all(_has_memory(anchored.weight) for anchored in weights):
                self._prepare_programs()
        names = dict.fromkeys(anchored.weight.group_name for anchored in weights if anchored.weight.group is not None)
        self.descriptions = {name: describe_call(weights, self.buckets, name, fingerprints) for name in names}

    def serves(self, weights: Sequence[AnchoredWeight], facts: Hashable) -> bool:
        """Whether the plan was made for these very anchors, and for weights of the same facts."""
        return facts == self.facts and all(
            reference() is anchored.anchor for reference, anchored in zip(self._anchors, weights, strict=True)
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
    """Whether kernels can read the weight at its address; they cannot if its tensor only stands for another, as fake
    tensors do.
    """
    try:
        values = weight.shown.values().detach()
        # Only torch's operators know that the memory of such a view holds the negative of its values.
        return (values.data_ptr() != 0 or not values.numel()) and not values.is_neg()
    except RuntimeError:
        return False


class CachedPlan:
    """A plan, and the weights and anchors that it was cached for as they were then, so that a later call can recognise
    them.
    """

    def __init__(self, weights: object, paired: Sequence[AnchoredWeight], plan: Plan, groups: Sequence[Group]) -> None:
        self.plan, self.groups = plan, list(groups)
        self.watches: list[weakref.ref[Any]] = []
        # FSDP1 and ZeRO-3 change how they hold a weight within a step: such weights are paired at every call.
        self._lasting = all(anchored.weight.lasting for anchored in paired)
        if not self._lasting:
            return
        self._names = [anchored.name for anchored in paired]
        self._weights = [anchored.weight.without_parameter() for anchored in paired]
        # Parameters are known by id, without weak references: torch cannot swap a tensor that has one, which is how
        # ``model.to`` converts DTensors. Another tensor at the same address serves as well, if its type and state are
        # equal.
        parameters = [anchored.weight.parameter for anchored in paired]
        self._ids, self._types = list(map(id, parameters)), list(map(type, parameters))
        self._anchors = [weakref.ref(anchored.anchor) for anchored in paired]
        self._states = [anchored.weight.state() for anchored in paired]
        self._snapshot = ModuleSnapshot(weights, parameters) if isinstance(weights, nn.Module) else None

    def match(self, weights: object, anchors: object) -> list[AnchoredWeight] | None:
        """Return the same weights and anchors as they are now; None if anything differs that the plan depends on."""
        if not self._lasting:
            return None
        parameters: Sequence[Tensor] | None
        if self._snapshot is not None:
            parameters = self._snapshot.find()
        else:
            parameters = [weights] if isinstance(weights, Tensor) else list(weights)  # type: ignore[call-overload]
        if parameters is None or list(map(id, parameters)) != self._ids or list(map(type, parameters)) != self._types:
            return None
        same_anchors = self._match_anchors(anchors)
        if same_anchors is None:
            return None
        paired = [
            AnchoredWeight(name, weight.with_parameter(parameter), anchor)
            for name, weight, parameter, anchor in zip(
                self._names, self._weights, parameters, same_anchors, strict=True
            )
        ]
        if [anchored.weight.state() for anchored in paired] != self._states:
            return None
        return paired

    def _match_anchors(self, anchors: object) -> list[Anchor] | None:
        if self._snapshot is not None:
            assert isinstance(anchors, Mapping)
            if list(anchors) != self._names:
                return None
            given = [anchors[name] for name in self._names]
        else:
            given = [anchors] if isinstance(anchors, Anchor) else list(anchors)  # type: ignore[call-overload]
        if len(given) != len(self._anchors):
            return None
        return (
            given
            if all(reference() is anchor for reference, anchor in zip(self._anchors, given, strict=True))
            else None
        )


class PlannedWeights(NamedTuple):
    """A call's weights and their plan; ``adapted`` are those that adapters move, beside ``weights``."""

    weights: list[AnchoredWeight]
    plan: Plan
    adapted: AdaptedWeights | None = None


def factors_of(planned: PlannedWeights) -> Sequence[Factor]:
    """Return the factors of all adapters of a call."""
    # A property of the tuple would stop torch.compile of torch 2.6.
    return () if planned.adapted is None else planned.adapted.factors


# Of a call all of whose weights adapters move.
_EMPTY = Plan([], None)
# Plans by the objects that they were made for, the newest first. As soon as an anchor or the module of any plan is
# gone, all plans of that key are dropped.
_cache: OrderedDict[Hashable, list[CachedPlan]] = OrderedDict()
_lock = threading.Lock()
# Every list of anchors has plans of its own; up to this many may be in use at a time.
_MOST_KEYS = 1024
# FSDP2 shows sharded and gathered parameters in turn; adapters are switched on and off.
_MOST_PLANS_PER_KEY = 4


def recall(weights: object, anchors: object) -> tuple[PlannedWeights, list[Group]] | None:
    """Return the plan of an earlier call with these weights and anchors, unless they have changed since."""
    key = _key(weights, anchors)
    if key is None:
        return None
    for cached in _cached_plans(key):
        paired = cached.match(weights, anchors)
        if paired is not None:
            return PlannedWeights(paired, cached.plan), cached.groups
    return None


def prepare(
    weights: object, anchors: object, parameters: Mapping[str, ParameterRef] | None, groups: Sequence[Group]
) -> PlannedWeights:
    """Pair weights with anchors and plan their computation, or take the plan of an earlier call with equal facts.

    Args:
        parameters: a module's parameters.
        groups: the process groups that hold shards of the weights.

    Raises:
        ValueError: weights and anchors do not match, or a backend cannot serve them.
        RuntimeError: the GPU's kernels have failed their self-test.
    """
    paired = pair(weights, anchors, parameters)
    key = _key(weights, anchors)
    # Only ranks compare them; torch 2.6 cannot trace what holds them.
    fingerprints = anchors.fingerprints if groups and isinstance(anchors, Anchors) else None
    if key is None or not paired:
        return PlannedWeights(paired, Plan(paired, None, fingerprints))
    facts = _facts(paired)
    same = [cached.plan for cached in _cached_plans(key) if cached.plan.serves(paired, facts)]
    plan = same[0] if same else Plan(paired, facts, fingerprints)
    _remember(key, CachedPlan(weights, paired, plan, groups), weights, paired)
    return PlannedWeights(paired, plan)


def _facts(weights: Sequence[AnchoredWeight]) -> Hashable:
    facts = []
    firsts: dict[int, int] = {}
    for i, anchored in enumerate(weights):
        weight = anchored.weight
        place = type(weight), weight.shard, weight.group_name, weight.grad_scale
        # The index of the first weight that is the same one says which weights are tied, without their identities.
        first = firsts.setdefault(weight.identity, i)
        kind = type(weight.parameter), _has_memory(weight)
        facts.append((anchored.name, first, kind, place, weight.state()))
    return tuple(facts)


def _cached_plans(key: Hashable) -> list[CachedPlan]:
    return list(_cache.get(key, ()))


def _key(weights: object, anchors: object) -> Hashable:
    """Return the objects that a call is recognised by, as a key; None if a call must be prepared anew."""
    if torch.compiler.is_compiling() or is_traced():
        return None
    try:
        requested = ops.requested_backend()
    except ValueError:
        # Preparing raises it again, where all ranks learn of it.
        return None
    if isinstance(weights, nn.Module):
        return (id(weights), id(anchors), requested) if isinstance(anchors, Mapping) else None
    if isinstance(weights, Tensor):
        return (id(anchors), requested) if isinstance(anchors, Anchor) else None
    if not isinstance(weights, Sequence) or not isinstance(anchors, Sequence):
        return None
    # The weights are not part of it: they may be new tensors at every step.
    return tuple(map(id, anchors)), requested


def _remember(key: Hashable, cached: CachedPlan, weights: object, paired: Sequence[AnchoredWeight]) -> None:
    def forget(_: object) -> None:
        _cache.pop(key, None)

    owners: list[Any] = [anchored.anchor for anchored in paired]
    owners += [weights] if isinstance(weights, nn.Module) else []
    cached.watches = [weakref.ref(owner, forget) for owner in owners]
    with _lock:
        # ``forget`` may run at any moment, without the lock: this very thread may be the one that collects garbage.
        _cache[key] = [cached, *_cache.pop(key, ())][:_MOST_PLANS_PER_KEY]
        while len(_cache) > _MOST_KEYS:
            _cache.popitem(last=False)


def recall_beside(weights: object, adapted: AdaptedWeights) -> tuple[PlannedWeights, list[Group]] | None:
    """Do as :func:`recall` for a model of which ``adapted`` are some weights, and have not changed."""
    if not adapted.plan.dense:
        return PlannedWeights([], _EMPTY, adapted), adapted.plan.groups
    recalled = recall(weights, adapted.plan.dense)
    return None if recalled is None else (recalled[0]._replace(adapted=adapted), recalled[1])


def prepare_beside(
    weights: object,
    adapted: AdaptedWeights,
    parameters: Mapping[str, ParameterRef] | None,
    groups: Sequence[Group],
) -> PlannedWeights:
    """Do as :func:`prepare` for a model of which ``adapted`` are some weights."""
    if not adapted.plan.dense:
        return PlannedWeights([], _EMPTY, adapted)
    return prepare(weights, adapted.plan.dense, parameters, groups)._replace(adapted=adapted)


def groups_of(weights: object, parameters: Mapping[str, ParameterRef] | None, anchors: object) -> list[Group]:
    """Return every process group that holds shards of the weights, in the same order on every rank.

    The groups of weights without anchors are among them: a rank that raises must still answer where others wait. Where
    there are no weights at all (None in place of a module) it answers in the groups that the anchors were made in.
    """
    groups: dict[str, Group] = {}
    if not (dist.is_available() and dist.is_initialized()):
        return []
    if not isinstance(weights, (nn.Module, Tensor, Sequence)):
        return [Group(group, remembered_device(group)) for group in recall_groups(anchors).values()]
    # Weights that are placed alike on one mesh have one group.
    seen: set[Any] = set()
    for name, tensor, locate in _locators(weights, parameters):
        kind = (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else id(tensor)  # type: ignore[attr-defined]
        if kind in seen:
            continue
        seen.add(kind)
        try:
            weight = locate(name)
        except (RuntimeError, ValueError):
            # Pairing raises the error again if the weight has an anchor.
            continue
        if weight.group is not None and weight.group_name not in groups:
            groups[weight.group_name] = Group(weight.group, weight.device)
    return list(groups.values())


def _locators(
    weights: object, parameters: Mapping[str, ParameterRef] | None
) -> Iterable[tuple[str, Tensor, Callable[[str], LocalWeight]]]:
    """Yield each weight that may lie on several ranks: its name, its tensor, and the function that locates it."""
    if parameters is not None:
        for name, parameter in parameters.items():
            if len(parameter.shape) == 2 and parameter.dtype.is_floating_point:
                yield name, parameter.parameter, parameter.locate
        return
    for tensor in weights if isinstance(weights, Sequence) else [weights]:
        if isinstance(tensor, Tensor) and is_dtensor(tensor):
            yield "weights", tensor, partial(locate_tensor, tensor)
