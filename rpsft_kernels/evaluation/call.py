"""One call: its weights found, checked and staged; agreed on by all ranks; projected, summed, pulled back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..distributed import GroupCall, find_parameters
from .agreement import digest, gradient_checksum, members_of
from .bucket import Bucket, Gathered, Projected
from .foreign_blocks import foreign_blocks
from .gradients import AlikeGradients, Gradients
from .plan import Found, groups_of, known, prepare
from .reduce import GroupReduction, start_drifts
from .requests import AccumulationRequest, Request


class Call:
    """A call that every rank has checked, and in which all ranks agree. Nothing is computed before :meth:`penalty` or
    :meth:`accumulate_`; :meth:`close` ends it.
    """

    def __init__(self, found: Found, request: Request) -> None:
        self.weights, self._plan = found
        self._coeff = float(request.coeff) if isinstance(request, AccumulationRequest) else None
        self.group_calls: dict[str, GroupCall] = {}
        self.gradients = Gradients(self.weights, self._coeff or 0.0, self._plan.tied)
        self._runs: list[ops.Run] = []
        buckets = self._plan.buckets
        # C of weights that lie over several processes travel while the rest is computed.
        self._shared = [bucket for bucket in buckets if bucket.group_name]
        self._local = [bucket for bucket in buckets if not bucket.group_name]
        self._gathered: dict[int, Gathered] = {}
        self._pulls: dict[int, list[AlikeGradients]] = {}
        self._staged: dict[int, list[Any]] = {}
        self._checksums: dict[str, int] = {}

    def _run(self, bucket: Bucket) -> ops.Run | None:
        return None if bucket.program is None else self._runs[bucket.program]

    # -- before ranks agree -----------------------------------------------------------------------------------

    def stage(self) -> None:
        """Take the tensors of this call. Gradients that do not exist are made, unset.

        Raises:
            NoKernel, ValueError: an operation cannot be computed here. Nothing has been computed.
        """
        for program in self._plan.programs:
            self._runs.append(program.begin())
        if self._coeff is not None:
            # Before new gradients, of zeros, are among them.
            for name in self._plan.descriptions:
                self._checksums[name] = gradient_checksum(members_of(self.weights, name))
        for bucket in (*self._shared, *self._local):
            gathered = self._gathered[bucket.place] = bucket.gather(self.weights)
            run = self._run(bucket)
            if run is not None:
                keep = bool(bucket.group_name) or (self._coeff is None and torch.is_grad_enabled())
                run.stage_projection(bucket.batch, gathered.operands, keep)
                if self._coeff is None and torch.is_grad_enabled():
                    self._stage_backward(run, bucket, gathered)
            if self._coeff is not None:
                self._stage_gradients(run, bucket, gathered)
        for run in self._runs:
            run.send()

    def _stage_backward(self, run: ops.Run, bucket: Bucket, gathered: Gathered) -> None:
        """A backward pass may find no kernel: better to hear of it now."""
        matrices = gathered.operands.weights
        wanted = [j for j, matrix in enumerate(matrices) if matrix.requires_grad]
        if wanted:
            operands = gathered.operands.pick(wanted) if len(wanted) < len(matrices) else gathered.operands
            run.prepare_gradients(bucket.batch, wanted, operands, matrices[0].dtype)

    def _stage_gradients(self, run: ops.Run | None, bucket: Bucket, gathered: Gathered) -> None:
        if self.gradients.are_copies(bucket):
            if run is not None and bucket.matrices:
                dtype = self.weights[bucket.busy[0]].weight.gradient_dtype
                everything = range(bucket.matrices)
                run.prepare_gradients(bucket.batch, everything, gathered.operands.for_pull_back(), dtype, True)
            return
        pulls = self._pulls[bucket.place] = list(self.gradients.pull_backs(bucket, gathered))
        if run is not None:
            self._staged[bucket.place] = [pull.stage(run, bucket, None) for pull in pulls]

    def close(self) -> None:
        """Let go of what the call uses; gradients that it has made go again where none was computed."""
        self.gradients.drop_made()
        for program, run in zip(self._plan.programs, self._runs, strict=False):
            program.end(run)
        self._runs = []
        # An exception that is raised may hold this call for a while.
        self._gathered, self._pulls, self._staged = {}, {}, {}

    # -- between ranks ------------------------------------------------------------------------------------------

    def agree(self, group_call: GroupCall) -> None:
        """Go on only if all ranks of a group mean the same call.

        Raises:
            ValueError: they do not, or another rank has refused.
        """
        name = group_call.group.group_name
        members = members_of(self.weights, name)
        # A weight may be listed under one name only: those of lists are numbered.
        shards = {one.name: one.weight.shard for one in members}
        described = digest(self._plan.descriptions.get(name, b""), members, self._coeff)
        checksums = group_call.check_consistent(described, shards, self._checksums.get(name, 0))
        if checksums[0] and len(set(checksums)) == 1:
            raise ValueError(
                f"{members[0].name}.grad: got gradients that are averaged over ranks already, expected those before "
                "the backward pass that averages them: call accumulate_rotation_grad_ before the last "
                "micro-batch's backward (each rank adds its own weights' share), or put rotation_penalty into the "
                "loss. Every rank has seen the very same batch? Then they look alike"
            )

    # -- the computation ------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """R, connected to the weights by autograd where gradients are on."""
        _, summands = self._project_shared()
        squares = [self._project(bucket).squares for bucket in self._local]
        return self._total(squares + summands)

    def accumulate_(self) -> Tensor:
        """R; adds ``coeff * dR/dW`` to the gradients, after all sums have arrived and are known to be finite."""
        shared, summands = self._project_shared()
        self._pull_back_shared(shared)
        squares = [self._project_and_pull_back(bucket) for bucket in self._local]
        self.gradients.keep_made()
        return self._total(squares + summands)

    def _project(self, bucket: Bucket) -> Projected:
        program = None if bucket.program is None else self._plan.programs[bucket.program]
        return bucket.project(program, self._run(bucket), self._gathered[bucket.place], self.weights)

    def _project_shared(self) -> tuple[list[Projected], list[Tensor]]:
        """The buckets whose weights lie over several processes, and R of these in summands."""
        shared = []
        for bucket in self._shared:
            projected = self._project(bucket)
            if bucket.summed:
                start_drifts(projected, self.group_calls[bucket.group_name])
            shared.append(projected)
        reductions = []
        for name, group_call in self.group_calls.items():
            members = [projected for projected in shared if projected.bucket.group_name == name]
            if members:
                reductions.append(GroupReduction.start(group_call, members, shared, self.weights))
        for reduction in reductions:
            reduction.finish()
        # Where one group's ranks refuse, none waits for them in another.
        for reduction in reductions:
            reduction.check_health()
        return shared, [summand for reduction in reductions for summand in reduction.summands(self.weights)]

    def _pull_back_shared(self, shared: Sequence[Projected]) -> None:
        staged: dict[int, list[Any]] = {}
        for projected in shared:
            bucket, run = projected.bucket, self._run(projected.bucket)
            if run is not None and bucket.place in self._pulls:
                pulls = self._pulls[bucket.place]
                staged[bucket.place] = [pull.stage(run, bucket, projected.drifts) for pull in pulls]
        for run in self._runs:
            run.send()
        for projected in shared:
            bucket, run = projected.bucket, self._run(projected.bucket)
            if bucket.place in staged and run is not None:
                self._pull_back(run, bucket, staged[bucket.place])
            else:
                self._pull_back_one_by_one(run, bucket, projected.drifts)

    def _project_and_pull_back(self, bucket: Bucket) -> Tensor:
        """Squares of a bucket that lies whole here; its C are gone before the next bucket's are made."""
        run = self._run(bucket)
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
            # Autograd must see that a tensor which it has saved is another one now.
            torch.autograd.graph.increment_version(pull.targets)
            self._write_back(pull)

    def _pull_back_one_by_one(self, run: ops.Run | None, bucket: Bucket, drifts: Sequence[Tensor] | None) -> None:
        """Gradients that are copies, each of which is written back before the next is taken; and all of them where
        nothing could be prepared. ``drifts``: None for those that the projection leaves.
        """
        pulls = self._pulls.get(bucket.place) or self.gradients.pull_backs(bucket, self._gathered[bucket.place])
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

    def _write_back(self, pull: AlikeGradients) -> None:
        self.gradients.keep_made(pull.weights)
        for i, grad in zip(pull.weights, pull.grads, strict=True):
            self.weights[i].weight.write_back(grad)

    def _total(self, summands: Sequence[Tensor]) -> Tensor:
        device = self.weights[0].weight.device
        # One concatenation and one sum, in a fixed order.
        return torch.cat([summand.reshape(-1).to(device) for summand in summands]).sum()


