"""Checks of arguments: weights, ranks and dtypes. They raise before any operation is given the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_weight(weight: object, name: str, dimensions: int = 2, sharded: bool = False) -> None:
    """Raise a ValueError under ``name`` unless ``weight`` is a dense floating tensor with data, a matrix by default.

    ``sharded`` admits a DTensor.
    """
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name}: got {type(weight).__name__}, expected a torch.Tensor of shape (m, n)")
    if weight.is_nested:
        raise ValueError(
            f"{name}: got a nested tensor, expected a dense matrix; pass its parts as a list: {name}.unbind()"
        )
    if weight.layout != torch.strided:
        raise ValueError(f"{name}: got layout {weight.layout}, expected a dense tensor; call {name}.to_dense()")
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: got dtype {weight.dtype}, expected bfloat16, float16, float32 or float64; quantised and integer "
            "weights have no drift to penalise: leave them out (exclude=...)"
        )
    if weight.ndim != dimensions:
        raise ValueError(
            f"{name}: got {weight.ndim} dimension(s), shape {tuple(weight.shape)}, expected "
            + ("a matrix (m, n); " if dimensions == 2 else "the elements of a flat range; ")
            + "leave it out, or pass a 2-D view"
        )
    if weight.device.type == "meta":
        raise ValueError(f"{name}: got a tensor on the meta device, expected one with data; materialise it first")
    if not sharded and hasattr(weight, "placements"):
        raise ValueError(
            f"{name}: got a DTensor, expected a plain tensor; of a sharded weight pass the part at hand: "
            f"{name}.to_local()"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module, such as ``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def check_rank(rank: object) -> None:
    """Raise a ValueError unless ``rank`` is an int of at least 1."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank: got {rank!r}, expected an int of at least 1 (the paper takes 768)")


def read_rank(rank: object) -> int | float:
    """Return ``rank`` as it was asked for: a number of directions, or a share of energy as a Python float.

    Raises:
        ValueError: it is neither an int of at least 1 nor a float strictly between 0 and 1.
    """
    if isinstance(rank, float):
        if 0.0 < rank < 1.0:
            return float(rank)
        raise ValueError(
            f"rank: got {rank!r}, expected an int of at least 1, a number of directions (the paper takes 768), or a "
            "float strictly between 0 and 1, a share of each weight's energy such as 0.9"
        )
    check_rank(rank)
    assert isinstance(rank, int)
    return rank


def read_coeff(coeff: object) -> float:
    """Return ``coeff`` as a Python number. One on a GPU is waited for.

    Raises:
        ValueError: ``float()`` does not take it, it is a bool or text, or a number that is not finite, or it requires
            grad.
    """
    if type(coeff) is not float:
        reason = _why_no_coeff(coeff)
        if reason is not None:
            raise ValueError(f"coeff: got {reason}")
    try:
        number = float(coeff)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"coeff: got {_show(coeff)}, expected a finite number (the paper's lambda), which float() takes; it said: "
            f"{error}"
        ) from error
    if not math.isfinite(number):
        raise ValueError(f"coeff: got {number!r}, expected a finite number (the paper's lambda)")
    return number


def _why_no_coeff(coeff: object) -> str | None:
    """Return why a value is no coefficient although ``float()`` may take it: what came, and what was expected."""
    expected = "expected a finite number (the paper's lambda)"
    # The dtypes of torch and of NumPy have equal names.
    dtype = str(getattr(coeff, "dtype", "")).removeprefix("torch.")
    if isinstance(coeff, (bool, complex, str, bytes, bytearray)) or dtype == "bool" or dtype.startswith("complex"):
        return f"{_show(coeff)}, {expected}: bools, text and complex numbers are none; pass a float"
    if isinstance(coeff, Tensor) and coeff.requires_grad:
        return f"a tensor that requires grad, {expected}: this call has no derivative; pass coeff.detach()"
    if hasattr(coeff, "placements"):
        return f"a DTensor, {expected}; pass coeff.full_tensor()"
    return None


def _show(value: object) -> str:
    """Return a value as a message shows it, however large it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} in {dtype_name(value.dtype)} on {value.device}"
    if type(value) is int and value.bit_length() > 1100:
        return f"an int of {value.bit_length()} bits"
    return repr(value)


def check_basis_dtype(dtype: torch.dtype, weight_dtype: torch.dtype, name: str) -> None:
    """Raise a ValueError under ``name`` unless U and V may be kept in ``dtype`` for weights of ``weight_dtype``."""
    if dtype == torch.float16:
        raise ValueError(
            f"{name}: got float16, expected bfloat16 or float32: a drift of the first fine-tuning steps "
            "underflows in float16 products"
        )
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name}: got {dtype}, expected torch.bfloat16, torch.float32 or torch.float64")
    if dtype == torch.float64 and weight_dtype != torch.float64:
        raise ValueError(
            f"{name}: got float64 for {dtype_name(weight_dtype)} weights, expected bfloat16 or float32: sums "
            "over such weights are float32"
        )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise a ValueError under ``name`` if the tensor holds NaN or infinity."""
    if not tensor.numel():
        return
    # aminmax propagates NaN, and needs no mask as large as the tensor.
    low, high = (float(bound) for bound in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: got NaN or infinity, expected finite values only; check where it was loaded from")
