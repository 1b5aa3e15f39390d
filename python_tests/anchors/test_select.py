from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rpsft_kernels.anchors.select import select_weights


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(6)


class _Model(nn.Module):
    """Two layers, a tied head, and one of everything that cannot be anchored."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([_Layer(), _Layer()])
        self.experts = nn.Parameter(torch.ones(2, 6, 4))
        self.quantised = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        self.eighth = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


LAYERS = [f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")]


def test_every_floating_matrix_once() -> None:
    model = _Model()
    selection = select_weights(model)
    assert list(selection.chosen) == ["embed.weight", *LAYERS]
    assert selection.chosen["layers.0.up.weight"].parameter is model.get_parameter("layers.0.up.weight")
    assert selection.skipped == {
        "experts": "3-D",
        "quantised": "integer dtype int8",
        "eighth": "unsupported dtype float8_e4m3fn",
        "empty": "empty",
        "scale": "0-D",
        "head.weight": "tied to embed.weight",
        **{f"layers.{i}.{name}": "1-D" for i in (0, 1) for name in ("up.bias", "norm.weight", "norm.bias")},
    }
    assert {*selection.chosen, *selection.skipped} == set(dict(model.named_parameters(remove_duplicate=False)))


def test_globs() -> None:
    selection = select_weights(_Model(), include="layers.*", exclude=["*norm*", "layers.1.*"])
    assert list(selection.chosen) == ["layers.0.up.weight", "layers.0.down.weight"]
    assert selection.skipped["embed.weight"] == "matches none of include"
    assert selection.skipped["experts"] == "matches none of include"
    assert selection.skipped["layers.0.norm.weight"] == "excluded by '*norm*'"
    assert selection.skipped["layers.1.up.weight"] == "excluded by 'layers.1.*'"
    assert selection.skipped["layers.0.up.bias"] == "1-D"
    assert list(select_weights(_Model(), include=("*.up.*", "embed.weight")).chosen) == [
        "embed.weight",
        "layers.0.up.weight",
        "layers.1.up.weight",
    ]
    assert list(select_weights(_Model(), exclude=()).chosen) == ["embed.weight", *LAYERS]


def test_a_glob_for_any_name_of_a_tied_weight_matches_it() -> None:
    assert list(select_weights(_Model(), include="head.*").chosen) == ["embed.weight"]
    selection = select_weights(_Model(), exclude="head.*")
    assert list(selection.chosen) == LAYERS
    assert selection.skipped["embed.weight"] == "excluded by 'head.*' through its tied name head.weight"
    assert selection.skipped["head.weight"] == "tied to embed.weight"
    assert select_weights(_Model(), exclude="embed*").skipped["embed.weight"] == "excluded by 'embed*'"


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("patterns", ["*visual*", ["layers.*", "*visual*"], "LAYERS.*"])
def test_glob_without_a_match(argument: str, patterns: Any) -> None:
    missed = patterns if isinstance(patterns, str) else patterns[1]
    message = rf"{argument}: pattern '{missed}' matches none of the model's \d+ parameters \(such as "
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        select_weights(_Model(), **{argument: patterns})


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("patterns", [3, {"embed*": 1}, ["embed*", None]])
def test_no_globs(argument: str, patterns: Any) -> None:
    with pytest.raises(ValueError, match=rf"{argument}: got .*, expected a glob such as"):
        select_weights(_Model(), **{argument: patterns})


def test_empty_include() -> None:
    with pytest.raises(ValueError, match="include: got no pattern, expected at least one"):
        select_weights(_Model(), include=[])


def test_nothing_left() -> None:
    with pytest.raises(
        ValueError, match=r"model: got no parameter to anchor \(.*3 excluded by '\*weight'.*anchors for"
    ):
        select_weights(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), exclude="*weight")
    with pytest.raises(ValueError, match=r"\(2 1-D\)"):
        select_weights(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="it has none at all"):
        select_weights(nn.ReLU())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_parameters_are_left_out(layout: torch.layout) -> None:
    model = nn.Linear(4, 3, bias=False)
    parts = [torch.ones(2, 4), torch.ones(5, 4)]
    model.register_parameter("parts", nn.Parameter(torch.nested.nested_tensor(parts, layout=layout)))
    selection = select_weights(model)
    assert list(selection.chosen) == ["weight"] and selection.skipped == {"parts": "nested tensor"}


def test_lazy_parameter() -> None:
    with pytest.raises(ValueError, match="0.weight: got an uninitialised lazy parameter"):
        select_weights(nn.Sequential(nn.LazyLinear(3)))


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_dtensor_is_chosen_by_its_whole_shape() -> None:
    mesh = init_device_mesh("cpu", (1,))
    sharded = nn.Linear(6, 4)
    sharded.weight = nn.Parameter(distribute_tensor(sharded.weight.data, mesh, [Shard(0)]))
    chosen = select_weights(nn.Sequential(nn.Linear(4, 6), sharded)).chosen
    assert {name: weight.shape for name, weight in chosen.items()} == {"0.weight": (6, 4), "1.weight": (4, 6)}
