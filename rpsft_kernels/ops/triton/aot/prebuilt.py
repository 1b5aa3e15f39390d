"""Copies kernels from an earlier build: they are the same for every Python that a wheel is built for."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from .library import Library
from .targets import Target


def copy_prebuilt(
    prebuilt: str | Path,
    targets: Sequence[Target],
    folder: str | Path,
    ranks: Sequence[int],
    only: str,
    strict: bool = False,
) -> Library:
    """Copy a folder of kernels if it holds what a build of these sources for these targets would make.

    Raises:
        ValueError: the folder holds no kernels, or kernels of other sources, targets, globs or bytes, or ``strict`` and
            some were left out; the message says what differs.
    """
    library = Library.open(Path(prebuilt))
    manifest = library.manifest
    expected = {"architectures": [target.arch for target in targets], "ranks": list(ranks), "only": only}
    for name, value in expected.items():
        if manifest[name] != value:
            raise ValueError(
                f"RPSFT_AOT_PREBUILT: {prebuilt} was built with {name} {manifest[name]!r}, expected {value!r}; "
                "build it with python -m rpsft_kernels.ops.triton.aot.build"
            )
    if strict and manifest["left_out"]:
        raise ValueError(
            f"RPSFT_AOT_PREBUILT: {prebuilt} leaves {len(manifest['left_out'])} kernels out, expected none; without "
            "RPSFT_STRICT=1 or --strict that is allowed"
        )
    places = [place for entry in manifest["kernels"] for place in (entry, entry.get("ptx")) if place]
    for name, digest in {place["file"]: place["sha256"] for place in places}.items():
        path = library.folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"RPSFT_AOT_PREBUILT: {path} is not the file that its manifest describes; build it again")
    shutil.copytree(library.folder, folder, dirs_exist_ok=True)
    return library
