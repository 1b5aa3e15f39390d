"""The ranks' part in the tests of ranks that fail, disagree or refuse."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import rpsft_kernels as rk
from ranks import FSDP2_RUNS
from rpsft_kernels.distributed import GroupCall, group_call, transfer
from rpsft_kernels.evaluation import bucket as buckets
from rpsft_kernels.evaluation import plan
from rpsft_kernels.ops import BucketLimits
from rpsft_kernels.ops import buckets as ops_buckets
from rpsft_kernels.private_names import default_store

RANK = 8
COEFF = 0.3
ODD = 1
# (4, 512) and (512, 4) weights are cut by DistributedDataParallel's division, too.
_SIZES = (24, 512, 24, 40)


@dataclass
class Outcome:
    """The outcome of a call: the exception's type ("" for none) and message, and whether gradients kept their bits."""

    kind: str
    message: str
    unchanged: bool
    seconds: float
    penalty: float = 0.0


def layers(sizes: tuple[int, ...] = _SIZES) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in pairwise(sizes)))


def whole_anchors(rank: int = RANK) -> rk.Anchors:
    return rk.Anchors.from_model(layers(), rank, progress=False, basis_dtype=torch.float32)


def wrapped(wrapper: str, model: nn.Sequential, mesh_shape: tuple[int, ...] = ()) -> Any:
    """Make a model that has moved since it was anchored."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    shape = mesh_shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def backward(model: Any) -> None:
    inputs = torch.randn(5, _SIZES[0], generator=torch.Generator().manual_seed(dist.get_rank()))
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            model(inputs).square().mean().backward()
    elif FSDP2_RUNS:
        model(inputs).square().mean().backward()
    else:
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * (1 + dist.get_rank())


def ready(wrapper: str, mesh_shape: tuple[int, ...] = ()) -> Any:
    """Make a drifted model with gradients, and a group that has served a call."""
    model = wrapped(wrapper, layers(), mesh_shape)
    backward(model)
    rk.rotation_penalty(model, whole_anchors())
    return model


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gradients(model: Any) -> list[Tensor | None]:
    found = []
    for parameter in model.parameters() if isinstance(model, nn.Module) else model:
        grad = _local(parameter.grad)
        found.append(None if grad is None else grad.clone())
    return found


def _equal(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None:
        return before is after
    return before.layout == after.layout and torch.equal(before.to_dense(), after.to_dense())


def penalty(model: Any, anchors: Any) -> Tensor:
    return rk.rotation_penalty(model, anchors)


def accumulate(model: Any, anchors: Any, coeff: float = COEFF) -> Tensor:
    return rk.accumulate_rotation_grad_(model, anchors, coeff)


CALLS: dict[str, Callable[..., Tensor]] = {"penalty": penalty, "accumulate": accumulate}


def attempt(call: Callable[..., Tensor], model: Any, *arguments: Any) -> Outcome:
    before, start = _gradients(model), time.monotonic()
    kind, message, value = "", "", 0.0
    try:
        value = call(model, *arguments).item()
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    seconds = time.monotonic() - start
    unchanged = all(map(_equal, before, _gradients(model)))
    return Outcome(kind, message, unchanged, seconds, value)


def die(*_: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def fail_inside(wrapper: str) -> dict[str, list[Outcome]]:
    """Have the odd rank run out of memory in each call after the ranks have agreed; and a right call after it."""
    model, anchors = ready(wrapper), whole_anchors()
    found = {}
    for name, call in CALLS.items():
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == ODD:
                patch.setattr(buckets.Bucket, "project", _run_out_of_memory)
            first = attempt(call, model, anchors)
        found[name] = [first, attempt(call, model, anchors)]
    return found


def _run_out_of_memory(*_: Any) -> NoReturn:
    raise MemoryError("no memory for C")


def killed_before(wrapper: str, call: str) -> Outcome:
    model = ready(wrapper)
    if dist.get_rank() == ODD:
        die()
    return attempt(CALLS[call], model, whole_anchors())


def killed_inside(wrapper: str, call: str, bucket: int) -> Outcome:
    """Have the odd rank die when it has sent the sums of ``bucket`` buckets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops_buckets, "CPU_LIMITS_OF_SHARDS", BucketLimits(drift_bytes=1, one_orientation=False))
        model = ready(wrapper)
        if dist.get_rank() == ODD:
            project = buckets.Bucket.project
            projected: list[buckets.Bucket] = []

            def until_dead(self: buckets.Bucket, *arguments: Any) -> Any:
                if len(projected) == bucket:
                    die()
                projected.append(self)
                return project(self, *arguments)

            patch.setattr(buckets.Bucket, "project", until_dead)
        return attempt(CALLS[call], model, whole_anchors())


