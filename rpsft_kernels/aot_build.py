"""Compiles the GPU kernels ahead of time, for absent GPUs, into a folder with a manifest.

Equal inputs (sources, tile tables, versions of Triton and its assembler) give equal bytes, whatever the machine, the
working directory and the number of processes.
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
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .aot_jobs import default_jobs, environment
from .aot_library import MANIFEST, SCHEMA, description, kernel_id, source_digest
from .aot_limits import exceeded
from .aot_prebuilt import copy_prebuilt
from .aot_targets import AMD, Target, left_out, parse_architectures
from .machine_code import nvidia_tools
from .ops.triton.tile_table import DESCRIPTORS, rank_classes
from .ops.triton.variant import ARGUMENT_TYPES, ARGUMENTS, Variant, list_variants

# torch allocates every argument at a multiple of 16 bytes at least; see compile_variant.
_DIVISIBILITY = 16
_POINTER = 8


def wanted_variants(table: str, ranks: Sequence[int], only: str) -> list[Variant]:
    """The variants of a tile table whose labels match a glob in ``only`` (separated by semicolons; none: all)."""
    globs = [glob.strip() for glob in only.split(";") if glob.strip()]
    variants = list_variants(table, DESCRIPTORS[table], tuple(ranks))
    return [v for v in variants if not globs or any(fnmatch.fnmatchcase(v.label(), glob) for glob in globs)]


@dataclass(frozen=True)
class Built:
    """One build: how many kernels, files and bytes, and what it took.

    ``largest_process``: peak bytes of memory of the largest compiling process, 0 where the system does not tell; there
    were ``jobs`` at a time.
    """

    kernels: int
    files: int
    size: int
    seconds: float
    largest_process: int
    jobs: int

    def __str__(self) -> str:
        peak = f"{self.largest_process / 2**20:.0f} MiB" if self.largest_process else "unknown"
        return (
            f"{self.kernels} kernels in {self.files} files, {self.size / 1e6:.1f} MB, {self.seconds:.0f} s; "
            f"peak memory {peak} in the largest of {self.jobs} processes"
        )


def build_kernels(
    architectures: Sequence[Target] | str,
    folder: str | Path,
    ranks: Sequence[int] | None = None,
    jobs: int | None = None,
    only: str = "",
) -> Built:
    """Compile every variant for every target into a folder, with a manifest; needs no GPU.

    Args:
        architectures: targets, or their names as in TORCH_CUDA_ARCH_LIST.
        folder: is made, or replaced where it holds an earlier build.
        ranks: one of each rank class that is wanted (default: all classes).
        jobs: processes (default: MAX_JOBS, else one per processor and 1.5 GiB of free memory).
        only: globs on the variants' labels, separated by semicolons.

    Raises:
        ValueError: an unknown architecture, a folder that holds something else, or no variant to compile.
    """
    targets = parse_architectures(architectures) if isinstance(architectures, str) else list(architectures)
    ranks = tuple(ranks or rank_classes())
    jobs = jobs or default_jobs()
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ValueError(f"folder: {folder} holds something other than kernels; name an empty or a new one")
    tasks = [(v, target) for target in targets for v in wanted_variants(target.table, ranks, only)]
    if not tasks:
        raise ValueError(f"only: no variant's label matches {only!r}; python -m rpsft_kernels compile lists them")
    began = time.monotonic()
    # Beside the folder, which is replaced at the end: what fails or is interrupted leaves no half of a build.
    with _beside(folder) as name:
        temporary = Path(name) / "kernels"
        temporary.mkdir()
        entries = [_written(temporary, entry, images) for entry, images in _compiled(tasks, jobs)]
        manifest = {
            "schema": SCHEMA,
            "versions": _versions(targets),
            "sources": source_digest(),
            "architectures": [target.arch for target in targets],
            "ranks": list(ranks),
            "only": only,
            "kernels": entries,
        }
        (temporary / MANIFEST).write_text(_lines(manifest), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    files = list(folder.iterdir())
    return Built(
        len(entries), len(files), sum(file.stat().st_size for file in files), time.monotonic() - began,
        _largest_child(), jobs,
    )  # fmt: skip


def _beside(folder: Path) -> tempfile.TemporaryDirectory[str]:
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


def _written(folder: Path, entry: dict[str, Any], images: list[bytes]) -> dict[str, Any]:
    """The entry with its files' names, once they are written."""
    for place, image, suffix in zip((entry, entry.get("ptx", {})), images, (entry["format"], "ptx"), strict=False):
        digest = hashlib.sha256(image).hexdigest()
        # Named by content: kernels that come out the same share a file.
        place |= {"file": f"{digest[:20]}.{suffix}", "sha256": digest}
        (folder / place["file"]).write_bytes(image)
    return entry


