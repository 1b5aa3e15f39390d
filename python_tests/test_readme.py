"""The README's examples run as they are written, and its table of what is supported is true."""

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


def _pins(name: str) -> dict[str, str]:
    """The versions that a file of requirements names."""
    lines = (README.parent / name).read_text().splitlines()
    return dict(reversed([match.groups() for line in lines if (match := re.match(r"(\w+)==([\w.]+)", line))]))


def test_the_table_of_support_is_what_is_tested() -> None:
    rows = re.findall(r"^\| (Python|torch|Triton|numpy) \|(.*)\|$", README.read_text(), re.M)
    table = {name.lower(): [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert set(table) == {"python", "torch", "triton", "numpy"}
    project = (README.parent / "pyproject.toml").read_text()
    makefile = (README.parent / "Makefile").read_text()
    heading = re.search(r"^\| \| supported \|(.*)\|$", README.read_text(), re.M)
    assert heading is not None
    targets = re.findall(r"`make test(?:-([\w.-]+))?`", heading[1])
    assert targets[0] == "oldest" and targets[-1] == ""
    for name, (supported, *versions) in table.items():
        floor = re.search(rf'"{name}>=([\d.]+)', project) or re.search(r'requires-python = ">=([\d.]+)"', project)
        assert floor is not None and supported.startswith(f"{floor[1]} and newer")
        # The oldest that is supported is the oldest that is tested.
        assert (versions[0] + ".").startswith(f"{floor[1]}.")
        for target, version in zip(targets, versions, strict=True):
            if name == "python":
                assert not target or re.search(rf"^PYTHON_{re.escape(target)} := {re.escape(version)}$", makefile, re.M)
            else:
                pins = _pins(f"requirements-{target or 'dev'}.txt")
                assert pins.get(name, "none" if name == "triton" else "not pinned") == version


def test_continuous_integration_runs_the_table() -> None:
    commands = (README.parent / ".ci" / "run").read_text().splitlines()
    corners = re.search(r"^CORNERS := (.*)$", (README.parent / "Makefile").read_text(), re.M)
    assert corners is not None
    assert {"make test", *(f"make test-{name}" for name in corners[1].split())} <= set(commands)
