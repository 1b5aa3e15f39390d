from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from recorded import Recorder, error, worst
from small_models import tiny_llama

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("datasets")

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from rpsft_kernels.integrations.transformers import penalised

pytestmark = pytest.mark.xdist_group("integrations")
COEFF, CLIP, SCALE = 3.0, 1.0, 2.0
TRAINERS: dict[str, tuple[Any, Any]] = {
    "SFT": (SFTTrainer, SFTConfig),
    "DPO": (DPOTrainer, DPOConfig),
    "GRPO": (GRPOTrainer, GRPOConfig),
}


def llama() -> Any:
    return tiny_llama(vocab_size=64, attn_implementation="eager", pad_token_id=0, eos_token_id=1, bos_token_id=None)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def words(seed: int, count: int) -> str:
    drawn = torch.randint(0, 61, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{int(i)}" for i in drawn)


def examples(kind: str) -> Dataset:
    if kind == "SFT":
        return Dataset.from_list([{"text": words(i, 10)} for i in range(12)])
    rows: list[dict[str, str]] = [{"prompt": words(i, 4)} for i in range(12)]
    if kind == "DPO":
        rows = [{**row, "chosen": words(i + 100, 5), "rejected": words(i + 200, 5)} for i, row in enumerate(rows)]
    return Dataset.from_list(rows)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) + text.count("w1") for text in completions]


def trainer(kind: str, folder: Path, own: rk.RotationPenalty | None, lora: bool, clip: float = CLIP) -> Any:
    cls, config = TRAINERS[kind]
    args: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "max_grad_norm": clip,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
    }
    options: dict[str, Any] = {"model": llama(), "train_dataset": examples(kind), "processing_class": tokenizer()}
    if kind == "GRPO":
        args |= {"num_generations": 2, "max_completion_length": 6}
        options["reward_funcs"] = [reward]
    if lora:
        options["peft_config"] = LoraConfig(r=4, lora_alpha=4 * SCALE, target_modules=["q_proj", "v_proj", "down_proj"])
    elif kind == "DPO":
        options["ref_model"] = llama()
    if own is not None:
        cls = penalised(cls)
        options["rotation"] = own

    class Recording(cls):  # type: ignore[misc]
        def create_optimizer(self, model: Any = None) -> Any:
            # The trainer has wrapped the model by now.
            self.optimizer = Recorder(self.model, moved=0.1 if lora else 0.01)
            return self.optimizer

    torch.manual_seed(0)
    return Recording(args=config(output_dir=str(folder), **args), **options)


def record(kind: str, folder: Path, own: rk.RotationPenalty | None, lora: bool, clip: float = CLIP) -> Any:
    made = trainer(kind, folder, own, lora, clip)
    torch.manual_seed(0)
    made.train()
    return made, made.optimizer.optimizer.steps


@pytest.mark.parametrize("kind", TRAINERS)
def test_trainers_of_all_weights(kind: str, tmp_path: Path) -> None:
    own = rk.RotationPenalty(8, COEFF, basis_dtype=torch.float32)
    made, steps = record(kind, tmp_path, own, lora=False)
    _, plain = record(kind, tmp_path, None, lora=False, clip=0.0)
    assert own.anchors is not None
    assert worst(llama(), steps, [step.gradients for step in plain], own.anchors, COEFF, CLIP) < 3e-6
    logs = made.state.log_history[:3]
    assert [log["rotation/R"] > 0 for log in logs] == [False, True, True]


def adapter_gradients(weights: dict[str, Tensor], anchors: rk.Anchors) -> dict[str, Tensor]:
    """Return dR/dA and dR/dB of R = ||U^T (s B A) V||^2, by autograd in float64."""
    leaves = {name: w.double().requires_grad_() for name, w in weights.items()}
    total = torch.zeros((), dtype=torch.float64)
    for name, anchor in anchors.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.default.weight" not in leaves:
            continue
        delta = SCALE * leaves[f"{layer}.lora_B.default.weight"] @ leaves[f"{layer}.lora_A.default.weight"]
        if anchor.left is not None and anchor.right is not None:
            delta = anchor.left.double().T @ delta @ anchor.right.double()
        total = total + delta.square().sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("kind", TRAINERS)
def test_trainers_of_adapters(kind: str, tmp_path: Path) -> None:
    own = rk.RotationPenalty(8, COEFF, basis_dtype=torch.float32)
    made, steps = record(kind, tmp_path, own, lora=True)
    _, plain = record(kind, tmp_path, None, lora=True, clip=0.0)
    anchors = own.anchors
    assert anchors is not None
    # Under the names of the plain model, whose weights they are of.
    layers = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert set(anchors) == {f"model.layers.{i}.{layer}.weight" for i in range(2) for layer in layers}
    seen = 0.0
    for step, without in zip(steps, plain, strict=True):
        rotation = adapter_gradients(step.weights, anchors)
        wanted = {name: g + COEFF * rotation[name] for name, g in without.gradients.items()}
        norm = torch.stack([g.norm() for g in wanted.values()]).norm()
        wanted = {name: g * min(1.0, float(CLIP / (norm + 1e-6))) for name, g in wanted.items()}
        assert error(step.gradients, wanted) < 3e-6
        seen = max(seen, float(torch.stack([g.norm() for g in rotation.values()]).norm() / norm))
    # Neither is lost in the other.
    assert 0.1 < seen < 10
    assert [log["rotation/R"] > 0 for log in made.state.log_history[:3]] == [False, True, True]


def test_adapters_that_are_resumed_have_the_same_bits(tmp_path: Path) -> None:
    def run(own: rk.RotationPenalty, resume: str | None = None) -> Any:
        made = penalised(SFTTrainer)(
            model=llama(),
            args=SFTConfig(
                output_dir=str(tmp_path),
                max_steps=5,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                save_steps=2,
                report_to=[],
                use_cpu=True,
                bf16=False,
                seed=3,
            ),
            train_dataset=examples("SFT"),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True),
            rotation=own,
        )
        made.train(resume_from_checkpoint=resume)
        return {name: p for name, p in made.model.named_parameters() if p.requires_grad}

    whole, again = (rk.RotationPenalty(8, COEFF, warmup=3) for _ in range(2))
    wanted = run(whole)
    found = run(again, str(tmp_path / "checkpoint-2"))
    assert whole.step == again.step == 5
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name]), name
