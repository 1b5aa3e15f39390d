"""Kernels compiled ahead of time: which one serves a launch, and its start without a compiler or the triton package.

``rpsft_kernels/kernels/`` holds machine code and ``manifest.json`` where the package was built with them
(:mod:`rpsft_kernels.aot_build`). RPSFT_AOT says what is made of them: ``1`` (default) takes a kernel where one matches
and leaves the rest to Triton, ``0`` leaves all to Triton, ``only`` never compiles.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .ops.triton.variant import Variant

SCHEMA = 1
MANIFEST = "manifest.json"
FOLDER = Path(__file__).with_name("kernels")
_SOURCES = Path(__file__).parent / "ops" / "triton"
# What is compiled; how it is planned and launched may change without making a kernel stale.
_KERNEL_SOURCES = ("columns", "drift", "fields", "full", "gradient", "project", "pull", "tile")
_MODES = ("0", "1", "only")
_log = logging.getLogger("rpsft_kernels")
_lock = threading.Lock()
_said: set[tuple[torch.device, str]] = set()


def mode() -> str:
    """The environment variable RPSFT_AOT: ``"0"``, ``"1"`` or ``"only"``."""
    value = os.environ.get("RPSFT_AOT", "") or "1"
    if value not in _MODES:
        raise ValueError(f"environment variable RPSFT_AOT: got {value!r}, expected 0, 1 or only")
    return value


def kernel_id(variant: Variant, arch: str) -> str:
    """Names one variant on one architecture, the same in every process and build."""
    facts = [variant.kernel, variant.constants, variant.warps, variant.stages, variant.registers, arch]
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()[:20]


def source_digest() -> str:
    """The digest of the kernels' sources: machine code of other sources must not pass for theirs."""
    digest = hashlib.sha256()
    for name in _KERNEL_SOURCES:
        digest.update((_SOURCES / f"{name}.py").read_bytes().replace(b"\r\n", b"\n") + b"\0")
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
        same_major = self.number // 10 == capability // 10
        return "compatible" if same_major and self.number < capability and not self.specific else None

    def how_ptx_runs(self, capability: int) -> str | None:
        return "ptx" if self.number == capability or (self.number < capability and not self.specific) else None


class Choice(NamedTuple):
    """A kernel for a launch, and how its code runs there: ``"exact"``, ``"compatible"`` or ``"ptx"``."""

    entry: dict[str, Any]
    how: str

    @property
    def file(self) -> dict[str, str]:
        """The name and digest of the file to load."""
        source: dict[str, str] = self.entry["ptx"] if self.how == "ptx" else self.entry
        return source


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
                raise ValueError("this installation carries no kernels compiled ahead of time") from None
            raise ValueError(f"{path}: {error}") from error
        if manifest.get("schema") != SCHEMA:
            raise ValueError(f"{path}: got schema {manifest.get('schema')!r}, expected {SCHEMA}")
        if manifest["sources"] != sources:
            raise ValueError(f"the kernels in {folder} were compiled from other sources than this package's")
        return cls(folder, manifest, {entry["id"]: entry for entry in manifest["kernels"]})

    def summary(self) -> str:
        """What it holds, for people: versions, and per architecture kernels, files and bytes."""
        lines = [f"{self.folder}", "  ".join(f"{name} {value}" for name, value in self.manifest["versions"].items())]
        for name in self.manifest["architectures"]:
            entries = [entry for entry in self.manifest["kernels"] if entry["arch"] == name]
            files = {entry["file"] for entry in entries} | {entry["ptx"]["file"] for entry in entries if "ptx" in entry}
            size = sum((self.folder / file).stat().st_size for file in files)
            ptx = ", with PTX" if any("ptx" in entry for entry in entries) else ""
            lines.append(f"{name:<10}{len(entries):>5} kernels in {len(files)} files, {size / 1e6:.1f} MB{ptx}")
        return "\n".join(lines)

    def arches(self) -> list[tuple[str, Arch]]:
        """NVIDIA architectures that it holds, the newest first."""
        found = [(name, arch) for name in self.manifest["architectures"] if (arch := Arch.parse(name)) is not None]
        return sorted(found, key=lambda pair: -pair[1].number)

    def find(self, variant: Variant, capability: int, shared_limit: int) -> Choice | str:
        """The kernel that serves a variant, or why none does: machine code for that device before PTX, newest first."""
        arches = self.arches()
        too_large = False
        for how in ("exact", "compatible", "ptx"):
            for name, arch in arches:
                runs = arch.how_ptx_runs(capability) if how == "ptx" else arch.how_cubin_runs(capability)
                entry = self.by_id.get(kernel_id(variant, name)) if runs == how else None
                if entry is None or (how == "ptx" and "ptx" not in entry):
                    continue
                # On the architecture that it was made for it fits.
                if how == "exact" or entry["shared"] <= shared_limit:
                    return Choice(entry, how)
                too_large = True
        if too_large:
            return f"its kernels use more than the {shared_limit} bytes of shared memory that a block has there"
        held = ", ".join(name for name, _ in arches) or "no NVIDIA architecture"
        reason = f"none of this installation's kernels ({held}) is that variant for that device"
        return reason + "; RPSFT_TILES is set" if os.environ.get("RPSFT_TILES") else reason

    def tables(self, capability: int, shared_limit: int) -> list[str]:
        """The tile tables all of whose kernels run on a device, as machine code or as PTX; the newest first."""
        runs: dict[str, bool] = {}
        for entry in self.manifest["kernels"]:
            arch = Arch.parse(entry["arch"])
            if arch is None:
                continue
            how = arch.how_cubin_runs(capability) or (arch.how_ptx_runs(capability) if "ptx" in entry else None)
            table = entry["table"]
            if how is not None:
                runs[table] = runs.get(table, True) and (how == "exact" or entry["shared"] <= shared_limit)
        return sorted((table for table, fits in runs.items() if fits), key=lambda table: -int(table[3:]))


