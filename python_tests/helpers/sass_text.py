"""Machine code as nvdisasm prints it: of kept kernels, and made up, with lines put in."""

from __future__ import annotations

import gzip
import re
import tempfile
from functools import lru_cache
from itertools import count
from pathlib import Path

from rpsft_kernels.ops.triton.machine_code.cubin import disassemble

DATA = Path(__file__).resolve().parents[1] / "data"
TRITONS = ("3.6.0", "3.7.0", "3.8.0", "3.9.0")
KERNELS = ("project", "project-strided", "gradient", "drift", "pull")


def cubin(version: str, kernel: str) -> bytes:
    """A kernel for compute capability 9.0 as a version of Triton compiled it (see data/keep.py)."""
    return gzip.decompress((DATA / f"triton-{version}-{kernel}.cubin.gz").read_bytes())


@lru_cache(maxsize=32)
def text_of(version: str, kernel: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin(version, kernel))
        file.flush()
        return disassemble(Path(file.name))


def program(*lines: str) -> str:
    """A kernel of these instructions and labels ("name:"), which ends after them."""
    addresses = count(0, 16)
    body = [
        line if line.endswith(":") else f"        /*{next(addresses):04x}*/                   {line} ;"
        for line in (*lines, "EXIT")
    ]
    head = ["//--------------------- .text.made      --------------", '\t.section\t.text.made,"ax",@progbits']
    return "\n".join([*head, "made:", ".text.made:", *body, ""])


def number_lines(text: str) -> str:
    """The text with its instructions' addresses counted anew, for lines have been put in or taken out."""
    addresses = count(0, 16)
    return re.sub(r"/\*[0-9a-f]{4,}\*/", lambda _: f"/*{next(addresses):04x}*/", text)


def put(text: str, line: str, *, before: str | None = None, behind: str | None = None, which: int = 0) -> str:
    """One more instruction (or label) before or behind the line of a number that matches a regular expression."""
    lines = text.splitlines()
    places = [i for i, each in enumerate(lines) if re.search(before or behind or "", each)]
    place = places[which] + (behind is not None)
    new = line if line.endswith(":") else f"        /*0000*/                   {line} ;"
    return number_lines("\n".join([*lines[:place], new, *lines[place:], ""]))


# Kernels that break the rule. 3.6.0's project kernel computed wrong numbers on an H200.
BROKEN = {
    "3.6.0": {"project", "gradient", "drift"},
    "3.7.0": {"project", "gradient", "drift"},
    "3.8.0": {"project", "gradient"},
    "3.9.0": set(),
}
