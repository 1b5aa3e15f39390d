"""The ranks' part in the tests of replicated weights: DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rpsft_kernels as rk
from llama import COEFF, RANK, batch, distance, drift, errors, expected, llama, own_batch, task_loss, train_alone
from small_models import found_at_anchor, linear_layers, mean_square, refused, vectors

FROZEN = "2.weight"


@dataclass(frozen=True)
class Setting:
    """A model, its loss on inputs, and the inputs; each rank gets a share."""

    model: Callable[[], Any]
    loss: Callable[[Any, Tensor], Tensor]
    inputs: Callable[[], Tensor]
    rank: int
    compiled: bool = False

    def wrapped(self, model: Any) -> Any:
        if self.compiled:
            model = torch.compile(model, backend="aot_eager")
        return DistributedDataParallel(model)

    def own_inputs(self) -> Tensor:
        return self.inputs().chunk(dist.get_world_size())[dist.get_rank()]


def _long() -> Any:
    """Weights (512, 96) and (96, 512): cut through rows and through columns."""
    return linear_layers((96, 512, 96, 512))


def _partly_frozen() -> Any:
    model = _long()
    model.get_parameter(FROZEN).requires_grad_(False)
    return model


def _two_small() -> Any:
    """Weights too small to be cut: of 4 ranks, some have nothing to do."""
    return linear_layers((60, 40, 30))


def _vectors() -> Tensor:
    return vectors(96)


SETTINGS = {
    "llama": Setting(llama, task_loss, batch, RANK),
    "cut weights": Setting(_long, mean_square, _vectors, RANK),
    "a frozen weight": Setting(_partly_frozen, mean_square, _vectors, RANK),
    "fewer weights than ranks": Setting(_two_small, mean_square, lambda: _vectors()[:, :60], RANK),
    "compiled": Setting(_long, mean_square, _vectors, RANK, compiled=True),
}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copy tensors under the names of the unwrapped model."""
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@dataclass(frozen=True)
class Moved:
    """A pretrained model and a drifted one, both replicated, with what the calls must give for the latter."""

    pretrained: Any
    model: Any
    loss: Callable[[], Tensor]
    penalty: float
    gradients: dict[str, Tensor]

    def compared(self, anchors: rk.Anchors) -> dict[str, Any]:
        """Compare every way of calling with float64; returns the facts that tests check."""
        result = found_at_anchor(self.pretrained, anchors, COEFF, _gradients)
        penalties: list[Tensor] = []
        bits: list[float] = []
        # The calls add to the task's gradients, which are the same without them to the last bit.
        tasks = {several: self._step(several, lambda: 0.0, lambda: None) for several in (False, True)}
        for several, task in tasks.items():
            ways = {
                "autograd": (lambda: self._penalty(anchors, penalties), lambda: None),
                "accumulated": (lambda: 0.0, lambda: self._accumulate(anchors, penalties)),
            }
            for way, (extra, before) in ways.items():
                found = self._step(several, extra, before)
                added = {name: found[name].double() - gradient.double() for name, gradient in task.items()}
                result[f"{way}, two micro-batches" if several else way] = errors(added, self.gradients)
                # Averaged over ranks: replicas go on with the same numbers.
                bits += [float(gradient.sum()) for gradient in found.values()]
        result["penalty"] = max(abs(p.item() / self.penalty - 1) for p in penalties)
        result["bits"] = [p.item() for p in penalties] + bits
        result["refused"] = self._refused(anchors)
        return result

    def _penalty(self, anchors: rk.Anchors, penalties: list[Tensor]) -> Tensor:
        penalties.append(rk.rotation_penalty(self.model, anchors))
        return COEFF * penalties[-1]

    def _accumulate(self, anchors: rk.Anchors, penalties: list[Tensor]) -> None:
        penalties.append(rk.accumulate_rotation_grad_(self.model, anchors, COEFF))

    def _step(self, several: bool, extra: Callable[[], Any], before: Callable[[], None]) -> dict[str, Tensor]:
        """Gradients of one or two micro-batches, with ``before`` called before the backward pass that averages: where
        there are two, between that one's forward pass and it; else before either, with no gradient there."""
        self.model.zero_grad()
        if not several:
            before()
            (self.loss() + extra()).backward()
            return _gradients(self.model)
        with self.model.no_sync():
            self.loss().backward()
        loss = self.loss()
        before()
        (loss + extra()).backward()
        return _gradients(self.model)

    def _refused(self, anchors: rk.Anchors) -> tuple[str, bool]:
        """Return the call's error after the backward pass that averages, and whether gradients are as they were."""
        before = self._step(False, lambda: 0.0, lambda: None)
        message = refused(lambda: rk.accumulate_rotation_grad_(self.model, anchors, COEFF))
        after = _gradients(self.model)
        return message, set(after) == set(before) and all(torch.equal(after[n], g) for n, g in before.items())


