"""Workspaces of the kernel tests begin as NaN: what is never written shows."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# On a GPU deterministic algorithms ask this of cuBLAS, which tests compare with.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _poisoned_workspaces() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
