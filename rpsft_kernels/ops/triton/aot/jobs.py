"""The number of processes that compile kernels at a time, and the environment that they compile in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# The largest process seen needed 230 MiB, or 620 MiB with torch imported. The rest is a margin, also for its assembler.
_PROCESS = 1 << 30
# Variables that Triton and its assembler read and that change the code or write files beside it. The variables that
# say where their tools are do not count: they belong to the installation, and the manifest names the tools' versions.
_PREFIXES = ("TRITON_", "PTXAS_", "MLIR_", "LLVM_", "AMDGCN_", "NVPTX_", "DISABLE_MMA_")
_NAMES = ("DISABLE_PTXAS_OPT", "DISABLE_LLVM_OPT", "ALLOW_LHS_TMEM_LAYOUT_CONVERSION", "USE_IR_LOC")
_TOOLS = r"TRITON_HOME|TRITON_(PTXAS|PTXAS_BLACKWELL|CUOBJDUMP|NVDISASM|LIBDEVICE|LIBCUDA|HIP_LLD|LIBHIP)_PATH"


def default_jobs() -> int:
    """MAX_JOBS, else one process per processor that this process may use, as long as memory suffices for each."""
    named = os.environ.get("MAX_JOBS", "").strip()
    if named:
        if not named.isdigit() or int(named) < 1:
            raise ValueError(f"environment variable MAX_JOBS: got {named!r}, expected a number of processes from 1")
        return int(named)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = available_memory()
    return max(1, processors if memory is None else min(processors, memory // _PROCESS))


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that new processes may take, of the machine or of the container's limit; None if neither is known."""
    limits = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    group = root / "sys/fs/cgroup"
    old = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, used in (("memory.max", "memory.current"), old):
        try:
            # The limit reads "max" if there is none, and int() refuses that.
            limits.append(max(0, int((group / limit).read_text()) - int((group / used).read_text())))
        except (OSError, ValueError):
            continue
    return min(limits, default=None)


def changes_code(name: str) -> bool:
    """Whether an environment variable may change the code that the compiler makes of a kernel."""
    return name in _NAMES or (name.startswith(_PREFIXES) and not re.fullmatch(_TOOLS, name))


@contextmanager
def compile_environment(**wanted: str) -> Iterator[None]:
    """Inside the ``with`` block, unset every variable that would change the code, and set those given.

    Processes that are started inside it inherit this environment.
    """
    before = dict(os.environ)
    _replace({name: value for name, value in before.items() if not changes_code(name)} | wanted)
    try:
        yield
    finally:
        _replace(before)


def _replace(variables: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update(variables)
