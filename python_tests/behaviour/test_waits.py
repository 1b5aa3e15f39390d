"""A step never waits for the GPU, and all of it can be captured: on a stand-in that sees what would not be so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from rpsft_kernels import ops
from rpsft_kernels.evaluation import distance
from rpsft_kernels.ops.triton import upload
from rpsft_kernels.ops.triton.tile_table import is_interpreted
from stand_in import DEVICE, OnGpu, StandIn
from stand_in import stand_in as stand_in  # a fixture
from support import random_matrix

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="kernels of the stand-in run in Triton's interpreter")

SHAPES = [(40, 24), (24, 40), (33, 20), (48, 48), (6, 30)]
RANK = 7
FROZEN = 1
FORMS = ["base", "block", "full"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BACKENDS = ["triton", "torch"]


class Model(nn.Module):
    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        for i, weight in enumerate(weights):
            self.register_parameter(f"weight{i}", nn.Parameter(weight, requires_grad=i != FROZEN))


class Step:
    """A model on the stand-in and the same on the CPU, with the same anchors.

    Unless they are ``new``, these have been used before: how far weights are from W0 is measured no more.
    """

    def __init__(
        self,
        form: str,
        dtype: torch.dtype,
        device: StandIn,
        backend: str = "triton",
        foreign: bool = False,
        new: bool = False,
    ) -> None:
        self.backend, self.device = backend, device
        pretrained = [random_matrix(*shape, dtype, scale=0.2, seed=i) for i, shape in enumerate(SHAPES)]
        with rk.use_backend("torch"):
            made = [
                rk.Anchor.from_weight(weight, 48 if form == "full" else RANK, keep_base=form != "block")
                for weight in pretrained
            ]
        with device.running():
            arithmetic = "elsewhere" if foreign else ops.arithmetic_id(backend, DEVICE, dtype)
            self.anchors = {f"weight{i}": self._moved(anchor, arithmetic) for i, anchor in enumerate(made)}
            self.model = Model([OnGpu((weight * 1.01).to(dtype)) for weight in pretrained])
        if not new:
            distance._measured.update(self.anchors.values())
        device.waits.clear()
        device.refused.clear()
        device.operators.clear()

    @staticmethod
    def _moved(anchor: rk.Anchor, arithmetic: str) -> rk.Anchor:
        pieces = {name: OnGpu(piece) for name, piece in anchor.pieces().items()}
        return rk.Anchor(
            **pieces,  # type: ignore[arg-type]
            shape=anchor.shape,
            weight_dtype=anchor.weight_dtype,
            rank=anchor.rank,
            energy=anchor.energy,
            arithmetic=None if anchor.block is None else arithmetic,
        )

    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def give_gradients(self, which: str) -> None:
        for i, parameter in enumerate(self.parameters()):
            parameter.grad = None
            if parameter.requires_grad and (which == "all" or (which == "some" and i % 2 == 0)):
                grad = random_matrix(*parameter.shape, parameter.dtype, scale=0.1, seed=70 + i)
                parameter.grad = OnGpu(grad)

    def accumulate(self) -> Tensor:
        with rk.use_backend(self.backend):
            return rk.accumulate_rotation_grad_(self.model, self.anchors, 0.7)

    def differentiate(self) -> Tensor:
        with rk.use_backend(self.backend):
            penalty = rk.rotation_penalty(self.model, self.anchors)
            (0.7 * penalty).backward()
            return penalty.detach()

    def run(self, call: str) -> Tensor:
        return self.accumulate() if call == "accumulate" else self.differentiate()

    def found(self, value: Tensor) -> list[Tensor]:
        """R and the gradients, as they are now."""
        assert isinstance(value, OnGpu)
        grads = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        return [value.inner.clone(), *(grad.inner.clone() for grad in grads if isinstance(grad, OnGpu))]


def _zero(grads: list[Tensor]) -> None:
    for grad in grads:
        grad.zero_()


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("existing", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["accumulate", "differentiate"])
def test_a_step_waits_for_nothing(
    call: str, backend: str, form: str, dtype: torch.dtype, existing: str, stand_in: StandIn
) -> None:
    step = Step(form, dtype, stand_in, backend)
    with stand_in.running():
        step.give_gradients(existing)
        value = step.run(call)
    found = step.found(value)
    assert stand_in.operators and stand_in.waits == [] and stand_in.refused == []
    assert stand_in.own == [], "all of it was prepared"
    assert len(found) == len(SHAPES) and all(bool(tensor.isfinite().all()) for tensor in found) and bool(found[0])


def test_plain_torch_multiplies_as_on_a_gpu(stand_in: StandIn) -> None:
    with stand_in.running():
        step = Step("base", torch.bfloat16, stand_in, "torch")
        step.accumulate()
    assert not hasattr(torch.ops.aten.mm, "dtype") or "aten.mm.dtype" in stand_in.operators
    assert "aten.addmm_.default" in stand_in.operators, "into the gradients themselves"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["accumulate", "differentiate"])
def test_a_captured_step_does_at_each_replay_what_the_step_does(
    call: str, backend: str, form: str, dtype: torch.dtype, stand_in: StandIn
) -> None:
    step = Step(form, dtype, stand_in, backend)
    with stand_in.running():
        step.give_gradients("all")
        grads = [p.grad for p in step.parameters() if p.grad is not None]
        step.run(call)
        with stand_in.capture():
            captured = step.run(call)
        assert stand_in.waits == [] and stand_in.refused == []
        for turn in range(2):
            with torch.no_grad():
                for at, parameter in enumerate(step.parameters()):
                    parameter += OnGpu(random_matrix(*parameter.shape, dtype, scale=0.01, seed=10 * turn + at))
            _zero(grads)
            stand_in.replay()
            replayed = step.found(captured)
            _zero(grads)
            assert equal(replayed, step.found(step.run(call)))
            assert all(bool(tensor.any()) for tensor in replayed)
            assert all(p.grad is None or any(p.grad is grad for grad in grads) for p in step.parameters())


@pytest.mark.parametrize("call", ["accumulate", "differentiate"])
def test_a_step_is_captured_as_often_as_one_likes(
    call: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it has run outside of a capture before; no more memory is set aside than is asked for."""

    class Exact(upload._CaptureReserve):
        def ensure(self, size: int) -> None:
            self._free = upload._allocate_pinned(size)

    monkeypatch.setattr(upload, "_reserve", Exact())
    # Many in one bucket.
    monkeypatch.setitem(globals(), "SHAPES", [(24, 40)] * 9)
    step = Step("base", torch.float32, stand_in)
    with stand_in.running():
        step.give_gradients("all")
        grads = [p.grad for p in step.parameters() if p.grad is not None]
        for _ in range(5):
            step.run(call)
            with stand_in.capture():
                captured = step.run(call)
            _zero(grads)
            stand_in.replay()
            replayed = step.found(captured)
            _zero(grads)
            assert equal(replayed, step.found(step.run(call)))
    assert stand_in.waits == [] and stand_in.refused == []


