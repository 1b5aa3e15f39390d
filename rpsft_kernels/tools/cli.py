"""``python -m rpsft_kernels``: the kernels' schedule, each rank's costs, a roofline, compilation, tuning,
a self-test, and the facts that a bug report needs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import torch

from ..distributed.partition import LAYOUTS
from .gpus import GPUS
from .models import MODELS
from .tuning import DEFAULT_BUDGET

_DEFAULT_RANK = 768
_DEFAULT_ARCH = "sm_90"
_WEIGHT_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b", help="(default: llama-3.1-8b)")
    command.add_argument("--rank", type=int, default=_DEFAULT_RANK, help=f"k of its anchors (default: {_DEFAULT_RANK})")


def _add_form(command: argparse.ArgumentParser) -> None:
    command.add_argument("--block-form", action="store_true", help="anchors without the base")


def _add_jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--jobs", type=int, help="processes (default: MAX_JOBS, else what this machine serves)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rpsft_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    schedule = commands.add_parser("schedule", help="buckets, launches, workspace and filled multiprocessor time")
    _add_model(schedule)
    schedule.add_argument("--multiprocessors", type=int, default=132, help="of the GPU (default: 132)")
    schedule.add_argument("--arch", default=_DEFAULT_ARCH, help=f"tile table (default: {_DEFAULT_ARCH})")
    _add_form(schedule)

    shards = commands.add_parser("shards", help="what each rank of a job pays, beside the published way")
    _add_model(shards)
    shards.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 8, 64], help="numbers of processes (default: 1 8 64)"
    )
    shards.add_argument("--layout", choices=LAYOUTS, help="how weights lie (default: all three)")
    _add_form(shards)

    roofline = commands.add_parser("roofline", help="predicted time of each phase on a GPU, beside the published way")
    _add_model(roofline)
    *others, last = GPUS
    roofline.add_argument("--gpu", default="h100", help=f"{', '.join(others)} or {last} (default: h100)")
    roofline.add_argument("--ranks", type=int, default=1, help="number of processes (default: 1)")
    roofline.add_argument("--layout", choices=LAYOUTS, default="shard0", help="how weights lie (default: shard0)")
    _add_form(roofline)
    roofline.add_argument("--dtype", choices=tuple(_WEIGHT_DTYPES), default="bfloat16", help="of the weights")

    build = commands.add_parser("compile", help="compile every kernel variant, print what each uses as JSON lines")
    build.add_argument(
        "--arch", default=_DEFAULT_ARCH, help=f"a tile table such as sm_80 or gfx942 (default: {_DEFAULT_ARCH})"
    )
    build.add_argument(
        "--rank",
        type=int,
        action="append",
        help=f"rank that chooses tile shapes (default: {_DEFAULT_RANK}); repeatable",
    )
    _add_jobs(build)

    kernels = commands.add_parser("kernels", help="the kernels compiled ahead of time in this installation")
    kernels.add_argument(
        "--build", metavar="ARCH", help='compile them instead: for architectures such as "8.0;9.0", or native'
    )
    kernels.add_argument("--strict", action="store_true", help="building: a kernel that is left out is an error")
    kernels.add_argument("--output", help="the folder to build (default: this installation's)")
    kernels.add_argument("--only", default="", help="globs on variants' labels, separated by semicolons")
    _add_jobs(kernels)
    kernels.add_argument(
        "--check", nargs="?", const="", metavar="PLACE", help="check a folder or a wheel (default: this installation's)"
    )

    commands.add_parser("env", help="what a bug report needs: versions, backends, kernels, devices")

    selftest = commands.add_parser("selftest", help="test the backends of this installation where they run")
    selftest.add_argument("--device", help="cuda, cuda:1, cpu (default: the first GPU, where there is one)")
    selftest.add_argument("--quick", action="store_true", help="the part that runs by itself before the first launch")

    tune = commands.add_parser("tune", help="time tile shapes on this GPU and write a table for RPSFT_TILES")
    _add_model(tune)
    tune.add_argument("--output", required=True, help="the table's file (JSON)")
    seconds = f"seconds that it may take (default: {DEFAULT_BUDGET:.0f})"
    tune.add_argument("--budget", type=float, default=DEFAULT_BUDGET, help=seconds)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 1 where the reader of its output has closed the pipe."""
    try:
        try:
            options = _parser().parse_args(arguments)
            return _COMMANDS[options.command](options)
        finally:
            # Fail here if the pipe is closed, not at the interpreter's exit, which would report it.
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at its exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise SystemExit(f"{name}: got {value}, expected at least 1")


