"""Scans the machine code of kernels in files, several at a time: for registers that are touched while a product may use
them, and for what the warp-specialised kernels have lost of their design.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..machine_code.cubin import disassemble_image, disassembler
from ..machine_code.division import find_losses
from ..machine_code.register_hazards import find_hazards
from ..variants import Variant
from .jobs import default_jobs


class Scan(NamedTuple):
    """The findings in one file. ``hazards``: numbers may be wrong; ``losses``: the kernel may be slow."""

    hazards: list[str]
    losses: list[str]


# By the sha256 of the content and by the variant: a process scans the same code once.
_scans: dict[tuple[str, Variant | None], Scan] = {}


def scan_files(variants: Mapping[Path, Variant | None]) -> dict[str, Scan]:
    """The findings in each file, by the file's name. A file that cannot be disassembled is a hazard; a file that does
    not exist is skipped.

    Args:
        variants: what each file was compiled from; None if that is not known.

    Raises:
        ValueError: there is no disassembler.
    """
    images = {path: path.read_bytes() for path in variants if path.is_file()}
    if images:
        disassembler()
    # Threads suffice: most of the work is done by nvdisasm, in processes of its own.
    with ThreadPoolExecutor(default_jobs()) as pool:
        scans = pool.map(_scan, images.values(), map(variants.__getitem__, images))
        return dict(zip((path.name for path in images), scans, strict=True))


def _scan(image: bytes, variant: Variant | None) -> Scan:
    key = (hashlib.sha256(image).hexdigest(), variant)
    if key not in _scans:
        try:
            sass = disassemble_image(image)
        except ValueError as error:
            return Scan([str(error)], [])
        losses = [] if variant is None else find_losses(sass, variant.kernel, dict(variant.constants))
        _scans[key] = Scan(find_hazards(sass), losses)
    return _scans[key]
