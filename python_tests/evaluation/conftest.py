"""Each backend in turn, with no plans of earlier tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import rpsft_kernels as rk
from plans import forget

BACKENDS = ("native", "torch", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels on the CPU take TRITON_INTERPRET=1, set before the start")
    forget()
    with rk.use_backend(request.param):
        yield request.param
    forget()