def _schedule(options: argparse.Namespace) -> int:
    from ..costs import is_full
    from ..ops.triton.aot.targets import BY_TABLE
    from .schedule import schedule_report

    _check_positive("--rank", options.rank)
    _check_positive("--multiprocessors", options.multiprocessors)
    if options.arch not in BY_TABLE:
        raise SystemExit(f"--arch: got {options.arch!r}, expected one of {', '.join(BY_TABLE)}")
    shapes = MODELS[options.model].weights()
    projected = [shape for shape in shapes if not is_full(shape, options.rank)]
    if not projected:
        raise SystemExit(
            f"--rank: got {options.rank}, at which every anchor is full; expected less: nothing is projected"
        )
    report = schedule_report(
        projected, options.rank, options.multiprocessors, options.arch, keep_base=not options.block_form
    )
    full = len(shapes) - len(projected)
    print(f"{options.model} at rank {options.rank}: {len(projected)} projected weights, {full} full")
    print(f"buckets               {report.buckets}")
    print(f"launches per step     {report.launches}")
    print(f"workspace             {report.workspace_bytes / 2**20:.1f} MiB")
    print(f"filled                {report.filled:.1%} of {options.multiprocessors} multiprocessors' time")
    for phase, filled in report.filled_by_phase.items():
        print(f"  {phase:<20}{filled:.1%}")
    return 0


def _shards(options: argparse.Namespace) -> int:
    from .shards import shard_table

    _check_positive("--rank", options.rank)
    _check_positive("--ranks", min(options.ranks))
    shapes = MODELS[options.model].weights()
    form = "block" if options.block_form else "base"
    print(f"{options.model} at rank {options.rank}, {form} form: per rank and step, the largest rank's")
    for layout in [options.layout] if options.layout else LAYOUTS:
        print()
        print(shard_table(shapes, options.rank, options.ranks, layout, keep_base=not options.block_form))
    print()
    print("published: every rank computes all; sent are whole weights that it gathers, per micro-batch, not per step")
    return 0


def _roofline(options: argparse.Namespace) -> int:
    from . import roofline as r

    if options.gpu not in GPUS:
        raise SystemExit(f"--gpu: got {options.gpu!r}, expected one of {', '.join(GPUS)}")
    _check_positive("--rank", options.rank)
    _check_positive("--ranks", options.ranks)
    gpu, form = GPUS[options.gpu], "block" if options.block_form else "base"
    job = r.Job(
        MODELS[options.model].weights(),
        options.rank,
        gpu,
        world_size=options.ranks,
        layout=options.layout,
        keep_base=not options.block_form,
        dtype=_WEIGHT_DTYPES[options.dtype],
    )
    (busiest, ours), published = r.our_phases(job), r.published_phases(job)
    print(f"{options.model} at rank {options.rank}, {form} form, {options.dtype} weights, {options.ranks} x {gpu.name}")
    print(
        f"a prediction, nothing is timed. {gpu.name}'s data sheet: {gpu.tensor / 1e12:g} TFLOP/s dense bfloat16, "
        f"{gpu.dram / 1e12:g} TB/s, link {gpu.link / 1e9:g} GB/s one way"
    )
    print(
        f"assumed: {r.TENSOR_SHARE:.0%} of the tensor cores' peak, {r.DRAM_SHARE:.0%} of DRAM's, {r.LINK_SHARE:.0%} of "
        f"the link's (one that joins all ranks), {r.LAUNCH_SECONDS * 1e6:g} us a launch, "
        f"{r.OPERATOR_SECONDS * 1e6:g} us of the host an operator of PyTorch"
    )
    print(f"\nthis package, prediction per step: rank {busiest}, the busiest of {options.ranks} ({options.layout})")
    print(r.phase_table(ours, gpu))
    if gpu.name == "h200" and job.world_size == 1:
        from .measured import H200, beside_predicted
        from .predict import predict

        print("\nthis package, predicted from its tiles, from rates of prototypes on an H200 and from assumptions")
        print(predict(job).table())
        print("\nmilliseconds, base form, bfloat16: predicted for the kernels of this commit, which were not measured,")
        print(f"and measured with the plain kernels of earlier ones ({H200})")
        print(beside_predicted())
    print("\npublished way, prediction per micro-batch: every rank")
    print(r.phase_table(published, gpu))
    ratio = r.total_seconds(published, gpu) / r.total_seconds(ours, gpu)
    print(f"\npredicted ratio of the sums, at one micro-batch a step: {ratio:.2f}")
    return 0


