"""A folder of kernels compiled ahead of time: its manifest, and which of its code runs on a device."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..machine_code.register_hazards import RULES

if TYPE_CHECKING:
    from ..variants import Variant

SCHEMA = 3
MANIFEST = "manifest.json"
# Beside the folder, where a build was to fill it and could not: why.
REASON = "_kernels_build.txt"
# The package's folder of compiled kernels, not that of their sources.
FOLDER = Path(__file__).parents[3] / "kernels"
_SOURCES = Path(__file__).parents[1]
_OPTIONS = ("compiler", "fields", "variants")
# What is compiled, and with which options; how it is planned and launched may change without making a kernel stale.
_KERNEL_SOURCES = (*sorted((_SOURCES / "kernels").glob("*.py")), *(_SOURCES / f"{name}.py" for name in _OPTIONS))
# How code can run on a device, the best first.
_WAYS = ("exact", "compatible", "ptx")
# Compute capabilities of Tegra: NVIDIA promises no binary compatibility between these and any other.
_TEGRA = frozenset({72, 87, 101, 110})


def kernel_id(variant: Variant, arch: str) -> str:
    """Names one variant on one architecture, the same in every process and build."""
    options = sorted(variant.options().items())
    facts = [variant.kernel, variant.constants, options, variant.registers, arch]
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()[:20]


def description(variant: Variant) -> dict[str, Any]:
    """What a manifest's entry takes from its variant."""
    return {
        "kernel": variant.kernel,
        "constants": dict(variant.constants),
        "warps": variant.warps,
        "stages": variant.stages,
        "residents": variant.residents,
        "maximal_registers": variant.registers,
    }


@lru_cache(maxsize=1)
def source_digest() -> str:
    """The digest of the kernels' sources, and of the rules that their machine code was held to: code of other sources,
    or looked through with less, must not pass for theirs.
    """
    digest = hashlib.sha256(f"rules {RULES}\0".encode())
    for path in _KERNEL_SOURCES:
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


class Arch(NamedTuple):
    """An architecture that machine code is for. ``specific``: it runs on that one alone (``sm_90a``)."""

    number: int
    specific: bool

    @classmethod
    def parse(cls, name: str) -> Arch | None:
        """None for what is not NVIDIA's."""
        found = re.fullmatch(r"sm_(\d+)(a?)", name)
        return cls(int(found[1]), bool(found[2])) if found else None

    def how_cubin_runs(self, capability: int) -> str | None:
        """How its machine code runs on a device: ``"exact"``, ``"compatible"``, or not at all."""
        if self.number == capability:
            return "exact"
        if self.specific or not _TEGRA.isdisjoint((self.number, capability)):
            return None
        same_major = self.number // 10 == capability // 10
        return "compatible" if same_major and self.number < capability else None

    def how_ptx_runs(self, capability: int) -> str | None:
        return "ptx" if self.number == capability or (self.number < capability and not self.specific) else None


class Device(NamedTuple):
    """What decides which code a device runs: its compute capability (``90`` for 9.0), bytes of shared memory that a
    block may have, and its driver's version of CUDA (``12040`` for 12.4; 0 where unknown).
    """

    capability: int
    shared_limit: int
    driver: int = 0

    @property
    def ptx(self) -> tuple[int, int] | None:
        """The newest PTX ISA that the driver is known to read; None where it is not known."""
        major, minor = self.driver // 1000, self.driver % 1000 // 10
        # 12.6 brought no new one.
        return {11: (7, minor), 12: (8, minor - (minor >= 6)), 13: (9, minor)}.get(major)


# (architecture, way) pairs whose images a device's driver has refused.
Refused = frozenset[tuple[str, str]]


class Choice(NamedTuple):
    """A kernel for a launch, and how its code runs there: ``"exact"``, ``"compatible"`` or ``"ptx"``."""

    entry: dict[str, Any]
    how: str

    @property
    def file(self) -> dict[str, str]:
        """The name and digest of the file to load."""
        source: dict[str, str] = self.entry["ptx"] if self.how == "ptx" else self.entry
        return source


class Service(NamedTuple):
    """All kernels of one tile table run on a device, as the code of one architecture, in one way."""

    table: str
    arch: str
    how: str
    kernels: int

    @property
    def generation(self) -> int:
        return int(self.table[3:])


