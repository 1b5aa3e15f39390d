from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import anchors_ranks
import rpsft_kernels as rk
from llama import RANK, llama, whole_anchors
from ranks import run_ranks

FORMS: dict[str, dict[str, Any]] = {
    "base": {"basis_dtype": torch.float32},
    "block": {"basis_dtype": torch.float32, "keep_base": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("saved", "size", "loaded", "other"),
    [
        ("rows", 4, "rows", 3),
        ("rows", 3, "columns", 4),
        ("columns", 2, "replicated", 3),
        ("replicated", 3, "rows", 2),
        ("flat", 3, "rows", 2),
        ("rows", 2, "flat", 4),
        ("whole", 1, "rows", 3),
        ("flat", 4, "whole", 1),
    ],
)
def test_saved_on_some_ranks_loads_on_others(
    saved: str, size: int, loaded: str, other: int, form: str, tmp_path: Path
) -> None:
    options, path = FORMS[form], str(tmp_path / "anchors")
    written = run_ranks(size, anchors_ranks.save, saved, path, options)
    for nbytes, said in written:
        # W0 is kept in bfloat16 here, which only its values tell.
        assert said[0] >= nbytes
    whole = whole_anchors(llama(), **options)
    results = run_ranks(other, anchors_ranks.load, loaded, path, options)
    for result in results:
        assert result["at anchor"] == 0.0
        # The block form rounds what is as large as the weight.
        assert abs(result["penalty"]) < (1e-5 if form == "base" else 1e-4)
        assert result["refused"]
        assert result["skipped"] == dict(whole.skipped)
        same = (saved, size) == (loaded, other) or loaded == "whole"
        if form == "base" or same:
            assert result["unverified"] == result["bytes"]
        else:
            assert "got a block of another sharding, expected that of" in result["unverified"] or not result["bytes"]


def test_a_whole_anchor_comes_back_from_parts(tmp_path: Path) -> None:
    path = str(tmp_path / "anchors")
    run_ranks(3, anchors_ranks.save, "rows", path, FORMS["base"])
    whole, read = whole_anchors(llama(), **FORMS["base"]), rk.Anchors.load(path, llama())
    assert list(read) == list(whole) and read.fingerprints == whole.fingerprints
    for name, anchor in whole.items():
        assert read[name].part is None and read[name].energy == anchor.energy
        for piece, tensor in anchor.pieces().items():
            assert torch.equal(read[name].pieces()[piece], tensor), (name, piece)


CHOSEN: list[tuple[float, dict[str, Any]]] = [
    (0.6, {}),
    (0.6, {"keep_base": False}),
    (0.95, {"subspace": "random", "seed": 5}),
]


@pytest.mark.parametrize("layout", ["replicated", "rows"])
def test_shares_and_random_subspaces_are_those_of_the_whole_model(layout: str, tmp_path: Path) -> None:
    cases = [(rank, {"basis_dtype": torch.float32, **options}) for rank, options in CHOSEN]
    first, second = run_ranks(2, anchors_ranks.choose_all, layout, str(tmp_path / "anchors"), cases)
    for result, other, (_, options) in zip(first, second, cases, strict=True):
        assert result["R"] == other["R"] and len(set(result["R"])) == 1
        assert result["at anchor"] == 0.0 and len(result["ranks"]) > 2
        # The block form rounds what is as large as the weight.
        assert abs(result["error"]) < (1e-5 if options.get("keep_base", True) else 1e-4)
        assert result["within"] and other["within"]


def test_memory_is_known_before(tmp_path: Path) -> None:
    # bfloat16 weights: the dtype of the base is certain.
    for layout in ("shard0", "replicated", "flat"):
        planned = rk.Anchors.memory(llama(torch.bfloat16).to("meta"), RANK, ranks=4, layout=layout)  # type: ignore[arg-type]
        assert len(planned.per_rank) == 4
        assert planned.per_rank == tuple(s + k for s, k in zip(planned.subspaces, planned.kept, strict=True))
    whole = rk.Anchors.from_model(llama(torch.bfloat16), RANK, progress=False)
    assert rk.Anchors.memory(llama(torch.bfloat16), RANK).per_rank == (whole.nbytes,)
    assert rk.Anchors.memory(llama(torch.bfloat16), RANK, ranks=1).per_rank == (whole.nbytes,)
    with pytest.raises(ValueError, match="rank, ranks, layout: got"):
        rk.Anchors.memory(llama(), RANK, ranks=0)


@pytest.mark.parametrize("layout", ["rows", "replicated"])
def test_one_rank_spoils_it_for_all_by_name(layout: str) -> None:
    first, second = run_ranks(2, anchors_ranks.spoil, layout)
    if layout == "rows":
        assert "model.layers.1.mlp.up_proj.weight: weight: got NaN or infinity" in first
        assert first == second
    else:
        # Replicas are equal by DDP's own doing: only the rank that computes the subspace reads its copy.
        assert first == second and (not first or "up_proj" in first)


def test_a_rank_that_cannot_write_is_named(tmp_path: Path) -> None:
    path = tmp_path / "anchors"
    path.mkdir()
    for message in run_ranks(2, anchors_ranks.unwritable, str(path)):
        assert message.startswith("path: the anchors were not saved: rank 1: ")
    assert not (path / "anchors.json").exists()
    with pytest.raises(ValueError, match=r"without anchors\.json, expected one that Anchors\.save wrote"):
        rk.Anchors.load(path)


def test_files_of_different_saves_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_ranks(2, anchors_ranks.save, "rows", str(tmp_path / name), FORMS["base"])
    file = "rank-00001-of-00002.safetensors"
    (tmp_path / "b" / file).replace(tmp_path / "a" / file)
    with pytest.raises(ValueError, match="got files of different saves"):
        rk.Anchors.load(tmp_path / "a")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_is_told_to_all(rank: int, tmp_path: Path) -> None:
    path = tmp_path / "anchors"
    for message in run_ranks(2, anchors_ranks.save_to_a_full_disk, str(path), rank):
        assert message.startswith(f"path: the anchors were not saved: rank {rank}: [Errno 27] File too large; nothing")
    assert sorted(path.iterdir()) == [path / f"rank-{1 - rank:05d}-of-00002.safetensors"]


def test_an_index_that_cannot_be_written_is_told_to_all(tmp_path: Path) -> None:
    path = tmp_path / "anchors"
    for message in run_ranks(2, anchors_ranks.save_without_index, str(path)):
        assert message == "path: the anchors were not saved: rank 0: [Errno 28] No space left on device"
    (path / "anchors.json").mkdir()
    for message in run_ranks(2, anchors_ranks.save_made, str(path)):
        assert message.startswith("path: the anchors were not saved: rank 0: [Errno ")


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("scratch")
    # By two ranks there is no file of a third, whose killed writer left something behind.
    (tmp_path / "scratch").mkdir()
    left_over = tmp_path / "scratch" / f".rank-00002-of-00003.safetensors.{'0' * 32}.tmp"
    left_over.touch()
    os.utime(left_over, (0, 0))
    for existing in (True, False):
        assert run_ranks(2, anchors_ranks.save_and_load, str(link)) == [0, 0]
        assert link.is_symlink() and (link / "anchors.json").is_file() and not left_over.exists(), existing
        shutil.rmtree(tmp_path / "scratch")


def test_a_damaged_row_is_refused_by_all_ranks(tmp_path: Path) -> None:
    path = str(tmp_path / "anchors")
    run_ranks(2, anchors_ranks.save, "rows", path, FORMS["base"])
    file = tmp_path / "anchors" / "rank-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    damage = r"\S+anchors: \S+: \w+: got rows .* with checksum .*: the file is damaged"
    with pytest.raises(ValueError, match=damage):
        rk.Anchors.load(path)
    first, second = run_ranks(2, anchors_ranks.load_where_one_rank_fails, "rows", path, path)
    assert re.match(rf"ValueError: path: the anchors were not loaded: rank 1: {damage}", first)
    assert re.match(rf"ValueError: {damage}", second)


@pytest.mark.parametrize("layout", ["rows", "replicated"])
def test_a_file_that_one_rank_lacks_is_refused_by_all(layout: str, tmp_path: Path) -> None:
    path, other = str(tmp_path / "anchors"), str(tmp_path / "absent")
    whole_anchors(llama()).save(path)
    first, second = run_ranks(2, anchors_ranks.load_where_one_rank_fails, layout, path, other)
    assert first.startswith("ValueError: path: the anchors were not loaded: rank 1: ") and other in first
    assert second.startswith("FileNotFoundError: ") and other in second


@pytest.mark.parametrize("error", ["did not converge", ""])
def test_a_rank_that_cannot_solve_a_weight_is_told_to_all(error: str) -> None:
    first, second = run_ranks(2, anchors_ranks.fail_to_solve, error)
    expected = f"weight: its singular subspaces were not found: .*{error}" if error else "MemoryError: no memory"
    assert first == second and re.match(rf"RuntimeError: model\.\S+: {expected}", first)


@pytest.mark.parametrize("layout", ["rows", "replicated"])
def test_what_one_rank_refuses_to_anchor_is_told_to_all(layout: str) -> None:
    for options, refusal in (({"include": "absent.*"}, "include: pattern "), ({"rank": 0}, "rank: got 0")):
        first, second = run_ranks(2, anchors_ranks.anchor_where_one_rank_refuses, layout, options)
        assert second.startswith(refusal) and first == f"no anchor was made: rank 1: {second}"


@pytest.mark.parametrize("layout", ["replicated", "rows"])
def test_a_rank_that_fails_alone_is_told_to_all(layout: str, tmp_path: Path) -> None:
    first, second = run_ranks(2, anchors_ranks.fail_alone, layout, str(tmp_path / "anchors"), timeout=20)
    for case, (message, right) in first.items():
        own, own_right = second[case]
        assert message.startswith(("ValueError: ", "RuntimeError: ")) and own, (case, message, own)
        assert not right and not own_right, (case, right, own_right)
        # Shards of one weight have one checksum, which all ranks see to differ.
        together = case == "verify, values" or (case.startswith("verify, values") and layout == "rows")
        assert together or re.search(r"ranks? \[?1\b", message), (case, message)