def _compile(options: argparse.Namespace) -> int:
    # The interpreter replaces the compiler where this is set; it is read when the kernels are imported.
    os.environ.pop("TRITON_INTERPRET", None)
    from ..ops.triton.aot.jobs import default_jobs
    from ..ops.triton.aot.targets import BY_TABLE
    from ..ops.triton.compiler import survey

    if options.arch not in BY_TABLE:
        raise SystemExit(f"--arch: got {options.arch!r}, expected one of {', '.join(BY_TABLE)}")
    for rank in options.rank or ():
        _check_positive("--rank", rank)
    for resources in survey(options.arch, tuple(options.rank or (_DEFAULT_RANK,)), options.jobs or default_jobs()):
        print(json.dumps(dataclasses.asdict(resources)), flush=True)
    return 0


def _kernels(options: argparse.Namespace) -> int:
    from ..ops.triton.aot import dispatch as aot
    from ..ops.triton.aot.library import FOLDER

    if options.build is not None:
        from ..ops.triton.aot.build import build_kernels, print_line

        folder = options.output or FOLDER
        try:
            built = build_kernels(
                options.build, folder, jobs=options.jobs, only=options.only, strict=options.strict, report=print_line
            )
        except ValueError as error:
            raise SystemExit(str(error)) from None
        print(built)
        return 0
    if options.check is not None:
        return _check(options.check or str(FOLDER))
    library = aot.installed_library()
    print(aot.kernels_missing() if library is None else library.summary())
    return 0


def _check(place: str) -> int:
    from ..ops.triton.aot.check import check_kernels

    try:
        checked = check_kernels(place)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for finding in checked.findings:
        print(finding)
    print(checked)
    return 1 if checked.findings else 0


def _env(options: argparse.Namespace) -> int:
    from .environment import environment_report

    print(environment_report())
    return 0


def _selftest(options: argparse.Namespace) -> int:
    from ..ops.selftest.command import test_device

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SystemExit(f"--device: got {options.device!r}, expected cuda, cuda:1 or cpu ({error})") from None
    return test_device(device, options.quick)


def _tune(options: argparse.Namespace) -> int:
    from .tune import tune, write_table

    _check_positive("--rank", options.rank)
    if not torch.cuda.is_available():
        raise SystemExit("tune: found no GPU; tile shapes can be timed only where the kernels run")
    shapes = MODELS[options.model].layer()
    write_table(tune(shapes, options.rank, torch.device("cuda"), budget=options.budget), options.output)
    return 0


_COMMANDS = {
    "schedule": _schedule,
    "shards": _shards,
    "roofline": _roofline,
    "compile": _compile,
    "kernels": _kernels,
    "env": _env,
    "selftest": _selftest,
    "tune": _tune,
}