def test_gradients_that_a_capture_has_made_are_written_at_each_replay(stand_in: StandIn) -> None:
    step = Step("base", torch.float32, stand_in)
    with stand_in.running():
        step.give_gradients("none")
        step.accumulate()
        expected = step.found(step.accumulate())
        step.give_gradients("none")
        with stand_in.capture():
            captured = step.accumulate()
        stand_in.replay()
        stand_in.replay()
    halves = [expected[0], *(grad / 2 for grad in expected[1:])]
    assert all(torch.allclose(a, b) for a, b in zip(step.found(captured), halves, strict=True))


def test_what_another_coefficient_sends_is_not_waited_for(stand_in: StandIn) -> None:
    step = Step("base", torch.bfloat16, stand_in)
    with stand_in.running():
        for coeff in (0.5, 0.25):
            step.give_gradients("none")
            with rk.use_backend("triton"):
                value = rk.accumulate_rotation_grad_(step.model, step.anchors, coeff)
            grads = step.found(value)[1:]
            if coeff == 0.5:
                first = grads
    assert stand_in.waits == [] and all(torch.equal(a, 2 * b) for a, b in zip(first, grads, strict=True))


def test_a_foreign_block_is_reported_without_a_look_at_it(stand_in: StandIn) -> None:
    step = Step("block", torch.float32, stand_in, foreign=True)
    with stand_in.running(), pytest.warns(UserWarning, match="rounds differently"):
        step.accumulate()
    assert stand_in.waits == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["accumulate", "differentiate"])
def test_the_first_call_with_new_anchors_waits_once(call: str, backend: str, form: str, stand_in: StandIn) -> None:
    """How far the weights are from W0 is read then; no capture reads it, and no later call."""
    step = Step(form, torch.float32, stand_in, backend, new=True)
    with stand_in.running():
        step.give_gradients("all")
        if backend == "torch":
            # Triton's kernels are captured only once they have run.
            with stand_in.capture():
                step.run(call)
        assert stand_in.waits == []
        step.run(call)
        assert stand_in.waits == ["tolist"]
        step.run(call)
        with stand_in.capture():
            step.run(call)
    assert stand_in.waits == ["tolist"] and stand_in.own == []


def _waiting(device: StandIn) -> Iterator[tuple[str, str]]:
    """What the stand-in must see, and what it calls it."""
    ones = OnGpu(torch.ones(3))
    pinned = torch.empty(3, pin_memory=True)

    def seen(name: str) -> Iterator[tuple[str, str]]:
        yield name, " ".join(device.waits)
        device.waits.clear()

    torch.tensor([1.0, 2.0], device=DEVICE)
    yield from seen("to the GPU")
    torch.ones(2).to(DEVICE, non_blocking=True)
    yield from seen("to the GPU")
    pinned.to(DEVICE)
    yield from seen("to the GPU")
    ones[[0, 2]]
    yield from seen("tensors of the CPU")
    ones.sum().item()
    yield from seen("_local_scalar_dense")
    bool(ones[0])
    yield from seen("_local_scalar_dense")
    ones.tolist()
    yield from seen("tolist")
    ones.nonzero()
    yield from seen("nonzero")
    ones[ones > 0]
    yield from seen("index")
    torch.equal(ones, ones)
    yield from seen("equal")
    ones.cpu()
    yield from seen("from the GPU")
    torch.ones(3).copy_(ones)
    yield from seen("from the GPU")
    ones.copy_(torch.ones(3))
    yield from seen("to the GPU")


def test_the_stand_in_sees_what_waits(stand_in: StandIn) -> None:
    with stand_in.running():
        for name, words in _waiting(stand_in):
            assert name in words
        ones = OnGpu(torch.ones(3))
        torch.empty(3, pin_memory=True).to(DEVICE, non_blocking=True)
        (ones * torch.tensor(2.0) + ones[1]).sum()
        torch.stack([ones[0], ones[2]]).mul_(3)
        assert stand_in.waits == []
        with stand_in.capture():
            torch.empty(3, pin_memory=True)
        assert stand_in.refused == ["aten.empty.memory_format: pinned memory"]
