"""A folder of kernels compiled ahead of time: its manifest, and which of its code runs on a device.

A method that reports why something does not work returns ``str | None``; None means that nothing is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..machine_code.register_hazards import RULES
from .targets import BY_ARCH, BY_TABLE, Compatibility, Generation

if TYPE_CHECKING:
    from ..variants import Variant

SCHEMA = 4
MANIFEST = "manifest.json"
# A build that could not fill the folder writes the reason into this file beside it.
REASON = "_kernels_build.txt"
# The package's folder of compiled kernels; their sources are in ops/triton/kernels.
FOLDER = Path(__file__).parents[3] / "kernels"
_SOURCES = Path(__file__).parents[1]
_OPTIONS = ("compiler", "fields", "variants", "aot/targets")
# The files that decide what is compiled, and with which options. Planning and launching may change without making a
# kernel stale.
_KERNEL_SOURCES = (*sorted((_SOURCES / "kernels").glob("*.py")), *(_SOURCES / f"{name}.py" for name in _OPTIONS))


def kernel_id(variant: Variant, arch: str) -> str:
    """The name of one variant on one architecture, the same in every process and build."""
    options = sorted(variant.options().items())
    facts = [variant.kernel, variant.constants, options, variant.registers, arch]
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()[:20]


def description(variant: Variant) -> dict[str, Any]:
    """The part of a manifest's entry that comes from its variant."""
    return {
        "kernel": variant.kernel,
        "constants": dict(variant.constants),
        "warps": variant.warps,
        "stages": variant.stages,
        "blocks_per_sm": variant.blocks_per_sm,
        "maximal_registers": variant.registers,
    }


@lru_cache(maxsize=1)
def source_digest() -> str:
    """The digest of the kernels' sources and of the rules that their machine code was scanned with.

    Code that was compiled from other sources, or scanned with older rules, has another digest.
    """
    digest = hashlib.sha256(f"rules {RULES}\0".encode())
    for path in _KERNEL_SOURCES:
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


class Device(NamedTuple):
    """The facts that decide which code a device can run: its compute capability (``90`` for 9.0), the bytes of shared
    memory that a block can have, and its driver's CUDA version (``12040`` for 12.4; 0 if unknown).
    """

    capability: int
    shared_limit: int
    driver: int = 0

    @property
    def ptx(self) -> tuple[int, int] | None:
        """The newest PTX ISA that the driver is known to read, or None if that is not known."""
        major, minor = self.driver // 1000, self.driver % 1000 // 10
        # CUDA 12.6 brought no new PTX ISA.
        return {11: (7, minor), 12: (8, minor - (minor >= 6)), 13: (9, minor)}.get(major)


# Kinds of code that a device's driver has refused: the architecture, and how its code was to run.
Refused = frozenset[tuple[str, Compatibility]]


class KernelMatch(NamedTuple):
    """A kernel for a launch, and how its code runs on the device."""

    entry: dict[str, Any]
    compatibility: Compatibility

    @property
    def file(self) -> dict[str, str]:
        """The name and digest of the file to load."""
        source: dict[str, str] = self.entry["ptx"] if self.compatibility is Compatibility.PTX else self.entry
        return source


class ServedTable(NamedTuple):
    """A tile table all of whose kernels run on a device, as the code of one architecture.

    ``kernels``: how many there are.
    """

    table: str
    arch: str
    compatibility: Compatibility
    kernels: int

    @property
    def capability(self) -> int:
        """The compute capability of the generation that the table was made for."""
        return BY_TABLE[self.table].capability


