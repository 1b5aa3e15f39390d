"""Images that a driver does not take: the next way is gone, once and said, or the error says why there is none."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from triton.backends.nvidia.compiler import ptx_get_version

from rpsft_kernels.ops.triton import device as triton_device
from rpsft_kernels.ops.triton.aot import dispatch as aot_dispatch
from rpsft_kernels.ops.triton.aot.library import Device
from world import DEVICE, PULL, SQUARES, World, launch

TOO_NEW = (
    "kernel 'squares' on CUDA device 0: cuModuleLoadDataEx failed with CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222), "
    "the provided PTX was compiled with an unsupported toolchain."
)


def test_ptx_that_the_driver_does_not_know_is_left_to_triton(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "rpsft_kernels")
    monkeypatch.setattr(triton_device, "own_profile", lambda _: triton_device.Profile("sm_90", 132, True))
    world.install(world.entry(SQUARES, "sm_80", ptx=True), world.entry(PULL, "sm_80", ptx=True))
    world.native.refused = {".ptx": TOO_NEW}
    assert triton_device.device_profile(DEVICE).architecture == "sm_80"
    assert [world.launch() for _ in range(3)] == ["jit"] * 3
    assert world.launch(PULL) == "jit"
    assert len(world.native.kernels) == 1, "one refusal is enough"
    assert triton_device.device_profile(DEVICE).architecture == "sm_90"
    refused, compiled = (record.getMessage() for record in caplog.records)
    assert refused == f"cuda:0: sm_80 PTX compiled ahead of time is passed over on compute capability 9.0: {TOO_NEW}"
    assert compiled.startswith(f"cuda:0: Triton compiles {SQUARES.label()}: compute capability 9.0: none of this")
    reason = str(aot_dispatch.unavailable(DEVICE))
    assert reason.startswith("this installation's kernels (sm_80) do not run on compute capability 9.0; the driver")
    assert "refused sm_80 PTX" in reason and TOO_NEW in reason


def test_refused_machine_code_is_followed_by_ptx(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rpsft_kernels")
    world.install(world.entry(SQUARES, "sm_80", ptx=True), world.entry(SQUARES, "sm_86"))
    world.device(86)
    world.native.refused = {"sm_86.cubin": "NO_BINARY_FOR_GPU (209)", "sm_80.cubin": "INVALID_IMAGE (200)"}
    assert [world.launch() for _ in range(2)] == ["squares-sm_80.ptx"] * 2
    assert [re.sub(" compiled.*: ", ": ", record.getMessage()) for record in caplog.records] == [
        "cuda:0: sm_86 machine code: NO_BINARY_FOR_GPU (209)",
        "cuda:0: sm_80 machine code: INVALID_IMAGE (200)",
        "cuda:0: kernels compiled ahead of time, sm_80 PTX, which the driver translates for compute capability 8.6, "
        "with the tiles of sm_80",
    ]


def test_a_refusal_is_one_devices(world: World) -> None:
    world.install((SQUARES, "sm_90a"))
    world.native.refused = {".cubin": "NO_BINARY_FOR_GPU (209)"}
    assert world.launch() == "jit"
    world.native.refused = {}
    assert world.launch() == "jit"
    launch(SQUARES, 5, torch.device("cuda", 1), *world.arguments)
    assert [device for _, device, *_ in world.native.launches] == [1]


def test_where_nothing_may_be_compiled_the_error_says_what_was_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.install(world.entry(SQUARES, "sm_80", ptx=True))
    world.native.refused = {".ptx": TOO_NEW}
    monkeypatch.setenv("RPSFT_AOT", "only")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no kernel compiled ahead of time .*\(222\).*RPSFT_AOT=1 lets Triton"):
            world.launch()


def test_ptx_newer_than_the_driver_is_not_even_tried(world: World) -> None:
    entry = world.entry(SQUARES, "sm_80", ptx=True)
    entry["ptx"]["isa"] = "8.5"
    world.install(entry)
    world.device(90, driver=12040)
    assert (world.launch(), world.native.kernels) == ("jit", [])
    assert str(aot_dispatch.unavailable(DEVICE)) == (
        "this installation's kernels (sm_80) do not run on compute capability 9.0; sm_80: its PTX is of version 8.5, "
        "and the driver (CUDA 12.4) reads up to 8.4"
    )
    for driver in (12050, 13000, 15020, 0):
        world.device(90, driver=driver)
        assert world.launch() == "squares-sm_80.ptx", driver


def test_what_drivers_read_is_what_triton_says_of_cuda() -> None:
    for version in [f"11.{minor}" for minor in range(9)] + [f"12.{minor}" for minor in range(10)] + ["13.0", "13.1"]:
        major, minor = map(int, version.split("."))
        isa = Device(90, 0, 1000 * major + 10 * minor).ptx
        assert isa is not None
        assert 10 * isa[0] + isa[1] == ptx_get_version(version), version
    assert Device(90, 0, 0).ptx is None
