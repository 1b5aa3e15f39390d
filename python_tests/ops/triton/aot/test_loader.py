"""From a file to a launcher: once, whoever asks, and by name where the file is not right."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from rpsft_kernels.ops.triton.aot import loader as aot_loader
from rpsft_kernels.ops.triton.aot.library import KernelMatch, Library
from rpsft_kernels.ops.triton.aot.targets import Compatibility
from world import SQUARES, World


def test_threads_that_ask_at_once_get_one_kernel(world: World) -> None:
    world.install((SQUARES, "sm_90a"))
    library = Library.open(world.folder)
    match = KernelMatch(library.manifest["kernels"][0], Compatibility.EXACT)
    made = world.native.Kernel

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.05)
        return made(*arguments)

    world.monkeypatch.setattr(world.native, "Kernel", slowly)
    together, found = threading.Barrier(8), []

    def ask() -> None:
        together.wait()
        found.append(aot_loader.kernel(library, match, "squares"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1
    assert len(world.native.kernels) == 1


def test_a_spoilt_file_is_not_launched(world: World) -> None:
    world.install((SQUARES, "sm_90a"))
    (world.folder / "squares-sm_90a.cubin").write_text("spoilt")
    with pytest.raises(RuntimeError, match=r"squares-sm_90a\.cubin is not the file that its manifest describes"):
        world.launch()


def test_a_missing_file_is_named(world: World) -> None:
    world.install((SQUARES, "sm_90a"))
    (world.folder / "squares-sm_90a.cubin").unlink()
    message = r"squares-sm_90a\.cubin: the manifest lists it, but it cannot be read \(No such file.*RPSFT_AOT=0 leaves"
    with pytest.raises(RuntimeError, match=message):
        world.launch()
