from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import rpsft_kernels as rk
from recorded import (
    FusedRecorder,
    Recorder,
    Step,
    batches_of,
    closed_form,
    error,
    listen,
    overflow,
    repeat_in_float64,
    worst,
)
from small_models import tiny_llama

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision

from rpsft_kernels.integrations.lightning import RotationPenaltyCallback, add_gradients_

pytestmark = pytest.mark.xdist_group("lightning")
VOCABULARY, COEFF, CLIP, RATE = 64, 3.0, 1.0, 1e-2
PREFIX = "model."


def llama() -> Any:
    return tiny_llama(vocab_size=VOCABULARY, attn_implementation="eager")


def penalty(**options: Any) -> rk.RotationPenalty:
    strength = {} if "budget" in options else {"coeff": COEFF}
    return rk.RotationPenalty(8, basis_dtype=torch.float32, **strength, **options)


class Module(lightning.LightningModule):
    def __init__(self, optimizer: Any = Recorder) -> None:
        super().__init__()
        self.model = llama()
        self._optimizer = optimizer

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self._optimizer(self.model)


class Manual(Module):
    """Two optimizers, each of half the layers."""

    def __init__(self, own: rk.RotationPenalty | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._own = own

    def configure_optimizers(self) -> Any:
        halves = self.model.model.layers
        return [Recorder(half) for half in halves]

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        self.manual_backward(self.model(**batch).loss)
        if self._own is not None:
            self._own.add_gradients_(self)
        for optimizer in optimizers:
            optimizer.step()
        self.model.zero_grad()


def examples(size: int) -> DataLoader[Any]:
    return DataLoader(batches_of(size, VOCABULARY), batch_size=1)  # type: ignore[arg-type]


def fit(
    module: Module,
    folder: Path,
    own: rk.RotationPenalty | None,
    *,
    size: int = 12,
    resume: str | None = None,
    **options: Any,
) -> lightning.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "accumulate_grad_batches": 4,
        "gradient_clip_val": CLIP,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    callbacks = options.pop("callbacks", []) + ([] if own is None else [RotationPenaltyCallback(own)])
    trainer = lightning.Trainer(**{**defaults, **options}, callbacks=callbacks)
    trainer.fit(module, examples(size), ckpt_path=resume)
    return trainer


def record(folder: Path, own: rk.RotationPenalty | None, **options: Any) -> Recorder:
    module = Module()
    made: list[Recorder] = []
    module._optimizer = lambda model: made.append(Recorder(model)) or made[-1]  # type: ignore[func-returns-value]
    with listen(module.model, lambda: made[-1]):
        fit(module, folder, own, **options)
    return made[0]


def anchors_of(own: rk.RotationPenalty) -> rk.Anchors:
    """Under the names of the model within the module."""
    assert own.anchors is not None
    return rk.Anchors(
        {name.removeprefix(PREFIX).removeprefix("_orig_mod."): anchor for name, anchor in own.anchors.items()}
    )


def tasks_of(steps: list[Step]) -> list[dict[str, Tensor]]:
    return [repeat_in_float64(llama(), step, divide=True) for step in steps]


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 1, "size": 5}, {"size": 10, "max_epochs": 2}, {"gradient_clip_val": None}],
    ids=["accumulation", "no accumulation", "incomplete accumulations", "no clipping"],
)
def test_the_optimizer_receives_the_task_and_the_penalty_then_clipped(options: dict[str, Any], tmp_path: Path) -> None:
    own = penalty()
    steps = record(tmp_path, own, **options).steps
    incomplete = options.get("size") == 10
    if incomplete:
        assert [len(step.batches) for step in steps] == [4, 4, 2] * 2
    # Lightning divides by the accumulation, also where it is incomplete.
    tasks = tasks_of(steps)
    for step, task in zip(steps, tasks, strict=True):
        for gradient in task.values():
            gradient *= len(step.batches) / options.get("accumulate_grad_batches", 4)
    assert worst(llama(), steps, tasks, anchors_of(own), COEFF, options.get("gradient_clip_val", CLIP)) < 3e-6


