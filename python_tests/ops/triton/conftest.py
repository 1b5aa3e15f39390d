"""Workspaces of the kernel tests begin as NaN: what is never written shows."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator

import pytest
import torch

from compiling import Compiler
from emulated import split_by_shape, stretches_by_shape
from rpsft_kernels.ops.triton import project_drift, scratch, toolchain

# On a GPU deterministic algorithms ask this of cuBLAS, which tests compare with.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _poisoned_workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Memory that other tests have freed still holds their numbers.
    monkeypatch.setattr(scratch, "_scratches", weakref.WeakValueDictionary())
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def any_tiles(device: torch.device) -> None:
    """For tests of tile shapes that no kernel was compiled ahead of time for: Triton compiles them, where it may."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and toolchain.touches_products():
        pytest.skip(f"Triton {toolchain.triton_version()} may compile code for compute capability 9.0 that is refused")


@pytest.fixture
def split_sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums that are split and such that are not, at shapes small enough for the emulator."""
    monkeypatch.setattr(project_drift, "splits_of", split_by_shape)
    monkeypatch.setattr(project_drift, "stretches_of", stretches_by_shape)
    project_drift.plan_forward.cache_clear()
    yield
    project_drift.plan_forward.cache_clear()


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    """Compiles variants for GPUs that need not be there."""
    compiler = Compiler()
    yield compiler
    compiler.close()
