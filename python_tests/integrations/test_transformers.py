from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import rpsft_kernels as rk
from recorded import (
    FusedRecorder,
    Recorder,
    batches_of,
    closed_form,
    error,
    expected_penalty,
    overflow,
    received,
    repeat_in_float64,
    worst,
)
from small_models import tiny_llama

transformers = pytest.importorskip("transformers", minversion="5.24", reason="docs/training.md says what was tested")
pytest.importorskip("accelerate")

from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from rpsft_kernels.integrations.transformers import (  # noqa: E402
    RotationArguments,
    RotationPenaltyCallback,
    RotationPenaltyMixin,
    attach,
    from_arguments,
    penalised,
)

# One worker imports the frameworks.
pytestmark = pytest.mark.xdist_group("integrations")
VOCABULARY, COEFF, CLIP = 64, 3.0, 1.0
# Ways of giving a trainer the penalty.
WAYS = ("penalised", "callback", "attach")


def model() -> Any:
    return tiny_llama(vocab_size=VOCABULARY, attn_implementation="eager")


def penalty(**options: Any) -> rk.RotationPenalty:
    strength = {} if "budget" in options else {"coeff": COEFF}
    return rk.RotationPenalty(8, basis_dtype=torch.float32, **strength, **options)


def trainer(
    way: str, folder: Path, own: rk.RotationPenalty | None, *, size: int = 20, optimizer: Any = None, **options: Any
) -> Any:
    callbacks = options.pop("callbacks", [])
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 1,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 3,
    }
    llama = model()
    arguments: dict[str, Any] = {
        "model": llama,
        "args": TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        "train_dataset": batches_of(size, VOCABULARY),
    }
    if optimizer is not None:
        made = optimizer(llama)
        arguments["optimizers"] = (made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0))
    if way == "callback":
        callbacks = [*callbacks, RotationPenaltyCallback(own)]
    if way == "penalised":
        return penalised(Trainer)(**arguments, callbacks=callbacks, rotation=own)
    made_trainer = Trainer(**arguments, callbacks=callbacks)
    if way == "attach":
        attach(made_trainer, own)
    return made_trainer


def record(way: str, folder: Path, own: rk.RotationPenalty | None, **options: Any) -> Recorder:
    made = trainer(way, folder, own, optimizer=Recorder, **options)
    recorder: Recorder = made.optimizer
    with recorder.listen(made.model):
        made.train()
    return recorder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 1, "size": 5},
        {"size": 10, "num_train_epochs": 2},
        {"activation_checkpointing": True, "size": 8},
        {"max_grad_norm": 0.0, "size": 8},
    ],
    ids=["accumulation", "no accumulation", "incomplete accumulations", "checkpointing", "no clipping"],
)
def test_the_optimizer_receives_the_task_and_the_penalty_then_clipped(
    way: str, options: dict[str, Any], tmp_path: Path
) -> None:
    own = penalty()
    recorder = record(way, tmp_path, own, **options)
    if options.get("size") == 10:
        assert [len(step.batches) for step in recorder.steps] == [4, 4, 2] * 2
    tasks = [repeat_in_float64(model(), step) for step in recorder.steps]
    assert own.anchors is not None
    clip = options.get("max_grad_norm", CLIP) or None
    assert worst(model(), recorder.steps, tasks, own.anchors, COEFF, clip) < 3e-6
    # The penalty is not lost in the task, nor the task in it.
    last = recorder.steps[-1]
    without = received(model(), last, tasks[-1], own.anchors, 0.0, clip)
    assert 0.1 < error(last.gradients, without)


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Examples whose number nobody knows."""

    def __iter__(self) -> Any:
        return iter(batches_of(6, VOCABULARY))


@pytest.mark.parametrize("way", ["penalised", "callback"])
def test_gradients_that_an_epoch_leaves_have_the_penalty_once(way: str, tmp_path: Path) -> None:
    own = penalty()
    made = trainer(way, tmp_path, own, optimizer=Recorder, max_steps=2)
    made.train_dataset = Stream()
    with made.optimizer.listen(made.model):
        recorder: Recorder = made.optimizer
        made.train()
    # Trainer steps at no epoch's end that it has not foreseen.
    assert [len(step.batches) for step in recorder.steps] == [4, 6]
    tasks = [repeat_in_float64(model(), step) for step in recorder.steps]
    assert own.anchors is not None
    assert worst(model(), recorder.steps, tasks, own.anchors, COEFF, CLIP) < 3e-6


@pytest.mark.parametrize("way", ["penalised", "callback"])
@pytest.mark.parametrize("options", [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_autocast_and_compiled_models(way: str, options: dict[str, Any], tmp_path: Path) -> None:
    own = penalty()
    recorder = record(way, tmp_path, own, size=8, **options)
    # Of bfloat16 and its rounding the trainer alone knows.
    plain = record("none", tmp_path, None, size=8, **{**options, "max_grad_norm": 0.0})
    tasks = [step.gradients for step in plain.steps]
    assert own.anchors is not None
    assert worst(model(), recorder.steps, tasks, own.anchors, COEFF, CLIP) < 3e-6


class Float16(TrainerCallback):
    """Scales gradients as for float16, which Accelerate does on no CPU."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        accelerator = self.trainer.accelerator
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"


