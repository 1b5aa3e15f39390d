from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rpsft_kernels import ops, rotation_penalty
from rpsft_kernels.anchors.anchor import Anchor
from rpsft_kernels.anchors.checksums import checksum_bytes
from rpsft_kernels.anchors.collection import Anchors
from rpsft_kernels.anchors.file_format import CHECKSUM, FORMAT
from rpsft_kernels.anchors.fingerprint import Fingerprint
from rpsft_kernels.anchors.together import remember_groups

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class _Model(nn.Module):
    """An embedding tied to the head, two square weights, one narrow one (full at rank 5) and a norm."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.query = nn.Linear(24, 24)
        self.key = nn.Linear(24, 4, bias=False)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self.to(dtype)


NAMES = ["embed.weight", "query.weight", "key.weight"]


def _anchors(model: nn.Module, rank: int | float = 5, **options: Any) -> Anchors:
    return Anchors.from_model(model, rank, progress=False, **options)


def _assert_same(left: Mapping[str, Anchor], right: Mapping[str, Anchor]) -> None:
    assert list(left) == list(right)
    for name in left:
        first, second = left[name], right[name]
        for attribute in (
            "form",
            "shape",
            "weight_dtype",
            "rank",
            "energy",
            "arithmetic",
            "nbytes",
            "device",
        ):
            assert getattr(first, attribute) == getattr(second, attribute), (name, attribute)
        for piece, tensor in first.pieces().items():
            other = second.pieces()[piece]
            assert tensor.dtype == other.dtype and tensor.stride() == other.stride()
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), (name, piece)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keep_base", [True, False])
def test_from_model(keep_base: bool, device: str) -> None:
    model = _Model().to(device)
    anchors = _anchors(model, keep_base=keep_base)
    assert isinstance(anchors, Mapping) and list(anchors) == NAMES and len(anchors) == 3
    first = "base" if keep_base else "block"
    assert [anchor.form for anchor in anchors.values()] == [first, first, "full"]
    assert anchors.skipped == {
        "query.bias": "1-D",
        "norm.weight": "1-D",
        "norm.bias": "1-D",
        "head.weight": "tied to embed.weight",
    }
    _assert_same(
        {name: anchors[name] for name in NAMES},
        {name: Anchor.from_weight(model.get_parameter(name), 5, keep_base=keep_base) for name in NAMES},
    )
    assert anchors.fingerprints == {name: Fingerprint.of(name, model.get_parameter(name)) for name in NAMES}
    assert anchors.nbytes == sum(anchor.nbytes for anchor in anchors.values())
    anchors.verify(model)


def test_from_model_changes_nothing() -> None:
    model = _Model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    _anchors(model, keep_base=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None


def test_selection_reaches_from_model() -> None:
    anchors = _anchors(_Model(), include=["query*", "embed*"], exclude="embed*", basis_dtype=torch.float32)
    assert list(anchors) == ["query.weight"]
    assert anchors["query.weight"].pieces()["left"].dtype == torch.float32
    assert anchors.skipped["embed.weight"] == "excluded by 'embed*'"
    assert anchors.skipped["key.weight"] == "matches none of include"
    with pytest.raises(ValueError, match=r"exclude: pattern '\*visual\*' matches none"):
        _anchors(_Model(), exclude="*visual*")


def test_a_share_of_energy_gives_each_weight_its_own_rank() -> None:
    model = _Model()
    for share in (0.3, 0.7, 0.99):
        anchors = _anchors(model, share)
        for name, anchor in anchors.items():
            same = Anchor.from_weight(model.get_parameter(name), anchor.rank)
            _assert_same({name: anchor}, {name: same})
            assert (anchor.share, same.share) == (share, None) and anchor.energy >= share
            if anchor.rank > 1:
                assert Anchor.from_weight(model.get_parameter(name), anchor.rank - 1).energy < share
        assert f"a share of {share} of each weight's energy" in anchors.summary()
        assert len({anchor.rank for anchor in anchors.values()}) > 1
    assert "share" not in _anchors(model).summary()


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_memory_of_a_share_is_a_bound(share: float, keep_base: bool) -> None:
    model = _Model(torch.float32)
    nn.init.orthogonal_(model.query.weight)  # Nothing takes more directions.
    planned = Anchors.memory(model, share, keep_base=keep_base)
    anchors = _anchors(model, share, keep_base=keep_base)
    assert planned.at_most and str(planned).startswith("at most ")
    assert anchors.nbytes <= planned.per_rank[0] < 3 * anchors.nbytes + 20_000
    assert planned.subspaces[0] >= sum(
        anchor.nbytes - sum(p.nbytes for p in (anchor.base, anchor.block) if p is not None)
        for anchor in anchors.values()
    )
    for layout in ("shard0", "replicated", "flat"):
        spread = Anchors.memory(model, share, keep_base=keep_base, ranks=3, layout=layout)  # type: ignore[arg-type]
        assert spread.at_most and len(spread.per_rank) == 3
    assert not Anchors.memory(model, 5).at_most


def test_wrapped_models_share_anchors() -> None:
    model = _Model()
    compiled, replicated = torch.compile(model), nn.DataParallel(model)
    assert isinstance(compiled, nn.Module)
    anchors = _anchors(compiled)
    assert list(anchors) == list(_anchors(replicated)) == NAMES
    for other in (model, compiled, replicated):
        anchors.verify(other)


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Anchors.from_model(_Model(), 5)
    shown = capsys.readouterr()
    assert "anchoring" in shown.err and "3/3" in shown.err and not shown.out
    Anchors.from_model(_Model(), 5, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.query.weight.data.fill_(float("nan")),
            "query.weight: weight: got NaN or infinity",
        ),
        (lambda model: model.query.to("meta"), "query.weight: weight: got a tensor on the meta device"),
    ],
)
def test_bad_weights_are_named(change: Any, message: str) -> None:
    model = _Model()
    change(model)
    with pytest.raises(ValueError, match=message):
        _anchors(model)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="model: got dict, expected a torch.nn.Module"):
        _anchors({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^rank: got 0, expected an int of at least 1"):
        _anchors(_Model(), 0)
    with pytest.raises(ValueError, match="embed.weight: basis_dtype: got float16"):
        _anchors(_Model(), basis_dtype=torch.float16)


def test_built_by_hand(tmp_path: Path) -> None:
    model = _Model()
    anchor = Anchor.from_weight(model.query.weight, 5)
    anchors = Anchors({"query.weight": anchor})
    assert anchors["query.weight"] is anchor and not anchors.skipped and not anchors.fingerprints
    with pytest.raises(ValueError, match="query.weight: no fingerprint was taken .anchors built by hand"):
        anchors.verify(model)
    anchors.save(tmp_path / "anchors")
    _assert_same(Anchors.load(tmp_path / "anchors"), anchors)
    with pytest.raises(KeyError):
        anchors["key.weight"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "anchors: got an empty mapping, expected at least one Anchor"),
        ([("a", 1)], "anchors: got list, expected a mapping"),
        ({"a": torch.ones(2, 2)}, r"anchors\['a'\]: got Tensor, expected an Anchor under a str name"),
        (
            {3: Anchor.from_weight(torch.ones(2, 2), 1)},
            r"anchors\[3\]: got Anchor, expected an Anchor under a str",
        ),
    ],
)
def test_constructor_refuses(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Anchors(given)


def test_constructor_refuses_foreign_fingerprints() -> None:
    anchor = Anchor.from_weight(torch.ones(3, 2), 1)
    right = Fingerprint.of("a", torch.ones(3, 2))
    assert Anchors({"a": anchor}, fingerprints={"a": right}).fingerprints == {"a": right}
    for name, print_ in (
        ("b", Fingerprint.of("b", torch.ones(3, 2))),
        ("a", Fingerprint.of("b", torch.ones(3, 2))),
        ("a", Fingerprint.of("a", torch.ones(2, 3))),
        ("a", Fingerprint.of("a", torch.ones(3, 2).half())),
    ):
        with pytest.raises(ValueError, match=rf"fingerprints\['{name}'\]: got Fingerprint"):
            Anchors({"a": anchor}, fingerprints={name: print_})


def test_views_are_read_only() -> None:
    anchors = _anchors(_Model())
    for view in (anchors.skipped, anchors.fingerprints, anchors):
        with pytest.raises(TypeError):
            view["new"] = None  # type: ignore[index]


def test_verify_lists_every_difference() -> None:
    model = _Model()
    anchors = _anchors(model)
    with torch.no_grad():
        model.query.weight[3, 4] += 1
    model.key = nn.Linear(24, 5, bias=False)
    del model.embed
    model.head.weight = nn.Parameter(model.head.weight.detach().float())
    with pytest.raises(ValueError) as caught:
        anchors.verify(model)
    lines = str(caught.value).split("\n  ")
    assert lines[0].startswith("model: 3 of 3 weights are not those that were anchored, expected the pretrained")
    assert lines[1] == "embed.weight: the model has no parameter of this name"
    assert lines[2].startswith("query.weight: got other values (checksum ")
    assert lines[3] == "key.weight: got shape (5, 24), anchored with (4, 24)"
    model = _Model()
    model.query.to(torch.float32)
    model.key.to("meta")
    with pytest.raises(ValueError) as caught:
        anchors.verify(model)
    assert "query.weight: got dtype float32, anchored in bfloat16" in str(caught.value)
    assert "key.weight: the parameter is on the meta device" in str(caught.value)
    assert "embed.weight:" not in str(caught.value)


def test_resume_is_told_how_to_load(tmp_path: Path) -> None:
    """Not to anchor what has been trained, which would restart R at 0."""
    model = _Model()
    _anchors(model).save(tmp_path / "anchors.safetensors")
    with torch.no_grad():
        model.query.weight.mul_(1.5)
    expected = rotation_penalty(model, Anchors.load(tmp_path / "anchors.safetensors")).item()
    with pytest.raises(
        ValueError, match=r"as on resume, load them without it \(Anchors.load\(path\)\), or with verify=False"
    ):
        Anchors.load(tmp_path / "anchors.safetensors", model)
    resumed = Anchors.load(tmp_path / "anchors.safetensors", model, verify=False)
    assert rotation_penalty(model, resumed).item() == expected > 0
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    save_file({"query.weight": model.query.weight.detach().clone()}, checkpoint / "model.safetensors")
    for path in (checkpoint, checkpoint / "model.safetensors"):
        with pytest.raises(
            ValueError, match=r"a model's checkpoint holds no anchors: on resume load those .* restart R at 0"
        ):
            Anchors.load(path, model)


def test_verify_refuses_another_checkpoint() -> None:
    with pytest.raises(ValueError, match="model: 3 of 3 weights are not those that were anchored"):
        _anchors(_Model(seed=0)).verify(_Model(seed=1))
    with pytest.raises(ValueError, match="model: got NoneType, expected a torch.nn.Module"):
        _anchors(_Model()).verify(None)  # type: ignore[arg-type]


def test_groups_of_anchors_that_are_gone_are_not_asked() -> None:
    anchors = _anchors(_Model())
    remember_groups(anchors, {"gone": None})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="model: got NoneType, expected a torch.nn.Module"):
        anchors.verify(None)  # type: ignore[arg-type]


def _with_foreign_blocks(anchors: Anchors) -> Anchors:
    foreign = {}
    for name, anchor in anchors.items():
        if anchor.block is not None:
            pieces = {**anchor.pieces(), "block": anchor.block * 1.0001}
            anchor = Anchor(
                **pieces,
                shape=anchor.shape,
                weight_dtype=anchor.weight_dtype,
                rank=anchor.rank,
                energy=anchor.energy,
                arithmetic="native:cpu:bfloat16",
            )
        foreign[name] = anchor
    return Anchors(foreign, fingerprints=anchors.fingerprints, skipped=anchors.skipped)


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_of_another_arithmetic_are_rebuilt(device: str, tmp_path: Path) -> None:
    model = _Model().to(device)
    anchors = _anchors(model, keep_base=False)
    foreign = _with_foreign_blocks(anchors)
    _assert_same(foreign.rebuilt(model), anchors)
    foreign.save(tmp_path / "anchors")
    assert Anchors.load(tmp_path / "anchors")["query.weight"].arithmetic == "native:cpu:bfloat16"
    _assert_same(Anchors.load(tmp_path / "anchors", model, device=device), anchors)
    kept = anchors.rebuilt(model)
    assert all(kept[name] is anchors[name] for name in anchors)
    with ops.use_backend("torch"):
        _assert_same(foreign.rebuilt(model), anchors.rebuilt(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("rank", [5, 16])
def test_saved_anchors_come_back_bit_for_bit(dtype: torch.dtype, keep_base: bool, rank: int, tmp_path: Path) -> None:
    model = _Model(dtype)
    anchors = _anchors(model, rank, keep_base=keep_base)
    anchors.save(tmp_path / "anchors.safetensors")
    loaded = Anchors.load(tmp_path / "anchors.safetensors")
    _assert_same(loaded, anchors)
    assert loaded.skipped == anchors.skipped and loaded.fingerprints == anchors.fingerprints
    _assert_same(Anchors.load(str(tmp_path / "anchors.safetensors"), model), anchors)
    with pytest.raises(ValueError, match="query.weight: got other values"):
        Anchors.load(tmp_path / "anchors.safetensors", _Model(dtype, seed=1))


def test_fingerprint_in_a_file_must_be_the_weights_own(tmp_path: Path) -> None:
    path = tmp_path / "anchors"
    _anchors(_Model()).save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        description = file.metadata()[FORMAT]
    known = '"name": "key.weight", "shape": [4, {}], "dtype": "bfloat16", "checksum"'
    changed = description.replace(known.format(24), known.format(25))
    assert changed != description
    save_file(tensors, path, metadata={FORMAT: changed, CHECKSUM: checksum_bytes(changed.encode())})
    with pytest.raises(ValueError, match=rf"{path}: fingerprints\['key.weight'\]: got Fingerprint"):
        Anchors.load(path)


@pytest.mark.parametrize("device", DEVICES)
def test_to(device: str) -> None:
    anchors = _anchors(_Model())
    moved = anchors.to(device)
    assert {anchor.device.type for anchor in moved.values()} == {device}
    _assert_same(moved.to("cpu"), anchors)
    assert moved.skipped == anchors.skipped and moved.fingerprints == anchors.fingerprints


def test_copies() -> None:
    anchors = _anchors(_Model(), keep_base=False)
    for other in (copy.deepcopy(anchors), pickle.loads(pickle.dumps(anchors))):
        _assert_same(other, anchors)
        assert other.skipped == anchors.skipped and other != anchors
    assert anchors == anchors and len({anchors, anchors}) == 1


def test_repr_and_summary() -> None:
    anchors = _anchors(_Model())
    assert repr(anchors) == f"Anchors(2 base, 1 full; 4 skipped; {anchors.nbytes / 1024:.1f} KiB on cpu)"
    energies = [anchors[name].energy for name in NAMES[:2]]
    lines = anchors.summary().splitlines()
    assert lines[0].split() == ["form", "weights", "rank", "memory", "energy", "min", "mean"]
    base = lines[1].split()
    assert base[:3] == ["base", "2", "5"] and base[-2:] == [
        f"{min(energies):.4f}",
        f"{sum(energies) / 2:.4f}",
    ]
    assert lines[2].split() == ["full", "1", "4", "192", "B", "1.0000", "1.0000"]
    assert lines[3].split()[:3] == ["total", "3", "4-5"]
    assert lines[4:] == [
        "skipped: 4 parameters",
        "  1-D (3): query.bias, norm.weight, norm.bias",
        "  tied to embed.weight (1): head.weight",
    ]
