"""The choice of a backend: who may choose, in which order, and the errors where a backend cannot serve."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from rpsft_kernels import ops
from rpsft_kernels.ops import dispatch, native, reference
from support import make_problem, operands_of

CPU = torch.device("cpu")


def request_in_thread() -> str | None:
    requested: list[str | None] = []
    thread = threading.Thread(target=lambda: requested.append(ops.requested_backend()))
    thread.start()
    thread.join()
    return requested[0]


def test_nested_choices_end_with_their_blocks() -> None:
    assert ops.requested_backend() is None
    with rk.use_backend("torch"):
        assert ops.requested_backend() == "torch"
        with rk.use_backend("triton"):
            assert ops.requested_backend() == "triton"
            with rk.use_backend("native"):
                assert ops.requested_backend() == "native"
            assert ops.requested_backend() == "triton"
        assert ops.requested_backend() == "torch"
    assert ops.requested_backend() is None


def leave_by_an_exception() -> None:
    with rk.use_backend("torch"), rk.use_backend("native"):
        raise RuntimeError("training went wrong")


def test_an_exception_ends_the_choice() -> None:
    with pytest.raises(RuntimeError, match="training went wrong"):
        leave_by_an_exception()
    assert ops.requested_backend() is None


def test_the_choice_belongs_to_its_thread() -> None:
    with rk.use_backend("torch"):
        assert request_in_thread() is None
        assert ops.requested_backend() == "torch"


def test_the_choice_belongs_to_its_task() -> None:
    async def choose(name: str, started: asyncio.Event, other_started: asyncio.Event) -> str | None:
        with rk.use_backend(name):
            started.set()
            await other_started.wait()
            return ops.requested_backend()

    async def choose_both() -> list[str | None]:
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(choose("torch", first, second), choose("triton", second, first))

    assert asyncio.run(choose_both()) == ["torch", "triton"]


def test_the_environment_chooses_where_nothing_outranks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_BACKEND", "torch")
    assert ops.requested_backend() == request_in_thread() == "torch"
    with rk.use_backend("triton"):
        assert ops.requested_backend() == "triton"
    assert ops.resolve_backend(CPU, torch.float32) == "torch"
    monkeypatch.setenv("RPSFT_BACKEND", "")
    assert ops.requested_backend() is None


@pytest.mark.parametrize("name", ["cuda", "Torch", "", None, 3])
def test_unknown_names(name: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"use_backend\(name\): got .*, expected one of 'torch', 'triton', 'native'"),
        rk.use_backend(name),
    ):
        pytest.fail("the block must not run")
    assert ops.requested_backend() is None


def test_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_BACKEND", "gpu")
    with pytest.raises(ValueError, match="environment variable RPSFT_BACKEND: got 'gpu', expected one of"):
        ops.requested_backend()
    weight = torch.ones(4, 4, requires_grad=True)
    with rk.use_backend("torch"):
        anchor = rk.Anchor.from_weight(weight, 2)
    with pytest.raises(ValueError, match="RPSFT_BACKEND: got 'gpu'"):
        rk.accumulate_rotation_grad_(weight, anchor, 1.0)
    assert weight.grad is None


def test_unknown_name_for_an_operation() -> None:
    operands = operands_of([make_problem("base", (6, 5), 2)])
    with pytest.raises(ValueError, match="backend: got 'gpu', expected one of 'torch'"):
        ops.project_drift(operands, "gpu")
    with pytest.raises(ValueError, match="got 'gpu', expected one of 'torch'"):
        ops.resolve_backend(CPU, torch.float32, "gpu")
    with pytest.raises(ValueError, match="got 'gpu', expected one of 'torch'"):
        ops.arithmetic_id("gpu", CPU, torch.float32)


def test_a_backend_that_cannot_serve_says_why(device: torch.device) -> None:
    with (
        rk.use_backend("native"),
        pytest.raises(
            ValueError,
            match=r"backend 'native' cannot serve float64 weights on cpu: .*; choose another with use_backend",
        ),
    ):
        ops.resolve_backend(CPU, torch.float64)
    with (
        rk.use_backend("native"),
        pytest.raises(ValueError, match="'native' cannot serve float32 weights on cuda: it computes on the CPU only"),
    ):
        ops.resolve_backend(torch.device("cuda"), torch.float32)
    with (
        rk.use_backend("triton"),
        pytest.raises(
            ValueError, match="backend 'triton' cannot serve float64 weights on .*: its kernels take bfloat16, float16"
        ),
    ):
        ops.resolve_backend(device, torch.float64)
    with rk.use_backend("torch"), pytest.raises(ValueError, match="backend 'torch' cannot serve int8 weights"):
        ops.resolve_backend(CPU, torch.int8)


@pytest.mark.parametrize(("name", "dtype"), [("native", torch.float64), ("triton", torch.float64)])
def test_public_functions_refuse_a_backend_that_cannot_serve(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    weight = torch.ones(4, 5, dtype=dtype, device=device, requires_grad=True)
    anchor = rk.Anchor.from_weight(weight, 2)
    assert anchor.left is not None and anchor.right is not None
    left, right = anchor.left, anchor.right
    with rk.use_backend(name):
        for call in (
            lambda: rk.rotation_penalty(weight, anchor),
            lambda: rk.accumulate_rotation_grad_(weight, anchor, 1.0),
            lambda: rk.project(weight, left, right),
            lambda: rk.Anchor.from_weight(weight, 2, keep_base=False),
        ):
            with pytest.raises(
                ValueError, match=f"backend '{name}' cannot serve {str(dtype)[6:]} weights on {device.type}"
            ):
                call()
    assert weight.grad is None


@pytest.mark.parametrize("missing", ["TRITON_INTERPRET", "triton"])
def test_triton_on_the_cpu_needs_its_interpreter(missing: str) -> None:
    # The variable is read when triton is imported, hence another process.
    program = (
        "import sys, torch\n"
        + ("sys.modules['triton'] = None\n" if missing == "triton" else "")
        + "import rpsft_kernels as rk\n"
        "w = torch.ones(4, 5)\n"
        "a = rk.Anchor.from_weight(w, 2)\n"
        "print(rk.rotation_penalty(w, a).item())\n"
        "with rk.use_backend('triton'):\n"
        "    try:\n"
        "        rk.rotation_penalty(w, a)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=100
    )
    expected = {
        "TRITON_INTERPRET": "on the CPU it runs only in Triton's interpreter (TRITON_INTERPRET=1)",
        "triton": "the package triton is not installed (pip install triton)",
    }
    value, message = run.stdout.splitlines()
    assert value == "0.0"
    assert message == (
        f"backend 'triton' cannot serve float32 weights on cpu: {expected[missing]}; "
        "choose another with use_backend(...) or RPSFT_BACKEND"
    )


def test_importing_the_package_imports_neither_triton_nor_dynamo() -> None:
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import rpsft_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert 'rpsft_kernels' in new and 'triton' not in new, new\n"
        "assert 'torch._dynamo' in before or 'torch._dynamo' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_free_choice(device: torch.device) -> None:
    assert ops.resolve_backend(CPU, torch.float32) == ("native" if native.instruction_sets() else "torch")
    assert ops.resolve_backend(CPU, torch.float64) == "torch"
    if device.type == "cuda":
        assert ops.resolve_backend(device, torch.bfloat16) == "triton"
    assert ops.resolve_backend(device, torch.float64) == "torch"
    assert ops.resolve_backend(device, torch.float32, "triton") == "triton"


def test_available_backends(device: torch.device) -> None:
    reasons = ops.available_backends(device, torch.float32)
    assert list(reasons) == ["torch", "triton", "native"]
    assert reasons["torch"] is None and reasons["triton"] is None
    assert (reasons["native"] is None) == (device.type == "cpu" and bool(native.instruction_sets()))
    assert ops.available_backends(device, torch.float64)["triton"] is not None


def test_arithmetic_id(device: torch.device) -> None:
    assert ops.arithmetic_id("torch", CPU, torch.float32) == "torch:cpu:float32"
    assert ops.arithmetic_id("torch", CPU, torch.bfloat16) == "torch:cpu:bfloat16"
    by_triton = ops.arithmetic_id("triton", device, torch.float32)
    assert by_triton.startswith("triton:") and by_triton.endswith(":float32") and len(by_triton.split(":")) == 3
    if device.type == "cpu":
        assert by_triton == "triton:interpreter:float32"


class RecordingBackend:
    """The reference under a backend's name, recording its calls."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def project_drift(self, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        self.calls.append(f"project_drift on {self.name}")
        return reference.project_drift(*arguments)

    def pull_back_into(self, grads: Sequence[Tensor], *arguments: Any, accumulate: bool) -> None:
        self.calls.append(f"pull_back_into on {self.name}")
        reference.pull_back_into(grads, *arguments, accumulate=accumulate)