def compare_all(cases: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Run :func:`compare` for several cases in one group: processes cost more to start than cases to compute."""
    return {case: compare(case, kinds) for case, kinds in cases.items()}


def compare(case: str, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return results by kind of anchor, each made before the model was wrapped and after; and the work's division."""
    setting = SETTINGS[case]
    kinds = {kind: {"basis_dtype": torch.float32, "progress": False, **options} for kind, options in kinds.items()}
    pretrained, moved = setting.model(), setting.model()
    drift(moved)
    whole = {kind: rk.Anchors.from_model(pretrained, setting.rank, **options) for kind, options in kinds.items()}
    reference = rk.Anchors.from_model(pretrained, setting.rank, basis_dtype=torch.float32, progress=False)
    penalty, gradients = expected(moved, reference)
    trained = {name for name, p in moved.named_parameters() if p.requires_grad}
    wanted = {name: COEFF * gradient for name, gradient in gradients.items() if name in trained}
    pretrained, model = setting.wrapped(pretrained), setting.wrapped(moved)
    inputs = setting.own_inputs()
    subject = Moved(pretrained, model, lambda: setting.loss(model, inputs), penalty, wanted)
    found: dict[str, Any] = {"results": {}, "held": {}}
    for kind, options in kinds.items():
        anchors = rk.Anchors.from_model(pretrained, setting.rank, **options)
        anchors.verify(pretrained)
        found["held"][kind] = {
            "whole": whole[kind].nbytes,
            "here": anchors.nbytes,
            "parts": {name: (a.held.rows, a.held.cols) for name, a in anchors.items() if a.held.numel},
            # Other holders of a cut weight have the same rows of U or V, and each has a block.
            "shared": {name: _shared_bytes(a) for name, a in anchors.items() if a.held.numel},
        }
        found["results"][f"{kind}, divided"] = subject.compared(anchors)
        if options.get("keep_base", True):
            found["results"][f"{kind}, whole"] = subject.compared(whole[kind])
    found["gradients"] = sorted(_gradients(model))
    return found


def _shared_bytes(anchor: rk.Anchor) -> int:
    shared = 0
    for basis, size in ((anchor.left, anchor.shape[0]), (anchor.right, anchor.shape[1])):
        if basis is not None and basis.shape[0] == size and not anchor.held.is_whole:
            shared += size * basis.stride(0) * basis.element_size()
    return shared + (0 if anchor.block is None or anchor.held.is_whole else anchor.block.nbytes)


def train(steps: int) -> dict[str, tuple[float, list[float]]]:
    """Return, by call, the distance of a replicated run from that of one process, and the sum of its parameters."""
    return {
        "rotation_penalty": _distance_of_run(steps, accumulate=False),
        "accumulate_rotation_grad_": _distance_of_run(steps, accumulate=True),
    }


def _distance_of_run(steps: int, accumulate: bool) -> tuple[float, list[float]]:
    alone = train_alone(steps, accumulate)
    model = DistributedDataParallel(llama())
    anchors = rk.Anchors.from_model(model, RANK, progress=False, basis_dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        if accumulate:
            rk.accumulate_rotation_grad_(model, anchors, COEFF)
            task_loss(model, own_batch()).backward()
        else:
            (task_loss(model, own_batch()) + COEFF * rk.rotation_penalty(model, anchors)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return distance(found, alone), [float(p.double().sum()) for p in found.values()]


def refusals() -> dict[str, list[str]]:
    """Return this rank's errors, and whether any gradient was made, where models and anchors do not go together."""
    pretrained = llama()
    whole_blocks = rk.Anchors.from_model(pretrained, RANK, keep_base=False, progress=False)
    model = DistributedDataParallel(pretrained)
    divided = rk.Anchors.from_model(model, RANK, progress=False)
    cases = {"divided anchors": (model.module, divided), "whole blocks": (model, whole_blocks)}
    messages = {name: _errors_of_calls(*case) for name, case in cases.items()}
    assert not _gradients(model)
    return messages


def _errors_of_calls(model: nn.Module, anchors: rk.Anchors) -> list[str]:
    """Return the error of each call."""
    return [
        refused(lambda: rk.rotation_penalty(model, anchors)),
        refused(lambda: rk.accumulate_rotation_grad_(model, anchors, COEFF)),
    ]


def verify_one_weight(path: str) -> list[str]:
    """Save and load anchors of one weight, which one rank alone works on; returns what verifying says, then and after
    another rank's copy and every copy of it have changed.
    """
    model = DistributedDataParallel(linear_layers((60, 40)))
    whole = rk.Anchors.from_model(model.module, RANK, progress=False)
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    anchors.save(path)
    loaded = rk.Anchors.load(path, model)
    assert dict(loaded)["0.weight"].part == anchors["0.weight"].part
    found = [refused(partial(given.verify, model)) for given in (anchors, loaded, whole)]
    with torch.no_grad():
        next(model.parameters())[3, 2] += 1
    return [*found, *(refused(partial(given.verify, model)) for given in (anchors, whole))]


class _Gated(nn.Module):
    """Weights behind a gate that is zero at first: their gradients are zeros, the gate's is not."""

    def __init__(self, inner: nn.Module, side: bool) -> None:
        super().__init__()
        self.inner, self.gate = inner, nn.Parameter(torch.zeros(()))
        self.side = nn.Linear(24, 24, bias=False) if side else None

    def forward(self, inputs: Tensor) -> Tensor:
        gated = self.gate * self.inner(inputs)
        return gated + inputs if self.side is None else gated + self.side(inputs)


def accumulate_behind_a_gate(side: bool) -> list[tuple[str, bool]]:
    """Return the call's error, and whether ranks have the same gradients then: called after the backward pass that
    averages; before it; before it, where gradients are zeros.
    """
    torch.manual_seed(0)
    model = DistributedDataParallel(_Gated(linear_layers((24, 16, 24)), side))
    anchors = rk.Anchors.from_model(model.module, RANK, progress=False)
    with torch.no_grad():
        for parameter in model.module.inner.parameters():
            parameter.add_(0.1)
    inputs = vectors(24)[dist.get_rank() :: dist.get_world_size()]

    def backward() -> None:
        (model(inputs) - 1).square().mean().backward()

    def accumulate() -> str:
        return refused(lambda: rk.accumulate_rotation_grad_(model, anchors, COEFF))

    found = []
    backward()
    found.append((accumulate(), _ranks_agree(model)))
    for to_none in (True, False):
        model.zero_grad(set_to_none=to_none)
        message = accumulate()
        backward()
        found.append((message, _ranks_agree(model)))
    return found


class _Branches(nn.Module):
    """Weights of which the forward pass leaves one out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = linear_layers((24, 16, 24)), nn.Linear(24, 24, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.used(inputs)
        return found


def leave_a_weight_out(options: dict[str, Any]) -> dict[str, list[Any]]:
    """Return, for each way of calling, its error, and the errors of the gradients of both anchored kinds of weights."""
    torch.manual_seed(0)
    model = _Branches()
    anchors = rk.Anchors.from_model(model, 6, progress=False, basis_dtype=torch.float32)
    drift(model)
    _, wanted = expected(model, anchors)
    replicated = DistributedDataParallel(model, **options)
    inputs = vectors(24)[dist.get_rank() :: dist.get_world_size()]

    def backward(extra: Tensor | float = 0.0) -> None:
        (0 * replicated(inputs).sum() + extra).backward()

    def between() -> None:
        loss = 0 * replicated(inputs).sum()
        rk.accumulate_rotation_grad_(replicated, anchors, 1.0)
        loss.backward()

    def before() -> None:
        rk.accumulate_rotation_grad_(replicated, anchors, 1.0)
        backward()

    def after_in_the_module() -> None:
        backward()
        rk.accumulate_rotation_grad_(replicated.module, anchors, 1.0)

    ways: dict[str, Callable[[], None]] = {"before": before, "between": between, "in the module": after_in_the_module}
    if options.get("static_graph"):
        # Without a static graph torch refuses it.
        ways = {"in the loss": lambda: backward(rk.rotation_penalty(replicated, anchors))}
    found: dict[str, list[Any]] = {}
    for way, call in ways.items():
        replicated.zero_grad()
        message = refused(call)
        gradients = _gradients(replicated)
        found[way] = [message, errors({n: g.double() for n, g in gradients.items()}, wanted) if gradients else None]
    if options.get("static_graph"):
        found["before"] = [refused(lambda: rk.accumulate_rotation_grad_(replicated, anchors, 1.0)), None]
    return found


def change_after_wrapping(change: str) -> list[Any]:
    """Return the errors of both calls, and those of the gradients, where DDP does not average one weight.

    A parameter that was replaced is one that no forward pass uses.
    """
    torch.manual_seed(0)
    model = linear_layers((24, 16, 24))
    anchors = rk.Anchors.from_model(model, 6, progress=False, basis_dtype=torch.float32)
    drift(model)
    layer = model[2]
    layer.weight.requires_grad_(change != "unfrozen")
    replicated = DistributedDataParallel(model, find_unused_parameters=change == "replaced")
    layer.weight.requires_grad_(True)
    if change == "replaced":
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    _, wanted = expected(model, anchors)
    inputs = vectors(24)[dist.get_rank() :: dist.get_world_size()]
    found: list[Any] = []
    for accumulates in (False,) if change == "replaced" else (True, False):
        replicated.zero_grad()

        def call(accumulates: bool = accumulates) -> None:
            extra: Tensor | float = 0.0
            if accumulates:
                rk.accumulate_rotation_grad_(replicated, anchors, 1.0)
            else:
                extra = rk.rotation_penalty(replicated, anchors)
            (0 * replicated(inputs).sum() + extra).backward()

        message = refused(call)
        gradients = {n: g.double() for n, g in _gradients(replicated).items() if n in wanted}
        found.append([message, errors(gradients, wanted) if gradients else None])
    return found


def _ranks_agree(model: nn.Module) -> bool:
    own = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return all(torch.equal(own, other) for other in gathered)
