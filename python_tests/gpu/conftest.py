"""Tests of what only a GPU can show. Elsewhere each is skipped, with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: make test-gpu runs it where there is one")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU of compute capability 8.0 or newer")
    # Several processes share the GPU: one that takes more than it should fails itself, and not the others.
    torch.cuda.set_per_process_memory_fraction(0.35)


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """Free the memory of each test for the next test of another process."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
