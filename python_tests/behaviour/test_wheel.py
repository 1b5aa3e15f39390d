"""Wheels with a few kernels, built from a source distribution and from a tree: what they hold and what they say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from fake_driver import fake_driver
from wheels import REPOSITORY, build_wheel, copy_sources, run_python, version, without

pytestmark = pytest.mark.xdist_group("wheels")
# As NVIDIA's images set it, for other packages.
CONTAINER = {"TORCH_CUDA_ARCH_LIST": "7.5 8.0 8.6 9.0 10.0 12.0+PTX"}
# The engine is not what this is about, and takes a minute.
FEW = {
    "RPSFT_NATIVE": "0",
    "MAX_JOBS": "2",
    "RPSFT_AOT_KERNELS": "squares*;full_drift(weight_type=bf16, base_type=bf16, aligned=True*",
    "RPSFT_CUDA_ARCHS": "7.5 8.0;9.0+PTX,9.0a",
    "SOURCE_DATE_EPOCH": "1700000000",
    **CONTAINER,
}
# What is compiled for a GPU that is found.
NATIVE = {name: FEW[name] for name in ("MAX_JOBS", "RPSFT_AOT_KERNELS", "TORCH_CUDA_ARCH_LIST")}


def hook(source: Path, call: str, **variables: str) -> str:
    """What a hook of the build backend returns, called as a build front end does."""
    program = (
        "import sys; sys.path.insert(0, 'build_tools'); import backend; "
        f"{call if 'found =' in call else f'found = {call}'}; print('\\n' + str(found))"
    )
    run = run_python("-c", program, cwd=source, **variables)
    assert run.returncode == 0, run.stdout[-3000:]
    return run.stdout.splitlines()[-1]


def metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return archive.read(name).decode()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_sources(tmp_path_factory.mktemp("wheels") / "source")
    # Left over from an earlier build, which later ones must not carry on.
    tag = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = folder / "build" / tag / "rpsft_kernels" / "kernels"
    stale.mkdir(parents=True)
    (stale / "old.cubin").write_text("stale")
    return folder


@pytest.fixture(scope="module")
def archive(source: Path) -> Path:
    name = hook(source, "backend.build_sdist('sdist')", **FEW)
    # What it is of has no kernels, whatever it is built with.
    assert name == f"rpsft_kernels-{version()}.tar.gz"
    return source / "sdist" / name


@pytest.fixture(scope="module")
def wheel(archive: Path) -> tuple[Path, str]:
    """Of the source distribution, as ``python -m build`` makes one."""
    return build_wheel(archive, archive.parent / "wheels", **FEW)


def test_a_wheel_carries_its_kernels_and_says_so(wheel: tuple[Path, str], tmp_path: Path) -> None:
    path, printed = wheel
    assert "RPSFT_CUDA_ARCHS: no kernels are compiled for 7.5" in printed
    assert "compiling kernels for sm_80, sm_90a in 2 processes" in printed
    assert "4 kernels in 9 files" in printed
    assert "peak memory" in printed
    # A package index takes no local version.
    assert path.name.startswith(f"rpsft_kernels-{version()}-")
    text = metadata(path)
    assert f"\nVersion: {version()}\n" in text
    assert "kernels-sm_80,kernels-sm_90a\n" in text
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith("rpsft_kernels/kernels/")]
        manifest = json.loads(archive.read("rpsft_kernels/kernels/manifest.json"))
        assert len(names) == 9
        assert manifest["architectures"] == ["sm_80", "sm_90a"]
        assert {entry["kernel"] for entry in manifest["kernels"]} == {"squares", "full_drift"}
        for entry in manifest["kernels"]:
            for file in (entry, entry["ptx"]):
                content = archive.read(f"rpsft_kernels/kernels/{file['file']}")
                assert hashlib.sha256(content).hexdigest() == file["sha256"]
        archive.extractall(tmp_path / "installed")
    # The kernels belong to the sources that they lie beside.
    program = "from rpsft_kernels.ops.triton.aot import dispatch; print(dispatch.installed_library().summary())"
    installed = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    )
    assert "sm_90a        2 kernels in 4 files" in installed.stdout


def test_a_wheel_of_the_tree_has_the_same_bytes(wheel: tuple[Path, str], source: Path, tmp_path: Path) -> None:
    """Whatever lies in the tree, and whether the kernels are compiled or were before."""
    path, _ = wheel
    again, _ = build_wheel(source, tmp_path / "again", **FEW)
    (stale,) = (source / "build").glob("lib.*/rpsft_kernels/kernels")
    # Or else the test does not know where builds leave their files.
    assert (stale / "manifest.json").exists()
    assert not (stale / "old.cubin").exists()
    assert again.name == path.name
    assert again.read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    prebuilt = str(tmp_path / "unpacked" / "rpsft_kernels" / "kernels")
    copied, printed = build_wheel(source, tmp_path / "copied", RPSFT_AOT_PREBUILT=prebuilt, **FEW)
    assert "compiling kernels" not in printed
    assert copied.read_bytes() == path.read_bytes()


def test_other_kernels_are_not_taken_for_these(wheel: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = wheel
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "rpsft_kernels" / "kernels"
    command = (REPOSITORY / "build_tools" / "compile_kernels.py", "--output", "new", "--prebuilt", folder)
    for words, message in (
        (("--arch", "9.0", "--only", FEW["RPSFT_AOT_KERNELS"]), "was built with architectures ['sm_80', 'sm_90a']"),
        (("--arch", "8.0;9.0"), "was built with only 'squares*;"),
        (("--arch", "8.0;9.0", "--only", FEW["RPSFT_AOT_KERNELS"], "--rank", "32"), "was built with ranks [32, 64"),
    ):
        run = run_python(*command, *words, cwd=tmp_path)
        assert run.returncode == 1
        assert f"RPSFT_AOT_PREBUILT: {folder} {message}" in run.stdout
    next(folder.glob("*.cubin")).write_bytes(b"")
    run = run_python(*command, "--arch", "8.0;9.0", "--only", FEW["RPSFT_AOT_KERNELS"], cwd=tmp_path)
    assert "is not the file that its manifest describes" in run.stdout
    assert not (tmp_path / "new").exists()


def test_a_source_distribution_is_complete_and_untagged(archive: Path) -> None:
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[-1] for name in files.getnames()}
        metadata_file = files.extractfile(f"rpsft_kernels-{version()}/PKG-INFO")
        assert metadata_file is not None
        assert f"\nVersion: {version()}\n" in metadata_file.read().decode()
    assert {"build_tools/backend.py", "csrc/sources.json", "csrc/launcher/launcher.cpp", "CMakeLists.txt"} <= names
    assert not any(name.endswith((".cubin", ".so")) for name in names)


def test_only_wheels_ask_for_what_compiles_kernels(source: Path, tmp_path: Path) -> None:
    for kind in ("sdist", "editable"):
        assert hook(source, f"backend.get_requires_for_build_{kind}()", **FEW) == "[]"
    asks = "backend.get_requires_for_build_wheel()"
    # Triton alone, which is small beside torch.
    assert hook(source, asks, **FEW) == "['triton>=3.9']"
    assert hook(source, asks, **CONTAINER) == "[]"
    assert hook(source, asks, RPSFT_AOT_PREBUILT="kernels", **FEW) == "[]"
    gpu = fake_driver(tmp_path, 90)
    assert hook(source, asks, RPSFT_CUDA_DRIVER=gpu, RPSFT_CUDA_ARCHS="none", **CONTAINER) == "[]"
    assert hook(source, asks, RPSFT_CUDA_DRIVER=gpu, RPSFT_CUDA_ARCHS="native") == "['triton>=3.9']"
    # Where it is but wished for, only if there is one: no older Python has this version.
    expected = "['triton>=3.9']" if sys.version_info >= (3, 11) else "[]"
    assert hook(source, asks, RPSFT_CUDA_DRIVER=gpu, **CONTAINER) == expected
    other = f"backend.platform.machine = lambda: 's390x'; found = {asks}"
    assert hook(source, other, RPSFT_CUDA_DRIVER=gpu) == "[]"
    for kind in ("sdist", "editable"):
        assert hook(source, f"backend.get_requires_for_build_{kind}()", RPSFT_CUDA_DRIVER=gpu) == "[]"


def test_an_editable_install_claims_no_kernels(source: Path, tmp_path: Path) -> None:
    name = hook(source, "backend.build_editable('editable')", RPSFT_CUDA_DRIVER=fake_driver(tmp_path, 90), **FEW)
    assert name.startswith(f"rpsft_kernels-{version()}-")
    text = metadata(source / "editable" / name)
    assert f"\nVersion: {version()}\n" in text
    assert "kernels-sm" not in text
    (source / "described").mkdir()
    assert hook(source, "backend.prepare_metadata_for_build_editable('described')", **FEW) == (
        f"rpsft_kernels-{version()}.dist-info"
    )
    assert not (source / "rpsft_kernels" / "kernels").exists()


def test_kernels_without_a_launcher_are_refused_before_they_are_compiled(source: Path) -> None:
    few = {name: value for name, value in FEW.items() if name != "RPSFT_NATIVE"}
    command = ("-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", "none", ".")
    run = run_python(*command, cwd=source, **few, CXX="no-such-compiler")
    assert run.returncode != 0
    assert (
        "RPSFT_CUDA_ARCHS asks for kernels (RPSFT_NATIVE=0: no launcher), but rpsft_kernels._native was not built: "
        "no C++ compiler: no-such-compiler was not found"
    ) in run.stdout
    assert "compiling kernels" not in run.stdout


def test_unknown_architectures_are_refused_before_anything_is_built(source: Path) -> None:
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "none", ".")
    run = run_python(*command, cwd=source, RPSFT_CUDA_ARCHS="8.0 Hopper")
    assert run.returncode != 0
    assert "RPSFT_CUDA_ARCHS: got 'Hopper', expected some of 8.0" in run.stdout


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources beside the objects of an engine that was built of them."""
    return copy_sources(tmp_path_factory.mktemp("linked") / "source", objects=True)


