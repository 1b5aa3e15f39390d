"""The requirements of compiling and starting kernels are found without importing triton."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpsft_kernels.ops.triton import toolchain


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    toolchain.compiler_missing.cache_clear()
    yield
    toolchain.compiler_missing.cache_clear()


def executable(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_without_a_compiler() -> None:
    assert toolchain.compiler_missing() == (
        "Triton needs a C compiler at its first launch, and neither gcc nor clang is found (install gcc, or set CC)"
    )
    assert toolchain.triton_missing() is None
    assert toolchain.jit_missing() == toolchain.compiler_missing()


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_with_one(name: str, tmp_path: Path) -> None:
    executable(tmp_path / name)
    assert toolchain.jit_missing() is None


def test_cc_outranks_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "gcc")
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert "CC names '/nowhere/cc', which is not found" in toolchain.compiler_missing()
    toolchain.compiler_missing.cache_clear()
    executable(tmp_path / "other")
    monkeypatch.setenv("CC", "other")
    assert toolchain.compiler_missing() is None


def test_a_helper_that_was_built_before_does(tmp_path: Path) -> None:
    built = tmp_path / "cache" / "ABC"
    built.mkdir(parents=True)
    (built / "cuda_utils.cpython-311-x86_64-linux-gnu.so").write_text("")
    assert toolchain.compiler_missing() is None


@pytest.mark.parametrize(
    ("version", "touches", "reason"),
    [
        ("3.6.0", True, "Triton 3.6.0 is known to compile such kernels wrongly"),
        ("3.8.2+git1234", True, "Triton 3.8.2+git1234 is known"),
        ("3.9.0", False, ""),
        ("3.10.1", False, ""),
        ("4.0", False, ""),
        ("", False, "the version of Triton is not known"),
    ],
)
def test_which_versions_touch_registers_of_pending_products(
    version: str, touches: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in toolchain._ASSEMBLER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "triton_version", lambda: version)
    assert toolchain.touches_products() == touches
    unsafe = toolchain.products_unsafe()
    assert (unsafe is None) == (not reason)
    assert (unsafe or "").startswith(reason)
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", "/opt/ptxas")
    if not reason:
        said = "TRITON_PTXAS_BLACKWELL_PATH and DISABLE_PTXAS_OPT may change how Triton assembles it"
        assert toolchain.products_unsafe() == said