@dataclass(frozen=True, eq=False)
class Library:
    """A folder of kernels and its manifest."""

    folder: Path
    manifest: dict[str, Any]
    by_id: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, folder: Path) -> Library:
        """Read a folder's manifest.

        Raises:
            ValueError: there are no kernels, or they do not belong to this package; the message says which.
        """
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            sources = source_digest()
        except (OSError, ValueError) as error:
            if not path.exists():
                failure = _build_failure(folder)
                why = "" if failure is None else f": {failure}"
                raise ValueError(f"this installation carries no kernels compiled ahead of time{why}") from None
            raise ValueError(f"{path}: {error}") from error
        _check_manifest(path, manifest)
        if manifest["sources"] != sources:
            raise ValueError(f"the kernels in {folder} were compiled from other sources than this package's")
        return cls(folder, manifest, {entry["id"]: entry for entry in manifest["kernels"]})

    def summary(self) -> str:
        """A summary to print: versions, and the kernels, files and bytes of each architecture."""
        lines = [f"{self.folder}", "  ".join(f"{name} {value}" for name, value in self.manifest["versions"].items())]
        for name in self.manifest["architectures"]:
            entries = self._of_arch.get(name, [])
            files = {entry["file"] for entry in entries} | {entry["ptx"]["file"] for entry in entries if "ptx" in entry}
            present = [path for path in (self.folder / file for file in files) if path.is_file()]
            size = sum(path.stat().st_size for path in present)
            versions = sorted({entry["ptx"]["isa"] for entry in entries if "ptx" in entry})
            ptx = f", with PTX {', '.join(versions)}" if versions else ""
            gone = f", {len(files) - len(present)} of them missing" if len(present) < len(files) else ""
            lacking = sum(each["arch"] == name for each in self.manifest["left_out"])
            less = f", {lacking} left out" if lacking else ""
            lines.append(
                f"{name:<10}{len(entries):>5} kernels in {len(files)} files{gone}{less}, {size / 1e6:.1f} MB{ptx}"
            )
        return "\n".join(lines)

    @cached_property
    def generations(self) -> list[Generation]:
        """The NVIDIA generations that it has kernels for, the newest first."""
        rows = [BY_ARCH[name] for name in self.manifest["architectures"] if name in BY_ARCH]
        return sorted((row for row in rows if row.is_nvidia), key=lambda row: -row.capability)

    def arch_names(self) -> str:
        """The names of these generations, separated by commas."""
        return ", ".join(row.arch for row in self.generations) or "no NVIDIA architecture"

    @cached_property
    def _of_arch(self) -> dict[str, list[dict[str, Any]]]:
        entries: dict[str, list[dict[str, Any]]] = {}
        for entry in self.manifest["kernels"]:
            entries.setdefault(entry["arch"], []).append(entry)
        return entries

    @cached_property
    def left_out(self) -> dict[str, dict[str, str]]:
        """The kernels that the build left out, by their ids: ``label``, ``arch`` and ``reason``."""
        return {each["id"]: each for each in self.manifest["left_out"]}

    def _runnable(self, device: Device, refused: Refused) -> Iterator[tuple[str, Compatibility]]:
        """The architectures whose code might run on a device, and how; the best first."""
        for compatibility in Compatibility:
            for row in self.generations:
                ptx = compatibility is Compatibility.PTX
                actual = (row.ptx_compatibility if ptx else row.cubin_compatibility)(device.capability)
                if actual is compatibility and (row.arch, compatibility) not in refused:
                    yield row.arch, compatibility

    def find(self, variant: Variant, device: Device, refused: Refused = frozenset()) -> KernelMatch | None:
        """The kernel that serves a variant, if there is one: machine code for that device before PTX, newest first."""
        return self._look_up(variant, device, refused)[0]

    def explain_no_match(self, variant: Variant, device: Device, refused: Refused = frozenset()) -> str | None:
        """Why :meth:`find` finds no kernel."""
        match, obstacles = self._look_up(variant, device, refused)
        if match is not None:
            return None
        if obstacles:
            return "; ".join(dict.fromkeys(obstacles))
        reason = f"none of this installation's kernels ({self.arch_names()}) is that variant for that device"
        return reason + "; RPSFT_TILES is set" if os.environ.get("RPSFT_TILES") else reason

    def _look_up(self, variant: Variant, device: Device, refused: Refused) -> tuple[KernelMatch | None, list[str]]:
        """The kernel for a variant, and the reasons against the ones that would have come before it."""
        obstacles = []
        for arch, compatibility in self._runnable(device, refused):
            identity = kernel_id(variant, arch)
            entry = self.by_id.get(identity)
            if identity in self.left_out:
                obstacles.append(f"left out of the {arch} kernels: {self.left_out[identity]['reason']}")
            if entry is None or (compatibility is Compatibility.PTX and "ptx" not in entry):
                continue
            obstacle = _obstacle(entry, compatibility, device)
            if obstacle is None:
                return KernelMatch(entry, compatibility), obstacles
            obstacles.append(obstacle)
        return None, obstacles

    def served_tables(self, device: Device, refused: Refused = frozenset()) -> list[ServedTable]:
        """The tile tables all of whose kernels run on a device; those that run best come first."""
        return [table for table, obstacle in self._candidates(device, refused) if obstacle is None]

    def obstacles(self, device: Device, refused: Refused = frozenset()) -> str | None:
        """The reasons against the tables that might run on a device and do not; None if there are none."""
        candidates = self._candidates(device, refused)
        obstacles = [f"{table.arch}: {obstacle}" for table, obstacle in candidates if obstacle is not None]
        return "; ".join(dict.fromkeys(obstacles)) or None

    def _candidates(self, device: Device, refused: Refused) -> Iterator[tuple[ServedTable, str | None]]:
        """Every tile table that might run on a device, and the reason against it."""
        for arch, compatibility in self._runnable(device, refused):
            ptx = compatibility is Compatibility.PTX
            entries = self._of_arch.get(arch, [])
            for table in dict.fromkeys(entry["table"] for entry in entries):
                # A build keeps the PTX of every kernel of an architecture or of none.
                own = [each for each in entries if each["table"] == table and (not ptx or "ptx" in each)]
                if own:
                    obstacles = (_obstacle(entry, compatibility, device) for entry in own)
                    obstacle = next((each for each in obstacles if each is not None), None)
                    yield ServedTable(table, arch, compatibility, len(own)), obstacle


