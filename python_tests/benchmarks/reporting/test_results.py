"""Figures that are computed from the rounds of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reporting.reading import load
from benchmarks.reporting.results import bandwidth_shares, gemm_shares, ratios
from result_files import write


def test_ratios_are_of_the_same_round(tmp_path: Path) -> None:
    other = {"provider": "published, bf16", "role": "published", "seconds": [0.020, 0.010, 0.020]}
    once = {"provider": "published, fp16", "role": "published", "seconds": [0.5]}
    ours, published, single = load(write(tmp_path / "r.jsonl", {}, other, once)).results
    # The ratio of the medians would be 1.
    assert ratios(published, ours) == pytest.approx([2.0, 0.5, 0.5])
    assert ratios(single, ours) == pytest.approx([50.0])


def test_shares_of_rate_and_bandwidth(tmp_path: Path) -> None:
    gemm = {"provider": "torch.mm", "role": "gemm", "seconds": [0.005, 0.005, 0.030]}
    file = load(write(tmp_path / "r.jsonl", {}, gemm, {"provider": "none", "flops": 0, "bytes": 0}))
    ours, products, none = file.results
    assert gemm_shares(ours, products) == pytest.approx([0.5, 0.25, 0.75])
    # 2 MB in 10, 20 and 40 ms, of 1 GB/s.
    assert bandwidth_shares(ours, file.run) == pytest.approx([0.2, 0.1, 0.05])
    assert gemm_shares(none, products) == [] and bandwidth_shares(none, file.run) == []


def test_ours_is_the_fastest_that_accumulates_in_base_form(tmp_path: Path) -> None:
    names = {
        "native, base form, autograd": 0.001,
        "native, block form": 0.002,
        "torch, base form": 0.004,
        "native, base form": 0.003,
    }
    rows = [{"provider": name, "seconds": [seconds] * 3} for name, seconds in names.items()]
    rows.append({"provider": "plain torch, base form", "role": "plain", "seconds": [0.0001] * 3})
    (case,) = load(write(tmp_path / "r.jsonl", *rows)).cases
    assert case.ours is not None and case.ours.provider == "native, base form"
    block = case.fastest("ours", "block")
    assert block is not None and block.provider == "native, block form"
    (case,) = load(write(tmp_path / "r.jsonl", *rows[:2])).cases
    assert case.ours is not None and case.ours.provider == "native, base form, autograd"
    (case,) = load(write(tmp_path / "r.jsonl", rows[-1])).cases
    assert case.ours is None
