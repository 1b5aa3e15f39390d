from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import rpsft_kernels as rk
from recorded import FusedRecorder, Recorder, batches_of, closed_form, error, overflow, repeat_in_float64, worst
from small_models import tiny_llama

accelerate = pytest.importorskip("accelerate")

from rpsft_kernels.integrations.accelerate import attach  # noqa: E402

pytestmark = pytest.mark.xdist_group("integrations")
VOCABULARY, COEFF, CLIP, RATE = 64, 3.0, 1.0, 1e-2


def llama() -> Any:
    return tiny_llama(vocab_size=VOCABULARY, attn_implementation="eager")


def penalty(**options: Any) -> rk.RotationPenalty:
    strength = {} if "budget" in options else {"coeff": COEFF}
    return rk.RotationPenalty(8, basis_dtype=torch.float32, **strength, **options)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    yield
    accelerate.state.AcceleratorState._reset_state(True)


class Loop:
    """Somebody's loop of Accelerate."""

    def __init__(
        self,
        own: rk.RotationPenalty | None,
        optimizer: Any = Recorder,
        accumulation: int = 4,
        size: int = 12,
        **options: Any,
    ) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)
        self.bare = llama()
        data = DataLoader(batches_of(size, VOCABULARY), batch_size=1)  # type: ignore[arg-type]
        self.model, self.optimizer, self.data = self.accelerator.prepare(self.bare, optimizer(self.bare), data)
        if own is not None:
            attach(self.accelerator, own, self.model)

    def run(self, clip: float | None = CLIP) -> Any:
        recorder = self.optimizer.optimizer
        for batch in self.data:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                if isinstance(recorder, Recorder):
                    recorder.batches.append(batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and clip is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return recorder


@pytest.mark.parametrize(
    "options", [{}, {"accumulation": 1, "size": 4}, {"size": 10}], ids=["accumulation", "none", "incomplete"]
)
def test_the_optimizer_receives_the_task_and_the_penalty_then_clipped(options: dict[str, Any]) -> None:
    own = penalty()
    recorder = Loop(own, **options).run()
    accumulation = options.get("accumulation", 4)
    tasks = []
    for step in recorder.steps:
        task = repeat_in_float64(llama(), step)
        # Accelerate divides by the accumulation, also where it is incomplete.
        tasks.append({name: g / accumulation for name, g in task.items()})
    if options.get("size") == 10:
        assert [len(step.batches) for step in recorder.steps] == [4, 4, 2]
    assert own.anchors is not None
    assert worst(llama(), recorder.steps, tasks, own.anchors, COEFF, CLIP) < 3e-6


@pytest.mark.parametrize("case", ["bf16", "compiled", "checkpointed"])
def test_autocast_compiled_and_checkpointed_models(case: str) -> None:
    def run(own: rk.RotationPenalty | None, clip: float) -> Any:
        options: dict[str, Any] = {"mixed_precision": "bf16"} if case == "bf16" else {}
        if case == "compiled":
            options["dynamo_backend"] = "eager"
        loop = Loop(own, size=8, **options)
        if case == "checkpointed":
            loop.bare.gradient_checkpointing_enable()
        recorder = loop.run(clip)
        accelerate.state.AcceleratorState._reset_state(True)
        return recorder

    own = penalty()
    steps = run(own, CLIP).steps
    tasks = [step.gradients for step in run(None, float("inf")).steps]
    assert own.anchors is not None
    assert worst(llama(), steps, tasks, own.anchors, COEFF, CLIP) < 3e-6


def scale_gradients(loop: Loop) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    # As on a GPU: Accelerate makes no scaler on a CPU.
    loop.accelerator.scaler = loop.optimizer.scaler = scaler
    loop.accelerator.native_amp = True
    loop.accelerator.state._mixed_precision = "fp16"
    inner = loop.optimizer.optimizer
    loop.optimizer._accelerate_step_called = False
    loop.optimizer._optimizer_original_step_method = inner.step
    loop.optimizer._optimizer_patched_step_method = accelerate.optimizer.patch_optimizer_step(
        loop.optimizer, inner.step
    )
    return scaler


def test_scaled_gradients() -> None:
    own = penalty()
    loop = Loop(own)
    scaler = scale_gradients(loop)
    recorder = loop.run()
    assert scaler.get_scale() > 1024
    tasks = [repeat_in_float64(llama(), step, divide=True) for step in recorder.steps]
    assert own.anchors is not None
    assert worst(llama(), recorder.steps, tasks, own.anchors, COEFF, CLIP) < 3e-6


@pytest.mark.parametrize("optimizer", [Recorder, FusedRecorder])
def test_steps_that_a_scaler_skips_do_not_count(optimizer: Any) -> None:
    own = rk.RotationPenalty(8, coeff=lambda step: 3.0 + step)
    loop = Loop(own, optimizer, accumulation=2, size=12)
    scale_gradients(loop)
    overflow(loop.bare, (1, 4))
    recorder = loop.run()
    assert len(recorder.steps) == own.step == 4
    assert own.metrics()["rotation/coeff"] == 6.0


@pytest.mark.parametrize("mode", ["decoupled", "project"])
def test_modes_after_the_step(mode: str) -> None:
    own = penalty(mode=mode, **({"budget": 0.01} if mode == "project" else {}))
    recorder = Loop(own).run()
    anchors = own.anchors
    assert anchors is not None
    tasks = [repeat_in_float64(llama(), step, divide=True) for step in recorder.steps]
    assert worst(llama(), recorder.steps, tasks, anchors, 0.0, CLIP) < 3e-6
    for moved, following in zip(recorder.after, recorder.steps[1:], strict=False):
        wanted = closed_form(llama(), moved, anchors, mode, lr=RATE, coeff=COEFF, budget=0.01)
        assert error(following.weights, wanted) < 1e-7
        assert error(moved, wanted) > 1e-4
    # A mode after the step needs no clipping.
    accelerate.state.AcceleratorState._reset_state(True)
    Loop(penalty(mode=mode, **({"budget": 0.01} if mode == "project" else {})), size=4).run(clip=None)


def test_a_loop_that_does_not_clip_is_refused_at_its_first_step() -> None:
    loop = Loop(penalty())
    with pytest.raises(ValueError, match=r"clip_grad_norm_: got no call between .* and optimizer.step\(\)"):
        loop.run(clip=None)
    assert loop.optimizer.optimizer.steps == []


@pytest.mark.parametrize("first", [True, False])
def test_another_model_beside_is_left_alone(first: bool) -> None:
    own = penalty()
    accelerator = accelerate.Accelerator(cpu=True)
    bare, other = llama(), llama()
    recorders = [Recorder(bare), Recorder(other)]
    model, optimizer, beside, optimizer_beside = accelerator.prepare(bare, recorders[0], other, recorders[1])
    attach(accelerator, own, model)
    pairs = [(model, optimizer), (beside, optimizer_beside)]
    for batch in DataLoader(batches_of(3, VOCABULARY), batch_size=1):  # type: ignore[arg-type]
        for each, steps in pairs if first else reversed(pairs):
            steps.optimizer.batches.append(batch)
            accelerator.backward(each(**batch).loss)
            accelerator.clip_grad_norm_(parameters=each.parameters(), max_norm=CLIP)
            steps.step()
            steps.zero_grad()
    assert own.anchors is not None and own.step == 3
    for recorder, coeff in zip(recorders, (COEFF, 0.0), strict=True):
        tasks = [repeat_in_float64(llama(), step) for step in recorder.steps]
        assert worst(llama(), recorder.steps, tasks, own.anchors, coeff, CLIP) < 3e-6


def test_a_step_of_another_optimizer_that_a_scaler_skips_counts() -> None:
    own = penalty()
    loop = Loop(own, accumulation=1)
    scaler = scale_gradients(loop)
    loop.run()
    assert own.step == 12
    # As where the other's gradients overflow: one scaler serves all.
    scaler.update(1024.0)
    loop.run()
    assert own.step == 24


def test_clipping_twice_in_a_step_adds_once() -> None:
    own = penalty()
    loop = Loop(own)
    clip = loop.accelerator.clip_grad_norm_
    loop.accelerator.clip_grad_norm_ = lambda *args: (clip(*args), clip(*args))
    loop.run(clip=float("inf"))
    assert own.step == 3


@pytest.mark.parametrize("options", [{"budget": 0.002}, {"budget": 0.002, "mode": "decoupled"}])
def test_a_run_that_is_resumed_has_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    whole, again = penalty(**options), penalty(**options)
    first = Loop(whole, adam, size=16)
    first.run()
    first.accelerator.save_state(str(tmp_path))
    first.run()
    accelerate.state.AcceleratorState._reset_state(True)
    second = Loop(again, adam, size=16)
    second.accelerator.load_state(str(tmp_path))
    assert again.step == 4
    second.run()
    wanted = dict(first.bare.named_parameters())
    for name, parameter in second.bare.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def test_what_cannot_be_attached_to_is_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"accelerator: got \w+, expected an accelerate.Accelerator"):
        attach(model, penalty(), model)
    loop = Loop(penalty())
    with pytest.raises(ValueError, match="R would count twice"):
        attach(loop.accelerator, penalty(), loop.model)
    other = Loop(None)
    with pytest.raises(ValueError, match=r"expected what accelerator.prepare\(model, optimizer\) returned"):
        attach(other.accelerator, penalty(), llama())
    other.accelerator._optimizers *= 2
    with pytest.raises(ValueError, match="got 2 optimizers in mode 'decoupled', expected one"):
        attach(other.accelerator, penalty(mode="decoupled"), other.model)