def _lines(manifest: dict[str, Any]) -> str:
    """JSON with one kernel a line: it can be searched and compared."""
    kernels = ",\n".join(json.dumps(entry) for entry in manifest["kernels"])
    head = json.dumps({name: value for name, value in manifest.items() if name != "kernels"}, indent=1)
    return head.removesuffix("\n}") + f',\n "kernels": [\n{kernels}\n]}}\n'


def _compiled(tasks: list[tuple[Variant, Target]], jobs: int) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Each task's entry and code, in order."""
    # Read by Triton when it is imported or compiles, hence fresh processes: no interpreter; nothing that a cache holds
    # of other settings; no line tables, which would put this machine's paths into the code.
    with (
        tempfile.TemporaryDirectory() as cache,
        environment(TRITON_CACHE_DIR=cache, TRITON_DISABLE_LINE_INFO="1"),
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        yield from pool.map(_compile, tasks)


def _compile(task: tuple[Variant, Target]) -> tuple[dict[str, Any], list[bytes]]:
    from .ops.triton.compile import compile_variant

    variant, target = task
    compiled = compile_variant(variant, target.architecture)
    metadata = compiled.metadata
    # Triton 3.6 says nothing of scratch memory for AMD, where it has none.
    scratch, alignment, profile_scratch = (
        getattr(metadata, name, default)
        for name, default in (("global_scratch_size", 0), ("global_scratch_align", 1), ("profile_scratch_size", 0))
    )
    code = "hsaco" if target.arch in AMD else "cubin"
    image = compiled.asm[code]
    asked = [metadata.launch_cooperative_grid, getattr(metadata, "launch_pdl", False), metadata.tensordesc_meta]
    if metadata.num_ctas != 1 or profile_scratch or any(asked):
        raise RuntimeError(f"{variant.label()} for {target.arch}: wants a launch that the launcher does not know")
    names = ARGUMENTS[variant.kernel]
    layout = _amd_layout(compiled.asm["amdgcn"]) if code == "hsaco" else parameter_table(image, metadata.name)
    # What a launch packs: the arguments, scratch memory and the profiler's, one pointer each.
    if layout != [(_POINTER * i, _POINTER) for i in range(len(names) + 2)]:
        raise RuntimeError(f"{variant.label()} for {target.arch}: parameters at {layout}, not one pointer each")
    registers, spilled = _amd_usage(compiled.asm["amdgcn"]) if code == "hsaco" else _usage(image)
    entry = {
        "id": kernel_id(variant, target.arch),
        **description(variant),
        "table": target.table,
        "arch": target.arch,
        "entry": metadata.name,
        "format": code,
        "threads": metadata.num_warps * metadata.warp_size,
        "shared": metadata.shared,
        "scratch": {"size": scratch, "alignment": alignment},
        "profile_scratch": profile_scratch,
        "arguments": [{"name": n, "type": ARGUMENT_TYPES[n], "divisibility": _DIVISIBILITY} for n in names],
        "layout": layout,
        "registers": registers,
        "spilled": spilled,
    }
    if findings := "; ".join(exceeded(entry)):
        raise RuntimeError(f"{variant.label()} for {target.arch}: {findings}; its tile table asks for too much")
    images = [image]
    if target.ptx:
        text = compiled.asm["ptx"]
        version = re.search(r"^\.version (\d+\.\d+)$", text, re.M)
        if version is None:
            raise RuntimeError(f"{variant.label()} for {target.arch}: its PTX has no version")
        entry["ptx"] = {"isa": version[1]}
        images.append(text.encode())
    return entry, images


def parameter_table(cubin: bytes, kernel: str) -> list[tuple[int, int]]:
    """(offset, size) in bytes of each parameter of a kernel, from the cubin's own table.

    Read from the section ``.nv.info.<kernel>``: records of a format, an attribute and 16 bits of size or value; the
    attribute 0x17 (EIATTR_KPARAM_INFO) describes one parameter.
    """
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)

    def section(index: int) -> tuple[int, bytes]:
        name, _, _, _, offset, size = struct.unpack_from("<IIQQQQ", cubin, sections + index * entry_size)
        return name, cubin[offset : offset + size]

    _, strings = section(names)
    wanted = f".nv.info.{kernel}".encode()
    for index in range(1, count):
        name, data = section(index)
        if strings[name : strings.index(b"\0", name)] == wanted:
            break
    else:
        raise ValueError(f"cubin: has no section {wanted.decode()}")
    found: dict[int, tuple[int, int]] = {}
    at = 0
    while at < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        if form == 4 and attribute == 0x17:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", data, at + 4)
            found[ordinal] = (offset, flags >> 18)
        # Format 4 has that many bytes behind it; the others hold their value in the record.
        at += 4 + (size if form == 4 else 0)
    return [found[ordinal] for ordinal in sorted(found)]


