"""Checks kernels compiled ahead of time: the manifest against the expected variants, against each file, and against
what the machine code says about itself; and the machine code against the rules for registers of pending products, and
against what the speed of the warp-specialised kernels rests on.

The check does not use the build's own reader of machine code: it runs cuobjdump again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..machine_code.cubin import read_cubin, read_hsaco
from ..tile_table import rank_classes
from ..variants import ARGUMENT_TYPES, ARGUMENTS, Variant
from . import library
from .limits import check_limits
from .scan import scan_files
from .targets import BY_ARCH

_POINTER = 8
# Triton adds two parameters after the declared ones: scratch memory, and the profiler's memory.
_SCRATCH = 2
_INSIDE = "rpsft_kernels/kernels/"


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        place: the folder or wheel.
        kernels, files: how many there are.
        left_out: variants that the manifest says could not be kept, which is no fault.
        architectures: what the machine code is for.
        complete: whether the build was asked for every variant.
        findings: the faults, a line each.
    """

    place: str
    kernels: int
    left_out: int
    files: int
    architectures: tuple[str, ...]
    complete: bool
    findings: list[str]

    def __str__(self) -> str:
        share = "every variant" if self.complete else "a selection of the variants"
        less = f", {self.left_out} left out as the manifest says" if self.left_out else ""
        count = f"{len(self.findings)} findings" if self.findings else "nothing amiss"
        return (
            f"{self.place}: {self.kernels} kernels ({share}{less}) for {', '.join(self.architectures)} in {self.files} "
            f"files: {count}"
        )


def check_kernels(place: str | Path) -> CheckReport:
    """Check a folder of kernels, or a wheel that carries one.

    Needs the package triton, whose cuobjdump reads the code, and no GPU.

    Raises:
        ValueError: there is nothing to check (no such place, no manifest, or one of another schema), or triton is not
            installed, or there is no nvdisasm for code of compute capability 9.0.
    """
    place = Path(place)
    if not place.exists():
        raise ValueError(f"place: {place} is not there; python -m rpsft_kernels kernels --build makes such a folder")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("checking kernels takes the package triton, whose cuobjdump reads them: pip install triton")
    if place.is_dir():
        return _check_folder(place, place)
    if not zipfile.is_zipfile(place):
        raise ValueError(f"place: {place} is neither a folder of kernels nor a wheel")
    with zipfile.ZipFile(place) as wheel, tempfile.TemporaryDirectory() as temporary:
        names = wheel.namelist()
        wheel.extractall(temporary, [name for name in names if name.startswith(_INSIDE)])
        report = _check_folder(place, Path(temporary, _INSIDE))
        if not any(re.fullmatch(r"rpsft_kernels/_native\..*(so|pyd)", name) for name in names):
            report.findings.append(f"{place.name}: carries no native module, which is what launches kernels")
        return report


def expected_kernels(manifest: dict[str, Any]) -> dict[str, Variant]:
    """The kernels that a manifest's architectures, ranks and globs ask for, by their ids."""
    from .build import wanted_variants

    kernels = {}
    for arch in manifest["architectures"]:
        for variant in wanted_variants(BY_ARCH[arch].table, manifest["ranks"], manifest["only"]):
            kernels[library.kernel_id(variant, arch)] = variant
    return kernels


