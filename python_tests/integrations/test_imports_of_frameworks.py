"""Frameworks are imported by their own file alone, and one that is missing is named with the way out."""

from __future__ import annotations

import subprocess
import sys

FRAMEWORKS = ("transformers", "trl", "peft", "accelerate", "lightning", "axolotl", "deepspeed", "datasets")
# In a process of its own: this one may have imported them.
PROGRAM = f"""
import importlib, sys
import rpsft_kernels
import rpsft_kernels.integrations, rpsft_kernels.integrations.deepspeed, rpsft_kernels.integrations.arguments
print("imported:", *[name for name in {FRAMEWORKS} if name in sys.modules])
for name in {FRAMEWORKS}:
    sys.modules[name] = None
for name in ("transformers", "accelerate", "lightning", "axolotl"):
    try:
        importlib.import_module("rpsft_kernels.integrations." + name)
    except ImportError as error:
        print(name + ":", error)
"""


def test_the_package_imports_no_framework_and_says_which_one_is_missing() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    imported, *refusals = done.stdout.splitlines()
    assert imported == "imported:", done.stdout + done.stderr
    for refusal, way_out in zip(
        refusals,
        (
            "pip install 'transformers[torch]'",
            "pip install accelerate",
            "pip install lightning",
            # Axolotl brings it along.
            "pip install 'transformers[torch]'",
        ),
        strict=True,
    ):
        assert refusal.endswith(way_out), refusals
