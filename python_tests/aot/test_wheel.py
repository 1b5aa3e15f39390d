"""A real wheel with a few kernels. The slowest test here: it builds one from a copy of the sources."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.xdist_group("aot")
def test_the_slowest_a_wheel_carries_its_kernels_and_says_so(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "requirements-dev.txt"):
        shutil.copy(REPOSITORY / name, source / name)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "kernels", "data", "tests")
    for name in ("rpsft_kernels", "csrc"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    # Left over from an earlier build, which this one must not carry on.
    tag = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = source / "build" / tag / "rpsft_kernels" / "kernels"
    stale.mkdir(parents=True)
    (stale / "old.cubin").write_text("stale")
    wheels = tmp_path / "wheels"
    # The engine is not what this is about, and takes a minute.
    environment = {**os.environ, "RPSFT_NATIVE": "0", "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX", "MAX_JOBS": "2"}
    environment["RPSFT_AOT_KERNELS"] = "squares*;full_drift(weight_type=bf16, base_type=bf16, aligned=True*"
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."]
    run = subprocess.run(
        command, cwd=source, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "compiling kernels for sm_80, sm_90a" in run.stdout
    assert "4 kernels in 9 files" in run.stdout
    assert "peak memory" in run.stdout
    # Or else the test does not know where builds leave their files.
    assert (stale / "manifest.json").exists()
    (wheel,) = wheels.iterdir()
    assert wheel.name.startswith("rpsft_kernels-0.1.0+sm80.sm90-")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("rpsft_kernels/kernels/")]
        manifest = json.loads(archive.read("rpsft_kernels/kernels/manifest.json"))
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        assert "\nVersion: 0.1.0+sm80.sm90\n" in archive.read(metadata).decode()
        assert len(names) == 9
        assert manifest["architectures"] == ["sm_80", "sm_90a"]
        assert {entry["kernel"] for entry in manifest["kernels"]} == {"squares", "full_drift"}
        for entry in manifest["kernels"]:
            for file in (entry, entry["ptx"]):
                content = archive.read(f"rpsft_kernels/kernels/{file['file']}")
                assert hashlib.sha256(content).hexdigest() == file["sha256"]
        archive.extractall(tmp_path / "installed")
    # The kernels belong to the sources that they lie beside.
    program = "from rpsft_kernels import aot; print(aot.installed().summary())"
    installed = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    )
    assert "sm_90a        2 kernels in 4 files" in installed.stdout
