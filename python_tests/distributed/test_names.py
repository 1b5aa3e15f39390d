from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import rpsft_kernels as rk
from rpsft_kernels.distributed.names import canonical_name, named_weights


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)
        self.head = nn.Linear(2, 3, bias=False)


NAMES = ["module.weight", "module.bias", "head.weight"]


@pytest.mark.parametrize(
    ("name", "replicas", "expected"),
    [
        ("a.weight", (), "a.weight"),
        ("_orig_mod.a.weight", (), "a.weight"),
        ("a._checkpoint_wrapped_module.b._orig_mod.weight", (), "a.b.weight"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.weight", (), "a.weight"),
        ("module.a.weight", (), "module.a.weight"),
        ("module.module.a.weight", {""}, "module.a.weight"),
        ("_orig_mod.module.a.weight", {"_orig_mod"}, "a.weight"),
        ("module._orig_mod.module.weight", {""}, "module.weight"),
        ("not_orig_mod.weight", (), "not_orig_mod.weight"),
        ("_forward_module.module.a.weight", {"_forward_module"}, "a.weight"),
        ("_original_module.a.weight", (), "a.weight"),
    ],
)
def test_canonical_name(name: str, replicas: tuple[str, ...] | set[str], expected: str) -> None:
    assert canonical_name(name, replicas) == expected


def test_plain_model_keeps_a_component_called_module() -> None:
    model = _Model()
    assert list(named_weights(model)) == NAMES
    assert named_weights(model)["module.weight"] is model.module.weight


def test_wrapped_models_have_the_plain_names() -> None:
    compiled = torch.compile(_Model())
    replicated = nn.DataParallel(_Model())
    inner = torch.compile(_Model())
    assert isinstance(inner, nn.Module)
    both = torch.compile(nn.DataParallel(inner))
    for model in (compiled, replicated, both):
        assert isinstance(model, nn.Module)
        assert list(named_weights(model)) == NAMES
    checkpointed = _Model()
    checkpointed.add_module("head", checkpoint_wrapper(checkpointed.head))
    assert list(named_weights(checkpointed)) == NAMES


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_a_module_that_fabric_has_set_up() -> None:
    """It shows each parameter twice."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    plain = _Model()
    anchors = rk.Anchors.from_model(plain, 2, progress=False)
    for model in (fabric.setup(plain), fabric.setup(torch.compile(_Model()))):
        assert list(named_weights(model)) == NAMES
        assert len(list(model.named_parameters(remove_duplicate=False))) == 2 * len(NAMES)
        assert rk.rotation_penalty(model, anchors).item() >= 0
    anchors.verify(fabric.setup(plain))


def test_distributed_data_parallel() -> None:
    store = HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(_Model())
        assert list(named_weights(model)) == NAMES
    finally:
        torch.distributed.destroy_process_group()


def test_tied_parameters_keep_every_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    model["again"] = model["head"]
    weights = named_weights(model)
    assert list(weights) == ["embed.weight", "head.weight", "again.weight"]
    assert len({id(weight) for weight in weights.values()}) == 1


def test_one_canonical_name_for_two_parameters() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.add_module("_orig_mod", nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match="two different parameters named 'weight' once wrappers are left out"):
        named_weights(model)


@pytest.mark.parametrize("model", [None, {"weight": torch.ones(2, 2)}, torch.ones(2, 2)])
def test_not_a_module(model: object) -> None:
    with pytest.raises(ValueError, match=r"model: got \w+, expected a torch.nn.Module"):
        named_weights(model)  # type: ignore[arg-type]
