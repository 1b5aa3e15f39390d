"""The ranks' part in the tests of integrations: other people's loops under DDP and FSDP2, on CPUs over gloo."""

from __future__ import annotations

import os
import runpy
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import rpsft_kernels as rk
from recorded import Recorder, Step, batches_of, listen, repeat_in_float64, worst
from small_models import refused, tiny_llama

VOCABULARY, COEFF, CLIP, SIZE = 64, 3.0, 1.0, 16


def llama() -> Any:
    return tiny_llama(vocab_size=VOCABULARY, attn_implementation="eager")


def penalty(**options: Any) -> rk.RotationPenalty:
    strength = {} if "budget" in options else {"coeff": COEFF}
    return rk.RotationPenalty(8, basis_dtype=torch.float32, **strength, **options)


def join() -> None:
    """Tell frameworks what a launcher would: the process group is there already."""
    os.environ.update(
        RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        LOCAL_RANK=str(dist.get_rank()),
        LOCAL_WORLD_SIZE=str(dist.get_world_size()),
        MASTER_ADDR="localhost",
        # Never opened.
        MASTER_PORT="29500",
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )


def trainer(way: str, own: rk.RotationPenalty, folder: str, unlike: float = 0.0, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from rpsft_kernels.integrations.transformers import RotationPenaltyCallback, penalised

    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(unlike)
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        max_grad_norm=CLIP,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    if args.fsdp:
        # What it sets up, it sets up for CPUs.
        assert args.device.type == "cpu"
        gpus_in_name()
    arguments: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": batches_of(SIZE, VOCABULARY),
    }

    class Recording(Trainer):  # type: ignore[misc]
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = Recorder(self.model)
            return self.optimizer

    if way == "callback":
        return Recording(**arguments, callbacks=[RotationPenaltyCallback(own)])
    return penalised(Recording)(**arguments, rotation=own)


def everyones(steps: list[Step]) -> list[Step]:
    """Return the steps with the micro-batches of all ranks."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [step.batches for step in steps])
    return [
        Step(step.weights, step.gradients, [batch for rank in gathered for batch in rank[i]])
        for i, step in enumerate(steps)
    ]


def worst_of(
    recorder: Recorder, own: rk.RotationPenalty, divide: bool, prefix: str = "", clip: float | None = CLIP
) -> float:
    steps = everyones(recorder.steps)
    anchors = rk.Anchors({name.removeprefix(prefix): anchor for name, anchor in whole_anchors(own).items()})
    return worst(llama(), steps, [repeat_in_float64(llama(), s, divide) for s in steps], anchors, COEFF, clip)


def whole_anchors(own: rk.RotationPenalty) -> rk.Anchors:
    """Return the penalty's anchors as they lie on no ranks: subspaces found again, of the same weights."""
    assert own.anchors is not None
    if all(anchor.part is None for anchor in own.anchors.values()):
        return own.anchors
    with tempfile.TemporaryDirectory() as folder:
        places: list[Any] = [folder]
        dist.broadcast_object_list(places)
        own.anchors.save(Path(places[0], "anchors"))
        whole = rk.Anchors.load(Path(places[0], "anchors"))
        dist.barrier()
    return whole


def train_and_listen(made: Any) -> Recorder:
    def recorder() -> Recorder:
        return made.optimizer.optimizer  # type: ignore[no-any-return]

    # The optimizer is made when training begins.
    with listen(made.model, recorder):
        made.train()
    return recorder()


def trainers_of_transformers() -> dict[str, Any]:
    """DDP, by the subclass and by the callback."""
    found: dict[str, Any] = {}
    for way in ("penalised", "callback"):
        own = penalty()
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(way, own, folder)
            recorder = train_and_listen(made)
        found[f"DDP, {way}"] = worst_of(recorder, own, divide=False)
        found[f"DDP, {way}, bits"] = bits(made.model)
    return found