def one_is_late() -> Outcome:
    """Have the last rank come to the call when the first has seen it fail: it is not taken for the one that died."""
    model = ready("fsdp2")
    if dist.get_rank() == ODD:
        die()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            lost = GroupCall._diagnose_failure

            def told(self: GroupCall, error: RuntimeError) -> RuntimeError:
                default_store().set("failed", "1")
                return lost(self, error)

            patch.setattr(GroupCall, "_diagnose_failure", told)
        else:
            default_store().wait(["failed"])
        return attempt(accumulate, model, whole_anchors())


def one_stays_away() -> Outcome | None:
    """The odd rank lives and never calls: the others wait until the group's timeout."""
    model = ready("fsdp2")
    if dist.get_rank() == ODD:
        default_store().wait(["0 is done", "2 is done"])
        return None
    outcome = attempt(accumulate, model, whole_anchors())
    default_store().set(f"{dist.get_rank()} is done", "1")
    return outcome


def keeper_killed(inside: bool) -> Outcome:
    """Rank 0, which keeps the store, dies: there is nobody to ask."""
    model = ready("fsdp2")
    if dist.get_rank() == 0:
        if not inside:
            die()
        setattr(buckets.Bucket, "project", die)  # noqa: B010
    return attempt(accumulate, model, whole_anchors())


def not_finite(wrapper: str, odd: int, mesh_shape: tuple[int, ...] = ()) -> list[list[Outcome]]:
    """Make, for each bad value, both calls with it, the second again without gradients; then both as before."""
    model, anchors = ready(wrapper, mesh_shape), whole_anchors()
    found = []
    for value in (float("nan"), float("inf"), float("-inf")):
        saved = []
        with torch.no_grad():
            for parameter in model.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                saved.append((local, local.clone()))
                if dist.get_rank() == odd:
                    local[-1, -1] = value
        outcomes = [attempt(call, model, anchors) for call in CALLS.values()]
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        outcomes.append(attempt(accumulate, model, anchors))
        with torch.no_grad():
            for local, values in saved:
                local.copy_(values)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        found.append([*outcomes, *(attempt(call, model, anchors) for call in CALLS.values())])
    return found


def _another_entry_of_u(anchor: rk.Anchor) -> rk.Anchor:
    assert anchor.left is not None
    left = anchor.left.clone()
    left[3, 2] += 0.5
    return dataclasses.replace(anchor, left=left)


def _another_u() -> rk.Anchors:
    anchors = whole_anchors()
    return rk.Anchors({**anchors, "1.weight": _another_entry_of_u(anchors["1.weight"])})


def _only(anchors: rk.Anchors, *names: str) -> rk.Anchors:
    return rk.Anchors({name: anchors[name] for name in names})


# The odd rank's call where the others accumulate with the whole anchors.
DISAGREEMENTS: dict[str, Callable[[Any], Tensor]] = {
    "fewer weights": lambda model: accumulate(model, _only(whole_anchors(), "0.weight", "2.weight")),
    "other weights": lambda model: accumulate(model, _only(whole_anchors(), "0.weight", "1.weight")),
    "another order": lambda model: accumulate(model, _only(whole_anchors(), "0.weight", "2.weight", "1.weight")),
    "another k": lambda model: accumulate(model, whole_anchors(RANK - 1)),
    "another U": lambda model: accumulate(model, _another_u()),
    "another coeff": lambda model: accumulate(model, whole_anchors(), 2 * COEFF),
    "another call": lambda model: penalty(model, whole_anchors()),
    "a frozen weight": lambda model: _frozen(model, "1.weight"),
}


