"""The choice of a backend: by device and dtype, by ``use_backend``, or by RPSFT_BACKEND."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, cast

import torch
from torch import Tensor

from ..checks import dtype_name
from ..private_names import constant_under_dynamo
from .operands import Operands

NAMES = ("torch", "triton", "native")
_MODULES = {"torch": "reference", "triton": "triton.backend", "native": "native"}
_override: ContextVar[str | None] = ContextVar("rpsft_backend", default=None)


class Backend(Protocol):
    """The functions that every backend module offers."""

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return the reason why the backend cannot serve weights of this dtype on this device, or None when it can."""

    def cannot_write(self, dtype: torch.dtype) -> str | None:
        """Return the reason why the backend cannot add to gradients of this dtype, or None when it can."""

    def arithmetic(self, device: torch.device) -> str:
        """Name what decides the bits of a projection on this device, beyond the backend's own name."""

    def project_drift(self, operands: Operands) -> tuple[list[Tensor], Tensor]:
        """Compute drifts and their squared norms, as :func:`rpsft_kernels.ops.project_drift` describes them."""

    def pull_back_into(
        self, grads: Sequence[Tensor], operands: Operands, drifts: Sequence[Tensor], scales: Tensor, accumulate: bool
    ) -> None:
        """Write the gradients, or add to them, as :func:`rpsft_kernels.ops.pull_back_` describes it."""


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(map(repr, NAMES))}")
    return name


def load(name: str) -> Backend:
    """Return the backend's module, imported on first use so that importing the package stays light."""
    return cast(Backend, importlib.import_module(f"rpsft_kernels.ops.{_MODULES[_check_name(name, 'backend')]}"))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the ``with`` block on one backend.

    Args:
        name: ``"torch"`` (plain PyTorch, any dtype up to float64), ``"triton"`` (GPU kernels, or
            interpreted on the CPU under ``TRITON_INTERPRET=1``) or ``"native"`` (the CPU engine).

    Raises:
        ValueError: at once for an unknown name; at the first operation for a backend that cannot serve
            the device or dtype at hand (the message says why).

    The choice belongs to the current thread or task and outranks the environment variable
    ``RPSFT_BACKEND``. A backward pass runs on the backend of its forward pass. Under ``torch.compile``
    the choice is the one in force while the function is traced.
    """
    token = _override.set(_check_name(name, "use_backend(name)"))
    try:
        yield
    finally:
        _override.reset(token)


def requested_backend() -> str | None:
    """Return the backend asked for by ``use_backend`` or ``RPSFT_BACKEND``, or None when the choice is free."""
    override = _override.get()
    if override is not None:
        return override
    name = os.environ.get("RPSFT_BACKEND", "")
    return _check_name(name, "environment variable RPSFT_BACKEND") if name else None


# Dynamo traces neither a ContextVar nor an import; the answer is a constant of the compiled function (documented at
# use_backend).
@constant_under_dynamo
def resolve_backend(device: torch.device, dtype: torch.dtype, requested: str | None = None) -> str:
    """Return the name of the backend that serves weights of ``dtype`` on ``device``.

    Args:
        device: where the weights are.
        dtype: the weights' dtype.
        requested: a backend's name; None asks ``use_backend`` and ``RPSFT_BACKEND``, then takes the
            fastest that can: triton on a GPU, native on the CPU where built, else torch.

    Raises:
        ValueError: the requested backend cannot serve this device or dtype.
    """
    requested = requested or requested_backend()
    if requested is not None:
        reason = load(requested).unavailable(device, dtype)
        if reason is not None:
            raise ValueError(
                f"backend {requested!r} cannot serve {str(dtype).removeprefix('torch.')} weights on "
                f"{device}: {reason}; choose another with use_backend(...) or RPSFT_BACKEND"
            )
        return requested
    preferred = {"cuda": "triton", "cpu": "native"}.get(device.type)
    if preferred is not None and load(preferred).unavailable(device, dtype) is None:
        return preferred
    return "torch"


def check_gradient_dtype(backend: str, dtype: torch.dtype, weight_dtype: torch.dtype, name: str) -> None:
    """Raise a ValueError under a gradient's ``name`` unless a backend can add to gradients of ``dtype``."""
    reason = load(backend).cannot_write(dtype)
    if reason is None:
        return
    way_out = f"cast it: {name} = {name}.to({weight_dtype})"
    if load("torch").cannot_write(dtype) is None:
        way_out += ", or use_backend('torch')"
    raise ValueError(
        f"{name}: got a gradient in {dtype_name(dtype)}, expected one that backend {backend!r} can add to: {reason}; "
        f"{way_out}"
    )


def arithmetic_id(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name everything that decides the bits of a projection, such as ``"torch:cpu:float32"``.

    A block form's ``B`` cancels ``U^T W0 V`` to the last bit only where both came from the same arithmetic.
    """
    return f"{backend}:{load(backend).arithmetic(device)}:{str(dtype).removeprefix('torch.')}"


def available_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Map every backend's name to None where it can serve, or to the reason why it cannot."""
    return {name: load(name).unavailable(device, dtype) for name in NAMES}
