"""Steps that are queued while the GPU is busy: the host goes on at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stepping import BACKENDS, CALLS, FORMS, Model

# 200 ms of a GPU at 2 GHz: far longer than the host needs to queue a step.
CYCLES = 400_000_000
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture
def watched() -> Iterator[None]:
    """torch raises where one of its own calls waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def warm_up(form: str, dtype: torch.dtype, device: torch.device, backend: str, call: str) -> Model:
    """A model that has made a step, by which kernels are loaded; without gradients."""
    model = Model(form, dtype, device, backend)
    model.step(call, 0.1)
    for parameter in model.trained():
        parameter.grad = None
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_no_call_of_torch_waits(
    call: str, backend: str, form: str, dtype: torch.dtype, device: torch.device, request: pytest.FixtureRequest
) -> None:
    model = warm_up(form, dtype, device, backend, call)
    request.getfixturevalue("watched")
    # New gradients, then those that exist; a coefficient of its own each time.
    values = [model.step(call, coeff) for coeff in (0.2, 0.3)]
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*values) and bool(values[0])


def test_the_watch_sees_a_wait(watched: None, device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        torch.tensor([1.0, 2.0], device=device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_the_host_is_done_before_the_gpu(call: str, backend: str, form: str, device: torch.device) -> None:
    model = warm_up(form, torch.bfloat16, device, backend, call)
    model.step(call, 0.2)
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    torch.cuda._sleep(CYCLES)
    model.step(call, 0.3)
    went_on = not stream.query()
    torch.cuda.synchronize()
    assert went_on, "the step waited for what the GPU was doing"