def _check_folder(place: Path, folder: Path) -> CheckReport:
    try:
        manifest = json.loads((folder / library.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not (folder / library.MANIFEST).exists():
            raise ValueError(f"place: {place} carries no kernels: it has no {library.MANIFEST}") from None
        raise ValueError(f"place: {folder / library.MANIFEST}: {error}") from error
    if manifest.get("schema") != library.SCHEMA:
        raise ValueError(f"place: {place} has schema {manifest.get('schema')!r}, expected {library.SCHEMA}")
    complete = not manifest["only"] and set(manifest["ranks"]) >= set(rank_classes())
    return CheckReport(
        place=str(place),
        kernels=len(manifest["kernels"]),
        left_out=len(manifest["left_out"]),
        files=len(list(folder.iterdir())),
        architectures=tuple(manifest["architectures"]),
        complete=complete,
        findings=list(_findings(folder, manifest)),
    )


def _findings(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    if manifest["sources"] != library.source_digest():
        yield f"{library.MANIFEST}: compiled from other sources than this package's"
    expected = expected_kernels(manifest)
    listed = Counter(entry["id"] for entry in manifest["kernels"])
    left_out = Counter(each["id"] for each in manifest["left_out"])
    for identity, variant in expected.items():
        if listed[identity] + left_out[identity] != 1:
            entries = f"{listed[identity]} entries with the id {identity}"
            entries += f", {left_out[identity]} that leave it out" if left_out[identity] else ""
            yield f"{variant.label()}: {entries}, expected one"
    for each in manifest["left_out"]:
        if each["id"] not in expected:
            yield f"{each['id']} ({each['label']}, {each['arch']}): is left out, but nothing asks for it"
    described = {library.MANIFEST}
    scanned = [each for each in manifest["kernels"] if BY_ARCH[each["arch"]].asynchronous_products]
    scans = scan_files({folder / entry["file"]: expected.get(entry["id"]) for entry in scanned})
    for entry in manifest["kernels"]:
        described |= {place["file"] for place in (entry, entry.get("ptx")) if place}
        if scan := scans.get(entry["file"]):
            for hazard in scan.hazards:
                yield f"{entry['id']} ({entry['kernel']}, {entry['arch']}): may compute wrong numbers: {hazard}"
            for loss in scan.losses:
                yield f"{entry['id']} ({entry['kernel']}, {entry['arch']}): may be slow: {loss}"
        for finding in _entry_findings(folder, entry, expected.get(entry["id"])):
            yield f"{entry['id']} ({entry['kernel']}, {entry['arch']}): {finding}"
    for name in sorted({path.name for path in folder.iterdir()} - described):
        yield f"{name}: no entry of the manifest describes it"


def _entry_findings(folder: Path, entry: dict[str, Any], variant: Variant | None) -> Iterator[str]:
    if variant is None:
        yield "is none of the kernels that the manifest's architectures, ranks and globs ask for"
    else:
        yield from _variant_findings(entry, variant)
    yield from check_limits(entry)
    yield from _layout_findings(entry)
    for place in (entry, entry.get("ptx")):
        path = folder / place["file"] if place else None
        if place is None or path is None:
            continue
        if not path.is_file():
            yield f"{path.name} does not exist"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != place["sha256"]:
            yield f"{path.name} has another sha256 than the manifest says"
        elif place is not entry:
            yield from _ptx_findings(path.read_text(), entry)
        elif entry["format"] == "cubin":
            yield from _cubin_findings(path, entry)
        else:
            yield from _hsaco_findings(path, entry)


def _variant_findings(entry: dict[str, Any], variant: Variant) -> Iterator[str]:
    """Differences between an entry and its variant: planning uses the one, launching the other."""
    for name, value in library.description(variant).items():
        if entry[name] != value:
            yield f"{name} is {entry[name]!r}, expected {value!r}"


def _layout_findings(entry: dict[str, Any]) -> Iterator[str]:
    names = list(ARGUMENTS[entry["kernel"]])
    declared = [(argument["name"], argument["type"]) for argument in entry["arguments"]]
    if declared != [(name, ARGUMENT_TYPES[name]) for name in names]:
        yield f"arguments are {declared}, expected {names}"
    packed = [[_POINTER * i, _POINTER] for i in range(len(names) + _SCRATCH)]
    if entry["layout"] != packed:
        yield f"layout is {entry['layout']}, and a launch packs {packed}"


def _cubin_findings(path: Path, entry: dict[str, Any]) -> Iterator[str]:
    try:
        code = read_cubin(path)
    except ValueError as error:
        yield str(error)
        return
    facts = (
        ("architecture", code.arch, entry["arch"]),
        ("entry", code.entry, entry["entry"]),
        ("parameters", [list(parameter) for parameter in code.parameters], entry["layout"]),
        ("registers", code.registers, entry["registers"]),
        ("spilled bytes", code.stack + code.local, entry["spilled"]),
        ("threads of a block", code.threads, entry["threads"]),
    )
    for name, read, listed in facts:
        if read != listed:
            yield f"{name}: {path.name} has {read}, the manifest says {listed}"


def _hsaco_findings(path: Path, entry: dict[str, Any]) -> Iterator[str]:
    try:
        arch, entries = read_hsaco(path.read_bytes())
    except ValueError as error:
        yield str(error)
        return
    if arch != entry["arch"]:
        yield f"architecture: {path.name} has {arch}, the manifest says {entry['arch']}"
    if entries != {entry["entry"]}:
        yield f"entry: {path.name} has {', '.join(sorted(entries))}, the manifest says {entry['entry']}"


def _ptx_findings(text: str, entry: dict[str, Any]) -> Iterator[str]:
    directives = {
        "target": re.escape(entry["arch"]),
        "version": r"\d+\.\d+",
        "address_size": "64",
        r"visible \.entry": re.escape(entry["entry"]) + r"\(",
    }
    for directive, expected in directives.items():
        match = re.search(rf"^\.{directive} *(\S+)", text, re.M)
        if match is None or not re.fullmatch(expected, match[1]):
            value = match[1] if match else "nothing"
            yield f"PTX: {directive.split()[-1].strip('.')} is {value}, expected {expected}"
    parameters = len(re.findall(rf"^\s*\.param \.u64 .*\b{re.escape(entry['entry'])}_param_\d+", text, re.M))
    if parameters != len(entry["layout"]):
        yield f"PTX: {parameters} parameters, the manifest says {len(entry['layout'])}"
