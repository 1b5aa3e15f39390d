"""Installed where there is neither a compiler nor Triton: what runs, and what is said to be missing for a GPU.

The environments are new ones that see torch and what it imports, and nothing else of the one that runs the tests.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wheels import FullWheel, build_wheel, copy_sources

# One worker builds the wheel that is installed.
pytestmark = pytest.mark.xdist_group("full wheel")
README = Path(__file__).resolve().parents[2] / "README.md"
# torch, its requirements and this package's: triton is not among them.
VISIBLE = (
    "torch", "torchgen", "functorch", "numpy", "numpy.libs", "safetensors", "tqdm", "typing_extensions.py", "sympy",
    "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock",
)  # fmt: skip


class Clean:
    """A virtual environment without pip, and a PATH on which it is alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "environment" / "bin"
        folder.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "environment"], check=True)
        links = folder / "visible"
        links.mkdir()
        packages = Path(importlib.metadata.distribution("torch").locate_file("")).resolve()
        described = [f"{name.removesuffix('.py')}-*.dist-info" for name in VISIBLE]
        for pattern in (*VISIBLE, *described):
            for path in packages.glob(pattern):
                (links / path.name).symlink_to(path)
        (site,) = (folder / "environment" / "lib").glob("python*/site-packages")
        self.site = site
        (site / "visible.pth").write_text(f"{links}\n")

    def install(self, wheel: Path) -> None:
        """Without its requirements, which are there."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python")]
        subprocess.run([*pip, "install", "-q", "--no-deps", str(wheel)], check=True, cwd=self.folder)

    def python(self, *arguments: str, **variables: str) -> str:
        environment = {"PATH": str(self.bin), "HOME": str(self.folder), "OMP_NUM_THREADS": "1"} | variables
        run = subprocess.run(
            [self.bin / "python", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout

    def example(self, backend: str = "") -> float:
        """R in the last step of the README's first example."""
        block = "import torch\ntorch.manual_seed(0)\n" + re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[0]
        variables = {"RPSFT_BACKEND": backend} if backend else {}
        return float(self.python("-c", block + "\nprint(R.item())", **variables).split()[-1])

    def environment_lines(self) -> dict[str, str]:
        printed = self.python("-m", "rpsft_kernels", "env").splitlines()
        return {line[:24].strip(): line[24:] for line in printed if line[0] != " "}


@pytest.fixture(scope="module")
def clean(full_wheel: FullWheel, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    made = Clean(tmp_path_factory.mktemp("clean"))
    made.install(full_wheel.path)
    return made


def test_there_is_no_compiler_and_no_triton(clean: Clean) -> None:
    found = [name for name in ("cc", "c++", "gcc", "g++", "clang", "nvcc") if shutil.which(name, path=str(clean.bin))]
    assert found == []
    program = "import importlib.util; print(importlib.util.find_spec('triton'), importlib.util.find_spec('torch').name)"
    assert clean.python("-c", program).split() == ["None", "torch"]


def test_the_first_example_runs_on_the_engine_and_on_the_reference(clean: Clean) -> None:
    engine, reference, default = clean.example("native"), clean.example("torch"), clean.example()
    assert engine > 0 and reference > 0
    # Without being asked for, the engine is what runs.
    assert default == engine


def test_what_is_missing_for_a_gpu_is_said(clean: Clean) -> None:
    lines = clean.environment_lines()
    assert lines["triton"] == "not installed"
    assert lines["cpu native"] == lines["cpu torch"] == "available"
    assert "the package triton is not installed (pip install triton)" in lines["cpu triton"]
    assert lines["kernels"].startswith(str(clean.site))
    # The kernels and their launcher are there: a GPU is what there is none of.
    assert "GPU" not in lines or lines["GPU"].startswith("none")
    assert re.search(r"sm_90a +\d{3} kernels in \d+ files", clean.python("-m", "rpsft_kernels", "kernels"))


def test_from_source_without_a_compiler(tmp_path: Path) -> None:
    """The package works without its engine, and says why there is none."""
    made = Clean(tmp_path / "clean")
    source = copy_sources(tmp_path / "source")
    wheel, printed = build_wheel(source, tmp_path / "wheels", PATH=str(made.bin))
    assert "WARNING: rpsft_kernels is installed without its CPU engine: no C++ compiler: c++ was not found" in printed
    made.install(wheel)
    reason = (made.site / "rpsft_kernels" / "_native_build.txt").read_text()
    assert reason == "no C++ compiler: c++ was not found\n"
    assert made.example() == made.example("torch") > 0
    lines = made.environment_lines()
    assert "no C++ compiler: c++ was not found" in lines["cpu native"]
    assert lines["cpu torch"] == "available"
    assert "carries no kernels compiled ahead of time" in lines["kernels"]