@lru_cache(maxsize=1)
def installed() -> Library | str:
    """The kernels of this installation, or why there are none."""
    try:
        return Library.open(FOLDER)
    except ValueError as error:
        return str(error)


@lru_cache(maxsize=1)
def _binding() -> Any:
    """The native module's launcher, or why there is none (a str)."""
    try:
        native = importlib.import_module("rpsft_kernels._native")
    except ImportError as error:
        return f"this installation carries no native module to launch them ({error})"
    launcher = getattr(native, "cuda", None)
    return "this installation's native module has no CUDA launcher" if launcher is None else launcher


@lru_cache(maxsize=1)
def triton_missing() -> str:
    """Why the package triton cannot compile the kernels, found without importing it; "" where it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # Some builds of torch carry one under another name: of the right age, one may suppose.
        return ""
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    if numbers < [3, 6]:
        return f"the package triton {version} is too old (pip install 'triton>=3.6', or a torch that brings it)"
    return ""


class Device(NamedTuple):
    """What decides which machine code a device runs."""

    capability: int
    shared_limit: int


@lru_cache(maxsize=64)
def _facts(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    # What every supported device has, where this torch does not tell.
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return Device(properties.major * 10 + properties.minor, shared)


def _usable() -> Library | str:
    """The installation's kernels, or what stands against using any."""
    if mode() == "0":
        return "RPSFT_AOT=0"
    if torch.version.hip is not None:
        return "kernels compiled ahead of time are launched on CUDA devices only"
    library = installed()
    if isinstance(library, str):
        return library
    binding = _binding()
    return binding if isinstance(binding, str) else library


def compiles() -> bool:
    """Whether a variant without a kernel may be compiled."""
    return mode() != "only" and not triton_missing()


def unavailable(device: torch.device) -> str | None:
    """Why no kernel of this installation serves a CUDA device, or None where at least one tile table's do."""
    library = _usable()
    if isinstance(library, str):
        return library
    facts = _facts(device)
    if not library.tables(*facts):
        held = ", ".join(name for name, _ in library.arches()) or "no NVIDIA architecture"
        return f"this installation's kernels ({held}) do not run on compute capability {_dotted(facts.capability)}"
    return None


def table_for(device: torch.device, own: str) -> str:
    """The tile table that launches on a CUDA device are planned with: its own one, unless nothing but kernels of an
    older table can run there.
    """
    if compiles():
        return own
    library = _usable()
    tables = [] if isinstance(library, str) else library.tables(*_facts(device))
    older = [table for table in tables if int(table[3:]) <= int(own[3:])]
    return own if own in tables or not older else older[0]