@pytest.mark.parametrize("case", ["bf16", "compiled", "checkpointed"])
def test_autocast_compiled_and_checkpointed_models(case: str, tmp_path: Path) -> None:
    def run(own: rk.RotationPenalty | None, **options: Any) -> list[Step]:
        module: Any = Module()
        made: list[Recorder] = []
        module._optimizer = lambda model: made.append(Recorder(model)) or made[-1]  # type: ignore[func-returns-value]
        if case == "checkpointed":
            module.model.gradient_checkpointing_enable()
        if case == "bf16":
            options["precision"] = "bf16-mixed"
        if case == "compiled":
            module.model = torch.compile(module.model, backend="eager")
        if case == "compiled":
            module._optimizer = lambda model: made.append(Recorder(model._orig_mod)) or made[-1]  # type: ignore[func-returns-value]
        fit(module, tmp_path, own, size=8, **options)
        return made[0].steps

    own = penalty()
    steps = run(own)
    tasks = [step.gradients for step in run(None, gradient_clip_val=None)]
    assert worst(llama(), steps, tasks, anchors_of(own), COEFF, CLIP) < 3e-6


@pytest.mark.parametrize("mode", ["decoupled", "project"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_modes_after_the_step(mode: str, accumulation: int, tmp_path: Path) -> None:
    own = penalty(mode=mode, **({"budget": 0.01} if mode == "project" else {}))
    recorder = record(tmp_path, own, size=3 * accumulation, accumulate_grad_batches=accumulation)
    anchors = anchors_of(own)
    assert worst(llama(), recorder.steps, tasks_of(recorder.steps), anchors, 0.0, CLIP) < 3e-6
    for moved, following in zip(recorder.after, recorder.steps[1:], strict=False):
        wanted = closed_form(llama(), moved, anchors, mode, lr=RATE, coeff=COEFF, budget=0.01)
        assert error(following.weights, wanted) < 1e-7
        assert error(moved, wanted) > 1e-4


def test_several_optimizers_have_the_penalty_once(tmp_path: Path) -> None:
    def run(own: rk.RotationPenalty | None) -> list[Any]:
        module = Manual(own)
        trainer = fit(module, tmp_path, own, size=3, accumulate_grad_batches=1, gradient_clip_val=None)
        return trainer.optimizers

    own = penalty()
    for i, (with_penalty, plain) in enumerate(zip(run(own), run(None), strict=True)):
        prefix = f"{PREFIX}model.layers.{i}."
        assert own.anchors is not None
        anchors = rk.Anchors({n.removeprefix(prefix): a for n, a in own.anchors.items() if n.startswith(prefix)})
        tasks = [step.gradients for step in plain.steps]
        assert worst(llama().model.layers[i], with_penalty.steps, tasks, anchors, COEFF, None) < 3e-6
    assert own.step == 3


def test_manual_optimization_without_the_penalty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Manual: got an optimizer step .* expected penalty.add_gradients_\(self\)"):
        fit(Manual(None), tmp_path, penalty(), size=2, accumulate_grad_batches=1, gradient_clip_val=None)


class Raw(Manual):
    """Steps past Lightning."""

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return super().optimizers(use_pl_optimizer=False)


class Overridden(Module):
    def optimizer_step(self, *args: Any, **options: Any) -> None:
        _, _, optimizer, closure = args
        optimizer.optimizer.step(closure)


@pytest.mark.parametrize("module", [lambda: Raw(None), Overridden], ids=["manual", "optimizer_step"])
def test_steps_past_lightning_are_refused(module: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got an optimizer step of its own .* without the penalty"):
        fit(module(), tmp_path, penalty(), size=2, accumulate_grad_batches=1, gradient_clip_val=None)


def test_optimizers_without_anchored_weights_step_by_themselves(tmp_path: Path) -> None:
    class Alternating(Manual):
        def training_step(self, batch: dict[str, Tensor], index: int) -> None:  # type: ignore[override]
            optimizers: Any = self.optimizers()
            # What it freezes, others train.
            self.toggle_optimizer(optimizers[index % 2])
            self.manual_backward(self.model(**batch).loss)
            assert self._own is not None
            if index % 2:
                self._own.add_gradients_(self)
            optimizers[index % 2].step()
            self.untoggle_optimizer(optimizers[index % 2])
            self.model.zero_grad()

    own = penalty(include="*layers.1.*")
    fit(Alternating(own), tmp_path, own, size=4, accumulate_grad_batches=1, gradient_clip_val=None)
    assert own.step == 2


class Wrapper:
    """What Lightning takes for an optimizer, without torch's class."""

    def __init__(self, model: nn.Module) -> None:
        self.inner = Recorder(model)
        self.param_groups, self.defaults, self.state = self.inner.param_groups, self.inner.defaults, self.inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


def test_optimizers_that_are_not_torch_s(tmp_path: Path) -> None:
    own = penalty()
    fit(Module(Wrapper), tmp_path, own, size=2, accumulate_grad_batches=1)
    assert own.step == 2
    own = penalty(mode="decoupled")
    with pytest.raises(
        ValueError, match=r"optimizer: got one without torch's hooks after its step in mode 'decoupled'"
    ):
        fit(Module(Wrapper), tmp_path, own, size=2, accumulate_grad_batches=1)


def test_a_mode_after_the_step_acts_once_for_several_optimizers(tmp_path: Path) -> None:
    own = penalty(mode="decoupled")
    trainer = fit(Manual(None), tmp_path, own, size=3, accumulate_grad_batches=1, gradient_clip_val=None)
    assert own.step == 3
    for i, optimizer in enumerate(trainer.optimizers):
        prefix = f"{PREFIX}model.layers.{i}."
        assert own.anchors is not None
        anchors = rk.Anchors({n.removeprefix(prefix): a for n, a in own.anchors.items() if n.startswith(prefix)})
        wanted = closed_form(
            llama().model.layers[i], optimizer.after[0], anchors, "decoupled", lr=RATE, coeff=COEFF, budget=0.0
        )
        assert error(optimizer.steps[1].weights, wanted) < 1e-7


class Kept(Logger):
    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        pass


def test_r_is_logged(tmp_path: Path) -> None:
    own, logger = penalty(), Kept()
    fit(Module(), tmp_path, own, size=24, logger=logger, log_every_n_steps=2)
    logged = [row for row in logger.rows if "rotation/R" in row]
    assert len(logged) == 3
    assert logged[-1]["rotation/R"] == pytest.approx(own.metrics()["rotation/R"])
    assert {"loss", "rotation/loss", "rotation/grad_ratio"} <= logged[-1].keys()


@pytest.mark.parametrize(
    "options", [{"budget": 0.002}, {"budget": 0.002, "mode": "decoupled"}, {"mode": "project", "budget": 0.002}]
)
def test_a_run_that_is_resumed_has_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run(own: rk.RotationPenalty, **more: Any) -> nn.Module:
        module = Module(adam)
        # At the ends of epochs: Lightning repeats the data of one that it resumes within.
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
        options = {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [saving]}
        fit(module, tmp_path, own, **options, **more)
        return module

    whole, again = penalty(**options), penalty(**options)
    wanted = dict(run(whole).named_parameters())
    path = str(tmp_path / "step=3.ckpt")
    found = dict(run(again, resume=path).named_parameters())
    assert whole.step == again.step == 9
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name]), name
    # Without the penalty's state another run comes of it.
    checkpoint = torch.load(path, weights_only=False)
    assert any("RotationPenaltyCallback" in key for key in checkpoint["callbacks"])
    if options.get("mode") != "project":
        checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if "Rotation" not in k}
        torch.save(checkpoint, path)
        other = dict(run(penalty(**options), resume=path).named_parameters())
        assert any(not torch.equal(other[name], wanted[name]) for name in wanted)


