"""The README's example runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from ranks import run_ranks

README = Path(__file__).parents[1] / "README.md"


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def _penalty(block: str) -> float:
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
    penalty = names["penalty"]
    assert isinstance(penalty, torch.Tensor)
    return penalty.item()


def test_the_first_example_runs() -> None:
    assert _penalty(_blocks()[0]) > 0


def test_the_sharded_example_runs() -> None:
    (block,) = [block for block in _blocks() if "fully_shard" in block]
    first, second = run_ranks(2, _penalty, block)
    assert first == second > 0
