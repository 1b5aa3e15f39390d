"""Scans kernels in files for registers that are touched while a product may use them, several files at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..machine_code.cubin import disassembler
from ..machine_code.register_hazards import scan_cubin
from .jobs import default_jobs

# Findings by the sha256 of the content: a process scans the same code once.
_findings: dict[str, list[str]] = {}


def hazards_in(paths: Iterable[Path]) -> dict[str, list[str]]:
    """The findings in each file, by the file's name. A file that cannot be disassembled is a finding; a file that does
    not exist is skipped.

    Raises:
        ValueError: there is no disassembler.
    """
    images = {path: path.read_bytes() for path in dict.fromkeys(paths) if path.is_file()}
    if images:
        disassembler()
    # Threads suffice: the work is done by nvdisasm, in processes of its own.
    with ThreadPoolExecutor(default_jobs()) as pool:
        return dict(zip((path.name for path in images), pool.map(_scan, images.values()), strict=True))


def _scan(image: bytes) -> list[str]:
    digest = hashlib.sha256(image).hexdigest()
    if digest not in _findings:
        try:
            _findings[digest] = scan_cubin(image)
        except ValueError as error:
            return [str(error)]
    return _findings[digest]
