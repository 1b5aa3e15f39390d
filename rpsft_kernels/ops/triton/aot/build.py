"""Compiles the GPU kernels ahead of time, for GPUs that need not be there, into a folder with a manifest.

Equal inputs (sources, tile tables, versions of Triton and its assembler) give equal bytes on every machine, in every
working directory, with any number of processes, with or without torch.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..tile_table import rank_classes
from ..toolchain import triton_missing
from ..variants import Variant, list_variants
from .compile import Kernel, LeftOut, compile_kernel
from .jobs import compile_environment, default_jobs
from .library import MANIFEST, SCHEMA, source_digest
from .prebuilt import copy_prebuilt
from .targets import DESCRIPTORS, Target
from .wanted import VARIABLE, is_strict, parse_wanted

# Seconds between two lines about a running build: at a new tenth of it, and otherwise.
_SOON, _LATE = 1.0, 5.0


def wanted_variants(table: str, ranks: Sequence[int], only: str) -> list[Variant]:
    """The variants of a tile table whose labels match a glob in ``only`` (separated by semicolons; "" matches all)."""
    globs = [glob.strip() for glob in only.split(";") if glob.strip()]
    variants = list_variants(table, DESCRIPTORS[table], tuple(ranks))
    return [v for v in variants if not globs or any(fnmatch.fnmatchcase(v.label(), glob) for glob in globs)]


@dataclass(frozen=True)
class BuildSummary:
    """The result of one build.

    Attributes:
        kernels, files, size: how many kernels and files there are, and their bytes.
        left_out: how many kernels could not be kept.
        seconds: how long the build took.
        largest_process: peak bytes of memory of the largest compiling process; 0 if the system does not tell.
        jobs: processes at a time.
    """

    kernels: int
    left_out: int
    files: int
    size: int
    seconds: float
    largest_process: int
    jobs: int

    def __str__(self) -> str:
        peak = f"{self.largest_process / 2**20:.0f} MiB" if self.largest_process else "unknown"
        less = f", {self.left_out} left out" if self.left_out else ""
        return (
            f"{self.kernels} kernels in {self.files} files{less}, {self.size / 1e6:.1f} MB, {self.seconds:.0f} s; "
            f"peak memory {peak} in the largest of {self.jobs} processes"
        )


def build_kernels(
    architectures: Sequence[Target] | str,
    folder: str | Path,
    ranks: Sequence[int] | None = None,
    jobs: int | None = None,
    only: str = "",
    strict: bool = False,
    report: Callable[[str], None] | None = None,
) -> BuildSummary:
    """Compile every variant for every target into a folder, with a manifest. This needs no GPU.

    A kernel is left out if it spills, needs more than its GPU has, or touches registers of a pending product. The
    manifest lists it with the reason.

    Args:
        architectures: targets, or a value of the environment variable RPSFT_CUDA_ARCHS: a list, or ``native``.
        folder: the folder to make, or to replace if it holds an earlier build.
        ranks: one rank of each wanted class (default: all classes).
        jobs: processes (default: MAX_JOBS, else one per processor and GiB of free memory).
        only: globs on the variants' labels, separated by semicolons.
        strict: raise ValueError for kernels that are left out, once all are compiled.
        report: is called with lines about kernels that are left out and about progress.

    Raises:
        ValueError: an unknown architecture, a folder that holds something else, no variant to compile, or ``strict``
            and a kernel is left out.
    """
    report = report or (lambda line: None)
    if isinstance(architectures, str):
        wanted = parse_wanted(architectures, "architectures")
        for note in wanted.notes:
            report(note)
        targets = list(wanted.targets)
    else:
        targets = list(architectures)
    ranks = tuple(ranks or rank_classes())
    jobs = jobs or default_jobs()
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ValueError(f"folder: {folder} holds something other than kernels; name an empty or a new one")
    tasks = [(v, target) for target in targets for v in wanted_variants(target.table, ranks, only)]
    if not tasks:
        raise ValueError(f"only: no variant's label matches {only!r}; python -m rpsft_kernels compile lists them")
    began = time.monotonic()
    # Build beside the folder and replace it at the end: a build that fails or is interrupted leaves no half behind.
    with _temporary_beside(folder) as name, _compile_processes(min(jobs, len(tasks))) as pool:
        temporary = Path(name) / "kernels"
        temporary.mkdir()
        entries, left_out = _write_all(temporary, pool.map(compile_kernel, tasks), len(tasks), report)
        if strict and left_out:
            raise ValueError(
                f"strict: {len(left_out)} of {len(tasks)} kernels cannot be kept, expected none ({left_out[0]}); "
                "without RPSFT_STRICT=1 or --strict they are left out"
            )
        manifest = {
            "schema": SCHEMA,
            "versions": pool.submit(_tool_versions, targets).result(),
            "sources": source_digest(),
            "architectures": [target.arch for target in targets],
            "ranks": list(ranks),
            "only": only,
            "left_out": [each._asdict() for each in left_out],
            "kernels": entries,
        }
        (temporary / MANIFEST).write_text(_format_manifest(manifest), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    files = list(folder.iterdir())
    return BuildSummary(
        kernels=len(entries),
        left_out=len(left_out),
        files=len(files),
        size=sum(file.stat().st_size for file in files),
        seconds=time.monotonic() - began,
        largest_process=_largest_child(),
        jobs=jobs,
    )


def _write_all(
    folder: Path, compiled: Iterator[Kernel | LeftOut], total: int, report: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[LeftOut]]:
    """Write the kernels' files and report progress; returns the kernels' entries, and what is left out."""
    entries: list[dict[str, Any]] = []
    left_out: list[LeftOut] = []
    began = last_report = time.monotonic()
    for done, each in enumerate(compiled, 1):
        if isinstance(each, LeftOut):
            left_out.append(each)
            report(str(each))
        else:
            entries.append(_write(folder, *each))
        now = time.monotonic()
        tenth = done * 10 // total > (done - 1) * 10 // total
        if now - last_report >= (_SOON if tenth else _LATE) and done < total:
            report(f"{done} of {total} kernels, {now - began:.0f} s")
            last_report = now
    return entries, left_out


def _temporary_beside(folder: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-")
    except OSError as error:
        raise ValueError(f"folder: {folder} cannot be written ({error}); name another one (--output)") from error


def _largest_child() -> int:
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _write(folder: Path, entry: dict[str, Any], images: list[bytes]) -> dict[str, Any]:
    """Write a kernel's files; returns its entry with their names and digests."""
    for place, image, suffix in zip((entry, entry.get("ptx", {})), images, (entry["format"], "ptx"), strict=False):
        digest = hashlib.sha256(image).hexdigest()
        # The name is a digest of the content, so kernels with equal code share a file.
        place |= {"file": f"{digest[:20]}.{suffix}", "sha256": digest}
        (folder / place["file"]).write_bytes(image)
    return entry


