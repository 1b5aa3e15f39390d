from __future__ import annotations

from typing import Any

import pytest

from framework_ranks import all_frameworks
from ranks import run_ranks

for framework in ("accelerate", "lightning"):
    pytest.importorskip(framework)
pytest.importorskip("transformers", minversion="5.24", reason="docs/training.md says what was tested")

ERRORS = [
    "DDP, penalised",
    "DDP, callback",
    "FSDP2, penalised",
    "FSDP2, callback",
    "DDP, attach",
    "FSDP2, attach",
    "DDP, Lightning",
    "FSDP2, Lightning",
]


def test_what_two_ranks_receive() -> None:
    first, second = run_ranks(2, all_frameworks)
    assert {name: first[name] for name in ERRORS if not first[name] < 3e-6} == {}
    check_layout(first)
    # examples/train_accelerate_fsdp2.py: R is one number.
    assert 0 < first["example"] == second["example"]
    # Ranks that begin with other weights are anchored once DDP has made them equal, or refused.
    assert first["unlike, penalised"] == second["unlike, penalised"] == "accepted"
    assert first["unlike, digests"] == second["unlike, digests"]
    assert first["unlike, bits"] == second["unlike, bits"]
    assert "got those of other weights on ranks [1] than on rank 0" in first["unlike, callback"]
    assert first["unlike, callback"] == second["unlike, callback"]
    # Replicas stay replicas.
    assert first["DDP, penalised, bits"] == second["DDP, penalised, bits"]


def check_layout(found: dict[str, Any]) -> None:
    layouts = {name: layout for name, layout in found.items() if name.endswith("parameters")}
    assert len(layouts) == 6
    for name, layout in layouts.items():
        assert layout == ("DTensor" if name.startswith("FSDP2") else "Parameter"), name
