"""One call, from its weights and anchors to R and the gradients: find, check, stage, agree, project, sum, pull back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..distributed import GroupCall, find_parameters
from .adapted import find_adapted_weights, recall_adapted
from .adapted_call import AdaptedCall
from .agreement import digest, gradient_checksum, members_of
from .bucket import Bucket, BucketTensors, ProjectedBucket
from .corrections import Corrections
from .distance import warn_of_distant_weights
from .foreign_blocks import warn_of_foreign_blocks
from .forward_mode import check_tangents
from .gradients import Gradients, PullBack
from .plan import PlannedWeights, factors_of, groups_of, prepare, prepare_beside, recall, recall_beside
from .reduce import GroupReduction, flatten_drifts, refuse_second_derivatives, stand_in, start_drifts
from .requests import AccumulationRequest, PenaltyRequest, Request


class Call:
    """A call that every rank has checked, and on which all ranks agree.

    Nothing is computed before :meth:`penalty` or :meth:`accumulate_`. :meth:`close` ends the call.
    """

    def __init__(self, planned: PlannedWeights, request: Request) -> None:
        self.weights, self._plan, adapted = planned
        self._coeff = request.factor if isinstance(request, AccumulationRequest) else None
        self.group_calls: dict[str, GroupCall] = {}
        # The weights that adapters move, which are computed from the adapters' factors.
        self._adapted_names = [] if adapted is None else [layer.name for layer in adapted.plan.layers]
        self._adapted = None if adapted is None or not adapted.plan.layers else AdaptedCall(adapted, self._coeff)
        # What the call writes, if it does: gradients, or the weights themselves.
        self._writes = not isinstance(request, PenaltyRequest)
        self.gradients: Gradients | Corrections = Gradients(self.weights, self._coeff or 0.0, self._plan.tied)
        self._keeps_drifts = False
        self._runs: list[ops.Run] = []
        buckets = self._plan.buckets
        # The C of weights over several processes are summed while the rest is computed.
        self._shared = [bucket for bucket in buckets if bucket.group_name]
        self._local = [bucket for bucket in buckets if not bucket.group_name]
        # These have the places of buckets as keys.
        self._tensors: dict[int, BucketTensors] = {}
        self._pulls: dict[int, list[PullBack]] = {}
        self._staged: dict[int, list[Any]] = {}
        self._checksums: dict[str, int] = {}

    def _run_of(self, bucket: Bucket) -> ops.Run | None:
        return None if bucket.program is None else self._runs[bucket.program]

    # -- before ranks agree -----------------------------------------------------------------------------------

    def stage(self) -> None:
        """Collect the tensors of this call and prepare its operations. Gradients that do not exist are made, unset.

        Raises:
            NoKernel, ValueError: an operation cannot be computed on this machine. Nothing has been computed.
        """
        for program in self._plan.programs:
            self._runs.append(program.begin())
        if self._coeff is not None:
            # These come before new gradients are made, which would be among them.
            for name in self._plan.descriptions:
                self._checksums[name] = gradient_checksum(members_of(self.weights, name))
        for bucket in (*self._shared, *self._local):
            tensors = self._tensors[bucket.place] = bucket.gather(self.weights)
            run = self._run_of(bucket)
            if run is not None:
                differentiable = not self._writes and torch.is_grad_enabled()
                keep = bool(bucket.group_name) or self._keeps_drifts or differentiable
                run.stage_projection(bucket.batch, tensors.operands, keep)
                if differentiable:
                    self._stage_backward(run, bucket, tensors)
            if self._writes:
                self._stage_gradients(run, bucket, tensors)
        if self._adapted is not None:
            self._adapted.stage()
        if self._writes:
            self.gradients.check_memory(self._plan)
        for run in self._runs:
            run.send()

    def _stage_backward(self, run: ops.Run, bucket: Bucket, tensors: BucketTensors) -> None:
        """Look up the kernels of the backward pass, so that a missing one is an error of this call and not of that."""
        matrices = tensors.operands.weights
        wanted = [j for j, matrix in enumerate(matrices) if matrix.requires_grad]
        if wanted:
            operands = tensors.operands.pick(wanted) if len(wanted) < len(matrices) else tensors.operands
            run.prepare_gradients(bucket.batch, wanted, operands, matrices[0].dtype)

    def _stage_gradients(self, run: ops.Run | None, bucket: Bucket, tensors: BucketTensors) -> None:
        if self.gradients.are_copies(bucket):
            if run is not None and bucket.matrices:
                dtype = self.weights[bucket.busy[0]].weight.gradient_dtype
                members, operands = range(bucket.matrices), tensors.operands.for_pull_back()
                run.prepare_gradients(bucket.batch, members, operands, dtype, accumulate=True)
            return
        pulls = self._pulls[bucket.place] = list(self.gradients.pull_backs(bucket, tensors))
        if run is not None:
            self._staged[bucket.place] = [pull.stage(run, bucket, None) for pull in pulls]

    def close(self) -> None:
        """Release everything that the call uses, and remove gradients that it has made and not computed."""
        self.gradients.drop_made()
        if self._adapted is not None:
            self._adapted.close()
        for program, run in zip(self._plan.programs, self._runs, strict=False):
            program.end(run)
        self._runs = []
        # An exception that is being raised may keep this call alive for a while.
        self._tensors, self._pulls, self._staged = {}, {}, {}

    # -- between ranks ------------------------------------------------------------------------------------------

    def agree(self, group_call: GroupCall) -> None:
        """Check that all ranks of a group make the same call.

        Raises:
            ValueError: they do not, another rank has refused, or gradients are averaged over ranks already.
        """
        name = group_call.group.group_name
        members = members_of(self.weights, name)
        # Names are unique: weights of a list are numbered.
        shards = {anchored.name: anchored.weight.shard for anchored in members}
        described = digest(self._describe(name), members, self._coeff)
        if self._adapted is not None:
            described ^= self._adapted.digest(name)
        checksums = group_call.check_consistent(described, shards, self._checksums.get(name, 0))
        if checksums[0] and len(set(checksums)) == 1:
            raise ValueError(
                f"{members[0].name}.grad: got gradients that are averaged over ranks already, expected those before "
                "the backward pass that averages them: call accumulate_rotation_grad_ before the last "
                "micro-batch's backward (each rank adds its own weights' share), or put rotation_penalty into the "
                "loss. Every rank has seen the very same batch, or gradients of other parameters are left from an "
                "earlier step? Then they look alike: clear those that are left, of the whole model (model.zero_grad())"
            )

    def _describe(self, group_name: str) -> bytes:
        """Return what all ranks of a group must share."""
        return self._plan.descriptions.get(group_name, b"")

    # -- the computation ------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """Return R; autograd connects it to the weights if gradients are on."""
        _, summands = self._project_shared()
        squares = [self._project(bucket).squares for bucket in self._local]
        adapted = [] if self._adapted is None else [self._adapted.penalties()]
        total = self._total(squares + summands + adapted)
        summed = any(bucket.summed for bucket in self._shared) or (self._adapted is not None and self._adapted.summed)
        return refuse_second_derivatives(total) if total.requires_grad and summed else total

    def accumulate_(self) -> Tensor:
        """Add ``coeff * dR/dW`` to the gradients and return R. All sums have arrived and are finite before that."""
        shared, summands = self._project_shared()
        self._pull_back_shared(shared)
        squares = [self._project_and_pull_back(bucket) for bucket in self._local]
        self.gradients.keep_made()
        adapted = [] if self._adapted is None else [self._adapted.add_gradients_()]
        return self._total(squares + summands + adapted)

    def penalty_by_weight(self) -> tuple[list[str], Tensor]:
        """Return the names of the call's weights, and R of each: (n,), on the first one's device, detached."""
        shared, _ = self._project_shared()
        local = [(bucket, self._project(bucket).squares) for bucket in self._local]
        names = [anchored.name for anchored in self.weights]
        penalties = [self._split_by_weight(shared, local)] if names else []
        if self._adapted is not None:
            penalties.append(self._adapted.penalties())
        return names + self._adapted_names, torch.cat([each.to(penalties[0]) for each in penalties])

    def _split_by_weight(self, shared: Sequence[ProjectedBucket], local: Sequence[tuple[Bucket, Tensor]]) -> Tensor:
        """Return R of each of the weights: (n,), on the first one's device.

        Args:
            shared: the buckets over several processes, projected and summed.
            local: the other buckets, with their squares.
        """
        found: dict[int, Tensor] = {}
        own = list(local)
        for projected in shared:
            if projected.bucket.summed:
                squares = [drift.square().sum() for drift in projected.drifts]
                found.update(zip(projected.bucket.members, squares, strict=True))
            else:
                own.append((projected.bucket, projected.squares))
        for bucket, bucket_squares in own:
            found.update(zip(bucket.busy, bucket_squares.detach().unbind(), strict=True))
        device = self.weights[0].weight.device
        dtypes = [ops.accumulation_dtype(anchored.weight.dtype) for anchored in self.weights]
        zero = torch.zeros((), dtype=max(dtypes, key=lambda dtype: dtype.itemsize), device=device)
        penalties = torch.stack([found.get(i, zero).to(zero) for i in range(len(self.weights))])
        for name, group_call in self.group_calls.items():
            # Each rank has its own summand, or that of the weights that it works on alone.
            places = [i for b in self._shared if b.group_name == name and not b.summed for i in b.members]
            if places:
                summands = torch.stack([penalties[i] for i in places]).to(group_call.device)
                sums = group_call.finish(group_call.start(summands)).to(device)
                for i, value in zip(places, sums.unbind(), strict=True):
                    penalties[i] = value
        return penalties

    def _project(self, bucket: Bucket) -> ProjectedBucket:
        program = None if bucket.program is None else self._plan.programs[bucket.program]
        return bucket.project(program, self._run_of(bucket), self._tensors[bucket.place], self.weights)

    def _project_shared(self) -> tuple[list[ProjectedBucket], list[Tensor]]:
        """Project the buckets whose weights lie over several processes; returns them, and their R in summands."""
        shared = []
        failure: Exception | None = None
        if self._adapted is not None:
            self._adapted.start(self.group_calls)
        for bucket in self._shared:
            try:
                projected = self._project(bucket) if failure is None else stand_in(bucket, self.weights)
                if bucket.summed and failure is None:
                    flatten_drifts(projected)
            except Exception as error:
                # The other ranks wait for these sums.
                failure, projected = error, stand_in(bucket, self.weights)
            if bucket.summed:
                start_drifts(projected, self.group_calls[bucket.group_name])
            shared.append(projected)
        reductions = []
        for name, group_call in self.group_calls.items():
            members = [projected for projected in shared if projected.bucket.group_name == name]
            if members:
                reductions.append(GroupReduction.start(group_call, members, shared, self.weights))
        if self._adapted is not None:
            self._adapted.finish()
        for reduction in reductions:
            reduction.finish()
        # All groups have finished before one raises, so that no rank waits in another group for those that raise.
        if failure is not None:
            try:
                raise failure
            finally:
                # Without this the exception would keep itself alive through this frame.
                failure = None
        if self._adapted is not None:
            self._adapted.check_health()
        for reduction in reductions:
            reduction.check_health()
        return shared, [summand for reduction in reductions for summand in reduction.summands(self.weights)]

    def _pull_back_shared(self, shared: Sequence[ProjectedBucket]) -> None:
        staged: dict[int, list[Any]] = {}
        for projected in shared:
            bucket, run = projected.bucket, self._run_of(projected.bucket)
            if run is not None and bucket.place in self._pulls:
                pulls = self._pulls[bucket.place]
                staged[bucket.place] = [pull.stage(run, bucket, projected.drifts) for pull in pulls]
        for run in self._runs:
            run.send()
        for projected in shared:
            bucket, run = projected.bucket, self._run_of(projected.bucket)
            if bucket.place in staged and run is not None:
                self._pull_back(run, bucket, staged[bucket.place])
            else:
                self._pull_back_one_by_one(run, bucket, projected.drifts)

    def _project_and_pull_back(self, bucket: Bucket) -> Tensor:
        """Project and pull back a bucket that lies whole on this process; returns its squares.

        Its C are freed before those of the next bucket are computed.
        """
        run = self._run_of(bucket)
        if run is None:
            projected = self._project(bucket)
            self._pull_back_one_by_one(None, bucket, projected.drifts)
            return projected.squares
        with run.turn():
            squares = self._project(bucket).squares
            if bucket.place in self._staged:
                self._pull_back(run, bucket, self._staged[bucket.place])
            else:
                self._pull_back_one_by_one(run, bucket, None)
        return squares

    def _pull_back(self, run: ops.Run, bucket: Bucket, staged: Sequence[Any]) -> None:
        for pull, operation in zip(self._pulls[bucket.place], staged, strict=True):
            run.pull_back_(operation, pull.scales)
            # Autograd must see that the values of a tensor which it may have saved are others now.
            torch.autograd.graph.increment_version(pull.targets)
            self._write_back(pull)

    def _pull_back_one_by_one(self, run: ops.Run | None, bucket: Bucket, drifts: Sequence[Tensor] | None) -> None:
        """Compute gradients that are copies, each written back before the next is taken; or those of a bucket that has
        no program. With ``drifts`` of None the run takes those that the projection has left in it.
        """
        pulls = self._pulls.get(bucket.place) or self.gradients.pull_backs(bucket, self._tensors[bucket.place])
        for pull in pulls:
            if run is not None:
                operation = pull.stage(run, bucket, drifts)
                run.send()
                run.pull_back_(operation, pull.scales)
            else:
                assert drifts is not None
                chosen = [drifts[i] for i in pull.owners]
                scales = torch.tensor(pull.scales, dtype=chosen[0].dtype, device="cpu")
                ops.pull_back_(pull.targets, pull.operands, chosen, scales, pull.accumulate, bucket.backend)
            self._write_back(pull)

    def _write_back(self, pull: PullBack) -> None:
        self.gradients.keep_made(pull.weights)
        for i, grad in zip(pull.weights, pull.grads, strict=True):
            self.weights[i].weight.write_back(grad)

    def _total(self, summands: Sequence[Tensor]) -> Tensor:
        device = self.weights[0].weight.device if self.weights or self._adapted is None else self._adapted.device
        # One concatenation and one sum keep the order fixed.
        return torch.cat([summand.reshape(-1).to(device) for summand in summands]).sum()


CallT = TypeVar("CallT", bound=Call)
RequestT = TypeVar("RequestT", bound=Request)


def open_call(
    weights: object, anchors: object, request: RequestT, make: Callable[[PlannedWeights, RequestT], CallT]
) -> CallT | None:
    """Check a call on every rank, and return it once all ranks agree; None for an empty list of weights.

    Args:
        weights: a tensor, a sequence of tensors or a module.
        anchors: as many anchors.
        request: what the call is asked for.
        make: the kind of call that serves such requests.

    Raises:
        ValueError: pairing or the request's check has failed; or another rank refused, or ranks differ in their
            anchors; or the kernels that Triton compiles on this machine may compute wrong numbers. Nothing has changed.
    """
    recalled = recall(weights, anchors)
    adapted = None if recalled is not None else recall_adapted(weights, anchors)
    if adapted is not None:
        recalled = recall_beside(weights, adapted)
    parameters = None
    if recalled is not None:
        groups = recalled[1]
    else:
        parameters = find_parameters(weights) if isinstance(weights, nn.Module) else None
        groups = groups_of(weights, parameters, anchors)
    group_calls = {group.process_group.group_name: GroupCall(*group) for group in groups}
    failure: Exception | None = None
    call: CallT | None = None
    try:
        if recalled is not None:
            planned = recalled[0]
        else:
            adapted = find_adapted_weights(weights, anchors, parameters, groups)
            if adapted is None:
                planned = prepare(weights, anchors, parameters, groups)
            else:
                planned = prepare_beside(weights, adapted, parameters, groups)
        factors = factors_of(planned)
        check_tangents([*planned.weights, *factors])
        request.check(planned.weights, factors)
        if planned.weights or factors:
            call = make(planned, request)
            call.group_calls = group_calls
            call.stage()
            # These come before ranks agree: where warnings are errors, the other ranks must learn of this one.
            warn_of_foreign_blocks(planned)
            warn_of_distant_weights(planned)
    except Exception as error:
        failure = error
    try:
        _propagate_refusals(call, group_calls, failure)
    except BaseException:
        # The exception keeps this frame alive.
        failure = None
        if call is not None:
            call.close()
        raise
    return call


def _propagate_refusals(call: Call | None, group_calls: dict[str, GroupCall], failure: Exception | None) -> None:
    """Raise on every rank if one has to.

    A rank of several groups carries the refusal of one group into the others, which learn of it in the second round at
    the latest.
    """
    lost: RuntimeError | None = None
    for _ in range(min(2, len(group_calls))):
        for group_call in group_calls.values():
            try:
                if failure is not None:
                    group_call.check_consistent(0, {}, failed=True)
                elif call is not None:
                    call.agree(group_call)
            except ValueError as error:
                failure = failure or error
            except RuntimeError as error:
                # Nobody came whom this rank could have told. What it refuses says more than that.
                if failure is None:
                    raise
                lost = error
    if failure is not None:
        try:
            if lost is not None:
                raise failure from lost
            raise failure
        finally:
            # Without this the exceptions would keep themselves alive through this frame.
            failure = lost = None
