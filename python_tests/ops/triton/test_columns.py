"""Kernels read the table by numbers that are fixed when they are compiled: cached ones must not read another table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

KEYS = """
import json, sys
from rpsft_kernels.ops.triton import fields
names = list(fields.INDEX)
if sys.argv[1:] == ["swapped"]:
    names[0], names[1] = names[1], names[0]
if sys.argv[1:] == ["longer"]:
    names.append("ANOTHER")
fields.INDEX, fields.WIDTH = {name: i for i, name in enumerate(names)}, len(names)
from rpsft_kernels.ops.triton.kernels.table import KERNELS
print(json.dumps({name: kernel.cache_key for name, kernel in KERNELS.items()}))
"""


def cache_keys(*change: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", KEYS, *change]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    keys: dict[str, str] = json.loads(run.stdout.splitlines()[0])
    return keys


def test_the_columns_are_part_of_every_kernels_cache_key() -> None:
    keys = cache_keys()
    assert keys == cache_keys()
    for change in ("swapped", "longer"):
        changed = cache_keys(change)
        assert [name for name in keys if keys[name] == changed[name]] == []