def held(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        kept = ("rpsft_kernels/kernels/", "rpsft_kernels/_kernels_build.txt")
        return [name for name in archive.namelist() if name.startswith(kept)]


def test_an_installation_where_there_is_no_gpu_has_no_kernels(linked: Path, tmp_path: Path) -> None:
    wheel, printed = build_wheel(linked, tmp_path / "wheels", **NATIVE)
    assert "no kernels are compiled: no CUDA driver: " in printed
    assert held(wheel) == []


def test_an_installation_has_the_kernels_of_its_gpu(linked: Path, tmp_path: Path) -> None:
    """Without a word about them, and where torch is not among what it is built with."""
    absent = without(tmp_path / "without", "torch", "numpy")
    driver = fake_driver(tmp_path / "driver", 90)
    # A blank is no word.
    variables = NATIVE | {"RPSFT_CUDA_DRIVER": driver, "PYTHONPATH": absent, "RPSFT_CUDA_ARCHS": " "}
    wheel, printed = build_wheel(linked, tmp_path / "wheels", **variables)
    assert "compiling kernels for sm_90a in 2 processes" in printed
    # Two kernels and a manifest.
    assert len(held(wheel)) == 3
    assert wheel.name.startswith(f"rpsft_kernels-{version()}-")
    assert f"\nVersion: {version()}\n" in metadata(wheel)
    # Said before it was known to succeed, else.
    assert "kernels-sm" not in metadata(wheel)


def test_kernels_that_cannot_be_compiled_are_no_reason_not_to_install(linked: Path, tmp_path: Path) -> None:
    variables = NATIVE | {"RPSFT_CUDA_DRIVER": fake_driver(tmp_path, 90), "PYTHONPATH": str(tmp_path)}
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util; found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\n"
    )
    wheel, printed = build_wheel(linked, tmp_path / "wheels", **variables)
    said = "no kernels can be compiled: the package triton is not installed (pip install triton)"
    assert f"WARNING: rpsft_kernels is installed without kernels for this machine's GPU: {said} (" in printed
    assert "RPSFT_CUDA_ARCHS=none does without them, RPSFT_CUDA_ARCHS=native makes this an error" in printed
    assert held(wheel) == ["rpsft_kernels/_kernels_build.txt"]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = "from rpsft_kernels.ops.triton.aot import dispatch; print(dispatch.kernels_missing())"
    installed = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    )
    assert f"kernels compiled ahead of time: they could not be compiled: {said}" in installed.stdout
    command = ("-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", "none", ".")
    run = run_python(*command, cwd=linked, **variables, RPSFT_STRICT="1")
    assert run.returncode != 0
    assert f"the GPU kernels that RPSFT_CUDA_ARCHS or RPSFT_STRICT asks for were not built: {said}" in run.stdout