def test_backward_runs_on_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("rpsft_kernels.ops.torch_ops.load", lambda name: RecordingBackend(name, calls))
    monkeypatch.setattr(dispatch, "resolve_backend", lambda *_: pytest.fail("the backend is chosen in the forward"))
    for form in ("base", "full"):
        operands = operands_of([make_problem(form, (6, 5), 2)])
        operands.weights[0].requires_grad_()
        _, squares = ops.project_drift(operands, "triton")
        with rk.use_backend("torch"):
            squares.sum().backward()
        assert calls == ["project_drift on triton", "pull_back_into on triton"]
        calls.clear()


def test_double_backward_stays_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("rpsft_kernels.ops.torch_ops.load", lambda name: RecordingBackend(name, calls))
    operands = operands_of([make_problem("base", (6, 5), 2)])
    weights = operands.weights
    weights[0].requires_grad_()
    _, squares = ops.project_drift(operands, "native")
    with rk.use_backend("torch"):
        (grad,) = torch.autograd.grad(squares.sum(), weights, create_graph=True)
        grad.square().sum().backward()
    assert len(calls) >= 4 and all(call.endswith("on native") for call in calls)


def test_a_penalty_keeps_its_backend_through_backward(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    calls: list[str] = []
    pull_back_into = reference.pull_back_into

    def record(*arguments: Any, **options: Any) -> None:
        calls.append("torch")
        pull_back_into(*arguments, **options)

    weight = torch.randn(20, 12, device=device)
    anchor = rk.Anchor.from_weight(weight, 3)
    weight = (weight + 0.1).requires_grad_()
    monkeypatch.setattr(reference, "pull_back_into", record)
    with rk.use_backend("torch"):
        penalty = rk.rotation_penalty(weight, anchor)
    assert calls == []
    with rk.use_backend("triton"):
        penalty.backward()
    assert calls == ["torch"]
