"""The programs in examples/ that need a framework; those that need none are in test_examples.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def program(name: str) -> Any:
    """Import a program, in this process: one that has the frameworks is spared their imports."""
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.xdist_group("integrations")
def test_train_transformers() -> None:
    pytest.importorskip("transformers", minversion="5.24", reason="docs/training.md says what was tested")
    main = program("train_transformers").main
    held, free = (main(["--steps", "20", "--coeff", coeff]) for coeff in ("1", "0"))
    assert held["loss"] < 3.8 and free["loss"] < 3.8
    assert 0 < held["rotation/R"] < free["rotation/R"] / 2


@pytest.mark.xdist_group("integrations")
def test_train_trl_lora() -> None:
    for framework in ("trl", "peft"):
        pytest.importorskip(framework)
    last = program("train_trl_lora").main(["--steps", "20"])
    assert last["loss"] < 4.1
    assert 0 < last["rotation/relative"] < 0.02


@pytest.mark.xdist_group("lightning")
def test_train_lightning() -> None:
    pytest.importorskip("lightning")
    last = program("train_lightning").main(["--steps", "60"])
    assert last["loss"] < 2.1
    assert last["rotation/budget_used"] == pytest.approx(1.0, rel=1e-3)
