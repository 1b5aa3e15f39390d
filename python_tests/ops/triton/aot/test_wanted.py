"""For which GPUs an installation compiles kernels: what its environment says, and what a made-up driver finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fake_driver import fake_driver
from rpsft_kernels.ops.triton.aot import devices as aot_devices
from rpsft_kernels.ops.triton.aot.devices import NoDevices, compute_capabilities
from rpsft_kernels.ops.triton.aot.wanted import is_strict, parse_wanted, wanted_targets

# NVIDIA's images set the variable to this list.
CONTAINER = {"TORCH_CUDA_ARCH_LIST": "7.5 8.0 8.6 9.0 10.0 12.0+PTX"}


@pytest.fixture(autouse=True)
def _no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_CUDA_DRIVER", str(tmp_path / "absent.so"))


def arches(environ: dict[str, str]) -> list[str]:
    return [target.arch for target in wanted_targets(environ).targets]


@pytest.mark.parametrize("word", ["0", "none", "None"])
def test_nothing_is_compiled_where_that_is_said(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_CUDA_DRIVER", fake_driver(tmp_path, 90))
    assert wanted_targets({"RPSFT_CUDA_ARCHS": word, **CONTAINER}) == ((), "", False, ())


def test_nothing_is_compiled_where_there_is_no_gpu() -> None:
    """Whatever list a container has for other packages."""
    for environ in ({}, CONTAINER):
        found = wanted_targets(environ)
        assert (found.targets, found.required) == ((), False)
        (note,) = found.notes
        assert re.match(r"no kernels are compiled: no CUDA driver: '.*absent\.so' does not open \(", note)


def test_kernels_are_for_the_gpus_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_CUDA_DRIVER", fake_driver(tmp_path, 90, 75, 80, 90))
    assert compute_capabilities() == [75, 80, 90]
    found = wanted_targets(CONTAINER)
    # A failure does not prevent the installation; nothing here reads PTX.
    assert (found.words, found.required, found.launchable) == ("native", False, True)
    assert [(target.arch, target.table, target.ptx) for target in found.targets] == [
        ("sm_80", "sm_80", False),
        ("sm_90a", "sm_90", False),
    ]
    assert found.notes == ("no kernels are compiled for this machine's GPU of compute capability 7.5",)
    assert wanted_targets({"RPSFT_CUDA_ARCHS": "native"}) == found._replace(required=True)
    assert wanted_targets({"RPSFT_STRICT": "1"}) == found._replace(required=True)
    # Nothing would launch them.
    assert arches({"RPSFT_NATIVE": "0"}) == []


def test_a_gpu_that_no_kernel_is_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_CUDA_DRIVER", fake_driver(tmp_path, 75, 130))
    notes = [f"no kernels are compiled for this machine's GPU of compute capability {name}" for name in ("7.5", "13.0")]
    assert wanted_targets({}) == ((), "", False, tuple(notes))
    with pytest.raises(ValueError, match=r"RPSFT_CUDA_ARCHS: got 'native', and .*capability 7\.5; .*name archit"):
        wanted_targets({"RPSFT_CUDA_ARCHS": "native"})


@pytest.mark.parametrize(
    ("init", "why"), [(0, "finds no GPU"), (100, "finds no GPU"), (803, "fails: cuInit returned 803")]
)
def test_a_driver_without_a_gpu_is_told_from_one_that_fails(
    init: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPSFT_CUDA_DRIVER", fake_driver(tmp_path, init=init))
    assert wanted_targets({}).notes == (f"no kernels are compiled: the CUDA driver {why}",)
    with pytest.raises(ValueError, match=f"--build: got 'native', and the CUDA driver {why}; name architectures"):
        parse_wanted("native", "--build")


def test_other_libraries_and_systems_have_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_CUDA_DRIVER", "libc.so.6")
    with pytest.raises(NoDevices, match="no CUDA driver: its library has no function cuInit"):
        compute_capabilities()
    monkeypatch.setattr(aot_devices.sys, "platform", "darwin")
    with pytest.raises(NoDevices, match="launched on Linux only, and this is darwin"):
        compute_capabilities()


@pytest.mark.parametrize("words", ["8.0;9.0", "8.0 9.0a", "8.0,9.0", "7.5 8.0 9.0+PTX"])
def test_a_list_is_what_must_be_compiled(words: str) -> None:
    found = wanted_targets({"RPSFT_CUDA_ARCHS": words, **CONTAINER})
    assert [target.arch for target in found.targets] == ["sm_80", "sm_90a"]
    assert found.required
    assert found.notes == (("RPSFT_CUDA_ARCHS: no kernels are compiled for 7.5",) if "7.5" in words else ())
    assert not wanted_targets({"RPSFT_CUDA_ARCHS": "gfx942"}).launchable


def test_the_variable_that_is_wrong_is_named() -> None:
    for words in ("8.0 Hopper", "8.0 native", "7.5"):
        with pytest.raises(ValueError, match=r"^RPSFT_CUDA_ARCHS: got '.*expected some of 8\.0.*=none builds without"):
            wanted_targets({"RPSFT_CUDA_ARCHS": words})
    with pytest.raises(ValueError, match="^RPSFT_AOT_PREBUILT: got a folder of kernels, expected RPSFT_CUDA_ARCHS"):
        wanted_targets({"RPSFT_AOT_PREBUILT": "kernels", **CONTAINER})
    with pytest.raises(ValueError, match="environment variable RPSFT_STRICT: got 'yes', expected 0 or 1"):
        is_strict({"RPSFT_STRICT": "yes"})
