"""Importing the package shows its public names alone, and imports nothing heavy."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys

import rpsft_kernels as rk

NAMES = [
    "Anchor",
    "Anchors",
    "RotationPenalty",
    "accumulate_rotation_grad_",
    "attach",
    "project",
    "rotation_penalty",
    "use_backend",
]


def test_dir_shows_the_public_names() -> None:
    assert dir(rk) == sorted(rk.__all__) == NAMES
    # Names that are not shown can be reached all the same.
    assert rk.__version__ and rk.ops.available_backends


def test_help_begins_with_a_table_of_the_public_names_and_an_example() -> None:
    printed = pydoc.plain(pydoc.render_doc(rk))
    description = printed[: printed.index("PACKAGE CONTENTS")]
    for name in NAMES:
        assert re.search(rf"^ +{name}\b.*\(.*\)  ", description, re.M), name
    assert "import rpsft_kernels as rk" in description
    # Each has its own documentation below.
    for name in NAMES:
        assert re.search(rf"^ +(class )?{name}\(", printed[len(description) :], re.M), name


def test_the_table_names_arguments_that_exist() -> None:
    rows = re.findall(r"^    ([\w.]+)\(([\w, ]+)\)  ", inspect.getdoc(rk) or "", re.M)
    assert len(rows) == len(NAMES)
    for name, arguments in rows:
        called = rk
        for part in name.split("."):
            called = getattr(called, part)
        parameters = list(inspect.signature(called).parameters)  # type: ignore[arg-type]
        assert arguments.split(", ") == parameters[: arguments.count(",") + 1], name


def test_importing_it_imports_neither_triton_nor_a_tool_and_starts_no_gpu() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import rpsft_kernels; "
        "print([name for name in set(sys.modules) - before if name.split('.')[0] in ('triton', 'transformers')"
        " or name.startswith(('rpsft_kernels.tools', 'rpsft_kernels.demo', 'rpsft_kernels.ops.triton.kernels'))], "
        "torch.cuda.is_initialized())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "False"]