def start(variant: Variant, programs: int, device: torch.device, arguments: Sequence[Tensor]) -> bool:
    """Run ``programs`` > 0 programs of a variant on the current stream of a GPU, where a kernel serves the call.

    Returns:
        Whether it was started; if not, Triton is to compile it.

    Raises:
        RuntimeError: no kernel serves the call, and nothing may or can compile it.
    """
    library = _usable()
    if isinstance(library, str):
        return _left(device, "none", variant, library)
    facts = _facts(device)
    choice = _chosen(library, variant, facts)
    if isinstance(choice, str):
        return _left(device, "no match", variant, f"compute capability {_dotted(facts.capability)}: {choice}")
    entry = choice.entry
    values = []
    for argument, tensor in zip(entry["arguments"], arguments, strict=True):
        value = tensor.data_ptr()
        if value % argument["divisibility"]:
            why = f"its argument {argument['name']} is not aligned to {argument['divisibility']} bytes"
            return _left(device, "misaligned", variant, why)
        values.append(value)
    _say(device, choice.how, f"{device}: kernels compiled ahead of time, {_how(choice, facts)}")
    # Held until the kernel is queued; then the allocator gives the memory to what comes later in the stream.
    scratch, alignment = None, entry["scratch"]["alignment"]
    if entry["scratch"]["size"]:
        scratch = _scratch(entry["scratch"]["size"] * programs + alignment, device)
    # Triton's two parameters behind the declared ones: scratch memory, and that of its profiler.
    values += [0 if scratch is None else -(-scratch.data_ptr() // alignment) * alignment, 0]
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(device).cuda_stream
    try:
        _loaded(library, entry["id"], choice.how, variant).launch(index, stream, (programs, 1, 1), values)
    except RuntimeError as error:
        raise RuntimeError(
            f"{error} (compiled ahead of time, {_how(choice, facts)}; RPSFT_AOT=0 leaves kernels to Triton)"
        ) from error
    return True


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device=device)


@lru_cache(maxsize=4096)
def _chosen(library: Library, variant: Variant, facts: Device) -> Choice | str:
    return library.find(variant, *facts)


@lru_cache(maxsize=4096)
def _loaded(library: Library, identity: str, how: str, variant: Variant) -> Any:
    """The native launcher of one kernel; it loads the code on each device where it is first launched."""
    choice = Choice(library.by_id[identity], how)
    entry = choice.entry
    image = (library.folder / choice.file["file"]).read_bytes()
    if hashlib.sha256(image).hexdigest() != choice.file["sha256"]:
        raise RuntimeError(f"{library.folder / choice.file['file']} is not the file that its manifest describes")
    layout = [(offset, size) for offset, size in entry["layout"]]
    return _binding().Kernel(image, entry["entry"], variant.label(), entry["threads"], entry["shared"], layout)


def _left(device: torch.device, kind: str, variant: Variant, reason: str) -> bool:
    """Leave a launch to Triton, or say why it cannot be."""
    if mode() == "only":
        way_out = "RPSFT_AOT=1 lets Triton compile it"
    elif triton_missing():
        way_out = f"it cannot be compiled: {triton_missing()}"
    else:
        _say(device, f"jit, {kind}", f"{device}: Triton compiles {variant.label()}: {reason}")
        return False
    raise RuntimeError(f"no kernel compiled ahead of time for {variant.label()} on {device}: {reason}; {way_out}")


def _how(choice: Choice, facts: Device) -> str:
    arch, capability = choice.entry["arch"], _dotted(facts.capability)
    return {
        "exact": f"{arch} machine code on compute capability {capability}",
        "compatible": f"{arch} machine code, which compute capability {capability} runs too",
        "ptx": f"{arch} PTX, which the driver translates for compute capability {capability}",
    }[choice.how]


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def _say(device: torch.device, kind: str, message: str) -> None:
    if (device, kind) in _said:
        return
    with _lock:
        if (device, kind) in _said:
            return
        _said.add((device, kind))
    _log.info(message)