def test_a_second_training_that_is_not_resumed_goes_on_with_a_warning(tmp_path: Path) -> None:
    module, own = Module(), penalty()
    fit(module, tmp_path, own, size=4)
    with pytest.warns(UserWarning, match="its rotation penalty has counted 1 steps"):
        fit(module, tmp_path, own, size=4)


@pytest.mark.parametrize("anchored", [False, True])
def test_processes_that_fit_makes(anchored: bool, tmp_path: Path) -> None:
    """The penalty of the process that calls fit is sent to them, and stays as it is."""
    own, module = penalty(), Module()
    if anchored:
        own.anchor(module)
    callback = pickle.loads(pickle.dumps(RotationPenaltyCallback(own)))
    # As if this process were one of them.
    callback._process += 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, tmp_path, None, size=4, callbacks=[callback])
    assert any("expected penalty.anchor(module) before fit" in str(w.message) for w in caught) != anchored
    assert (callback.penalty.step, own.step) == (1, 0)


def test_strategies_that_keep_gradients_to_themselves_are_refused(tmp_path: Path) -> None:
    class Other(lightning.pytorch.strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(ValueError, match="strategy: got Other, expected one device, DDP or ModelParallelStrategy"):
        fit(Module(), tmp_path, penalty(), strategy=Other(torch.device("cpu")))


class Float16(MixedPrecision):
    """float16's scaling of gradients, on a CPU."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("optimizer", [Recorder, FusedRecorder])
def test_scaled_gradients(optimizer: Any, tmp_path: Path) -> None:
    own, module = penalty(), Module(optimizer)
    made: list[Recorder] = []
    module._optimizer = lambda model: made.append(optimizer(model)) or made[-1]  # type: ignore[func-returns-value]
    clip = None if optimizer is FusedRecorder else CLIP
    with listen(module.model, lambda: made[-1]):
        fit(module, tmp_path, own, plugins=[Float16()], gradient_clip_val=clip)
    steps = made[0].steps
    assert worst(llama(), steps, tasks_of(steps), anchors_of(own), COEFF, clip) < 3e-6


@pytest.mark.parametrize("optimizer", [Recorder, FusedRecorder])
def test_steps_that_a_scaler_skips_do_not_count(optimizer: Any, tmp_path: Path) -> None:
    own = rk.RotationPenalty(8, coeff=lambda step: 3.0 + step)
    made: list[Recorder] = []
    module = Module(lambda model: made.append(optimizer(model)) or made[-1])  # type: ignore[func-returns-value]
    overflow(module.model, (0, 3, 4))
    fit(module, tmp_path, own, plugins=[Float16()], size=8, accumulate_grad_batches=1, gradient_clip_val=None)
    assert len(made[0].steps) == own.step == 5
    assert own.metrics()["rotation/coeff"] == 3.0 + own.step - 1


def test_manual_optimization_says_how_gradients_are_scaled(tmp_path: Path) -> None:
    class Own(Manual):
        """Passes the scale, or not."""

        def __init__(self, own: rk.RotationPenalty, passes: bool) -> None:
            super().__init__(own)
            self._passes = passes

        def training_step(self, batch: dict[str, Tensor], index: int) -> None:  # type: ignore[override]
            plugin: Any = self.trainer.precision_plugin
            self.manual_backward(self.model(**batch).loss)
            assert self._own is not None
            self._own.add_gradients_(self, plugin.scaler.get_scale() if self._passes else 1.0)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
            self.model.zero_grad()

    own = penalty()
    options: dict[str, Any] = {"size": 3, "accumulate_grad_batches": 1, "gradient_clip_val": None}
    trainer = fit(Own(own, True), tmp_path, own, plugins=[Float16()], **options)
    plain = fit(Manual(None), tmp_path, None, plugins=[Float16()], **options)
    prefix = f"{PREFIX}model.layers.0."
    assert own.anchors is not None
    anchors = rk.Anchors({n.removeprefix(prefix): a for n, a in own.anchors.items() if n.startswith(prefix)})
    first, tasks = trainer.optimizers[0], [step.gradients for step in plain.optimizers[0].steps]  # type: ignore[attr-defined]
    assert worst(llama().model.layers[0], first.steps, tasks, anchors, COEFF, None) < 3e-6  # type: ignore[attr-defined]
    own = penalty()
    with pytest.raises(ValueError, match=r"scale: got 1 in Own's call of penalty.add_gradients_, expected 1024"):
        fit(Own(own, False), tmp_path, own, plugins=[Float16()], **options)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("optimizer", [Recorder, FusedRecorder])
def test_a_step_of_another_optimizer_that_a_scaler_skips_counts(optimizer: Any, first: bool, tmp_path: Path) -> None:
    class Beside(Manual):
        """Two models of one module, whose optimizers share Lightning's scaler."""

        def __init__(self, own: rk.RotationPenalty) -> None:
            super().__init__(own)
            self.other = llama()

        def configure_optimizers(self) -> Any:
            return [optimizer(self.model), optimizer(self.other)]

        def training_step(self, batch: dict[str, Tensor], index: int) -> None:  # type: ignore[override]
            plugin: Any = self.trainer.precision_plugin
            optimizers: Any = self.optimizers()
            for model, steps in list(zip((self.model, self.other), optimizers, strict=True))[:: 1 if first else -1]:
                self.manual_backward(model(**batch).loss)
                if model is self.model:
                    assert self._own is not None
                    self._own.add_gradients_(self, plugin.scaler.get_scale())
                steps.step()
                model.zero_grad()

    own = rk.RotationPenalty(8, include="model.*")
    module = Beside(own)
    overflow(module.other, (1, 2))
    trainer = fit(module, tmp_path, own, plugins=[Float16()], size=4, accumulate_grad_batches=1, gradient_clip_val=None)
    assert [len(each.steps) for each in trainer.optimizers] == [4, 2]  # type: ignore[attr-defined]
    assert own.step == 4


@pytest.mark.parametrize("overflows", [(0, 3, 4), (1, 2, 3), ()])
def test_several_steps_of_a_batch(overflows: tuple[int, ...], tmp_path: Path) -> None:
    class Twice(Module):
        automatic_optimization = False  # type: ignore[assignment]

        def training_step(self, batch: dict[str, Tensor], index: int) -> None:  # type: ignore[override]
            plugin: Any = self.trainer.precision_plugin
            optimizer: Any = self.optimizers()
            for _ in range(2):
                self.manual_backward(self.model(**batch).loss)
                own.add_gradients_(self, plugin.scaler.get_scale())
                optimizer.step()
                self.model.zero_grad()

    own = penalty()
    module = Twice()
    overflow(module.model, overflows)
    trainer = fit(module, tmp_path, own, plugins=[Float16()], size=3, accumulate_grad_batches=1, gradient_clip_val=None)
    assert len(trainer.optimizers[0].steps) == own.step == 6 - len(overflows)  # type: ignore[attr-defined]


def test_a_batch_without_a_loss_makes_no_step_of_the_penalty(tmp_path: Path) -> None:
    class Skipping(Module):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return None if index == 1 else super().training_step(batch, index)  # type: ignore[return-value]

    own = penalty()
    made: list[Recorder] = []
    module = Skipping(lambda model: made.append(Recorder(model)) or made[-1])  # type: ignore[func-returns-value]
    fit(module, tmp_path, own, size=3, accumulate_grad_batches=1)
    # Lightning calls the optimizer, with no gradients.
    assert [bool(step.gradients) for step in made[0].steps] == [True, False, True]
    assert own.step == 2


class Scaled(lightning.fabric.plugins.MixedPrecision):
    """float16's scaling of gradients, on a CPU."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self) -> Any:
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("scaled", [False, True])
def test_fabric(scaled: bool) -> None:
    plugins = [Scaled()] if scaled else []
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=plugins)
    bare = llama()
    recorder = Recorder(bare)
    model, optimizer = fabric.setup(bare, recorder)
    own = penalty()
    own.anchor(bare)
    with recorder.listen(bare):
        model.train()
        for i, batch in enumerate(examples(12)):
            with fabric.no_backward_sync(model, enabled=i % 4 != 3):
                fabric.backward(model(**batch).loss / 4)
            if i % 4 == 3:
                add_gradients_(fabric, own, model)
                fabric.clip_gradients(model, optimizer, max_norm=CLIP)
                optimizer.step()
                optimizer.zero_grad()
    assert own.anchors is not None
    assert worst(llama(), recorder.steps, tasks_of(recorder.steps), own.anchors, COEFF, CLIP) < 3e-6
