"""Builds the optional CPU engine, rpsft_kernels._native, from csrc, and GPU kernels ahead of time where they are asked
for. All else about the package is in pyproject.toml.

Without a compiler the package is pure Python and rpsft_kernels/_native_build.txt says why. RPSFT_NATIVE=0 leaves the
engine out; RPSFT_NATIVE=1 makes its absence an error; CXX names the compiler.

TORCH_CUDA_ARCH_LIST="8.0;9.0" compiles the GPU kernels for these architectures into rpsft_kernels/kernels of a wheel
and names them in its local version and keywords; MAX_JOBS processes compile. The engine carries what launches them:
without it they are an error, unless RPSFT_NATIVE=0. RPSFT_AOT_PREBUILT names a folder of these kernels that was built
before, which is then copied. RPSFT_AOT_KERNELS restricts them (globs, for tests).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info
from setuptools.errors import CompileError

SOURCES: dict[str, list[dict[str, Any]]] = json.loads(Path("csrc/sources.json").read_text(encoding="utf-8"))
WISH = os.environ.get("RPSFT_NATIVE", "")
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
PREBUILT = os.environ.get("RPSFT_AOT_PREBUILT", "").strip()
REASON = "_native_build.txt"
COMPILE = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# NDEBUG: pybind11's assertions would put the paths of its headers here into the module.
COMPILE += ["-fno-math-errno", "-ffp-contract=fast", "-pthread", "-DNDEBUG", "-Icsrc"]
# Python's own symbols come from the interpreter that loads the module.
LINK = ["-shared", "-pthread", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ldl"])]


def load_targets() -> Any:
    """rpsft_kernels/aot_targets.py alone: importing the package would take torch."""
    spec = importlib.util.spec_from_file_location("aot_targets", Path("rpsft_kernels", "aot_targets.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TARGETS = load_targets()
# Refuses what it does not know before anything is built.
WANTED = TARGETS.parse_architectures(ARCHITECTURES) if ARCHITECTURES else []
# A wheel of kernels that nothing in it can launch is a mistake, unless it was asked for.
REQUIRED = WISH == "1" or (WISH != "0" and bool(TARGETS.local_version(WANTED)))


class Unit(NamedTuple):
    source: str
    flags: list[str]


def compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
    if shutil.which(named[0]) is None:
        raise CompileError(f"no C++ compiler: {named[0]} was not found")
    return named


def accepts(cxx: list[str], flags: list[str], folder: Path) -> bool:
    empty = folder / "empty.cpp"
    empty.write_text("")
    command = [*cxx, "-std=c++17", *flags, "-c", str(empty), "-o", str(folder / "empty.o")]
    return subprocess.run(command, capture_output=True).returncode == 0


def units(cxx: list[str], folder: Path) -> list[Unit]:
    """What this machine and this compiler can build; every unit is told which instruction sets are among them."""
    import pybind11

    machine = "x86_64" if platform.machine() == "AMD64" else platform.machine()
    chosen, macros = [], []
    for entry in SOURCES["library"]:
        flags = entry.get("flags", [])
        if "machine" in entry:
            if entry["machine"] != machine or not accepts(cxx, flags, folder):
                continue
            macros.append(f"-DRPSFT_HAS_{Path(entry['source']).stem.upper()}")
        chosen.append(Unit(entry["source"], flags))
    # The bindings alone see these: the engine knows no Python.
    headers = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    chosen += [Unit(entry["source"], entry.get("flags", []) + headers) for entry in SOURCES["bindings"]]
    return [Unit(source, flags + macros) for source, flags in chosen]


def build(module: Path, folder: Path) -> None:
    """Compiles what has changed since the last build in the folder. Raises where there is no module in the end."""
    from ninja.ninja_syntax import Writer, escape

    folder.mkdir(parents=True, exist_ok=True)
    cxx = compiler()
    with (folder / "build.ninja").open("w", encoding="utf-8") as file:
        ninja = Writer(file, width=120)
        ninja.variable("builddir", escape(str(folder)))
        compile_command = escape(shlex.join(cxx + COMPILE)) + " $flags -MD -MF $out.d -c $in -o $out"
        ninja.rule("compile", compile_command, "compile $in", "$out.d", deps="gcc")
        ninja.rule("link", f"{escape(shlex.join(cxx))} $in {escape(shlex.join(LINK))} -o $out")
        objects: list[str] = []
        for source, flags in units(cxx, folder):
            objects.append(str((folder / source).with_suffix(".o")))
            ninja.build(objects[-1:], "compile", [f"csrc/{source}"], variables={"flags": escape(shlex.join(flags))})
        ninja.build([str(folder / module.name)], "link", objects)
    command = [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja")]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(run.stdout, flush=True)
    if run.returncode != 0:
        # Units compile side by side: another one's warnings may stand after what went wrong.
        said = [line[-300:] for line in run.stdout.splitlines() if line.strip() and not line.startswith("ninja:")]
        errors = [line for line in said if "error:" in line or "undefined reference" in line]
        raise CompileError("\n".join(errors[:4] or said[-6:]))
    module.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / module.name, module)


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name))
        folder = Path("build") / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        # Neither a module nor a reason of an earlier build may pass for this one's.
        module.unlink(missing_ok=True)
        (module.parent / REASON).unlink(missing_ok=True)
        try:
            if WISH == "0":
                raise CompileError("RPSFT_NATIVE=0 when this package was built")
            build(module, folder)
        except (CompileError, ImportError, OSError) as error:
            if REQUIRED:
                why = "RPSFT_NATIVE=1" if WISH == "1" else "TORCH_CUDA_ARCH_LIST is set (RPSFT_NATIVE=0: no launcher)"
                raise CompileError(f"{why}, but rpsft_kernels._native was not built: {error}") from error
            module.parent.mkdir(parents=True, exist_ok=True)
            (module.parent / REASON).write_text(f"{error}\n", encoding="utf-8")
            print(f"WARNING: rpsft_kernels is installed without its CPU engine: {error}", file=sys.stderr, flush=True)

    def copy_extensions_to_source(self) -> None:
        # An editable install: the module, or the reason for its absence, goes to the package in the source tree.
        for ext in self.extensions:
            module = Path(self.get_ext_filename(ext.name))
            for path in (module, module.parent / REASON):
                path.unlink(missing_ok=True)
                if Path(self.build_lib, path).exists():
                    shutil.copyfile(Path(self.build_lib, path), path)

    def run(self) -> None:
        super().run()
        # A module that was not built is not among the package's files.
        self.extensions = [e for e in self.extensions if Path(self.build_lib, self.get_ext_filename(e.name)).exists()]
        folder = Path(self.build_lib, "rpsft_kernels", "kernels")
        # Kernels of an earlier build may not pass for this one's.
        shutil.rmtree(folder, ignore_errors=True)
        # After the engine, which takes a minute: what stands against it is found before the kernels take many.
        if WANTED and not self.editable_mode:
            build_kernels(folder)


def build_kernels(folder: Path) -> None:
    # In a process of its own: the package is not installed yet, and Triton wants an environment of its own.
    paths = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "rpsft_kernels.aot_build", "--arch", ARCHITECTURES, "--output", str(folder)]
    command += ["--prebuilt", PREBUILT] if PREBUILT else []
    sys.stdout.flush()
    if subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode != 0:
        raise CompileError("the GPU kernels that TORCH_CUDA_ARCH_LIST asks for were not built: see above")


class Tagged(egg_info):
    def finalize_options(self) -> None:
        # Here, and not among the options of setup(): the setup.cfg that every source distribution holds outranks those.
        self.tag_build = TARGETS.local_version(WANTED)
        super().finalize_options()


setup(
    keywords=["fine-tuning", "regularization", "pytorch", *(f"kernels-{target.arch}" for target in WANTED)],
    ext_modules=[
        Extension(
            "rpsft_kernels._native",
            [f"csrc/{entry['source']}" for entry in SOURCES["library"] + SOURCES["bindings"]],
            optional=not REQUIRED,
        )
    ],
    cmdclass={"build_ext": BuildNative, "egg_info": Tagged},
)
