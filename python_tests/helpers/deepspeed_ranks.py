"""The ranks' part in the tests of DeepSpeed; it is imported here alone, and runs on the CPU over gloo."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import rpsft_kernels as rk
from llama import (
    COEFF,
    RANK,
    batch,
    distance,
    drift,
    errors,
    expected,
    expected_with,
    llama,
    own_batch,
    task_loss,
    train_alone,
    whole_anchors,
)
from small_models import refused


def initialize(
    model: nn.Module,
    stage: int,
    bfloat16: bool = False,
    accumulation: int = 1,
    offload: bool = False,
    loss_scale: float = 1.0,
    gradient_dtype: str | None = None,
    lr: float = 1e-3,
    round_robin: bool = False,
) -> Any:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        LOCAL_RANK=str(dist.get_rank()),
        MASTER_ADDR="localhost",
        # Never opened: the process group is there already.
        MASTER_PORT="29500",
    )
    import deepspeed

    # An all-reduce for inference, with which a compiler would be busy for a minute.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if round_robin:
        zero["round_robin_gradients"] = True
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed clips by default.
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if bfloat16:
        config["bf16"] = {"enabled": True}
    if gradient_dtype is not None:
        config["data_types"] = {"grad_accum_dtype": gradient_dtype}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if loss_scale != 1.0:
        # Scale the loss as for float16, which DeepSpeed refuses on a CPU.
        engine.optimizer.override_loss_scale(loss_scale)
    return engine


def weights(engine: Any) -> dict[str, Any]:
    return dict(engine.module.named_parameters())


def local_gradients(engine: Any) -> dict[str, Tensor]:
    """Return this rank's partition of each parameter that trains, with its padding."""
    from deepspeed.utils import safe_get_local_grad

    return {name: safe_get_local_grad(p).clone() for name, p in weights(engine).items() if p.requires_grad}