def open_call(weights: object, anchors: object, request: Request) -> Call | None:
    """The call, checked by every rank and agreed on by all; None for an empty list of weights.

    Raises:
        ValueError: what pairing and the request's check raise; or another rank refused, or ranks differ in their
            anchors; or what Triton compiles here for the GPU may compute wrong numbers. Nothing has changed.
    """
    seen = known(weights, anchors)
    parameters = None
    if seen is not None:
        groups = seen[1]
    else:
        parameters = find_parameters(weights) if isinstance(weights, nn.Module) else None
        groups = groups_of(weights, parameters)
    group_calls = {group.process_group.group_name: GroupCall(*group) for group in groups}
    failure: Exception | None = None
    call: Call | None = None
    try:
        found = prepare(weights, anchors, parameters, groups) if seen is None else seen[0]
        request.check(found.weights)
        if found.weights:
            call = Call(found, request)
            call.group_calls = group_calls
            call.stage()
            for message in foreign_blocks(found):
                # For the caller of the public function that calls this one.
                warnings.warn(message, UserWarning, stacklevel=3)
    except Exception as error:
        failure = error
    try:
        _propagate_refusals(call, group_calls, failure)
    except BaseException:
        # What is raised holds this frame.
        failure = None
        if call is not None:
            call.close()
        raise
    return call


def _propagate_refusals(call: Call | None, group_calls: dict[str, GroupCall], failure: Exception | None) -> None:
    """Raise on every rank where one has to. Ranks of several groups carry a refusal of one into the others: those hear
    of it the second time at the latest.
    """
    for _ in range(min(2, len(group_calls))):
        for group_call in group_calls.values():
            try:
                if failure is not None:
                    group_call.check_consistent(0, {}, failed=True)
                elif call is not None:
                    call.agree(group_call)
            except ValueError as error:
                failure = failure or error
    if failure is not None:
        try:
            raise failure
        finally:
            # Else it would hold itself, by this frame.
            failure = None
