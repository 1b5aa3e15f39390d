from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.fsdp import FSDPModule, fully_shard

from ranks import FSDP2_RUNS
from rpsft_kernels.distributed.dtensor import gathered_by_fsdp2
from rpsft_kernels.private_names import Zero3Parameter, fsdp2_parameters, shards_before
from rpsft_kernels.private_names.table import TABLE, Row, read, spellings

ROOT = Path(__file__).parents[1]
# The files in which torch defines each holder or, for wrapped modules, names them.
SOURCES = {
    "torch.compile's OptimizedModule": "_dynamo/eval_frame.py",
    "checkpoint_wrapper's CheckpointWrapper": "distributed/algorithms/_checkpoint/checkpoint_wrapper.py",
    "function": "_dynamo/variables/functions.py",
    "Module": "nn/modules/module.py",
    "torch.utils._python_dispatch": "utils/_python_dispatch.py",
    "TorchDispatchMode": "_subclasses/fake_tensor.py",
    "torch.autograd.forward_ad": "autograd/forward_ad.py",
    "torch._C._functorch": "_C/_functorch.pyi",
    "torch.distributed.distributed_c10d": "distributed/distributed_c10d.py",
    "DistributedDataParallel": "nn/parallel/distributed.py",
    "Tensor": "overrides.py",
    "optimizer in backward": "distributed/optim/apply_optimizer_in_backward.py",
    "Optimizer": "amp/grad_scaler.py",
    "DeviceMesh": "distributed/device_mesh.py",
    "_StridedShard": "distributed/tensor/placement_types.py",
    "FSDPModule": "distributed/fsdp/_fully_shard/_fully_shard.py",
    "FSDPState": "distributed/fsdp/_fully_shard/_fsdp_state.py",
    "FSDPParamGroup": "distributed/fsdp/_fully_shard/_fsdp_param_group.py",
    "FSDPParam": "distributed/fsdp/_fully_shard/_fsdp_param.py",
    "ParamModuleInfo": "distributed/fsdp/_fully_shard/_fsdp_param.py",
    "FullyShardedDataParallel": "distributed/fsdp/_common_utils.py",
    "FlatParamHandle": "distributed/fsdp/_flat_param.py",
    "FlatParameter": "distributed/fsdp/_flat_param.py",
    "SharedParamInfo": "distributed/fsdp/_flat_param.py",
    "_ShardParamInfo": "distributed/fsdp/_flat_param.py",
}
# Names of the table that are words of others, too.
COMMON = {"module", "param_name", "module_name", "process_group", "loss_scale", "flat_param"}


# -- the table -----------------------------------------------------------------------------------------------


