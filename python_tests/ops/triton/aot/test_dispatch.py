"""Which kernel serves a launch: with made-up devices, and a launcher that only writes down what it is asked."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from rpsft_kernels.ops.triton import backend, toolchain
from rpsft_kernels.ops.triton.aot import dispatch as aot_dispatch
from rpsft_kernels.ops.triton.aot.library import kernel_id
from rpsft_kernels.ops.triton.variants import ARGUMENTS, Variant
from world import DEVICE, HOPPER_PULL, PULL, SQUARES, World, launch

LIMIT = 99 << 10


@pytest.mark.parametrize(("variant", "threads"), [(PULL, 128), (HOPPER_PULL, 384)])
def test_what_is_launched(variant: Variant, threads: int, world: World) -> None:
    world.install(world.entry(variant, "sm_90a", shared=70000, scratch=256))
    assert world.launch(variant, programs=6) == f"{variant.kernel}-sm_90a.cubin"
    (kernel,) = world.native.kernels
    assert kernel["entry"] == f"{variant.kernel}_kernel"
    assert kernel["name"] == variant.label()
    assert (kernel["threads"], kernel["shared"]) == (threads, 70000)
    assert kernel["layout"] == [(8 * i, 8) for i in range(7)]
    ((_, device, stream, grid, arguments),) = world.native.launches
    assert (device, stream, grid) == (0, 77, (6, 1, 1))
    assert arguments[:5] == [tensor.data_ptr() for tensor in world.arguments]
    # Scratch memory for each program, and none for Triton's profiler.
    assert world.scratch == [6 * 256 + 128]
    assert arguments[5] > 0
    assert arguments[5] % 128 == 0
    assert arguments[6] == 0
    world.launch(variant)
    assert len(world.native.kernels) == 1
    assert world.compiled == []


def test_without_scratch_its_pointer_is_null(world: World) -> None:
    world.install((SQUARES, "sm_90a"))
    world.launch()
    assert world.native.launches[0][-1][-2:] == [0, 0]
    assert world.scratch == []


def test_no_programs_are_no_launch(world: World) -> None:
    world.install((SQUARES, "sm_90a"))
    launch(SQUARES, 0, DEVICE, *[torch.zeros(8)] * 3)
    assert (world.native.launches, world.compiled) == ([], [])


def test_machine_code_of_the_device_comes_first(world: World) -> None:
    world.install(
        world.entry(SQUARES, "sm_80", ptx=True), (SQUARES, "sm_86"), (SQUARES, "sm_90a"), (SQUARES, "sm_100a")
    )
    served = {}
    for capability in (80, 86, 89, 90, 100, 103, 120):
        world.device(capability)
        served[capability] = world.launch()
    assert served == {
        80: "squares-sm_80.cubin",
        86: "squares-sm_86.cubin",
        89: "squares-sm_86.cubin",  # the newest of the same major
        90: "squares-sm_90a.cubin",
        100: "squares-sm_100a.cubin",
        103: "squares-sm_80.ptx",  # sm_100a code runs on 10.0 alone
        120: "squares-sm_80.ptx",
    }


def test_what_runs_nowhere_near_is_left_to_triton(world: World) -> None:
    world.install(world.entry(SQUARES, "sm_90a", ptx=True), (SQUARES, "sm_86"))
    for capability in (80, 100, 120):
        world.device(capability)
        assert world.launch() == "jit"


def test_a_driver_translates_no_ptx_of_products_that_run_on(world: World) -> None:
    """The code that it makes of them cannot be scanned."""
    world.install(world.entry(SQUARES, "sm_90a", ptx=True))
    world.native.refused["sm_90a.cubin"] = "no kernel image"
    assert world.launch() == "jit"
    assert "what the driver makes of PTX for sm_90a" in str(aot_dispatch.unavailable(DEVICE))
    # Older PTX knows no such products.
    world.install(world.entry(SQUARES, "sm_90a", ptx=True), world.entry(SQUARES, "sm_80", ptx=True))
    assert world.launch() == "squares-sm_80.ptx"


def test_code_that_needs_more_shared_memory_than_the_device_has_is_passed_over(world: World) -> None:
    world.install(world.entry(SQUARES, "sm_80", shared=160 << 10))
    world.device(89, shared=LIMIT)
    assert world.launch() == "jit"
    world.device(86, shared=163 << 10)
    assert world.launch() == "squares-sm_80.cubin"


def test_an_unknown_variant_is_left_to_triton(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.install((SQUARES, "sm_90a"))
    assert world.launch(PULL) == "jit"
    monkeypatch.setenv("RPSFT_AOT", "only")
    aot_dispatch._explain_no_match.cache_clear()
    monkeypatch.setenv("RPSFT_TILES", "table.json")
    message = (
        r"no kernel compiled ahead of time for pull\(basis_type=bf16, block_m=64, warps=4, stages=2\) on cuda:0: "
        r"compute capability 9\.0: none of this installation's kernels \(sm_90a\) is that variant.*RPSFT_TILES is set"
    )
    with pytest.raises(RuntimeError, match=message):
        world.launch(PULL)


def test_a_misaligned_argument_never_reaches_a_kernel_that_counts_on_alignment(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.install((SQUARES, "sm_90a"))
    arguments = [torch.zeros(8), torch.zeros(8)[1:], torch.zeros(8)]
    launch(SQUARES, 1, DEVICE, *arguments)
    assert (world.compiled, world.native.launches) == ([SQUARES], [])
    monkeypatch.setenv("RPSFT_AOT", "only")
    with pytest.raises(RuntimeError, match=r"squares\(.* on cuda:0: its argument squares is not aligned to 16 bytes"):
        launch(SQUARES, 1, DEVICE, *arguments)


def test_modes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.install((SQUARES, "sm_90a"))
    served = {}
    for mode in ("", "0", "1", "only"):
        monkeypatch.setenv("RPSFT_AOT", mode)
        served[mode] = world.launch()
    cubin = "squares-sm_90a.cubin"
    assert served == {"": cubin, "0": "jit", "1": cubin, "only": cubin}
    monkeypatch.setenv("RPSFT_AOT", "yes")
    with pytest.raises(ValueError, match="environment variable RPSFT_AOT: got 'yes', expected 0, 1 or only"):
        world.launch()


@pytest.mark.parametrize("lacking", ["kernels", "launcher", "CUDA"])
def test_installations_that_lack_something(lacking: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.install((SQUARES, "sm_90a"))
    if lacking == "kernels":
        monkeypatch.setattr(aot_dispatch, "_open_installed", lambda: (None, "this installation carries no kernels"))
    elif lacking == "launcher":
        missing = "this installation's native module has no CUDA launcher"
        monkeypatch.setattr(aot_dispatch, "launcher_missing", lambda: missing)
    else:
        monkeypatch.setattr(torch.version, "hip", "6.0")
    assert world.launch() == "jit"
    assert lacking in str(aot_dispatch.unavailable(DEVICE))
    monkeypatch.setenv("RPSFT_AOT", "only")
    with pytest.raises(RuntimeError, match=rf"no kernel compiled ahead of time for squares.*{lacking}.*RPSFT_AOT=1"):
        world.launch()


def test_one_line_is_logged_for_each_device_and_way(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rpsft_kernels")
    world.install(world.entry(SQUARES, "sm_80", ptx=True), (SQUARES, "sm_90a"))
    for capability in (90, 86, 100):
        world.device(capability)
        for _ in range(2):
            world.launch()
    for _ in range(2):
        world.launch(PULL)
        launch(SQUARES, 1, DEVICE, *[torch.zeros(8)[1:]] * 3)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "cuda:0: kernels compiled ahead of time, sm_90a machine code on compute capability 9.0",
        "cuda:0: kernels compiled ahead of time, sm_80 machine code, which compute capability 8.6 runs too, with the "
        "tiles of sm_80",
        "cuda:0: kernels compiled ahead of time, sm_80 PTX, which the driver translates for compute capability 10.0, "
        "with the tiles of sm_80",
        f"cuda:0: Triton compiles {PULL.label()}: compute capability 10.0: none of this installation's kernels "
        "(sm_90a, sm_80) is that variant for that device",
        f"cuda:0: Triton compiles {SQUARES.label()}: its argument table is not aligned to 16 bytes",
    ]


def test_failures_of_the_driver_say_where_the_code_came_from(world: World) -> None:
    world.install((SQUARES, "sm_90a"))
    world.native.error = RuntimeError("kernel 'squares': cuModuleLoadDataEx failed")
    with pytest.raises(RuntimeError, match=r"cuModuleLoadDataEx failed \(compiled ahead of time, sm_90a.*RPSFT_AOT=0"):
        world.launch()


def test_without_the_package_triton(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.install((SQUARES, "sm_90a"))
    monkeypatch.setattr(toolchain, "triton_missing", lambda: "the package triton is not installed (pip install triton)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(backend, "_is_interpreted", lambda: False)
    assert backend.unavailable(DEVICE, torch.bfloat16) is None
    assert world.launch() == "squares-sm_90a.cubin"
    with pytest.raises(RuntimeError, match="it cannot be compiled: the package triton is not installed"):
        world.launch(PULL)
    missing = "the package triton is not installed (pip install triton)"
    assert backend.unavailable(torch.device("cpu"), torch.bfloat16) == missing
    world.device(120)
    assert backend.unavailable(DEVICE, torch.bfloat16) == (
        f"{missing}, and this installation's kernels (sm_90a) do not run on compute capability 12.0"
    )
    none = "this installation carries no kernels compiled ahead of time"
    monkeypatch.setattr(aot_dispatch, "_open_installed", lambda: (None, none))
    assert backend.unavailable(DEVICE, torch.bfloat16) == (
        f"{missing}, and this installation carries no kernels compiled ahead of time"
    )


def test_what_was_left_out_is_compiled_or_refused_with_the_reason(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = {"id": kernel_id(PULL, "sm_90a"), "label": PULL.label(), "arch": "sm_90a", "reason": "spills 16 bytes"}
    world.left_out.append(lacking)
    world.install((SQUARES, "sm_90a"))
    with caplog.at_level(logging.INFO, "rpsft_kernels"):
        assert world.launch(PULL) == "jit"
    assert "compute capability 9.0: left out of the sm_90a kernels: spills 16 bytes" in caplog.text
    monkeypatch.setenv("RPSFT_AOT", "only")
    with pytest.raises(RuntimeError, match="left out of the sm_90a kernels: spills 16 bytes; RPSFT_AOT=1 lets Triton"):
        world.launch(PULL)
    assert world.launch(SQUARES) == "squares-sm_90a.cubin"


# -- what is decided when a launch is bound, and what when it is started ----------------------------------------


def arguments_of(variant: Variant) -> list[torch.Tensor]:
    return [torch.zeros(8) for _ in ARGUMENTS[variant.kernel]]


def test_a_bound_launch_is_started_as_it_was_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.install(world.entry(PULL, "sm_90a", scratch=256))
    arguments = arguments_of(PULL)
    start = aot_dispatch.bind(PULL, 6, DEVICE, arguments)
    assert start is not None and world.native.launches == []
    assert world.scratch == [6 * 256 + 128]
    # Another stream, mode and installation are none of its business.
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=88))
    monkeypatch.setenv("RPSFT_AOT", "0")
    monkeypatch.setattr(aot_dispatch, "_open_installed", lambda: (None, "this installation carries no kernels"))
    for _ in range(3):
        start()
    assert world.scratch == [6 * 256 + 128], "its scratch memory is its own"
    first, *others = world.native.launches
    assert others == [first] * 2
    _, device, stream, grid, values = first
    assert (device, stream, grid) == (0, 77, (6, 1, 1))
    assert values[:5] == [argument.data_ptr() for argument in arguments]


def test_what_triton_is_to_compile_is_not_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.install((SQUARES, "sm_90a"))
    assert aot_dispatch.bind(PULL, 1, DEVICE, arguments_of(PULL)) is None
    misaligned = [torch.zeros(9)[1:] for _ in ARGUMENTS["squares"]]
    assert aot_dispatch.bind(SQUARES, 1, DEVICE, misaligned) is None
    monkeypatch.setenv("RPSFT_AOT", "only")
    for variant, arguments in ((PULL, arguments_of(PULL)), (SQUARES, misaligned)):
        with pytest.raises(aot_dispatch.NoKernel, match="no kernel compiled ahead of time for"):
            aot_dispatch.bind(variant, 1, DEVICE, arguments)
    assert (world.native.kernels, world.native.launches, world.compiled) == ([], [], [])


def test_a_file_that_is_gone_is_missed_when_the_launch_is_bound(world: World) -> None:
    world.install((SQUARES, "sm_90a"))
    (world.folder / "squares-sm_90a.cubin").unlink()
    with pytest.raises(RuntimeError, match=r"squares-sm_90a\.cubin: the manifest lists it, but it cannot be read"):
        aot_dispatch.bind(SQUARES, 1, DEVICE, arguments_of(SQUARES))


def test_a_refused_image_is_passed_over_when_the_launch_is_bound_anew(world: World) -> None:
    world.install(world.entry(SQUARES, "sm_80", ptx=True))
    world.device(80)
    world.native.refused["sm_80.cubin"] = "no kernel image"
    start = aot_dispatch.bind(SQUARES, 1, DEVICE, arguments_of(SQUARES))
    assert start is not None
    for _ in range(2):
        with pytest.raises(aot_dispatch.ImageRefused, match="no kernel image"):
            start()
    start = aot_dispatch.bind(SQUARES, 1, DEVICE, arguments_of(SQUARES))
    assert start is not None
    start()
    assert [image.decode() for image, *_ in world.native.launches] == ["squares-sm_80.ptx"]
