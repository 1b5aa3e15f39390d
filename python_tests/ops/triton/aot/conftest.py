from __future__ import annotations

from pathlib import Path

import pytest

from rpsft_kernels.ops.triton.aot import dispatch as aot_dispatch
from rpsft_kernels.ops.triton.aot import loader as aot_loader
from rpsft_kernels.ops.triton.aot.build import build_kernels
from world import World

ARCHITECTURES = "8.0;9.0"
# A few of each kind: with masks and without, through pointers and descriptors, elementwise, and specialised. Those with
# float32 bases are for 9.0 alone.
ONLY = (
    "squares*;"
    "project(weight_type=bf16, base_type=bf16, basis_type=bf16, rows_contiguous=True, aligned=True*;"
    "pull(basis_type=bf16, transposed=True, aligned=True*;"
    "pull(basis_type=fp32, transposed=True, aligned=True, descriptor=True*;"
    "gradient(grad_type=fp32, basis_type=bf16, aligned=True*accumulate=True*;"
    "gradient(grad_type=fp32, basis_type=fp32, rows_contiguous=True, aligned=True, descriptor=True*accumulate=True*;"
    "gradient(grad_type=bf16, basis_type=bf16, basis_parts*;"
    "full_gradient(weight_type=bf16, base_type=bf16, grad_type=fp32, aligned=True, accumulate=True*;"
    "hopper_project(weight_type=bf16, base_type=bf16, rows_contiguous=True*;"
    "round*;"
    "hopper_pull(transposed=True*;"
    "hopper_gradient(grad_type=fp32, rows_contiguous=True, accumulate=True*"
)


@pytest.fixture(autouse=True)
def _fresh(_chosen_by_the_test: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not depend on the environment, or on what was logged or decided before."""
    for name in ("RPSFT_AOT", "RPSFT_AOT_KERNELS", "RPSFT_CUDA_ARCHS", "RPSFT_STRICT", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(aot_dispatch, "_logged", set())
    monkeypatch.setattr(aot_dispatch, "_refused", {})
    monkeypatch.setattr(aot_dispatch, "_reasons", {})
    monkeypatch.setattr(aot_loader, "_kernels", {})
    for cached in (
        aot_dispatch._find,
        aot_dispatch._explain_no_match,
        aot_dispatch._served_tables,
        aot_dispatch._served_table,
    ):
        cached.cache_clear()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of kernels for sm_80 and sm_90 at ranks up to 32."""
    folder = tmp_path_factory.mktemp("aot") / "kernels"
    build_kernels(ARCHITECTURES, folder, ranks=(32,), jobs=2, only=ONLY)
    return folder