def _build_failure(folder: Path) -> str | None:
    """The reason that a build which could not fill the folder wrote into a file beside it."""
    try:
        return folder.with_name(REASON).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _obstacle(entry: dict[str, Any], compatibility: Compatibility, device: Device) -> str | None:
    """Why a kernel's code does not run on a device although its architecture would."""
    # A kernel always fits the architecture that it was compiled for.
    if compatibility is not Compatibility.EXACT and entry["shared"] > device.shared_limit:
        return f"its kernels use more than the {device.shared_limit} bytes of shared memory that a block has there"
    if compatibility is not Compatibility.PTX:
        return None
    if BY_ARCH[entry["arch"]].asynchronous_products:
        # Assemblers have broken the rule of ``machine_code.register_hazards``; a driver's assembler may too.
        return f"what the driver makes of PTX for {entry['arch']}, whose products run on, cannot be looked at"
    isa = entry["ptx"]["isa"]
    readable = device.ptx
    if readable is not None and tuple(map(int, isa.split("."))) > readable:
        driver = f"the driver (CUDA {device.driver // 1000}.{device.driver % 1000 // 10})"
        return f"its PTX is of version {isa}, and {driver} reads up to {readable[0]}.{readable[1]}"
    return None


def _check_manifest(path: Path, manifest: Any) -> None:
    """Raise ValueError unless every field that is read later is present."""
    way_out = "; install the package again, or build them with python -m rpsft_kernels kernels --build"
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: got {type(manifest).__name__}, expected a JSON object{way_out}")
    if manifest.get("schema") != SCHEMA:
        raise ValueError(f"{path}: got schema {manifest.get('schema')!r}, expected {SCHEMA}{way_out}")
    expected = {"sources": str, "architectures": list, "versions": dict, "left_out": list, "kernels": list}
    for name, kind in expected.items():
        if not isinstance(manifest.get(name), kind):
            got = type(manifest[name]).__name__ if name in manifest else "nothing"
            raise ValueError(f"{path}: {name}: got {got}, expected {kind.__name__}{way_out}")
    for number, each in enumerate(manifest["left_out"]):
        if not isinstance(each, dict) or not {"id", "label", "arch", "reason"} <= each.keys():
            raise ValueError(f"{path}: left_out[{number}]: got {each!r}, expected id, label, arch and reason{way_out}")
    wanted = ("id", "arch", "table", "entry", "threads", "shared", "scratch", "arguments", "layout", "file", "sha256")
    for number, entry in enumerate(manifest["kernels"]):
        lacking = [name for name in wanted if not isinstance(entry, dict) or name not in entry]
        ptx = entry.get("ptx") if isinstance(entry, dict) else None
        if ptx is not None:
            lacking += [f"ptx.{name}" for name in ("file", "sha256", "isa") if name not in ptx]
        if lacking:
            raise ValueError(f"{path}: kernels[{number}]: has no {', '.join(lacking)}{way_out}")
