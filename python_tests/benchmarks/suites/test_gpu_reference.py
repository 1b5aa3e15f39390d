"""The comparison of the ``torch`` backend with plain torch: that it computes, compares and judges."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.suites import gpu_reference
from benchmarks.suites.gpu_reference import Figures

CPU = torch.device("cpu")
GOOD = Figures(torch.bfloat16, 2e-3, 1.5e-3, 1.4, 1e-3, 0.002, 0.01, 200 << 20)


def test_both_dtypes_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_reference.run([(40, 24), (24, 56), (8, 40)], 8, 3, CPU) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("CPU, torch ") and first.endswith("3 weights, rank 8")
    assert [line.split(":")[0] for line in lines] == ["bfloat16", "float32"]
    assert all("ratio" in line and "gradient error" in line for line in lines)


def test_a_wrong_gradient_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_reference, "_extra_bytes", lambda *_: None)
    assert gpu_reference.run([(40, 24)], 8, 1, CPU) == 1
    assert "WRONG: a weight's gradient is off by 1.0e+00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"ratio": 1.6}, ["1.60 times as long as plain torch, expected at most 1.5"]),
        ({"error": float("nan")}, ["a weight's gradient is off by nan, expected at most 1e-02"]),
        ({"extra_bytes": 300 << 20}, ["314572800 bytes of temporaries, expected at most 268435456"]),
        ({"extra_bytes": None, "ratio": 9.0}, []),
    ],
)
def test_what_is_judged(change: dict[str, float | None], said: list[str]) -> None:
    assert dataclasses.replace(GOOD, **change).faults() == said  # type: ignore[arg-type]
    assert "bfloat16: backend torch 2.000 ms" in GOOD.line() and "beside it 200 MiB" in GOOD.line()
