"""Where anchors come from: given, from a file, or made; and that a checkpoint is never anchored without a word."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import rpsft_kernels as rk
from small_models import linear_layers, mean_square, vectors

SIZES = (24, 40, 20)


def _layers() -> nn.Sequential:
    return linear_layers(SIZES)


def _train(model: nn.Module, penalty: rk.RotationPenalty, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        mean_square(model, vectors(SIZES[0])).backward()
        penalty.add_gradients_(model)
        optimizer.step()
        optimizer.zero_grad()


def test_a_file_is_written_once_and_read_from_then_on(tmp_path: Path) -> None:
    path, model = tmp_path / "anchors.safetensors", _layers()
    first = rk.RotationPenalty(8, path=path).anchor(model)
    written = path.stat().st_mtime_ns
    assert first.anchors is not None
    # A rank is not needed where there is a file.
    second = rk.RotationPenalty(path=path).anchor(_layers())
    assert second.anchors is not None
    assert path.stat().st_mtime_ns == written
    for name, anchor in first.anchors.items():
        for piece, tensor in anchor.pieces().items():
            assert torch.equal(tensor, second.anchors[name].pieces()[piece]), (name, piece)
    assert first.state_dict() == second.state_dict()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["anchors.safetensors"]


def test_anchoring_is_lazy_and_done_once() -> None:
    model, penalty = _layers(), rk.RotationPenalty(8)
    assert penalty.anchors is None and penalty.state_dict()["anchors"] == ""
    _train(model, penalty, 1)
    anchors = penalty.anchors
    assert anchors is not None
    assert penalty.anchor(model) is penalty
    assert penalty.anchors is anchors
    anchors.verify(_layers())


def test_a_trained_model_beside_the_file_is_refused_unless_its_state_comes_first(tmp_path: Path) -> None:
    path, model = tmp_path / "anchors.safetensors", _layers()
    penalty = rk.RotationPenalty(8, path=path)
    _train(model, penalty)
    fresh = rk.RotationPenalty(8, path=path)
    with pytest.raises(ValueError, match=r"load the penalty's state first \(load_state_dict\)") as refusal:
        fresh.anchor(model)
    assert "are not those that were anchored" in str(refusal.value)
    assert fresh.anchors is None
    resumed = rk.RotationPenalty(8, path=path)
    resumed.load_state_dict(penalty.state_dict())
    resumed.anchor(model)
    assert penalty.anchors is not None and resumed.anchors is not None
    with torch.no_grad():
        before, after = (float(rk.rotation_penalty(model, a)) for a in (penalty.anchors, resumed.anchors))
    assert before == after > 0


def test_a_resumed_run_never_anchors_the_model_anew(tmp_path: Path) -> None:
    model, penalty = _layers(), rk.RotationPenalty(8)
    _train(model, penalty)
    for resumed in (rk.RotationPenalty(8), rk.RotationPenalty(8, path=tmp_path / "not there")):
        resumed.load_state_dict(penalty.state_dict())
        with pytest.raises(ValueError, match="path: got no saved anchors for a run that is resumed"):
            resumed.anchor(model)
    assert not list(tmp_path.iterdir())


def test_neither_a_rank_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank: got None, and there is no file"):
        rk.RotationPenalty(path=tmp_path / "not there").anchor(_layers())


@pytest.mark.parametrize("trace", ["trainer_state.json", "optimizer.pt", "adapter_model.safetensors"])
def test_weights_of_a_checkpoint_are_not_anchored_without_a_word(trace: str, tmp_path: Path) -> None:
    model = _layers()
    model.config = SimpleNamespace(_name_or_path=str(tmp_path))  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.RotationPenalty(8).anchor(model)
    (tmp_path / trace).write_text(json.dumps({}))
    with pytest.warns(UserWarning, match=rf"model: got weights from .*, which a trainer wrote \({trace}\)") as caught:
        rk.RotationPenalty(8).anchor(model)
    assert caught[0].filename == __file__


def test_anchors_that_are_given_are_not_made_again() -> None:
    model = _layers()
    anchors = rk.Anchors.from_model(model, 8, progress=False)
    penalty = rk.RotationPenalty(anchors=anchors)
    assert penalty.anchors is anchors
    assert penalty.anchor(model).anchors is anchors


def test_anchors_of_another_rank_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "anchors.safetensors"
    anchors = rk.RotationPenalty(8, path=path).anchor(_layers()).anchors
    for given in ({"path": path}, {"anchors": anchors}):
        with pytest.raises(ValueError, match="got anchors of rank 8 .*, expected rank=4"):
            rk.RotationPenalty(4, **given).anchor(_layers())
        for rank in (8, None):
            assert rk.RotationPenalty(rank, **given).anchor(_layers()).anchors is not None
    # Weights smaller than the rank are anchored whole.
    full = rk.Anchors.from_model(_layers(), 64, progress=False)
    assert rk.RotationPenalty(64, anchors=full).anchor(_layers()).anchors is full
    with pytest.raises(ValueError, match="got anchors of rank 24 .*, expected rank=8"):
        rk.RotationPenalty(8, anchors=full).anchor(_layers())


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({"rank": 0.5}, {"rank": 0.6}, r"for a share of energy of 0.5, expected rank=0.6"),
        ({"rank": 8}, {"rank": 0.9}, r"of rank 8 with a share of energy of 0.*, expected rank=0.9"),
        ({"keep_base": False}, {"keep_base": True}, r"in block form .0.weight., expected keep_base=True"),
        ({}, {"rank": None, "keep_base": False}, r"in base form .0.weight., expected keep_base=False"),
        ({"basis_dtype": torch.float32}, {}, r"with bases in float32 .0.weight., expected basis_dtype=torch.bfloat16"),
        ({}, {"rank": None, "basis_dtype": torch.float32}, r"in bfloat16 .0.weight., expected basis_dtype=torch.float"),
        ({"include": "0.*"}, {}, r"without 1 weights .2.weight., expected include=None"),
        ({"exclude": "0.*"}, {}, r"without 1 weights .0.weight., expected include=None"),
        ({"exclude": "0.*"}, {"rank": None, "exclude": "2.*"}, r"of 1 weights .2.weight. too, expected exclude='2.\*'"),
        ({"include": "0.*"}, {"exclude": "2.bias"}, r"without 1 weights .2.weight., expected exclude='2.bias'"),
        ({}, {"rank": None, "include": ["0.*"]}, r"of 1 weights .2.weight. too, expected include=\['0.\*'\]"),
        ({"subspace": "random", "seed": 3}, {}, r"of random subspaces .seed 3., a control, .*, expected rank=8"),
    ],
)
def test_anchors_that_are_not_what_is_asked_for_are_refused(
    made: dict[str, Any], asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "anchors.safetensors"
    anchors = rk.Anchors.from_model(_layers(), **{"rank": 8, **made}, progress=False)
    anchors.save(path)
    penalty = rk.RotationPenalty(**{"rank": 8, **asked}, path=path)
    with pytest.raises(ValueError, match=f"path: at .*{message}.*leave rank and the other options of anchors out"):
        penalty.anchor(_layers())
    assert penalty.anchors is None
    assert rk.RotationPenalty(path=path).anchor(_layers()).anchors is not None
    # What has the same options is what is asked for.
    made = {name: value for name, value in made.items() if name not in ("subspace", "seed")}
    same = tmp_path / "same.safetensors"
    for _ in range(2):
        rk.RotationPenalty(**{"rank": 8, **made}, path=same).anchor(_layers())
    # Anchors that are given may be of some weights on purpose.
    if asked and asked.keys() <= {"keep_base", "basis_dtype", "rank"}:
        with pytest.raises(ValueError, match=message):
            rk.RotationPenalty(**{"rank": 8, **asked}, anchors=anchors).anchor(_layers())


def test_a_share_that_anchors_do_not_tell_is_said() -> None:
    anchors = rk.Anchors.from_model(_layers(), 8, progress=False)
    least = min(anchor.energy for anchor in anchors.values())
    with pytest.warns(UserWarning, match="got anchors that do not say for which share of energy they were made"):
        rk.RotationPenalty(0.9 * least, anchors=anchors).anchor(_layers())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.RotationPenalty(0.5, anchors=rk.Anchors.from_model(_layers(), 0.5, progress=False)).anchor(_layers())


def test_a_tied_head_with_adapters_has_the_anchor_of_the_plain_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from adapted_models import adapt, gpt2, move

    path = tmp_path / "anchors"
    rk.RotationPenalty(4, path=path).anchor(gpt2().double())
    model = adapt(gpt2(), ["lm_head"])
    penalty = rk.RotationPenalty(4, path=path).anchor(model)
    move(model)
    (name,) = anew = rk.Anchors.from_model(adapt(gpt2(), ["lm_head"]), 4, progress=False)
    assert penalty.anchors is not None and name == "lm_head.weight" and name not in penalty.anchors
    value = rk.rotation_penalty(model, penalty.anchors).item()
    assert value == pytest.approx(rk.rotation_penalty(model, anew).item(), rel=1e-6) and value > 0


def test_options_reach_the_anchors() -> None:
    penalty = rk.RotationPenalty(0.5, include="0.*", keep_base=False, basis_dtype=torch.float32).anchor(_layers())
    assert penalty.anchors is not None
    assert list(penalty.anchors) == ["0.weight"]
    anchor = penalty.anchors["0.weight"]
    assert anchor.form == "block" and anchor.left is not None and anchor.left.dtype == torch.float32
    assert 1 <= anchor.rank < 24 and anchor.energy >= 0.5


def test_weights_without_energy_are_refused() -> None:
    model = _layers()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    penalty = rk.RotationPenalty(8)
    with pytest.raises(ValueError, match="anchors: got pretrained weights that are 0 in all their subspaces"):
        penalty.anchor(model)
    assert penalty.anchors is None