def trainers_with_other_heads() -> dict[str, Any]:
    """Models of which the ranks have other weights until DDP makes them equal."""
    found: dict[str, Any] = {}
    for way in ("penalised", "callback"):
        own = penalty()
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(way, own, folder, unlike=0.1 * dist.get_rank())
            found[f"unlike, {way}"] = refused(made.train)
        if found[f"unlike, {way}"] == "accepted":
            found["unlike, digests"] = own.state_dict()["anchors"]
            found["unlike, bits"] = bits(made.model)
    return found


def bits(model: nn.Module) -> list[float]:
    return [float(p.detach().double().sum()) for p in model.parameters()]


def gpus_in_name() -> None:
    """Let Accelerate take the ranks for GPUs: it shards models for those alone."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def forget() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def fsdp2_in_trainer() -> dict[str, Any]:
    found = {}
    for way in ("penalised", "callback"):
        own = penalty()
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(
                way,
                own,
                folder,
                fsdp=True,
                fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
            )
            recorder = train_and_listen(made)
        found[f"FSDP2, {way}"] = worst_of(recorder, own, divide=False)
        found[f"FSDP2, {way}, parameters"] = type(next(made.model.parameters())).__name__
        forget()
    return found


def loops_of_accelerate() -> dict[str, Any]:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    from rpsft_kernels.integrations.accelerate import attach

    found: dict[str, Any] = {}
    for name in ("DDP", "FSDP2"):
        plugin = None
        if name == "FSDP2":
            gpus_in_name()
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                cpu_ram_efficient_loading=False,
            )
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4, fsdp_plugin=plugin)
        bare = llama()
        data = DataLoader(batches_of(SIZE, VOCABULARY), batch_size=1)  # type: ignore[arg-type]
        model, optimizer, data = accelerator.prepare(bare, Recorder(bare), data)
        own = penalty()
        attach(accelerator, own, model)
        for batch in data:
            with accelerator.accumulate(model):
                optimizer.optimizer.batches.append(batch)
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        found[f"{name}, attach"] = worst_of(optimizer.optimizer, own, divide=True)
        found[f"{name}, attach, parameters"] = type(next(model.parameters())).__name__
        forget()
    return found


def trainers_of_lightning() -> dict[str, Any]:
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from rpsft_kernels.integrations.lightning import RotationPenaltyCallback

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, sharded: bool) -> None:
            super().__init__()
            self.sharded, self.model = sharded, llama()

        def configure_model(self) -> None:
            if self.sharded and not isinstance(next(self.model.parameters()), DTensor):
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> Recorder:
            return Recorder(self.model)

    found: dict[str, Any] = {}
    fsdp2 = ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    for name in ("DDP", "FSDP2"):
        own, module = penalty(), Module(sharded=name == "FSDP2")
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy="ddp" if name == "DDP" else fsdp2,
            max_epochs=1,
            accumulate_grad_batches=4,
            gradient_clip_val=CLIP if name == "DDP" else None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[RotationPenaltyCallback(own)],
        )
        data = DataLoader(batches_of(SIZE, VOCABULARY), batch_size=1)  # type: ignore[arg-type]
        with listen(module.model, lambda: trainer.optimizers[0]):  # noqa: B023
            trainer.fit(module, data)
        recorder: Recorder = trainer.optimizers[0]
        found[f"{name}, Lightning"] = worst_of(
            recorder, own, divide=True, prefix="model.", clip=trainer.gradient_clip_val
        )
        found[f"{name}, Lightning, parameters"] = type(next(module.model.parameters())).__name__
    return found


def example_of_accelerate() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "examples" / "train_accelerate_fsdp2.py"
    gpus_in_name()
    metrics = runpy.run_path(str(path))["main"](["--steps", "20"])
    forget()
    return {"example": metrics["rotation/R"]}


def all_frameworks() -> dict[str, Any]:
    """One launch for all: each framework takes seconds to import. The example is the last, which ends the group."""
    join()
    found = trainers_of_transformers()
    found |= trainers_with_other_heads()
    forget()
    for others in (fsdp2_in_trainer, loops_of_accelerate, trainers_of_lightning, example_of_accelerate):
        found |= others()
    return found
