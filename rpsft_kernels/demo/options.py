"""The demo's command line, checked before anything slow begins."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import ops

# What an arm is called at the prompt, and in tables and curves.
ARMS = {"sft": "SFT", "rpsft": "RPSFT", "random": "random"}

# These suit a few minutes on two CPU cores, not a real fine-tuning: the paper's takes thousands of steps at 1e-6, with
# rank 768 and coefficient 1. A lower rank leaves most of the drift free: at 128 the penalty has no effect to be seen.
_DEFAULTS = {
    "steps": 32,
    "rank": 432,
    "coeff": 1.0,
    "lr": 1.5e-4,
    "batch": 32,
    "arms": list(ARMS),
    "seeds": [0],
    "autocast": None,
    "device": "auto",
    "backend": None,
    "output": Path("output/demo.png"),
}


@dataclass(frozen=True)
class Options:
    """The options of one demo.

    Attributes:
        steps: Optimizer steps of each run.
        rank: k, singular directions kept of each weight.
        coeff: The paper's lambda.
        lr: Peak learning rate of AdamW.
        batch: Sums per optimizer step.
        arms: Ways to fine-tune, keys of ``ARMS``, in the order of training.
        seeds: Of the training data, their order, the held-out sums and the random subspaces; all arms are trained once
            for each.
        autocast: Whether forward passes of training compute in bfloat16.
        device: ``cpu`` or a CUDA device.
        backend: Backend of the package's operations; None leaves the choice to the package.
        output: The PNG of the curves; the measurements go to a JSON file beside it.
    """

    steps: int
    rank: int
    coeff: float
    lr: float
    batch: int
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    autocast: bool
    device: torch.device
    backend: str | None
    output: Path


def parse_options(arguments: list[str] | None = None) -> Options:
    """Read the command line; an option that cannot work ends the process with status 2 and says why."""
    parser = argparse.ArgumentParser(
        prog="python -m rpsft_kernels.demo",
        description="Fine-tune SmolLM2-135M-Instruct on sums without the rotation penalty, with it (RPSFT), and with "
        "the same penalty in random subspaces, and measure what each run learned and what it forgot.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of each run")
    parser.add_argument("--rank", type=int, help="directions kept of each weight")
    parser.add_argument("--coeff", type=float, help="coefficient of the penalty, the paper's lambda")
    parser.add_argument("--lr", type=float, help="peak learning rate of AdamW")
    parser.add_argument("--batch", type=int, help="sums per optimizer step")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), help="without the penalty, with it, and with random subspaces"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="of data, their order and random subspaces; every arm is trained for each"
    )
    parser.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        help="train in bfloat16 autocast; None does on a processor that multiplies bfloat16 pairs, and on a GPU",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; auto is cuda where there is one, else cpu")
    parser.add_argument("--backend", help="torch, triton or native; None leaves the choice to the package")
    parser.add_argument("--output", type=Path, help="PNG of the curves; the numbers go to a JSON file beside it")
    parser.set_defaults(**_DEFAULTS)
    given = parser.parse_args(arguments)
    try:
        return check_options(**vars(given))
    except ValueError as error:
        parser.error(str(error))


def check_options(
    *,
    steps: int,
    rank: int,
    coeff: float,
    lr: float,
    batch: int,
    arms: Sequence[str],
    seeds: Sequence[int],
    autocast: bool | None,
    device: str,
    backend: str | None,
    output: Path,
) -> Options:
    """Check the options; creates the folder of ``output``.

    Raises:
        ValueError: an option is out of its range, there is no such device or backend here, or ``output`` cannot
            be written.
    """
    for name, value in (("steps", steps), ("rank", rank), ("batch", batch)):
        if value < 1:
            raise ValueError(f"--{name}: got {value}, expected a whole number of at least 1")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"--lr: got {lr}, expected a positive number such as 3e-4")
    if not (math.isfinite(coeff) and coeff >= 0):
        raise ValueError(f"--coeff: got {coeff}, expected a number of at least 0; 0 only measures the penalty")
    for name, values in (("arms", arms), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"--{name}: got {' '.join(map(str, values))}, expected each once")
    if min(seeds) < 0:
        raise ValueError(f"--seeds: got {min(seeds)}, expected whole numbers of at least 0")
    resolved_device = find_device(device)
    _check_backend(backend, resolved_device)
    _check_output(output)
    return Options(
        steps=steps,
        rank=rank,
        coeff=coeff,
        lr=lr,
        batch=batch,
        arms=tuple(arms),
        seeds=tuple(seeds),
        autocast=choose_autocast(resolved_device) if autocast is None else autocast,
        device=resolved_device,
        backend=backend,
        output=output,
    )


def choose_autocast(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32's there: on a GPU, or a processor with instructions for them.

    Without the CPU engine the processor's instructions are not known, and the answer is False.
    """
    return device.type != "cpu" or any("bf16" in name for name in ops.native.instruction_sets())


def find_device(name: str) -> torch.device:
    """Find the device called ``name``; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if count else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, expected auto, cpu, cuda or cuda:<number>")
    if device.type == "cpu":
        return torch.device("cpu")
    index = device.index or 0
    if index >= count:
        raise ValueError(
            f"--device: got {name!r}, but PyTorch {torch.__version__} sees {count} CUDA devices here; "
            "use --device cpu, or install a PyTorch built for CUDA on a machine with a GPU"
        )
    return torch.device("cuda", index)


def _check_backend(backend: str | None, device: torch.device) -> None:
    if backend is not None and backend not in ops.dispatch.NAMES:
        raise ValueError(f"--backend: got {backend!r}, expected one of {', '.join(ops.dispatch.NAMES)}")
    try:
        ops.resolve_backend(device, torch.float32, backend)
    except ValueError as error:
        raise ValueError(f"--backend: {error}") from error


def _check_output(output: Path) -> None:
    if output.suffix != ".png":
        raise ValueError(f"--output: got '{output}', expected a file name that ends in .png")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: cannot make the folder of '{output}': {error}") from error
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output: cannot write '{output}'; name a file in a folder that you may write to")
