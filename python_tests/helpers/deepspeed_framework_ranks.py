"""The ranks' part in the tests of integrations under DeepSpeed, on CPUs over gloo."""

from __future__ import annotations

import os
import sys
import tempfile
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import rpsft_kernels as rk
from framework_ranks import CLIP, COEFF, SIZE, VOCABULARY, forget, join, llama, penalty
from llama import drift
from recorded import Named, Step, batches_of, error, received, repeat_in_float64

RATE = 0.5


def prepare() -> None:
    join()
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
    os.environ.pop("ACCELERATE_USE_CPU", None)
    import deepspeed

    # An all-reduce for inference, with which a compiler would be busy for a minute.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    assert deepspeed


def whole(model: nn.Module) -> Named:
    import deepspeed

    named = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}


def moved_model(own: rk.RotationPenalty) -> Any:
    """Return a model whose penalty is anchored where it was before it moved."""
    model = llama()
    own.anchor(model)
    drift(model, 0.02)
    return model


def config_of(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def worst_of(weights: list[Named], batches: list[Any], own: rk.RotationPenalty, divide: bool) -> list[float]:
    """Return the errors of all steps: SGD's steps tell the gradients that it has received.

    Every rank has trained with the same batches: without a GPU, Accelerate does not count the ranks of DeepSpeed.
    """
    errors = []
    assert own.anchors is not None and len(weights) > 2
    for i, (before, after) in enumerate(pairwise(weights)):
        found = {name: (before[name].double() - after[name].double()) / RATE for name in before}
        step = Step(before, found, batches[4 * i : 4 * i + 4])
        task = repeat_in_float64(llama(), step, divide)
        errors.append(error(found, received(llama(), step, task, own.anchors, COEFF, CLIP)))
    return errors


def trainers_of_transformers(stage: int) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from rpsft_kernels.integrations.transformers import penalised

    own, batches = penalty(), []
    model = moved_model(own)
    weights = [{name: p.detach().clone() for name, p in model.named_parameters()}]

    class Plain(Trainer):  # type: ignore[misc]
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
            return self.optimizer

        def compute_loss(
            self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **options: Any
        ) -> Any:
            batches.append({**inputs, "num_items_in_batch": num_items_in_batch})
            return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **options)

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            weights.append(whole(model))

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            num_train_epochs=1,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            learning_rate=RATE,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            deepspeed=config_of(stage),
        )
        data = batches_of(SIZE, VOCABULARY)
        made = penalised(Plain)(model=model, args=args, train_dataset=data, callbacks=[Look()], rotation=own)
        made.train()
    name = f"Trainer, ZeRO-{stage}"
    logged = [log["rotation/R"] for log in made.state.log_history if "loss" in log]
    found = {name: worst_of(weights, batches, own, divide=False), f"{name}, R": logged}
    forget()
    return found


def loops_of_accelerate(stage: int) -> dict[str, Any]:
    from accelerate import Accelerator, DeepSpeedPlugin

    from rpsft_kernels.integrations.accelerate import attach

    own, batches = penalty(), []
    model = moved_model(own)
    weights = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    accelerator = Accelerator(
        gradient_accumulation_steps=4, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config_of(stage))
    )
    data = DataLoader(batches_of(SIZE, VOCABULARY), batch_size=1)  # type: ignore[arg-type]
    engine, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE), data)
    attach(accelerator, own, engine)
    for batch in data:
        with accelerator.accumulate(engine):
            batches.append(batch)
            accelerator.backward(engine(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                weights.append(whole(model))
    forget()
    return {f"Accelerate, ZeRO-{stage}": worst_of(weights, batches, own, divide=True)}


def all_of_deepspeed() -> dict[str, Any]:
    prepare()
    found: dict[str, Any] = {}
    for stage in (1, 2, 3):
        found |= trainers_of_transformers(stage)
    for stage in (2, 3):
        found |= loops_of_accelerate(stage)
    return found