def release(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


@pytest.mark.parametrize("row", [row for row in TABLE if row.library == "torch"], ids=str)
def test_the_installed_torch_has_what_the_table_says(row: Row) -> None:
    installed = release(torch.__version__)
    if installed < release(row.since) or (row.until and installed > release(row.until)):
        # Others may be left for compatibility.
        assert any(
            release(other.since) <= installed and (not other.until or installed <= release(other.until))
            for other in spellings[row.holder, row.meaning]
        )
        return
    source = (Path(torch.__file__).parent / SOURCES[row.holder]).read_text()
    assert re.search(rf"\b{row.name}\b", source)


@pytest.mark.parametrize("key", spellings, ids=" ".join)
def test_what_no_version_spells_so_is_an_error_that_names_the_version(key: tuple[str, str]) -> None:
    rows = spellings[key]
    with pytest.raises(RuntimeError) as caught:
        read(object(), *key)
    message, library = str(caught.value), rows[0].library
    installed = torch.__version__
    if library != "torch":
        try:
            installed = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            installed = "unknown"
    assert message.startswith(f"{library}: got version {installed}, whose {key[0]} has no ")
    assert all(str(row) in message for row in rows)
    assert f"expected {library} " in message and "install one of these" in message


def test_the_newest_spelling_that_is_there_is_read() -> None:
    what = ("FSDPState", "groups of parameters")
    assert [row.name for row in spellings[what]] == ["_fsdp_param_groups", "_fsdp_param_group"]
    assert read(SimpleNamespace(_fsdp_param_groups=[1], _fsdp_param_group=2), *what) == [1]
    assert read(SimpleNamespace(_fsdp_param_group=None), *what) is None


def other_uses(path: Path) -> Iterator[str]:
    """Attributes with a leading underscore that the project does not define, and names of the table, used or quoted."""
    listed = {row.name for row in TABLE} - COMMON
    for node in ast.walk(ast.parse(path.read_text())):
        found = None
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr in listed or (private and not own and node.attr not in defined()):
                found = node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in listed:
            found = node.value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch._", "deepspeed.runtime")):
            found = node.module
        if found is not None:
            yield f"{path}:{getattr(node, 'lineno', 0)}: {found}"


def files() -> list[Path]:
    folders = ("rpsft_kernels", "benchmarks", "build_tools")
    return [ROOT / "setup.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


_defined: set[str] = set()


def defined() -> set[str]:
    """Every name that the project gives to something of its own, those of namedtuples, and ``os._exit``: Python
    documents these.
    """
    if not _defined:
        _defined.update(("_replace", "_fields", "_asdict", "_exit"))
        for path in files():
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    _defined.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    _defined.add(node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                        _defined.add(node.attr)
    return _defined


def test_no_other_file_uses_a_private_name() -> None:
    own = ROOT / "rpsft_kernels" / "private_names"
    assert [use for path in files() if own not in path.parents for use in other_uses(path)] == []


def test_private_names_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "planted.py"
    source.write_text(
        "from torch._dynamo import disable\ny = x._local_tensor\nz = getattr(x, 'ds_id')\nw = x.ds_shape\n"
    )
    seen = {use.split(": ")[-1] for use in other_uses(source)}
    assert seen == {"torch._dynamo", "_local_tensor", "ds_id", "ds_shape"}


# -- FSDP2 ---------------------------------------------------------------------------------------------------


class Fake(FSDPModule, nn.Linear):
    """A module that FSDP2 manages, with a state that a test gives it."""

    def __new__(cls, *sizes: int) -> Any:
        # FSDPModule's takes it for one that was made by fully_shard.
        return object.__new__(cls)

    def __init__(self, state: object) -> None:
        nn.Linear.__init__(self, 3, 2, bias=False)
        self.fake_state = state

    def _get_fsdp_state(self) -> Any:
        return self.fake_state


class Later(SimpleNamespace):
    """A state of torch 2.12 and newer: the old name is there, and raises where it would say too little."""

    @property
    def _fsdp_param_group(self) -> Any:
        if len(self._fsdp_param_groups) > 1:
            raise ValueError("use _fsdp_param_groups")
        return next(iter(self._fsdp_param_groups), None)


def group_of(*modules: nn.Module) -> tuple[Any, list[nn.Parameter]]:
    """A group of the weights of ``modules``, which show others than the sharded ones."""
    sharded = [nn.Parameter(torch.zeros(1, 3)) for _ in modules]
    held = [
        SimpleNamespace(sharded_param=parameter, _module_info=SimpleNamespace(module=module, param_name="weight"))
        for parameter, module in zip(sharded, modules, strict=True)
    ]
    return SimpleNamespace(fsdp_params=held), sharded


@pytest.mark.parametrize("spelling", ["one", "list", "both"])
def test_both_spellings_of_the_groups_are_read(spelling: str) -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    group, sharded = group_of(first, second)
    states = {
        "one": SimpleNamespace(_fsdp_param_group=group),
        "list": SimpleNamespace(_fsdp_param_groups=[group]),
        "both": Later(_fsdp_param_groups=[group]),
    }
    model = nn.Sequential(Fake(states[spelling]), first, second)
    found = list(gathered_by_fsdp2(model))
    assert [id(shown) for shown, _ in found] == [id(first.weight), id(second.weight)]
    assert [id(behind) for _, behind in found] == [id(parameter) for parameter in sharded]


def test_several_groups_of_one_module() -> None:
    modules = [nn.Linear(3, 2) for _ in range(3)]
    (group, sharded), (other, rest) = group_of(*modules[:2]), group_of(modules[2])
    model = nn.Sequential(Fake(Later(_fsdp_param_groups=[group, other])), *modules)
    assert [id(behind) for _, behind in gathered_by_fsdp2(model)] == [id(p) for p in sharded + rest]


@pytest.mark.parametrize(
    "state",
    [SimpleNamespace(_fsdp_param_group=None), SimpleNamespace(_fsdp_param_groups=[]), Later(_fsdp_param_groups=[])],
)
def test_a_module_that_manages_nothing_has_no_groups(state: object) -> None:
    assert list(gathered_by_fsdp2(nn.Sequential(Fake(state)))) == []


def test_what_is_sharded_now_is_not_behind_anything() -> None:
    module = nn.Linear(3, 2)
    group, (sharded,) = group_of(module)
    module.weight = sharded
    assert list(gathered_by_fsdp2(nn.Sequential(Fake(SimpleNamespace(_fsdp_param_group=group)), module))) == []


@pytest.mark.parametrize(
    ("state", "missing"),
    [
        (SimpleNamespace(), "_fsdp_param_groups (torch 2.12 and newer) and no _fsdp_param_group (torch 2.6 to 2.11)"),
        (SimpleNamespace(_fsdp_param_groups=[object()]), "fsdp_params"),
        (SimpleNamespace(_fsdp_param_group=SimpleNamespace(fsdp_params=[object()])), "_module_info"),
    ],
)
def test_a_spelling_of_a_torch_to_come_is_an_error(state: object, missing: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"has no {missing}")):
        list(gathered_by_fsdp2(nn.Sequential(Fake(state))))


def test_the_torch_at_hand() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
        parameters = {id(parameter) for parameter in model.parameters()}
        found = [pair for module in model.modules() for pair in fsdp2_parameters(module)]
        assert {id(sharded) for _, sharded in found} == parameters and len(found) == len(parameters)
        assert all(shown is sharded for shown, sharded in found)
        assert list(gathered_by_fsdp2(model)) == []
        if FSDP2_RUNS:
            model.unshard()  # type: ignore[operator]
            assert {id(behind) for _, behind in gathered_by_fsdp2(model)} == {
                id(sharded) for _, sharded in fsdp2_parameters(model)
            }
    finally:
        dist.destroy_process_group()


# -- others --------------------------------------------------------------------------------------------------


def test_placements_of_another_kind_are_not_taken_for_plain_shards() -> None:
    from torch.distributed.tensor import Shard

    assert shards_before(Shard(0)) == shards_before(Shard(1)) == 1
    assert shards_before(SimpleNamespace(split_factor=3)) == 3
    with pytest.raises(RuntimeError, match="_StridedShard has no split_factor"):
        shards_before(SimpleNamespace(dim=0))


def test_a_partitioned_parameter_is_known_by_any_of_its_marks() -> None:
    parameter = nn.Parameter(torch.zeros(0))
    assert Zero3Parameter.of(parameter) is None
    parameter.ds_shape = torch.Size((4, 3))  # type: ignore[attr-defined]
    found = Zero3Parameter.of(parameter)
    assert found is not None and found.shape == (4, 3)
    # One of DeepSpeed's that is not yet under its optimizer.
    assert not found.has_optimizer and found.loss_scale == 1.0
    with pytest.raises(RuntimeError, match=r"ZeRO-3 parameter has no ds_tensor \(deepspeed 0\.19\.5 and newer\)"):
        _ = found.partition


def test_a_torch_without_distributed_serves_one_process() -> None:
    program = """
import without_distributed
import torch
import rpsft_kernels as rk

assert not torch.distributed.is_available()
model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8))
anchors = rk.Anchors.from_model(model, 4, progress=False)
assert rk.rotation_penalty(model, anchors).item() == 0.0
with torch.no_grad():
    model[0].weight.mul_(1.5)
assert rk.accumulate_rotation_grad_(model, anchors, 1.0).item() > 0
assert model[0].weight.grad.norm() > 0 and model[1].weight.grad.norm() == 0
print("done")
"""
    here = Path(__file__).parent / "helpers"
    run = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "done", run.stderr