def _format_manifest(manifest: dict[str, Any]) -> str:
    """JSON with one kernel per line, which is easy to search and to compare."""
    kernels = ",\n".join(json.dumps(entry) for entry in manifest["kernels"])
    head = json.dumps({name: value for name, value in manifest.items() if name != "kernels"}, indent=1)
    return head.removesuffix("\n}") + f',\n "kernels": [\n{kernels}\n]}}\n'


@contextmanager
def _compile_processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile kernels; this process itself does not import Triton."""
    # Triton reads its environment when it is imported and when it compiles, so the processes are fresh. They use no
    # interpreter, no cache of other settings, and no line tables, which would put this machine's paths into the code.
    with (
        tempfile.TemporaryDirectory() as cache,
        compile_environment(TRITON_CACHE_DIR=cache, TRITON_DISABLE_LINE_INFO="1"),
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        yield pool


def _tool_versions(targets: Sequence[Target]) -> dict[str, str]:
    from importlib.metadata import version

    versions = {"python": platform.python_version(), "triton": version("triton")}
    for target in targets:
        if target.generation.is_nvidia:
            versions[f"ptxas {target.arch}"] = _ptxas_version(target.generation.capability)
    return versions


@lru_cache(maxsize=16)
def _ptxas_version(capability: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas_version

    output = get_ptxas_version(capability)
    version = re.search(r"V(\d[\d.]*)", output)
    return version[1] if version else output.strip()


def print_line(line: str) -> None:
    """Print a line and flush it: a build takes minutes, and its output is often not a terminal."""
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rpsft_kernels.ops.triton.aot.build``, which compiles the kernels of a wheel."""
    parser = argparse.ArgumentParser(prog="python -m rpsft_kernels.ops.triton.aot.build", description=main.__doc__)
    parser.add_argument("--arch", help='such as "8.0;9.0", or native: this machine\'s GPUs (default: RPSFT_CUDA_ARCHS)')
    parser.add_argument("--output", required=True, help="the folder")
    parser.add_argument("--rank", type=int, action="append", help="one of a rank class; repeatable (default: all)")
    parser.add_argument("--jobs", type=int, help="processes (default: MAX_JOBS, else what processors and memory serve)")
    parser.add_argument("--only", default=os.environ.get("RPSFT_AOT_KERNELS", ""), help="globs on variants' labels")
    parser.add_argument("--strict", action="store_true", help="a kernel that is left out is an error (RPSFT_STRICT=1)")
    parser.add_argument("--prebuilt", help="copy this folder of the same kernels instead of compiling them")
    options = parser.parse_args(arguments)
    try:
        fails = options.strict or is_strict(os.environ)
        source = VARIABLE if options.arch is None else "--arch"
        targets, _, _, notes = parse_wanted(options.arch or os.environ.get(VARIABLE, ""), source)
        for note in notes:
            print_line(note)
        for target in targets:
            if not target.generation.is_nvidia:
                print_line(f"{target.arch}: packed, but nothing launches these yet: on AMD Triton compiles")
        if options.prebuilt:
            ranks = options.rank or rank_classes()
            library = copy_prebuilt(options.prebuilt, targets, options.output, ranks, options.only, fails)
            print_line(library.summary())
            return 0
        if missing := triton_missing():
            raise ValueError(f"no kernels can be compiled: {missing}")
        jobs = options.jobs or default_jobs()
        print_line(f"compiling kernels for {', '.join(target.arch for target in targets)} in {jobs} processes")
        summary = build_kernels(
            targets,
            options.output,
            ranks=options.rank,
            jobs=jobs,
            only=options.only,
            strict=fails,
            report=print_line,
        )
        print_line(str(summary))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
