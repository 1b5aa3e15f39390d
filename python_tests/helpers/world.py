"""A made-up installation on a made-up device, with a launcher that only writes down what it is asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rpsft_kernels.ops.triton import jit, toolchain
from rpsft_kernels.ops.triton.aot import dispatch as aot_dispatch
from rpsft_kernels.ops.triton.aot import loader as aot_loader
from rpsft_kernels.ops.triton.aot.library import MANIFEST, SCHEMA, Device, Library, kernel_id, source_digest
from rpsft_kernels.ops.triton.launch import Launch
from rpsft_kernels.ops.triton.variants import ARGUMENT_TYPES, ARGUMENTS, SPECIALISED, Variant, squares_variant

DEVICE = torch.device("cuda", 0)
SQUARES = squares_variant()
PULL = Variant("pull", (("BASIS_TYPE", "bf16"), ("BLOCK_M", 64)), 4, 2)
HOPPER_PULL = Variant("hopper_pull", (("BLOCK_M", 128),), 4, 4)


def launch(variant: Variant, programs: int, device: torch.device, *arguments: Tensor) -> None:
    """Prepare a launch and queue it."""
    Launch(variant, programs, device, *arguments)()


class Recorder:
    """Stands for the native launcher."""

    class LoadError(RuntimeError):
        pass

    def __init__(self) -> None:
        self.kernels: list[dict[str, Any]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.refused: dict[str, str] = {}

    def Kernel(
        self, image: bytes, entry: str, name: str, threads: int, shared: int, layout: list[tuple[int, int]]
    ) -> Any:
        self.kernels.append({"image": image, "entry": entry, "name": name, "threads": threads, "shared": shared})
        self.kernels[-1]["layout"] = layout

        def start(device: int, stream: int, grid: tuple[int, int, int], arguments: list[int]) -> None:
            if self.error is not None:
                raise self.error
            for suffix, words in self.refused.items():
                if image.decode().endswith(suffix):
                    raise self.LoadError(words)
            self.launches.append((image, device, stream, grid, arguments))

        return SimpleNamespace(launch=start)


class World:
    """An installation and a device that can be changed, and what became of launches."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.native = Recorder()
        self.compiled: list[Variant] = []
        self.scratch: list[int] = []
        # The variants that a build left out, with the reason.
        self.left_out: list[dict[str, str]] = []
        for module in (aot_dispatch, aot_loader):
            monkeypatch.setattr(module, "launcher", lambda: self.native)
            monkeypatch.setattr(module, "launcher_missing", lambda: None)
        for cause in ("triton_missing", "compiler_missing"):
            monkeypatch.setattr(toolchain, cause, lambda: None)
        monkeypatch.setattr(aot_dispatch, "_descriptor_scratch", self._scratch)
        monkeypatch.setattr(jit, "bind_jit", lambda variant, *_: lambda: self.compiled.append(variant))
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
        self.device(90)

    def _scratch(self, size: int, device: torch.device) -> Tensor:
        self.scratch.append(size)
        return torch.empty(size, dtype=torch.int8)

    def device(self, capability: int, shared: int = 227 << 10, driver: int = 0) -> None:
        self.monkeypatch.setattr(aot_dispatch, "_device_facts", lambda _: Device(capability, shared, driver))

    def install(self, *kernels: tuple[Variant, str] | dict[str, Any], **manifest: Any) -> None:
        entries = [kernel if isinstance(kernel, dict) else self.entry(*kernel) for kernel in kernels]
        for entry in entries:
            for file in [entry] + ([entry["ptx"]] if "ptx" in entry else []):
                (self.folder / file["file"]).write_text(file["file"])
                file["sha256"] = hashlib.sha256(file["file"].encode()).hexdigest()
        arches = list(dict.fromkeys(entry["arch"] for entry in entries))
        found = {"schema": SCHEMA, "sources": source_digest(), "architectures": arches, "kernels": entries}
        found |= {"versions": {"triton": "3.9.0"}, "left_out": self.left_out} | manifest
        (self.folder / MANIFEST).write_text(json.dumps(found))
        library = Library.open(self.folder)
        self.monkeypatch.setattr(aot_dispatch, "_open_installed", lambda: (library, None))

    @staticmethod
    def entry(variant: Variant, arch: str, ptx: bool = False, shared: int = 1024, scratch: int = 0) -> dict[str, Any]:
        names = ARGUMENTS[variant.kernel]
        entry: dict[str, Any] = {
            "id": kernel_id(variant, arch),
            "arch": arch,
            "table": arch.rstrip("a"),
            "entry": f"{variant.kernel}_kernel",
            "threads": 32 * variant.warps * (3 if variant.kernel in SPECIALISED else 1),
            "shared": shared,
            "scratch": {"size": scratch, "alignment": 128},
            "arguments": [{"name": name, "type": ARGUMENT_TYPES[name], "divisibility": 16} for name in names],
            "layout": [[8 * i, 8] for i in range(len(names) + 2)],
            "file": f"{variant.kernel}-{arch}.cubin",
        }
        return entry | ({"ptx": {"file": f"{variant.kernel}-{arch}.ptx", "isa": "8.0"}} if ptx else {})

    def launch(self, variant: Variant = SQUARES, programs: int = 5) -> str:
        """The file that was launched, or "jit"."""
        self.arguments = [torch.zeros(8) for _ in ARGUMENTS[variant.kernel]]
        before = len(self.compiled), len(self.native.launches)
        launch(variant, programs, DEVICE, *self.arguments)
        if len(self.compiled) > before[0]:
            return "jit"
        assert len(self.native.launches) == before[1] + 1
        return str(self.native.launches[-1][0].decode())