def full_gradients(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    found = {name: safe_get_full_grad(p) for name, p in weights(engine).items()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def whole_parameters(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    parameters = weights(engine)
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().clone() for name, p in parameters.items()}


def move(engine: Any, moved: nn.Module) -> None:
    """Give the engine's model the values of an unwrapped one."""
    import deepspeed

    whole, parameters = dict(moved.named_parameters()), weights(engine)
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0):
        for name, parameter in parameters.items():
            parameter.copy_(whole[name])


def partition(whole: Tensor) -> Tensor:
    """Cut this rank's partition out of a tensor and pad it with zeros, as DeepSpeed documents it."""
    size = dist.get_world_size()
    length = -(-whole.numel() // size)
    filled = torch.cat([whole.reshape(-1), whole.new_zeros(length * size - whole.numel())])
    return filled[length * dist.get_rank() :][:length]


def partition_errors(before: dict[str, Tensor], after: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the worst error of what a call added, relative to the whole gradient's share of one rank."""
    size, worst = dist.get_world_size(), 0.0
    assert set(wanted) <= set(after)
    for name, gradient in after.items():
        change = gradient.double() - before[name].double()
        if name not in wanted:
            assert not change.any(), name
            continue
        assert gradient.numel() == -(-wanted[name].numel() // size)
        share = wanted[name].norm() / size**0.5
        worst = max(worst, float((change - partition(wanted[name])).norm() / share))
    return worst


def partitioned(
    sharded_anchors: bool,
    anchor_options: dict[str, Any],
    bfloat16: bool = False,
    frozen: str = "",
    task: float = 1.0,
    **options: Any,
) -> dict[str, Any]:
    """Run ZeRO-3 at the anchor and on a drifted model, and compare with float64."""
    model, moved = llama(), llama(torch.bfloat16 if bfloat16 else torch.float32)
    drift(moved)
    penalty, wanted = expected_with(anchor_options, model, moved)
    scale = COEFF * options.get("loss_scale", 1.0)
    wanted = {name: scale * g for name, g in wanted.items() if not (frozen and name.startswith(frozen))}
    anchors = whole_anchors(model, **anchor_options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    engine = initialize(model, 3, bfloat16, **options)
    if sharded_anchors:
        anchors = rk.Anchors.from_model(
            engine, RANK, progress=False, **{"basis_dtype": torch.float32, **anchor_options}
        )
        anchors.verify(engine)
    result: dict[str, Any] = {"names": list(anchors), "bytes": anchors.nbytes}
    result["autograd"] = refused(lambda: rk.rotation_penalty(engine, anchors))
    result["before backward"] = refused(lambda: rk.accumulate_rotation_grad_(engine, anchors, COEFF))

    engine.backward(task * task_loss(engine, own_batch()))
    before = local_gradients(engine)
    with torch.no_grad():
        result["at anchor"] = [rk.rotation_penalty(engine, anchors).item()]
    result["at anchor"].append(rk.accumulate_rotation_grad_(engine, anchors, COEFF).item())
    result["changed at anchor"] = [n for n, g in local_gradients(engine).items() if not torch.equal(g, before[n])]

    move(engine, moved)
    with torch.no_grad():
        penalties = [rk.rotation_penalty(engine, anchors)]
    engine.optimizer.zero_grad()
    engine.backward(task * task_loss(engine, own_batch()))
    before = local_gradients(engine)
    penalties.append(rk.accumulate_rotation_grad_(engine, anchors, COEFF))
    result["added"] = partition_errors(before, local_gradients(engine), wanted)
    penalties.append(rk.accumulate_rotation_grad_(engine, anchors, COEFF))
    twice = {name: 2 * g for name, g in wanted.items()}
    result["twice"] = partition_errors(before, local_gradients(engine), twice)
    result["penalty"] = max(abs(p.item() / penalty - 1) for p in penalties)
    result["bits"] = [p.item() for p in penalties]
    if sharded_anchors:
        result["other values"] = refused(lambda: anchors.verify(engine))
    return result


class Odd(nn.Module):
    """Weights that no number of ranks divides, one that leaves ranks empty-handed, one that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in {"first": (11, 7), "second": (5, 11), "small": (2, 2), "unused": (5, 4)}.items():
            layer = nn.Linear(shape[1], shape[0], bias=False)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(shape, generator=generator))
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        # Small, beside the penalty that is to be found again in the sum.
        y: Tensor = self.second(self.first(x)).square().mean() + self.small(x[:, :2]).square().mean()
        return 1e-3 * y


def odd_partitions(steps: int) -> dict[str, Any]:
    """Train :class:`Odd` under ZeRO-3 for some steps, and compare the gradients of each with float64."""
    reference = rk.Anchors.from_model(Odd(), 3, progress=False, basis_dtype=torch.float32)
    model = Odd()
    drift(model, 0.1)
    engine = initialize(Odd(), 3, lr=0.05)
    anchors = rk.Anchors.from_model(engine, 3, progress=False, basis_dtype=torch.float32)
    move(engine, model)
    inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(4))
    result: dict[str, Any] = {"errors": [], "unused": [], "held": {n: a.held.numel for n, a in anchors.items()}}
    for _ in range(steps):
        with torch.no_grad():
            for name, parameter in whole_parameters(engine).items():
                model.get_parameter(name).copy_(parameter)
        _, wanted = expected(model, reference)
        wanted = {name: COEFF * g for name, g in wanted.items()}
        engine.backward(engine(inputs))
        before = local_gradients(engine)
        # DeepSpeed leaves the gradient of the step before there, which is none of this step.
        before["unused.weight"].zero_()
        rk.accumulate_rotation_grad_(engine, anchors, COEFF)
        after = local_gradients(engine)
        result["errors"].append(partition_errors(before, after, wanted))
        engine.step()
    return result


def replicated(stage: int, anchor_options: dict[str, Any], bfloat16: bool = False) -> dict[str, Any]:
    """Run ZeRO-1 or ZeRO-2 with the penalty in the loss, and compare with float64."""
    model, moved = llama(), llama(torch.bfloat16 if bfloat16 else torch.float32)
    drift(moved)
    form = {key: value for key, value in anchor_options.items() if key != "keep_base"}
    whole = whole_anchors(model, **anchor_options)
    penalty, wanted = expected(moved, whole_anchors(model, **form))
    wanted = {name: COEFF * g for name, g in wanted.items()}
    engine = initialize(model, stage, bfloat16)
    anchors = rk.Anchors.from_model(engine, RANK, progress=False, **{"basis_dtype": torch.float32, **anchor_options})
    anchors.verify(engine)
    result: dict[str, Any] = {"bytes": anchors.nbytes, "whole bytes": whole.nbytes, "names": list(anchors)}
    zero = task_loss(engine, own_batch()) * 0
    loss = rk.rotation_penalty(engine, anchors)
    engine.backward(zero + COEFF * loss)
    result["at anchor"] = [loss.item(), *(float(g.abs().max()) for g in full_gradients(engine).values())]
    result["accumulate"] = refused(lambda: rk.accumulate_rotation_grad_(engine, anchors, COEFF))
    engine.step()

    whole_values = dict(moved.named_parameters())
    with torch.no_grad():
        for name, parameter in weights(engine).items():
            parameter.copy_(whole_values[name])
    result["other values"] = refused(lambda: anchors.verify(engine))
    # The order in which gradients come differs; ranks must agree on it.
    for order in ("first", "last", "alone"):
        loss = rk.rotation_penalty(engine, anchors)
        zero = task_loss(engine, own_batch()) * 0
        if order == "last":
            loss = rk.rotation_penalty(engine, anchors)
        engine.backward(COEFF * loss if order == "alone" else zero + COEFF * loss)
        result[f"gradient, penalty {order}"] = errors(full_gradients(engine), wanted)
        engine.step()
        with torch.no_grad():
            for name, parameter in weights(engine).items():
                parameter.copy_(whole_values[name])
    result["penalty"] = abs(loss.item() / penalty - 1)
    result["bits"] = [loss.item()]
    return result


def unpartitioned(accumulation: int) -> dict[str, Any]:
    """Run ZeRO-0, whose optimizer reads .grad: add before the last backward pass, which averages, and after it."""
    moved = llama()
    drift(moved)
    engine = initialize(moved, 0, accumulation=accumulation)
    anchors = whole_anchors(llama())
    _, wanted = expected(moved, anchors)
    wanted = {name: COEFF * gradient for name, gradient in wanted.items()}
    result: dict[str, Any] = {}
    for i, tokens in enumerate(own_batch().chunk(accumulation)):
        loss = 0 * task_loss(engine, tokens)
        if i == accumulation - 1:
            penalty = rk.accumulate_rotation_grad_(engine, anchors, COEFF)
        engine.backward(loss)
        if i == accumulation - 1:
            gradients = {name: p.grad.clone() for name, p in weights(engine).items() if p.grad is not None}
            result["gradient"] = errors(gradients, wanted)
            result["averaged"] = refused(lambda: rk.accumulate_rotation_grad_(engine, anchors, COEFF))
            before = {name: p.detach().clone() for name, p in weights(engine).items()}
        engine.step()
    result["bits"] = penalty.item()
    result["moved"] = [
        name for name, p in weights(engine).items() if name in anchors and not torch.equal(p, before[name])
    ]
    result["anchored"] = list(anchors)
    return result


def add_gradients_of_masters(engine: Any, anchors: rk.Anchors, coeff: float) -> float:
    """Add the gradient of the masters' R between engine.backward and engine.step, as docs/accuracy.md shows."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_grad

    penalty = 0.0
    for name, parameter in engine.module.named_parameters():
        if name in anchors:
            master = safe_get_full_fp32_param(parameter).clone().requires_grad_()
            penalty += rk.accumulate_rotation_grad_(master, anchors[name], coeff).item()
            safe_set_full_grad(parameter, safe_get_full_grad(parameter) + master.grad)
    return penalty


def masters(stage: int) -> dict[str, Any]:
    """Move the float32 masters of a bfloat16 model by less than a rounding step, and compare with float64."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    model = llama(torch.bfloat16)
    anchors = whole_anchors(model, basis_dtype=torch.float32)
    # With float32 gradients stage 1 has another optimizer, whose gradients DeepSpeed's functions do not reach.
    gradient_dtype = None if stage == 1 else "fp32"
    # They are found, unless they are offloaded.
    engine = initialize(model, stage, bfloat16=True, gradient_dtype=gradient_dtype, offload=stage == 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            rk.rotation_penalty(engine, anchors)
    result: dict[str, Any] = {"warnings": [str(warning.message) for warning in caught]}
    moved = llama(torch.bfloat16).float()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        value = whole + 1e-4 * whole.abs().mean() * torch.randn(whole.shape, generator=generator)
        moved.get_parameter(name).data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
    penalty, wanted = expected(moved, anchors)
    with torch.no_grad():
        result["engine"] = rk.rotation_penalty(engine, anchors).item() / penalty
    engine.backward(0 * task_loss(engine, own_batch()))
    found = add_gradients_of_masters(engine, anchors, COEFF)
    result["penalty"] = abs(found / penalty - 1)
    result["gradient"] = errors(full_gradients(engine), {name: COEFF * g for name, g in wanted.items()})
    engine.step()
    return result


def masters_of_partitions(offload: bool) -> dict[str, Any]:
    """Take steps too small for bfloat16 under ZeRO-3, and compare with float64 at the masters."""
    from deepspeed.utils import safe_get_full_fp32_param

    model = llama(torch.bfloat16)
    reference = whole_anchors(model)
    frozen = next(name for name in reference if name.startswith("model.layers.1."))
    model.get_parameter(frozen).requires_grad_(False)
    # In bfloat16 its weights are the model's.
    unrounded = llama()
    for parameter in unrounded.parameters():
        parameter.data.mul_(1 + 2**-10)
    engine = initialize(model, 3, bfloat16=True, gradient_dtype="fp32", offload=offload, lr=1e-6)
    options: dict[str, Any] = {"progress": False, "basis_dtype": torch.float32}
    anchors = {
        "base": rk.Anchors.from_model(engine, RANK, **options),
        "block": rk.Anchors.from_model(engine, RANK, keep_base=False, **options),
        "unrounded": whole_anchors(unrounded),
    }
    result: dict[str, Any] = {"at anchor": {}, "warnings": {}}
    for form, each in anchors.items():
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            result["at anchor"][form] = rk.rotation_penalty(engine, each).item()
        result["warnings"][form] = [str(warning.message) for warning in caught]

    for _ in range(4):
        engine.backward(task_loss(engine, own_batch()))
        rk.accumulate_rotation_grad_(engine, anchors["base"], COEFF)
        engine.step()
    moved, copies = llama(torch.bfloat16).float(), whole_parameters(engine)
    for name, parameter in weights(engine).items():
        if parameter.requires_grad:
            moved.get_parameter(name).data.copy_(safe_get_full_fp32_param(parameter))
    penalty, wanted = expected(moved, reference)
    full = {name: reference[name] for name, anchor in anchors["block"].items() if anchor.form == "full"}
    rest = {name: anchor for name, anchor in reference.items() if name not in full}
    of_full, _ = expected(moved, full)
    moved.load_state_dict(copies, strict=False)
    of_copies, _ = expected(moved, reference)
    of_blocks, _ = expected(moved, rest)
    # Full anchors keep W0 in any case.
    of_blocks += expected(moved, full)[0] if offload else of_full
    engine.backward(0 * task_loss(engine, own_batch()))
    before = local_gradients(engine)
    with torch.no_grad():
        result["R"] = [rk.rotation_penalty(engine, anchors["base"]).item()]
        result["blocks"] = rk.rotation_penalty(engine, anchors["block"]).item() / of_blocks - 1
    result["R"].append(rk.accumulate_rotation_grad_(engine, anchors["base"], COEFF).item())
    result["penalty"] = max(abs(found / penalty - 1) for found in result["R"])
    result["penalty of copies"] = max(abs(found / of_copies - 1) for found in result["R"])
    wanted = {name: COEFF * g for name, g in wanted.items() if name != frozen}
    result["gradient"] = partition_errors(before, local_gradients(engine), wanted)
    return result


def masters_of_replicas(stage: int, gradient_dtype: str | None, folder: str) -> dict[str, Any]:
    """Take steps too small for bfloat16 under ZeRO-1 or ZeRO-2, and compare with float64 at the masters.

    Anchors are saved in ``folder`` before, and loaded after these steps.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    model = llama(torch.bfloat16)
    reference = whole_anchors(model)
    frozen = next(name for name in reference if name.startswith("model.layers.1."))
    model.get_parameter(frozen).requires_grad_(False)
    engine = initialize(model, stage, bfloat16=True, gradient_dtype=gradient_dtype, lr=1e-6)
    options: dict[str, Any] = {"progress": False, "basis_dtype": torch.float32}
    anchors = {
        "made of the engine": rk.Anchors.from_model(engine, RANK, **options),
        "whole": reference,
        "block": rk.Anchors.from_model(engine, RANK, keep_base=False, **options),
    }
    anchors["made of the engine"].verify(engine)
    result: dict[str, Any] = {"at anchor": {}, "warnings": {}, "bytes": anchors["made of the engine"].nbytes}
    result["whole bytes"] = reference.nbytes
    for form, each in anchors.items():
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            result["at anchor"][form] = rk.rotation_penalty(engine, each).item()
        result["warnings"][form] = [str(warning.message) for warning in caught]

    for form, each in anchors.items():
        each.save(f"{folder}/{form}")
    for _ in range(4):
        loss = COEFF * rk.rotation_penalty(engine, anchors["made of the engine"])
        engine.backward(task_loss(engine, own_batch()) + loss)
        engine.step()
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    moved, copies = llama(torch.bfloat16).float(), whole_parameters(engine)
    for name, parameter in weights(engine).items():
        if parameter.requires_grad:
            moved.get_parameter(name).data.copy_(safe_get_full_fp32_param(parameter))
    penalty, wanted = expected(moved, reference)
    moved.load_state_dict(copies, strict=False)
    of_copies, _ = expected(moved, reference)
    wanted = {name: COEFF * g for name, g in wanted.items() if name != frozen}
    for form in ("made of the engine", "whole"):
        with torch.no_grad():
            found = [rk.rotation_penalty(engine, anchors[form]).item()]
        loss = rk.rotation_penalty(engine, anchors[form])
        found.append(loss.item())
        engine.backward(0 * task_loss(engine, own_batch()) + COEFF * loss)
        result[form] = {
            "R": found,
            "penalty": max(abs(each / penalty - 1) for each in found),
            "penalty of copies": max(abs(each / of_copies - 1) for each in found),
            "gradient": errors(full_gradients(engine), wanted),
        }
        engine.step()
    with torch.no_grad():
        for form, each in anchors.items():
            loaded = rk.Anchors.load(f"{folder}/{form}", engine, verify=False)
            same = rk.rotation_penalty(engine, loaded) == rk.rotation_penalty(engine, each)
            result.setdefault("resumed", {})[form] = bool(same)
    # What somebody has written into the model alone counts.
    with torch.no_grad():
        for name in wanted:
            weights(engine)[name].mul_(1.5)
            moved.get_parameter(name).copy_(weights(engine)[name])
        written, _ = expected(moved, reference)
        result["written"] = rk.rotation_penalty(engine, anchors["made of the engine"]).item() / written - 1
    return result


def masters_in_another_order() -> float:
    """Return the error of R at masters that lie in another order than the parameters came in."""
    model = llama(torch.bfloat16)
    reference = whole_anchors(model)
    engine = initialize(model, 2, bfloat16=True, lr=1e-6, round_robin=True)
    for _ in range(4):
        engine.backward(task_loss(engine, own_batch()))
        engine.step()
    moved, optimizer = llama(torch.bfloat16).float(), engine.optimizer
    assert optimizer.round_robin_bit16_indices[0] != sorted(optimizer.round_robin_bit16_indices[0])
    parts = [torch.empty_like(optimizer.single_partition_of_fp32_groups[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, optimizer.single_partition_of_fp32_groups[0].detach())
    flat, first = torch.cat(parts).detach(), optimizer.bit16_groups_flat[0].storage_offset()
    for name, parameter in weights(engine).items():
        master = flat[parameter.storage_offset() - first :][: parameter.numel()].view(parameter.shape)
        assert torch.equal(master.bfloat16(), parameter)
        moved.get_parameter(name).data.copy_(master)
    with torch.no_grad():
        return abs(rk.rotation_penalty(engine, reference).item() / expected(moved, reference)[0] - 1)


def train(steps: int, stage: int, accumulation: int = 1, **options: Any) -> float:
    """Return the distance of a run under DeepSpeed from the unsharded one."""
    alone = train_alone(steps, stage == 3)
    engine = initialize(llama(), stage, accumulation=accumulation, **options)
    anchors = rk.Anchors.from_model(engine, RANK, progress=False, basis_dtype=torch.float32)
    for _ in range(steps):
        for i, tokens in enumerate(own_batch().chunk(accumulation)):
            loss = task_loss(engine, tokens)
            engine.backward(loss if stage == 3 else loss + COEFF * rk.rotation_penalty(engine, anchors))
            if stage == 3 and i == accumulation - 1:
                rk.accumulate_rotation_grad_(engine, anchors, COEFF)
            engine.step()
    assert engine.global_steps == steps and len(batch()) % (dist.get_world_size() * accumulation) == 0
    return distance(whole_parameters(engine), alone)
