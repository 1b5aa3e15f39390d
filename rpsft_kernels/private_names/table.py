"""Each private name of torch and DeepSpeed that this package uses, with the versions that have it."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch

# The oldest and the newest version whose sources were read.
READ = {
    "torch": ("2.6", "2.13"),
    "deepspeed": ("0.19.5", "0.19.8"),
    "lightning": ("2.6.6", "2.6.6"),
    "accelerate": ("1.15.0", "1.15.0"),
}
_ABSENT = object()


@dataclass(frozen=True)
class Row:
    """One name as some versions of a library spell it.

    Attributes:
        library: the library whose version decides.
        holder: the class or module that has the attribute.
        meaning: the attribute's meaning. Rows of one holder and meaning are spellings of one attribute, newest first.
        name: the attribute's name.
        since: the first version in ``READ`` that has it.
        until: the last version that has it; "" where the newest in ``READ`` does.
    """

    library: str
    holder: str
    meaning: str
    name: str
    since: str
    until: str = ""

    def __str__(self) -> str:
        versions = f"{self.since} to {self.until}" if self.until else f"{self.since} and newer"
        return f"{self.name} ({self.library} {versions})"


def _rows(library: str, holder: str, *names: tuple[str, str]) -> list[Row]:
    return [Row(library, holder, meaning, name, READ[library][0]) for meaning, name in names]


TABLE: tuple[Row, ...] = (
    # The component that a wrapping module puts into a parameter's path. distributed/names.py
    *_rows("torch", "torch.compile's OptimizedModule", ("wrapped module", "_orig_mod")),
    *_rows("torch", "FullyShardedDataParallel", ("wrapped module", "_fsdp_wrapped_module")),
    *_rows("torch", "checkpoint_wrapper's CheckpointWrapper", ("wrapped module", "_checkpoint_wrapped_module")),
    # Fabric's wrapper shows what it wraps twice: as it is called, in other wrappers, and as it came.
    Row("lightning", "_FabricModule", "wrapped module", "_forward_module", "2.6.6"),
    Row("lightning", "_FabricModule as it came", "wrapped module", "_original_module", "2.6.6"),
    # What an accelerator has prepared, models as they were before. integrations/accelerate.py
    *_rows("accelerate", "Accelerator", ("prepared models", "_models"), ("prepared optimizers", "_optimizers")),
    # Written, not read: Dynamo takes the result of a function with this attribute for a constant. ops/dispatch.py
    *_rows("torch", "function", ("constant under Dynamo", "_dynamo_marked_constant")),
    # The modules and parameters that a module has now. distributed/snapshot.py
    *_rows("torch", "Module", ("modules by name", "_modules"), ("parameters by name", "_parameters")),
    # The modes that are on, and whether one makes addresses meaningless. evaluation/plan.py
    *_rows("torch", "torch.utils._python_dispatch", ("modes that are on", "_get_current_dispatch_mode_stack")),
    *_rows("torch", "TorchDispatchMode", ("kind, of torch's own", "_mode_key")),
    # Whether tensors may have tangents, without a look at each. evaluation/requests.py
    *_rows("torch", "torch.autograd.forward_ad", ("current level", "_current_level")),
    # Transforms of torch.func, and their tensors. evaluation/transforms.py, evaluation/projection.py
    *_rows(
        "torch",
        "torch._C._functorch",
        ("innermost transform, or None", "peek_interpreter_stack"),
        ("whether a transform differentiates a tensor", "is_gradtrackingtensor"),
        ("whether a tensor is a batch", "is_batchedtensor"),
        ("whether a tensor is a batch of gradients", "is_legacy_batchedtensor"),
    ),
    # The store through which ranks learn which of them are gone. distributed/group_call.py
    *_rows("torch", "torch.distributed.distributed_c10d", ("store of the job", "_get_default_store")),
    # DDP: the parameters that it averages, and when it leaves a gradient alone. distributed/discover.py
    *_rows(
        "torch",
        "DistributedDataParallel",
        ("parameters when it was made", "_module_parameters"),
        ("facts about itself", "_get_ddp_logging_data"),
        ("whether it looks for unused parameters", "find_unused_parameters"),
        ("whether its graph is static", "static_graph"),
    ),
    # Hooks and optimizers that take a gradient within the backward pass. distributed/gradient_hooks.py
    *_rows(
        "torch",
        "Tensor",
        ("hooks after its gradient is complete", "_post_accumulate_grad_hooks"),
        ("hooks that get its gradient", "_backward_hooks"),
    ),
    *_rows("torch", "optimizer in backward", ("optimizers of a parameter", "_in_backward_optimizers")),
    # Fused optimizers divide gradients by GradScaler's scale within their step. integrations/lightning.py
    *_rows("torch", "Optimizer", ("whether its step unscales gradients", "_step_supports_amp_scaling")),
    # DTensor: one group over several dimensions of a mesh; the order of cuts of one dimension. distributed/dtensor.py
    *_rows("torch", "DeviceMesh", ("mesh of one dimension with the same ranks", "_flatten")),
    *_rows("torch", "_StridedShard", ("number of shards that cut before it", "split_factor")),
    # FSDP2: the sharded parameter for each one that a module shows. distributed/dtensor.py
    *_rows("torch", "FSDPModule", ("state", "_get_fsdp_state")),
    Row("torch", "FSDPState", "groups of parameters", "_fsdp_param_groups", "2.12"),
    # One group or None. From 2.12 on a property, which raises where there are several.
    Row("torch", "FSDPState", "groups of parameters", "_fsdp_param_group", "2.6", "2.11"),
    *_rows("torch", "FSDPParamGroup", ("parameters", "fsdp_params")),
    *_rows("torch", "FSDPParam", ("sharded parameter", "sharded_param"), ("place in the model", "_module_info")),
    *_rows("torch", "ParamModuleInfo", ("module", "module"), ("name in the module", "param_name")),
    # FSDP1: the range of each weight in this rank's flat shard. distributed/fsdp1.py
    *_rows("torch", "FullyShardedDataParallel", ("handle, or None where it flattens nothing", "_handle")),
    *_rows(
        "torch",
        "FlatParamHandle",
        ("flat parameter", "flat_param"),
        ("whether modules keep their own parameters", "_use_orig_params"),
        ("whether ranks hold shards", "uses_sharded_strategy"),
        ("ranks that hold the shards", "process_group"),
        ("dtype of the forward and the backward pass", "_fwd_bwd_param_dtype"),
        ("whether gradients keep that dtype", "_keep_low_precision_grads"),
        ("whether parameters are between forward and backward pass", "_skipped_use_sharded_views"),
    ),
    *_rows(
        "torch",
        "FlatParameter",
        ("names of its weights", "_fqns"),
        ("shapes of its weights", "_shapes"),
        ("modules' own parameters", "_params"),
        ("weights tied to its weights", "_shared_param_infos"),
        ("where its weights lie in the shard", "_shard_param_infos"),
        ("size of the shard", "_sharded_size"),
    ),
    *_rows(
        "torch",
        "SharedParamInfo",
        ("name", "param_name"),
        ("module's name", "module_name"),
        ("name of the weight that it is tied to", "prim_param_name"),
        ("name of that weight's module", "prim_module_name"),
    ),
    *_rows(
        "torch",
        "_ShardParamInfo",
        ("whether the shard has any of the weight", "in_shard"),
        ("where the weight begins in the shard", "offset_in_shard"),
        ("first element of the weight", "intra_param_start_idx"),
        ("last element of the weight", "intra_param_end_idx"),
    ),
    # DeepSpeed ZeRO-1 and 2: the ranks that average. distributed/discover.py
    *_rows("deepspeed", "DeepSpeedEngine", ("ranks that average gradients", "data_parallel_group")),
    # DeepSpeed ZeRO-1 and 2, and its bfloat16 optimizer: the optimizer's part of a parameter. distributed/weight.py
    *_rows("deepspeed", "linked parameter", ("link to the optimizer's part of it", "_hp_mapping")),
    # The masters of these, a range of each group of parameters on every rank. distributed/zero_replica.py
    *_rows(
        "deepspeed",
        "DeepSpeedZeroOptimizer",
        ("parameters of each group, flat", "bit16_groups_flat"),
        ("masters of each group, flat, of this rank", "single_partition_of_fp32_groups"),
        ("ranks that divide each group", "real_dp_process_group"),
        ("whether it is on the CPU", "cpu_offload"),
    ),
    *_rows(
        "deepspeed",
        "BF16_Optimizer",
        ("parameters of each group, flat", "bf16_groups_flat"),
        ("masters of each group, flat, of this rank", "fp32_groups_flat_partition"),
        ("ranks that divide each group", "real_dp_process_group"),
    ),
    # DeepSpeed ZeRO-3: a parameter's partition, its master, and whether it has a gradient. distributed/zero3.py
    *_rows(
        "deepspeed",
        "ZeRO-3 parameter",
        ("identity", "ds_id"),
        ("shape of the whole", "ds_shape"),
        ("number of elements of the whole", "ds_numel"),
        ("ranks that hold it", "ds_process_group"),
        ("partition", "ds_tensor"),
        ("optimizer", "_z3_optimizer"),
    ),
    *_rows("deepspeed", "ZeRO-3 partition", ("number of elements", "ds_numel")),
    *_rows(
        "deepspeed",
        "DeepSpeedZeroOptimizer_Stage3",
        ("parameters with a gradient in this step", "_offload_boundary_param_ids"),
        ("whether it is on the CPU", "offload_optimizer"),
        ("whether a backward pass has ended", "_epilogue_ran_this_backward"),
        ("number of the micro-batch", "micro_step_id"),
        ("whether the micro-batch is the last of its step", "is_gradient_accumulation_boundary"),
        ("averaged gradients", "averaged_gradients"),
        ("what gradients are multiplied by", "loss_scale"),
        ("masters of each group, flat", "fp32_partitioned_groups_flat"),
        ("group, first element and number of elements in it of each trained parameter", "grad_position"),
        ("key of a parameter among trained ones", "get_param_id"),
    ),
)

spellings: dict[tuple[str, str], list[Row]] = {}
for _row in TABLE:
    spellings.setdefault((_row.holder, _row.meaning), []).append(_row)


def read(owner: object, holder: str, meaning: str) -> Any:
    """Read an attribute of ``owner`` by the first of its spellings in ``TABLE`` that ``owner`` has.

    Raises:
        RuntimeError: it has none of them.
    """
    rows = spellings[holder, meaning]
    for row in rows:
        value = getattr(owner, row.name, _ABSENT)
        if value is not _ABSENT:
            return value
    library = rows[0].library
    installed = _installed_version(library)
    oldest, newest = READ[library]
    raise RuntimeError(
        f"{library}: got version {installed}, whose {holder} has no {' and no '.join(map(str, rows))} "
        f"({meaning}), expected {library} {oldest} to {newest}, whose private names this package knows; install one "
        "of these, or a version of this package that knows yours"
    )


def _installed_version(library: str) -> str:
    if library == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
