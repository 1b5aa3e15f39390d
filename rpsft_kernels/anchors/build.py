"""Builds anchors of weights as they lie: each subspace is computed once, each rank keeps its shard's anchor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..costs import is_full
from ..distributed import LocalWeight, ReplicatedWeight, Shard, Transfer, gather_objects
from .anchor import Anchor
from .fingerprint import Fingerprint
from .make import AnchorOptions, Basis, Solution, anchor_fields, solve
from .together import Refusals


def build_anchors(
    weights: Mapping[str, LocalWeight], options: AnchorOptions, process_groups: Mapping[str, dist.ProcessGroup]
) -> Iterator[tuple[str, Anchor, Fingerprint]]:
    """Build each weight's anchor, or its local shard's anchor; collective where weights lie on several ranks.

    A weight that lies on several ranks is gathered on one of them, one weight per rank at a time, and the ranks compute
    subspaces side by side; the rows of U and V that each rank needs are sent back.

    What a rank cannot do it tells the others of its groups before it would next talk to them. An error comes at the
    end, on every rank, whatever has been yielded before.

    Args:
        weights: by name, as they lie here.
        options: the properties that all anchors share.
        process_groups: those that learn of an error, by name: at least those of the weights.

    Raises:
        ValueError: a weight cannot be anchored, here or on another rank; the message names it.
        RuntimeError: its subspaces cannot be computed; every rank of its group raises it, with the weight's name.
    """
    groups: dict[str, dict[str, LocalWeight]] = {}
    for name, weight in weights.items():
        if weight.group is not None:
            groups.setdefault(weight.group_name, {})[name] = weight
    shards = _agree(groups, options)
    refusals = Refusals("no anchor was made")
    with refusals.keep():
        for name, weight in weights.items():
            if weight.group is None:
                yield _build_alone(name, weight, options)
    for group_name, members in groups.items():
        shards_by_rank = shards[group_name]
        group = next(iter(members.values())).group
        assert group is not None
        for solvers in _assign_solvers(members, shards_by_rank):
            built = _Round(solvers, members, shards_by_rank, options, group).run(refusals)
            if built is None:
                break
            yield from built
    refusals.tell_all(process_groups)


def _build_alone(name: str, weight: LocalWeight, options: AnchorOptions) -> tuple[str, Anchor, Fingerprint]:
    """Build the anchor of a weight that lies on this rank alone."""
    try:
        values = weight.values()
        solution, basis = solve(values, options, name)
        anchor = Anchor(**anchor_fields(values, weight.shard, solution, basis, options))
    except Exception as error:
        if type(error) not in (ValueError, RuntimeError):
            raise
        raise type(error)(f"{name}: {error}") from error
    return name, anchor, Fingerprint.of(name, values)


@dataclass(frozen=True)
class _Statement:
    """One rank's part in the agreement on what is anchored, and how.

    Attributes:
        options: the properties that all anchors share.
        dtypes: the dtype of each weight of the group, by name.
        shards: the shard of each weight that lies on that rank.
        failed: whether that rank has seen a disagreement in another group.
    """

    options: AnchorOptions
    dtypes: dict[str, torch.dtype]
    shards: dict[str, Shard]
    failed: bool


def _agree(
    groups: Mapping[str, Mapping[str, LocalWeight]], options: AnchorOptions
) -> dict[str, dict[str, list[Shard]]]:
    """Return every rank's shard of each weight, by group and name, once all ranks mean the same anchors.

    A rank of several groups carries the disagreement of one into the others, in the second round at the latest.

    Raises:
        ValueError: ranks differ in their options or weights. Nothing has been computed or sent.
    """
    shards: dict[str, dict[str, list[Shard]]] = {}
    problem = ""
    # As many rounds on every rank: how many groups the others are in, a rank does not know.
    for _ in range(2):
        for group_name, weights in groups.items():
            group = next(iter(weights.values())).group
            assert group is not None
            own = _Statement(
                options=options,
                dtypes={name: weight.dtype for name, weight in weights.items()},
                shards={name: weight.shard for name, weight in weights.items()},
                failed=bool(problem),
            )
            gathered = gather_objects(own, group)
            problem = problem or _find_disagreement(gathered, group)
            if not problem:
                shards[group_name] = {name: [statement.shards[name] for statement in gathered] for name in weights}
    if problem:
        raise ValueError(problem)
    return shards


def _find_disagreement(statements: Sequence[_Statement], group: dist.ProcessGroup) -> str:
    """Return the message for ranks that do not mean the same anchors; "" where they do."""
    for field in dataclasses.fields(AnchorOptions):
        given = [getattr(statement.options, field.name) for statement in statements]
        if len(set(given)) > 1:
            said = ", ".join(f"{value} on rank {dist.get_global_rank(group, i)}" for i, value in enumerate(given))
            return (
                f"{field.name}: got {said}, expected the same on every rank: Anchors.from_model is one call of all "
                "ranks with the same arguments; no anchor was made"
            )
    weights = [
        (list(statement.dtypes.items()), [s.shape for s in statement.shards.values()]) for statement in statements
    ]
    if any(other != weights[0] for other in weights):
        return (
            "model: got other parameters to anchor on other ranks (names, shapes or dtypes differ), expected the same "
            "model, include and exclude on all"
        )
    if any(statement.failed for statement in statements):
        return "model: another rank refused this call for a reason that it raises itself; no anchor was made"
    return ""


def _assign_solvers(
    weights: Mapping[str, LocalWeight], shards_by_rank: Mapping[str, list[Shard]]
) -> Iterator[dict[str, int]]:
    """Name the solver of each weight, round by round: a rank solves at most one weight a round, the dearest first."""

    def cost(name: str) -> float:
        m, n = weights[name].shape
        return float(m * n * min(m, n) + 10 * min(m, n) ** 3)

    busy = [0.0] * len(next(iter(shards_by_rank.values())))
    queues: list[list[str]] = [[] for _ in busy]
    for name in sorted(weights, key=lambda name: (-cost(name), name)):
        owners = [member for member, shard in enumerate(shards_by_rank[name]) if shard.is_whole]
        # A rank that keeps the whole weight needs nothing sent to it.
        solver = owners[0] if owners else min(range(len(busy)), key=busy.__getitem__)
        busy[solver] += cost(name)
        queues[solver].append(name)
    for i in range(max(map(len, queues))):
        yield {queue[i]: solver for solver, queue in enumerate(queues) if i < len(queue)}


@dataclass(frozen=True)
class _Outcome:
    """The message of a weight's solver to the other ranks: a solution, or in ``problem`` why there is none.

    ``refused`` says whether that is a ValueError, which the caller can do something about.
    """

    solution: Solution | None = None
    fingerprint: Fingerprint | None = None
    problem: str = ""
    refused: bool = False


@dataclass(frozen=True)
class _Round:
    """Weights of one process group that are solved side by side, at most one on each rank.

    Attributes:
        solvers: the rank (within the group) that solves each weight of the round; equal on all ranks.
        weights: the weights of the group as they lie here.
        shards_by_rank: every rank's shard of each weight.
        options: the properties that all anchors share.
        group: the processes that hold the weights.
    """

    solvers: Mapping[str, int]
    weights: Mapping[str, LocalWeight]
    shards_by_rank: Mapping[str, list[Shard]]
    options: AnchorOptions
    group: dist.ProcessGroup

    def run(self, refusals: Refusals) -> list[tuple[str, Anchor, Fingerprint]] | None:
        """Return the anchors of the round; None on every rank of the group where one of them has refused.

        What this rank refuses at the end, when the others wait for nothing, it tells in the next round.
        """
        gathered: dict[str, Tensor] = {}
        transfer = Transfer(self.group)
        with refusals.keep():
            self._plan_gather(transfer, gathered)
        if refusals.tell(self.group):
            return None
        transfer.run()
        own, whole_basis_by_name = self._solve(gathered)
        # The gathered weights are dropped before rows of U and V are received.
        del gathered, transfer
        outcomes = self._exchange(own)
        basis_by_name: dict[str, Basis] = {}
        transfer = Transfer(self.group)
        with refusals.keep():
            self._check(outcomes)
            self._plan_scatter(transfer, whole_basis_by_name, outcomes, basis_by_name)
        if refusals.tell(self.group):
            return None
        transfer.run()
        built = []
        with refusals.keep():
            for name, outcome in outcomes.items():
                assert outcome.solution is not None and outcome.fingerprint is not None
                anchor = self._anchor(name, outcome.solution, basis_by_name.get(name))
                built.append((name, anchor, outcome.fingerprint))
        return built

    def _plan_gather(self, transfer: Transfer, gathered: dict[str, Tensor]) -> None:
        """Plan how the whole weights (m, n) that this rank solves come together in ``gathered``."""
        this_rank = self.group.rank()
        for name, solver in self.solvers.items():
            weight = self.weights[name]
            if isinstance(weight, ReplicatedWeight):
                if solver == this_rank:
                    gathered[name] = weight.parameter.detach()
                continue
            views = weight.shard.views(weight.values().detach())
            if solver != this_rank:
                for _, view in views:
                    transfer.send(view, solver)
                continue
            whole = gathered[name] = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            for member, shard in enumerate(self.shards_by_rank[name]):
                for rect in shard.rects:
                    if member != this_rank:
                        transfer.receive(whole[slice(*rect.rows), slice(*rect.cols)], member)
            for rect, view in views:
                whole[slice(*rect.rows), slice(*rect.cols)] = view

    def _solve(self, gathered: dict[str, Tensor]) -> tuple[dict[str, _Outcome], dict[str, Basis]]:
        """Solve this rank's weights; a weight whose anchor has the full form has no basis."""
        outcomes: dict[str, _Outcome] = {}
        basis_by_name: dict[str, Basis] = {}
        for name, whole in gathered.items():
            try:
                solution, basis = solve(whole, self.options, name)
                outcomes[name] = _Outcome(solution, Fingerprint.of(name, whole))
            except Exception as error:
                # Whatever it is, the other ranks wait for the outcome.
                kind = "" if type(error) in (ValueError, RuntimeError) else f"{type(error).__name__}: "
                outcomes[name] = _Outcome(problem=f"{name}: {kind}{error}", refused=isinstance(error, ValueError))
                continue
            if basis is not None:
                basis_by_name[name] = basis
        return outcomes, basis_by_name

    def _exchange(self, own: dict[str, _Outcome]) -> dict[str, _Outcome]:
        """Tell every rank each weight's outcome, in the order of ``solvers``."""
        gathered = gather_objects(own, self.group)
        return {name: gathered[solver][name] for name, solver in self.solvers.items()}

    @staticmethod
    def _check(outcomes: Mapping[str, _Outcome]) -> None:
        """Check that every weight was solved.

        Raises:
            ValueError: a weight was refused.
            RuntimeError: a weight could not be solved.
        """
        for outcome in outcomes.values():
            if outcome.problem:
                raise (ValueError if outcome.refused else RuntimeError)(outcome.problem)

    def _plan_scatter(
        self,
        transfer: Transfer,
        whole_basis_by_name: Mapping[str, Basis],
        outcomes: Mapping[str, _Outcome],
        basis_by_name: dict[str, Basis],
    ) -> None:
        """Plan how every rank's rows of U and V come into ``basis_by_name``, from the solver that has them whole."""
        this_rank = self.group.rank()
        for name, solver in self.solvers.items():
            weight, solution = self.weights[name], outcomes[name].solution
            assert solution is not None
            if is_full((weight.shape[0], weight.shape[1]), solution.rank):
                continue
            if solver == this_rank:
                for member, shard in enumerate(self.shards_by_rank[name]):
                    rows = whole_basis_by_name[name].of(shard)
                    if member == this_rank:
                        basis_by_name[name] = rows
                    else:
                        transfer.send(rows.left, member)
                        transfer.send(rows.right, member)
            else:
                rows = basis_by_name[name] = self._empty_basis(weight, solution.rank)
                transfer.receive(rows.left, solver)
                transfer.receive(rows.right, solver)

    def _empty_basis(self, weight: LocalWeight, rank: int) -> Basis:
        left, right = (
            torch.empty((size, rank), dtype=self.options.basis_dtype, device=weight.device)
            for size in weight.shard.bounds.shape
        )
        return Basis(left, right)

    def _anchor(self, name: str, solution: Solution, basis: Basis | None) -> Anchor:
        weight, shard = self.weights[name], self.shards_by_rank[name][self.group.rank()]
        if shard.numel:
            values = weight.values()
        else:
            # Some wrappers have no tensor for an empty shard.
            values = torch.empty(shard.local_shape, dtype=weight.dtype, device=weight.device)
        return Anchor(**anchor_fields(values, shard, solution, basis, self.options), part=shard)
