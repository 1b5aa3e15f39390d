"""A build takes what a machine can give, and nothing of its environment gets into the kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rpsft_kernels.ops.triton.aot import jobs as aot_jobs
from rpsft_kernels.ops.triton.aot.build import build_kernels
from rpsft_kernels.ops.triton.aot.jobs import available_memory, changes_code, compile_environment, default_jobs

GIB = 1 << 30


@pytest.mark.parametrize(
    ("processors", "memory", "jobs"),
    [(2, 8 * GIB, 2), (64, 8 * GIB, 8), (4, GIB, 1), (1, 64 * GIB, 1), (3, None, 3)],
)
def test_processes_fit_processors_and_memory(
    processors: int, memory: int | None, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    monkeypatch.setattr(aot_jobs, "available_memory", lambda: memory)
    assert default_jobs() == jobs
    monkeypatch.setenv("MAX_JOBS", "7")
    assert default_jobs() == 7


@pytest.mark.parametrize("word", ["many", "0", "-1", "1.5"])
def test_max_jobs_is_a_number(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", word)
    with pytest.raises(
        ValueError, match=rf"environment variable MAX_JOBS: got '{word}', expected a number of processes"
    ):
        default_jobs()


def test_a_container_has_less_memory_than_its_machine(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert available_memory(tmp_path) is None
    write("proc/meminfo", "MemTotal:  16777216 kB\nMemAvailable:   8388608 kB\n")
    assert available_memory(tmp_path) == 8 * GIB
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", f"{GIB}\n")
    assert available_memory(tmp_path) == 8 * GIB
    write("sys/fs/cgroup/memory.max", f"{3 * GIB}\n")
    assert available_memory(tmp_path) == 2 * GIB
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    assert available_memory(tmp_path) == GIB


def test_variables_that_change_code_are_told_from_paths_of_tools() -> None:
    changing = (
        "TRITON_INTERPRET",
        "TRITON_F32_DEFAULT",
        "TRITON_KERNEL_OVERRIDE",
        "TRITON_OVERRIDE_ARCH",
        "PTXAS_OPTIONS",
        "DISABLE_PTXAS_OPT",
        "DISABLE_LLVM_OPT",
        "LLVM_PASS_PLUGIN_PATH",
        "TRITON_PLUGIN_PATHS",
        "MLIR_ENABLE_DUMP",
        "AMDGCN_USE_BUFFER_OPS",
        "TRITON_MOCK_PTX_VERSION",
        "DISABLE_MMA_V3",
    )
    assert [name for name in changing if not changes_code(name)] == []
    kept = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_HOME", "PATH", "HOME", "CC", "MAX_JOBS")
    assert [name for name in kept if changes_code(name)] == []


def test_the_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/opt/ptxas")
    before = dict(os.environ)
    with compile_environment(TRITON_CACHE_DIR="/cache"):
        assert "TRITON_F32_DEFAULT" not in os.environ
        assert (os.environ["TRITON_PTXAS_PATH"], os.environ["TRITON_CACHE_DIR"]) == ("/opt/ptxas", "/cache")
    assert dict(os.environ) == before


@pytest.mark.xdist_group("aot")
def test_kernels_do_not_depend_on_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = "squares*;pull(basis_type=bf16, aligned=True*"
    build_kernels("8.0", tmp_path / "plain", ranks=(32,), jobs=1, only=only)
    for name, value in (
        ("DISABLE_PTXAS_OPT", "1"),
        ("PTXAS_OPTIONS", "-O1"),
        ("TRITON_INTERPRET", "1"),
        ("DISABLE_LLVM_OPT", "1"),
        ("TRITON_F32_DEFAULT", "ieee"),
        ("TRITON_DISABLE_LINE_INFO", "0"),
        ("TRITON_DEFAULT_FP_FUSION", "1"),
        ("TRITON_KERNEL_DUMP", "1"),
        ("TRITON_DUMP_DIR", str(tmp_path / "dump")),
    ):
        monkeypatch.setenv(name, value)
    build_kernels("8.0", tmp_path / "other", ranks=(32,), jobs=1, only=only)
    plain, other = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("plain", "other"))
    assert plain == other
    assert not (tmp_path / "dump").exists()