@pytest.mark.parametrize("way", ["penalised", "callback"])
def test_scaled_gradients(way: str, tmp_path: Path) -> None:
    own, float16 = penalty(), Float16()
    made = trainer(way, tmp_path, own, optimizer=Recorder, callbacks=[float16])
    float16.trainer = made
    made.accelerator.scaler = float16.scaler
    with made.optimizer.listen(made.model):
        recorder: Recorder = made.optimizer
        try:
            made.train()
        finally:
            made.accelerator.state._mixed_precision = "no"
    assert float16.scaler.get_scale() > 1024
    tasks = [repeat_in_float64(model(), step) for step in recorder.steps]
    assert own.anchors is not None
    assert worst(model(), recorder.steps, tasks, own.anchors, COEFF, CLIP) < 3e-6


@pytest.mark.parametrize("way", ["penalised", "callback"])
@pytest.mark.parametrize("optimizer", [Recorder, FusedRecorder])
def test_steps_that_a_scaler_skips_do_not_count(way: str, optimizer: Any, tmp_path: Path) -> None:
    own, float16 = rk.RotationPenalty(8, coeff=lambda step: 3.0 + step), Float16()
    options = {"gradient_accumulation_steps": 1, "size": 8}
    made = trainer(way, tmp_path, own, optimizer=optimizer, callbacks=[float16], **options)
    float16.trainer = made
    made.accelerator.scaler = float16.scaler
    overflow(made.model, (0, 3, 4))
    try:
        made.train()
    finally:
        made.accelerator.state._mixed_precision = "no"
    assert made.state.global_step == 8
    assert len(made.optimizer.optimizer.steps) == own.step == 5
    assert own.metrics()["rotation/coeff"] == 3.0 + own.step - 1


@pytest.mark.parametrize("way", ["penalised", "callback"])
def test_a_step_of_another_optimizer_that_a_scaler_skips_counts(way: str, tmp_path: Path) -> None:
    class Beside(Float16):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            # As where gradients of a model of the user's own overflow.
            self.scaler.update(self.scaler.get_scale() / 4)

    own, float16 = penalty(), Beside()
    made = trainer(way, tmp_path, own, callbacks=[float16], gradient_accumulation_steps=1, size=4)
    float16.trainer = made
    made.accelerator.scaler = float16.scaler
    try:
        made.train()
    finally:
        made.accelerator.state._mixed_precision = "no"
    assert own.step == 4