def _frozen(model: Any, name: str) -> Tensor:
    names = {n.removeprefix("module."): p for n, p in model.named_parameters()}
    names[name].requires_grad_(False)
    try:
        return accumulate(model, whole_anchors())
    finally:
        names[name].requires_grad_(True)


def _unusable_gradient(model: Any) -> Tensor:
    parameter = next(model.parameters())
    saved = parameter.grad
    if isinstance(parameter, DTensor):
        parameter.grad = DTensor.from_local(
            torch.zeros(parameter.shape), parameter.device_mesh, [Replicate()], run_check=False
        )
    else:
        parameter.grad = saved.to_sparse()
    try:
        return accumulate(model, whole_anchors())
    finally:
        parameter.grad = saved


def _of_another_shape(model: Any) -> Tensor:
    return accumulate(model, rk.Anchors({**whole_anchors(), "1.weight": whole_anchors()["0.weight"]}))


def _under_a_name_that_is_gone(model: Any) -> Tensor:
    return accumulate(model, rk.Anchors({**whole_anchors(), "gone.weight": whole_anchors()["0.weight"]}))


def _with_a_backend_that_is_not_there(model: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RPSFT_BACKEND", "nothing")
        return accumulate(model, whole_anchors())


def _with_an_error_of_another_type(model: Any) -> Tensor:
    def broken(*_: Any) -> NoReturn:
        raise MemoryError("no memory for pairing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "pair", broken)
        return accumulate(model, whole_anchors())


# The calls that the odd rank itself refuses, and its message.
REFUSALS: dict[str, tuple[Callable[[Any], Tensor], str, str]] = {
    "gradient": (_unusable_gradient, "ValueError", "weight.grad: got "),
    "shape": (_of_another_shape, "ValueError", "1.weight: got shape (24, 512), expected (512, 24)"),
    "name": (_under_a_name_that_is_gone, "ValueError", "'gone.weight'"),
    "no anchors": (lambda model: accumulate(model, {}), "ValueError", "anchors: got none"),
    "no mapping": (lambda model: accumulate(model, None), "ValueError", "anchors: got NoneType"),
    "coeff": (lambda model: accumulate(model, whole_anchors(), float("nan")), "ValueError", "coeff: got nan"),
    "backend": (_with_a_backend_that_is_not_there, "ValueError", "RPSFT_BACKEND"),
    "another error": (_with_an_error_of_another_type, "MemoryError", "no memory for pairing"),
}


def disagree(wrapper: str) -> dict[str, list[Outcome]]:
    return _odd_one_out(wrapper, DISAGREEMENTS)


def refuse(wrapper: str) -> dict[str, list[Outcome]]:
    return _odd_one_out(wrapper, {case: call for case, (call, _, _) in REFUSALS.items()})


def _odd_one_out(wrapper: str, cases: dict[str, Callable[[Any], Tensor]]) -> dict[str, list[Outcome]]:
    """Make the odd call of each case, and after it a right one, all in one group."""
    model, anchors = ready(wrapper), whole_anchors()

    def right(model: Any) -> Tensor:
        return accumulate(model, anchors)

    me = dist.get_rank()
    return {case: [attempt(odd if me == ODD else right, model), attempt(right, model)] for case, odd in cases.items()}


def refuse_in_a_list() -> list[Outcome]:
    """Pass DTensors in a list: the odd rank has one anchor too few."""
    weights = list(ready("fsdp2").parameters())
    anchors = list(whole_anchors().values())
    given = anchors[:-1] if dist.get_rank() == ODD else anchors
    return [attempt(accumulate, weights, given), attempt(accumulate, weights, anchors)]


def refuse_without_a_model(path: str) -> list[Outcome]:
    """The odd rank has None in the place of the model, with anchors that were made, loaded or moved in its groups; each
    call comes with a right one after it. In the end it alone makes such a call.
    """

    def verify(model: Any, anchors: rk.Anchors) -> Tensor:
        anchors.verify(model)
        return torch.ones(())

    outcomes = []
    me, none = dist.get_rank(), nn.Module()
    for wrapper in ("fsdp2", "ddp"):
        model = wrapped(wrapper, layers())
        made = rk.Anchors.from_model(model, RANK, progress=False)
        made.save(path + wrapper)
        loaded, moved = rk.Anchors.load(path + wrapper, model, verify=False), made.to("cpu")
        for call, anchors in ((verify, made), (penalty, made), (accumulate, made), (penalty, loaded), (penalty, moved)):
            for given in (None if me == ODD else model, model):
                outcomes.append(attempt(lambda _, each=call, m=given, a=anchors: each(m, a), none))
    if me == ODD:
        outcomes.append(attempt(lambda _: accumulate(None, made), none))
    return outcomes


def missed_calls() -> Outcome:
    """The odd rank has missed two calls that the others lost, and is not said to be absent from the next that fails."""
    model, anchors = ready("fsdp2"), whole_anchors()
    if dist.get_rank() != ODD:
        for _ in range(2):
            GroupCall(dist.group.WORLD, torch.device("cpu"))  # type: ignore[arg-type]
    rk.rotation_penalty(model, anchors)
    if dist.get_rank() == ODD:
        setattr(buckets.Bucket, "project", die)  # noqa: B010
    return attempt(accumulate, model, anchors)


def two_groups(problem: str) -> list[Outcome]:
    """Weights over the two dimensions of a mesh: rank 0 shares no group with rank 3, where the problem is."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    anchors = list(whole_anchors().values())[:2]
    wholes = [parameter.detach() for parameter in layers().parameters()][:2]
    placements = [[Shard(0), Replicate()], [Replicate(), Shard(0)]]
    weights = [
        nn.Parameter(distribute_tensor(whole, mesh, places)) for whole, places in zip(wholes, placements, strict=True)
    ]
    given = anchors
    if dist.get_rank() == 3:
        if problem == "refuses":
            given = anchors[:1]
        elif problem == "not finite":
            with torch.no_grad():
                weights[1].to_local()[0, 0] = float("nan")  # type: ignore[attr-defined]
        else:
            given = [anchors[0], _another_entry_of_u(anchors[1])]
    outcomes = [attempt(accumulate, weights, given)]
    if problem == "not finite":
        return outcomes
    return [*outcomes, attempt(accumulate, weights, anchors)]


def forced_parts(wrapper: str, sizes: tuple[int, ...], rank: int, taken_from: tuple[int, ...]) -> Outcome:
    """Give every rank the anchors of another rank's shards."""
    model = wrapped(wrapper, layers(sizes))
    anchors = rk.Anchors.from_model(model, rank, progress=False, basis_dtype=torch.float32)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, dict(anchors))
    return attempt(accumulate, model, rk.Anchors(everyones[taken_from[dist.get_rank()]]))


def send_through_another_device() -> tuple[list[Any], list[Any], int]:
    """Return anchors, penalties and gradients made where sums and parts travel through another device and where they
    do not, and the number of sums that did.

    The first device of the CPU stands for one that the group serves: it is not the device that weights say.
    """
    wire, sums = torch.device("cpu", 0), []

    def run() -> list[Any]:
        anchors = rk.Anchors.from_model(wrapped("fsdp2", layers()), RANK, progress=False)
        model = wrapped("fsdp2", layers())
        found: list[Any] = [rk.accumulate_rotation_grad_(model, anchors, COEFF).item()]
        found += [piece.tolist() for anchor in anchors.values() for piece in anchor.pieces().values()]
        return found + [gradient.tolist() for gradient in _gradients(model) if gradient is not None]

    plain = run()
    reduce = dist.all_reduce

    def record(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sums.append(tensor)
        return reduce(tensor, *arguments, **options)

    copy = Tensor.copy_
    copied: list[Tensor] = []

    def count(target: Tensor, source: Tensor, *arguments: Any) -> Tensor:
        copied.extend(sent for sent in sums if sent is source)
        return copy(target, source, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        for module in (group_call, transfer):
            patch.setattr(module, "find_wire", lambda group, device: wire)
        patch.setattr(dist, "all_reduce", record)
        patch.setattr(Tensor, "copy_", count)
        moved = run()
    return moved, plain, len(copied)