def _amd_layout(assembly: str) -> list[tuple[int, int]]:
    arguments = re.search(r"\.args:\n(.*?)\n    \.group_segment", assembly, re.S)
    found = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)", arguments[1] if arguments else "")
    return [(int(offset), int(size)) for offset, size in found]


def _amd_usage(assembly: str) -> tuple[int, int]:
    found = (re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "private_segment_fixed_size"))
    registers, spilled = (int(match[1]) if match else 0 for match in found)
    return registers, spilled


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvidia_tools() / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _versions(targets: Sequence[Target]) -> dict[str, str]:
    from importlib.metadata import version

    found = {"python": platform.python_version(), "triton": version("triton")}
    for target in targets:
        if target.arch not in AMD:
            found[f"ptxas {target.arch}"] = _ptxas_version(target.architecture)
    return found


@lru_cache(maxsize=16)
def _ptxas_version(architecture: str) -> str:
    from triton.backends.nvidia.compiler import get_ptxas_version

    said = get_ptxas_version(int(architecture[3:]))
    found = re.search(r"V(\d[\d.]*)", said)
    return found[1] if found else said.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m rpsft_kernels.aot_build``: what setup.py runs."""
    parser = argparse.ArgumentParser(prog="python -m rpsft_kernels.aot_build", description=main.__doc__)
    parser.add_argument("--arch", required=True, help="as in TORCH_CUDA_ARCH_LIST")
    parser.add_argument("--output", required=True, help="the folder")
    parser.add_argument("--rank", type=int, action="append", help="one of a rank class; repeatable (default: all)")
    parser.add_argument("--jobs", type=int, help="processes (default: MAX_JOBS, else what processors and memory serve)")
    parser.add_argument("--only", default=os.environ.get("RPSFT_AOT_KERNELS", ""), help="globs on variants' labels")
    parser.add_argument("--prebuilt", help="copy this folder of the same kernels instead of compiling them")
    options = parser.parse_args(arguments)
    try:
        targets = parse_architectures(options.arch)
        for word in left_out(options.arch):
            print(f"TORCH_CUDA_ARCH_LIST: no kernels are compiled for {word}", flush=True)
        for target in targets:
            if target.arch in AMD:
                print(f"{target.arch}: packed, but nothing launches these yet: on AMD Triton compiles", flush=True)
        if options.prebuilt:
            ranks = options.rank or rank_classes()
            print(copy_prebuilt(options.prebuilt, targets, options.output, ranks, options.only).summary(), flush=True)
            return 0
        jobs = options.jobs or default_jobs()
        print(f"compiling kernels for {', '.join(target.arch for target in targets)} in {jobs} processes", flush=True)
        print(build_kernels(targets, options.output, options.rank, jobs, options.only), flush=True)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