@dataclass(frozen=True, eq=False)
class Library:
    """A folder of kernels and its manifest."""

    folder: Path
    manifest: dict[str, Any]
    by_id: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, folder: Path) -> Library:
        """
        Raises:
            ValueError: there are no kernels, or they do not belong to this package; the message says what is the case.
        """
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            sources = source_digest()
        except (OSError, ValueError) as error:
            if not path.exists():
                why = _why_none(folder)
                raise ValueError(f"this installation carries no kernels compiled ahead of time{why}") from None
            raise ValueError(f"{path}: {error}") from error
        _check_manifest(path, manifest)
        if manifest["sources"] != sources:
            raise ValueError(f"the kernels in {folder} were compiled from other sources than this package's")
        return cls(folder, manifest, {entry["id"]: entry for entry in manifest["kernels"]})

    def summary(self) -> str:
        """What it holds, for people: versions, and per architecture kernels, files and bytes."""
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

    def arches(self) -> list[tuple[str, Arch]]:
        """NVIDIA architectures that it holds, the newest first."""
        return self._arches

    def held(self) -> str:
        """Their names."""
        return ", ".join(name for name, _ in self._arches) or "no NVIDIA architecture"

    @cached_property
    def _arches(self) -> list[tuple[str, Arch]]:
        found = [(name, arch) for name in self.manifest["architectures"] if (arch := Arch.parse(name)) is not None]
        return sorted(found, key=lambda pair: -pair[1].number)

    @cached_property
    def _of_arch(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for entry in self.manifest["kernels"]:
            found.setdefault(entry["arch"], []).append(entry)
        return found

    @cached_property
    def left_out(self) -> dict[str, dict[str, str]]:
        """By the ids of kernels that it would have: their ``label``, ``arch`` and the ``reason`` why it has not."""
        return {each["id"]: each for each in self.manifest["left_out"]}

    def _ways(self, device: Device, refused: Refused) -> Iterator[tuple[str, str]]:
        """Architecture and way of all code that might run on a device, the best first."""
        for how in _WAYS:
            for name, arch in self._arches:
                runs = arch.how_ptx_runs if how == "ptx" else arch.how_cubin_runs
                if runs(device.capability) == how and (name, how) not in refused:
                    yield name, how

    def find(self, variant: Variant, device: Device, refused: Refused = frozenset()) -> Choice | str:
        """The kernel that serves a variant, or why none does: machine code for that device before PTX, newest first."""
        obstacles = []
        for name, how in self._ways(device, refused):
            identity = kernel_id(variant, name)
            entry = self.by_id.get(identity)
            if identity in self.left_out:
                obstacles.append(f"left out of the {name} kernels: {self.left_out[identity]['reason']}")
            if entry is None or (how == "ptx" and "ptx" not in entry):
                continue
            obstacle = _obstacle(entry, how, device)
            if not obstacle:
                return Choice(entry, how)
            obstacles.append(obstacle)
        if obstacles:
            return "; ".join(dict.fromkeys(obstacles))
        reason = f"none of this installation's kernels ({self.held()}) is that variant for that device"
        return reason + "; RPSFT_TILES is set" if os.environ.get("RPSFT_TILES") else reason

    def services(self, device: Device, refused: Refused = frozenset()) -> list[Service]:
        """The tile tables all of whose kernels run on a device, and how: the best way first."""
        return [found for found, obstacle in self._tried(device, refused) if not obstacle]

    def obstacles(self, device: Device, refused: Refused = frozenset()) -> str:
        """What stands against the code that might run on a device; "" where no code might."""
        found = [f"{tried.arch}: {obstacle}" for tried, obstacle in self._tried(device, refused) if obstacle]
        return "; ".join(dict.fromkeys(found))

    def _tried(self, device: Device, refused: Refused) -> Iterator[tuple[Service, str]]:
        for name, how in self._ways(device, refused):
            entries = self._of_arch.get(name, [])
            for table in dict.fromkeys(entry["table"] for entry in entries):
                # Where PTX was kept, it was of every kernel.
                own = [e for e in entries if e["table"] == table and (how != "ptx" or "ptx" in e)]
                if own:
                    obstacle = next(filter(None, (_obstacle(entry, how, device) for entry in own)), "")
                    yield Service(table, name, how, len(own)), obstacle


def _why_none(folder: Path) -> str:
    """What a build that was to compile them says of it, in a file beside the folder."""
    try:
        return ": " + folder.with_name(REASON).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _obstacle(entry: dict[str, Any], how: str, device: Device) -> str:
    """Why a kernel's code does not run on a device after all; "" where it does."""
    # On the architecture that it was made for it fits.
    if how != "exact" and entry["shared"] > device.shared_limit:
        return f"its kernels use more than the {device.shared_limit} bytes of shared memory that a block has there"
    if how == "ptx":
        if entry["arch"] == "sm_90a":
            # Assemblers have broken the rule of ``machine_code.register_hazards``; a driver's assembler may too.
            return "what the driver makes of PTX for sm_90a, whose products run on, cannot be looked at"
        isa = entry["ptx"]["isa"]
        readable = device.ptx
        if readable is not None and tuple(map(int, isa.split("."))) > readable:
            driver = f"the driver (CUDA {device.driver // 1000}.{device.driver % 1000 // 10})"
            return f"its PTX is of version {isa}, and {driver} reads up to {readable[0]}.{readable[1]}"
    return ""


def _check_manifest(path: Path, manifest: Any) -> None:
    """That it has what is read without asking; a ValueError where it has not."""
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
