"""Files of results as the benchmarks write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN: dict[str, Any] = {
    "kind": "run",
    "schema": 1,
    "device": "Toy CPU",
    "device_type": "cpu",
    "clocks": "not locked",
    "threads": 2,
    "versions": {"python": "3.11", "torch": "2.13", "triton": None, "rpsft_kernels": "0.1.0", "numpy": "2.0"},
    "isa": "avx2",
    "commit": "0123456789abcdef",
    "dirty": False,
    "command": "python benchmarks/suite.py",
    "started": "2026-01-02T03:04:05Z",
    "load": 0.5,
    "bandwidth_bytes_per_second": 1e9,
}


RESULT: dict[str, Any] = {
    "kind": "result",
    "suite": "layer",
    "case": "toy layer k=4",
    "model": "toy",
    "rank": 4,
    "dtype": "bfloat16",
    "weights": 7,
    "elements": 1000,
    "axis": None,
    "x": None,
    "provider": "native, base form",
    "role": "ours",
    "status": "timed",
    "why": "",
    "seconds": [0.010, 0.020, 0.040],
    "flops": 4_000_000,
    "bytes": 2_000_000,
    "error": 0.004,
    "error_bound": 0.01,
    "drift": 0.01,
    "penalty_at_anchor": 0.0,
    "extra_bytes": 1048576,
    "launches": 1,
    "host_seconds": 0.0001,
    "energy": None,
}


def write(path: Path, *results: dict[str, Any], run: dict[str, Any] | None = None) -> Path:
    rows = [{**RUN, **(run or {})}, *({**RESULT, **result} for result in results)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