@pytest.mark.parametrize("way", ["penalised", "callback"])
@pytest.mark.parametrize("mode", ["decoupled", "project"])
def test_modes_after_the_step(way: str, mode: str, tmp_path: Path) -> None:
    own = penalty(mode=mode, **({"budget": 0.01} if mode == "project" else {}))
    recorder = record(way, tmp_path, own, size=12)
    tasks = [repeat_in_float64(model(), step) for step in recorder.steps]
    anchors = own.anchors
    assert anchors is not None
    # The gradients are the task's alone.
    assert worst(model(), recorder.steps, tasks, anchors, 0.0, CLIP) < 3e-6
    for moved, following in zip(recorder.after, recorder.steps[1:], strict=False):
        wanted = closed_form(model(), moved, anchors, mode, lr=1e-2, coeff=COEFF, budget=0.01)
        assert error(following.weights, wanted) < 1e-7
        assert error(moved, wanted) > 1e-4


class Reporter(TrainerCallback):
    """Stands where W&B's and TensorBoard's callbacks do: before those of the user."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("way", WAYS)
def test_reporters_are_told_r(way: str, tmp_path: Path) -> None:
    reporter, own = Reporter(), penalty()
    made = trainer(way, tmp_path, own, callbacks=[reporter], optimizer=Recorder, eval_strategy="no")
    made.train()
    steps, anchors = made.optimizer.optimizer.steps, own.anchors
    assert anchors is not None
    *told, summary = reporter.logs
    assert "train_loss" in summary and not any("rotation" in name for name in summary)
    for log, history, step in zip(told, made.state.log_history, steps, strict=False):
        assert log["rotation/R"] == history["rotation/R"]
        assert log["rotation/R"] == pytest.approx(expected_penalty(model(), step.weights, anchors), rel=1e-5)
        assert log["rotation/loss"] == pytest.approx(COEFF * log["rotation/R"])
        # What is logged as the loss is the task's.
        task = sum(float(model_loss(step.weights, batch)) for batch in step.batches)
        assert not step.batches or log["loss"] == pytest.approx(task)
    assert ("rotation/grad_ratio" in told[-1]) == (way != "callback")


def model_loss(weights: Any, batch: Any) -> torch.Tensor:
    found = model()
    found.load_state_dict(weights, strict=False)
    loss: torch.Tensor = found(**batch).loss
    return loss


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("penalised", {"budget": 0.002}),
        ("penalised", {"budget": 0.002, "mode": "decoupled"}),
        ("penalised", {"budget": 0.002, "mode": "project"}),
        ("callback", {"warmup": 4}),
        ("callback", {"mode": "decoupled", "warmup": 4}),
        ("attach", {"warmup": 4}),
    ],
)
def test_a_run_that_is_resumed_has_the_same_bits(way: str, options: dict[str, Any], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3, "size": 28}
    whole = penalty(**options)
    first = trainer(way, tmp_path, whole, **saving)
    first.train()
    again = penalty(**options)
    second = trainer(way, tmp_path, again, **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.step == whole.step == 7
    wanted = dict(first.model.named_parameters())
    for name, parameter in second.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    assert second.state.log_history[-2]["rotation/R"] == first.state.log_history[-2]["rotation/R"]
    # The state is what makes them equal.
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RotationPenaltyCallback"]
    path.write_text(json.dumps(state))
    if options.get("mode") != "project":
        third = trainer(way, tmp_path, penalty(**options), **saving)
        with pytest.warns(UserWarning, match="has no state of a rotation penalty"):
            third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert any(not torch.equal(p, wanted[name]) for name, p in third.model.named_parameters())


def test_a_callback_that_comes_too_late_to_anchor_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "size": 8}
    trainer("none", tmp_path, None, **saving).train()
    late = trainer("none", tmp_path, None, **saving)
    late.add_callback(RotationPenaltyCallback(penalty()))
    with pytest.raises(ValueError, match="R would start again at 0. Give the callback to the trainer's constructor"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_callbacks_that_are_made_anew_are_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "size": 8}
    trainer("callback", tmp_path, penalty(), **saving).train()
    restoring = trainer("callback", tmp_path, penalty(), restore_callback_states_from_checkpoint=True, **saving)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint has made it anew, leave that off"):
        restoring.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_callback_without_the_tasks_gradient_refuses_a_budget(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budget: .*penalised\(Trainer\)"):
        trainer("callback", tmp_path, penalty(budget=0.01))
    trainer("callback", tmp_path, penalty(budget=0.01, mode="project"))


def test_deepspeed_is_refused_to_a_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer("callback", tmp_path, penalty())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    callback = made.callback_handler.callbacks[-2]
    assert isinstance(callback, RotationPenaltyCallback)
    with pytest.raises(ValueError, match=r"got DeepSpeed, expected .*penalised\(Trainer\)"):
        callback.on_train_begin(made.args, made.state, made.control, model=made.model)


def test_optimizers_that_step_within_the_backward_pass_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim: got 'lomo', which steps within the backward pass"):
        trainer("penalised", tmp_path, penalty(), optim="lomo")
    with pytest.raises(ValueError, match="optim: got 'galore_adamw_layerwise'"):
        trainer("callback", tmp_path, penalty(), optim="galore_adamw_layerwise")


def test_two_penalties_are_refused(tmp_path: Path) -> None:
    made = trainer("penalised", tmp_path, penalty())
    with pytest.raises(ValueError, match="R would count twice"):
        attach(made, penalty())
    made = trainer("callback", tmp_path, penalty())
    with pytest.raises(ValueError, match="R would count twice"):
        attach(made, penalty())
    assert type(made) is Trainer
    made.add_callback(RotationPenaltyCallback(penalty()))
    with pytest.raises(ValueError, match="callbacks: got several RotationPenaltyCallback"):
        made.train()


def test_each_weight_is_corrected_by_the_learning_rate_of_its_group(tmp_path: Path) -> None:
    def of_layers(name: str) -> bool:
        return "layers" in name

    def optimizer(llama: Any) -> Recorder:
        recorder = Recorder(llama)
        (group,) = recorder.param_groups
        named = dict(llama.named_parameters())
        recorder.param_groups = [
            {**group, "params": [p for n, p in named.items() if of_layers(n) == inner], "lr": 1e-3 if inner else 1e-2}
            for inner in (True, False)
        ]
        return recorder

    own = penalty(mode="decoupled")
    made = trainer("penalised", tmp_path, own, optimizer=optimizer, size=8)
    made.train()
    recorder, anchors = made.optimizer.optimizer, own.anchors
    assert anchors is not None
    found = recorder.steps[1].weights
    for inner, lr in ((True, 1e-3), (False, 1e-2)):
        wanted = closed_form(model(), recorder.after[0], anchors, "decoupled", lr=lr, coeff=COEFF, budget=0.0)
        names = [name for name in wanted if of_layers(name) == inner]
        assert error({n: found[n] for n in names}, {n: wanted[n] for n in names}) < 1e-7


def test_a_trainer_whose_model_cannot_be_anchored_stays_as_it_is(tmp_path: Path) -> None:
    made = trainer("none", tmp_path, None)
    callbacks = list(made.callback_handler.callbacks)
    with pytest.raises(ValueError):
        attach(made, rk.RotationPenalty(8, include="no weight has this name"))
    assert type(made) is Trainer and made.callback_handler.callbacks == callbacks


@pytest.mark.parametrize("way", ["penalised", "attach"])
def test_what_is_no_penalty_is_refused(way: str, tmp_path: Path) -> None:
    for value in (None, {"rank": 8}):
        with pytest.raises(ValueError, match=rf"rotation: got {type(value).__name__}, expected a RotationPenalty"):
            trainer(way, tmp_path, value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="penalty: got dict, expected a RotationPenalty"):
        RotationPenaltyCallback({"rank": 8})  # type: ignore[arg-type]


def test_a_second_training_that_is_not_resumed_goes_on_with_a_warning(tmp_path: Path) -> None:
    made = trainer("penalised", tmp_path, penalty(), size=4)
    made.train()
    with pytest.warns(UserWarning, match="its rotation penalty has counted 1 steps"):
        made.train()


@pytest.mark.parametrize("way", ["penalised", "callback"])
def test_a_model_that_is_made_anew_is_the_one_that_was_anchored(way: str, tmp_path: Path) -> None:
    made: list[Any] = []

    def init(by: float) -> Any:
        found = model()
        with torch.no_grad():
            found.model.layers[0].mlp.down_proj.weight.add_(by * len(made))
        made.append(None)
        return found

    for by in (0.0, 0.1):
        own = penalty()
        arguments: dict[str, Any] = {
            "model_init": partial(init, by),
            "args": TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"),
            "train_dataset": batches_of(8, VOCABULARY),
        }
        if way == "callback":
            anew = Trainer(**arguments, callbacks=[RotationPenaltyCallback(own)])
        else:
            anew = penalised(Trainer)(**arguments, rotation=own)
        callback = next(c for c in anew.callback_handler.callbacks if isinstance(c, RotationPenaltyCallback))
        assert pickle.loads(pickle.dumps(callback)).penalty.state_dict() == own.state_dict()
        if by:
            with pytest.raises(ValueError, match=r"model_init: got other weights(.|\n)*layers.0.mlp.down_proj"):
                anew.train()
        else:
            anew.train()
        assert own.step == (0 if by else 1)


def test_a_training_step_that_leaves_the_penalty_out_is_refused(tmp_path: Path) -> None:
    class Plain(Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    class Above(RotationPenaltyMixin, Trainer):  # type: ignore[misc]
        training_step = Plain.training_step

    arguments: dict[str, Any] = {
        "args": TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no"),
        "train_dataset": batches_of(16, VOCABULARY),
    }
    with pytest.raises(ValueError, match=r"training_step: got a step .* without the penalty, .* super\(\)"):
        Above(model=model(), rotation=penalty(), **arguments).train()
    own = penalty()
    penalised(Plain)(model=model(), rotation=own, **arguments).train()
    assert own.step == 2


def test_penalised_takes_trainers() -> None:
    class Own(RotationPenaltyMixin, Trainer):
        pass

    assert penalised(Own) is Own
    assert penalised(Trainer) is penalised(Trainer)
    assert penalised(Trainer).__name__ == "PenalisedTrainer"
    with pytest.raises(ValueError, match="expected Trainer or a subclass of it"):
        penalised(TrainingArguments)


def test_arguments_of_a_command_line() -> None:
    def parse(*words: str) -> rk.RotationPenalty | None:
        (arguments,) = HfArgumentParser(RotationArguments).parse_args_into_dataclasses(list(words))
        return from_arguments(arguments)

    assert parse() is None
    found = parse("--rotation_rank", "8", "--rotation_coeff", "0.5", "--rotation_include", "*q_proj*", "*k_proj*")
    assert found is not None and found.mode == "gradient"
    anchors = found.anchor(model()).anchors
    assert anchors is not None and len(anchors) == 4 and {a.rank for a in anchors.values()} == {8}
    assert found.anchor(model())._coeff() == 0.5
    projecting = parse("--rotation_rank", "0.9", "--rotation_budget", "0.05", "--rotation_mode", "project")
    assert projecting is not None and projecting.mode == "project"
    with pytest.raises(ValueError, match="rotation_rank: got 8.5, expected a whole number"):
        parse("--rotation_rank", "8.5")
    with pytest.raises(ValueError, match="rotation_rank: got none beside rotation_budget"):
        parse("--rotation_budget", "0.05")
