"""Kernels in files, scanned for registers that are touched while a product may use them: several at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..machine_code.cubin import disassembler
from ..machine_code.register_hazards import scan_cubin
from .jobs import default_jobs

# By the content's sha256: a process looks at the same code once.
_findings: dict[str, list[str]] = {}


def hazards_in(paths: Iterable[Path]) -> dict[str, list[str]]:
    """By a file's name what is found in it; that it cannot be disassembled is a finding. Files that are not there are
    passed over.

    Raises:
        ValueError: there is no disassembler.
    """
    images = {path: path.read_bytes() for path in dict.fromkeys(paths) if path.is_file()}
    if images:
        disassembler()
    # What runs is nvdisasm, in a process of its own.
    with ThreadPoolExecutor(default_jobs()) as pool:
        return dict(zip((path.name for path in images), pool.map(_found, images.values()), strict=True))


def _found(image: bytes) -> list[str]:
    digest = hashlib.sha256(image).hexdigest()
    if digest not in _findings:
        try:
            _findings[digest] = scan_cubin(image)
        except ValueError as error:
            return [str(error)]
    return _findings[digest]
