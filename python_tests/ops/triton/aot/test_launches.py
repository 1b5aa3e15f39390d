"""From the public operations' kernels to the driver: real machine code, the compiled launcher, no GPU.

A stand-in takes the place of the driver's library and writes down what it is asked to launch.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import workload
from planned import planned_for
from rpsft_kernels.ops.triton.aot.build import build_kernels
from rpsft_kernels.ops.triton.aot.compile import parameter_table
from rpsft_kernels.ops.triton.aot.library import Library
from rpsft_kernels.ops.triton.fields import INDEX, WIDTH
from rpsft_kernels.ops.triton.kernels.table import KERNELS
from rpsft_kernels.ops.triton.variants import ARGUMENTS, SPECIALISED, Variant

pytestmark = pytest.mark.xdist_group("aot")
REPOSITORY = Path(__file__).resolve().parents[4]
ARCHITECTURES = {"sm_80": "8.0", "sm_90": "9.0"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The launches of the process, those that the driver saw, and the kernels that were built for it: they agree."""
    table: str = request.param
    folder = tmp_path_factory.mktemp("launches")
    asked: list[Variant] = []

    def note(variant: Variant, programs: int, arguments: tuple[Tensor, ...]) -> None:
        asked.append(variant)

    with planned_for(workload.profile_of(table), note):
        workload.Workload().run()
    build_kernels(ARCHITECTURES[table], folder / "kernels", jobs=2, only=";".join({v.label() for v in asked}))
    driver = folder / "libcuda_stub.so"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    source = REPOSITORY / "csrc" / "tests" / "cuda_stub.cpp"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", f"-I{REPOSITORY / 'csrc'}"]
    subprocess.run([*compiler, *options, str(source), "-o", str(driver)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RPSFT_AOT": "only", "RPSFT_CUDA_DRIVER": str(driver)}
    command = [sys.executable, workload.__file__, str(folder / "kernels"), table, str(driver)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout)
    library = Library.open(folder / "kernels")
    by_label = {variant.label(): variant for variant in asked}
    arch = library.manifest["architectures"][0]
    return found | {"library": library, "asked": asked, "variants": by_label, "arch": arch}


def fnv1a(content: bytes) -> int:
    number = 14695981039346656037
    for byte in content:
        number = ((number ^ byte) * 1099511628211) % 2**64
    return number


def pairs(served: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Each launch, the call that the driver got for it, and the manifest's entry of its kernel."""
    library: Library = served["library"]
    calls = [call for call in served["calls"] if call["call"] == "cuLaunchKernel"]
    assert len(calls) == len(served["launches"])
    found = []
    for launch, call in zip(served["launches"], calls, strict=True):
        match = library.find(served["variants"][launch["label"]], workload_device(served))
        assert match is not None
        found.append((launch, call, match.entry))
    return found


def workload_device(served: dict[str, Any]) -> Any:
    from rpsft_kernels.ops.triton.aot.library import Device

    return Device(int(served["arch"][3:].rstrip("a")), 227 << 10)


def test_every_kind_of_kernel_is_launched(served: dict[str, Any]) -> None:
    assert [launch["label"] for launch in served["launches"]] == [variant.label() for variant in served["asked"]]
    specialised = {"project", "pull", "gradient"}, {*SPECIALISED, "round"}
    others = specialised[0] if served["arch"] == "sm_90a" else specialised[1]
    assert {variant.kernel for variant in served["asked"]} == set(ARGUMENTS) - others


def test_the_drivers_buffer_is_what_the_code_reads(served: dict[str, Any]) -> None:
    """Byte for byte: each address at the offset that the machine code's own parameter table has for it."""
    for launch, call, entry in pairs(served):
        image = (served["library"].folder / entry["file"]).read_bytes()
        assert call["image"] == fnv1a(image), "another file's code"
        kernel = served["variants"][launch["label"]].kernel
        # In the order of the kernel's own declaration.
        declared = [name for name in KERNELS[kernel].arg_names if name in launch["arguments"]]
        assert tuple(declared) == ARGUMENTS[kernel]
        places = parameter_table(image, entry["entry"])
        assert len(places) == len(declared) + 2
        buffer = bytes.fromhex(call["parameters"])
        assert len(buffer) == max(offset + size for offset, size in places)
        read = [int.from_bytes(buffer[offset : offset + size], "little") for offset, size in places]
        assert read[:-2] == [launch["arguments"][name] for name in declared]
        assert read[-1] == 0, "Triton's profiler gets no memory"
        size, alignment = entry["scratch"]["size"], entry["scratch"]["alignment"]
        if size:
            ((start, length),) = launch["scratch"]
            assert start <= read[-2] and read[-2] + size * launch["programs"] <= start + length
            assert read[-2] % alignment == 0
        else:
            assert (read[-2], launch["scratch"]) == (0, [])


def test_the_launch_is_the_one_that_the_kernel_was_compiled_for(served: dict[str, Any]) -> None:
    for launch, call, entry in pairs(served):
        variant = served["variants"][launch["label"]]
        assert call["result"] == 0
        assert (call["device"], call["stream"]) == (workload.DEVICE, workload.STREAM + workload.DEVICE)
        assert call["grid"] == [launch["programs"], 1, 1]
        # Specialised kernels have two consumers of that many warps, and a producer that takes up as many.
        threads = 32 * variant.warps * (3 if variant.kernel in SPECIALISED else 1)
        assert call["block"] == [threads, 1, 1]
        assert call["shared"] == entry["shared"]
        if variant.kernel != "squares":
            assert 0 < launch["programs"] <= workload.MULTIPROCESSORS * variant.blocks_per_sm


def test_shared_memory_is_raised_for_those_that_want_more(served: dict[str, Any]) -> None:
    large = {entry["id"]: entry["shared"] for _, _, entry in pairs(served) if entry["shared"] > 48 << 10}
    raised = [
        call["value"] for call in served["calls"] if call["call"] == "cuFuncSetAttribute" and call["attribute"] == 8
    ]
    assert sorted(raised) == sorted(large.values())


def test_every_kernel_is_loaded_once(served: dict[str, Any]) -> None:
    loads = [call["image"] for call in served["calls"] if call["call"] == "cuModuleLoadDataEx"]
    assert len(loads) == len({variant.label() for variant in served["asked"]})


def test_tables_point_at_the_weights(served: dict[str, Any]) -> None:
    """The memory of the table argument holds the addresses of the tensors that the operation was called with."""
    seen: dict[str, set[int]] = {}
    for launch in served["launches"]:
        kernel = served["variants"][launch["label"]].kernel.removeprefix("hopper_")
        for at in range(0, len(launch["table"]), WIDTH):
            row = launch["table"][at : at + WIDTH]
            addresses = served["addresses"]
            if kernel in ("pull", "gradient"):
                number = addresses["grads"].index(row[INDEX["GRAD"]])
            else:
                number = row[INDEX["NUMBER"]]
            if kernel in ("project", "drift", "reduce", "pull", "gradient"):
                sides = {addresses["lefts"][number], addresses["rights"][number]}
                assert {row[INDEX["LEFT"]], row[INDEX["RIGHT"]]} == sides
            if kernel == "project":
                assert row[INDEX["WEIGHT"]] == addresses["weights"][number]
                assert row[INDEX["BASE"]] == addresses["bases"][number]
            seen.setdefault(kernel, set()).add(number)
    assert seen["project"] == seen["drift"] == seen["pull"] == seen["gradient"] == {0, 1, 2}
