"""PTX written by hand for tests; each kernel is first assembled by the ptxas that Triton ships, where there is one."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .launch import run
from .stats import Stats

HEAD = """.version 8.4
.target {target}
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k({params})
.reqntid {threads}{directives}
{{
 .reg .pred %p<20>; .reg .b16 %h<40>; .reg .b32 %r<60>; .reg .b64 %d<40>; .reg .f32 %f<40>;
{body}
}}
"""
SIZE = {"b16": 2, "b32": 4, "f32": 4, "b64": 8}
REGISTER = {"b16": "%h", "b32": "%r", "b64": "%d", "f32": "%f"}
_UNSIGNED: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@functools.cache
def _ptxas() -> Path | None:
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "backends/nvidia/bin/ptxas"
    return path if path.exists() else None


def assemble(text: str, target: str) -> None:
    if _ptxas() is None:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [str(_ptxas()), f"--gpu-name={target}", "-O0", file.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + "\n" + text


def kernel(
    body: str, args: Sequence[Any] = (), threads: int = 128, shared: int = 0, target: str = "sm_80", programs: int = 1,
    registers: int = 0, **options: Any,
) -> Stats:  # fmt: skip
    """Run ``body``, which refers to parameter i as [p<i>]; ``args`` are arrays or integers.

    ``registers``: as many as a thread begins with, where the kernel says so.
    """
    params = ", ".join(
        f".param .u64 p{i}" if not isinstance(a, int) else f".param .u32 p{i}" for i, a in enumerate(args)
    )
    directives = f" .maxnreg {registers}" if registers else ""
    text = HEAD.format(target=target, params=params, threads=threads, directives=directives, body=body)
    assemble(text, target)
    return run(text, (programs,), args, threads // 32, shared, **options)


def apply(code: str, types: Sequence[str], out: str, *inputs: Any, target: str = "sm_80") -> npt.NDArray[Any]:
    """Run ``code`` once per thread. Its operands {0}, {1}.. are the inputs of the given types, {d} the result."""
    n = len(inputs[0])
    threads = -(-n // 32) * 32
    arrays = []
    for name, values in zip(types, inputs, strict=True):
        array = np.zeros(threads, _UNSIGNED[SIZE[name]])
        if isinstance(values, np.ndarray) and values.itemsize == array.itemsize:
            array[:n] = values.view(array.dtype)
        else:
            array[:n] = [int(v) % (1 << 8 * array.itemsize) for v in values]
        arrays.append(array)
    result = np.zeros(threads, _UNSIGNED[SIZE[out]])
    lines = ["mov.u32 %r50, %tid.x;"]
    for i, name in enumerate(types):
        register = f"{REGISTER[name]}{i + 1}"
        lines.append(f"ld.param.u64 %d30, [p{i}]; mad.wide.u32 %d30, %r50, {SIZE[name]}, %d30;")
        lines.append(f"ld.global.{name} {register}, [%d30];")
        code = code.replace(f"{{{i}}}", register)
    d = f"{REGISTER[out]}20"
    lines.append(code.replace("{d}", d))
    lines.append(f"ld.param.u64 %d31, [p{len(types)}]; mad.wide.u32 %d31, %r50, {SIZE[out]}, %d31;")
    lines.append(f"st.global.{out} [%d31], {d}; ret;")
    kernel("\n".join(lines), [*arrays, result], threads=threads, target=target)
    return result[:n]
