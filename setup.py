"""Builds the optional CPU engine, rpsft_kernels._native, from csrc, and GPU kernels ahead of time where they are asked
for or this machine has a GPU. Everything else about the package is in pyproject.toml.

Without a compiler the package is pure Python and rpsft_kernels/_native_build.txt says why. RPSFT_NATIVE=0 leaves the
engine out; RPSFT_NATIVE=1 makes its absence an error; CXX names the compiler.

RPSFT_CUDA_ARCHS="8.0;9.0" compiles the GPU kernels for these architectures into rpsft_kernels/kernels of a wheel and
names them in its keywords; "native" means this machine's GPUs, "none" no kernels. Unset, this machine's GPUs are
compiled for where there are any; where that fails the package is installed without kernels, and
rpsft_kernels/_kernels_build.txt says why. MAX_JOBS processes compile. A kernel that cannot be kept is left out with a
line, or an error under RPSFT_STRICT=1. The engine's module launches the kernels: without it a list of architectures is
an error, unless RPSFT_NATIVE=0. RPSFT_AOT_PREBUILT names a folder of these kernels that was built before, which is then
copied. RPSFT_AOT_KERNELS restricts them (globs, for tests).
"""

from __future__ import annotations

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
from setuptools.errors import CompileError

sys.path.insert(0, str(Path("build_tools").resolve()))

from bare_package import load

AOT_WANTED = load("ops.triton.aot.wanted")
VARIABLE = AOT_WANTED.VARIABLE
NO_KERNELS = load("ops.triton.aot.library").REASON

SOURCES: dict[str, list[dict[str, Any]]] = json.loads(Path("csrc/sources.json").read_text(encoding="utf-8"))
WISH = os.environ.get("RPSFT_NATIVE", "")
PREBUILT = os.environ.get("RPSFT_AOT_PREBUILT", "").strip()
REASON = "_native_build.txt"
COMPILE = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# NDEBUG: pybind11's assertions would put the paths of its headers here into the module.
COMPILE += ["-fno-math-errno", "-ffp-contract=fast", "-pthread", "-DNDEBUG", "-Icsrc", "-Icsrc/include"]
# Python's own symbols come from the interpreter that loads the module.
LINK = ["-shared", "-pthread", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ldl"])]
# Raises for unknown architectures before anything is built.
WANTED = AOT_WANTED.wanted_targets(os.environ)
# A wheel whose kernels nothing in it can launch is a mistake, unless the user asked for it.
REQUIRED = WISH == "1" or (WISH != "0" and WANTED.required and WANTED.launchable)


class Unit(NamedTuple):
    source: str
    flags: list[str]


def find_compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
    if shutil.which(named[0]) is None:
        raise CompileError(f"no C++ compiler: {named[0]} was not found")
    return named


def accepts(cxx: list[str], flags: list[str], folder: Path) -> bool:
    empty = folder / "empty.cpp"
    empty.write_text("")
    command = [*cxx, "-std=c++17", *flags, "-c", str(empty), "-o", str(folder / "empty.o")]
    return subprocess.run(command, capture_output=True).returncode == 0


def list_units(cxx: list[str], folder: Path) -> list[Unit]:
    """The units that this compiler can build for this machine; macros name the instruction sets among them."""
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
    # Only the bindings see these headers: the engine knows no Python.
    headers = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    chosen += [Unit(entry["source"], entry.get("flags", []) + headers) for entry in SOURCES["bindings"]]
    return [Unit(source, flags + macros) for source, flags in chosen]


def build(module: Path, folder: Path) -> None:
    """Compile the units that have changed since the last build in the folder, and link the module.

    Raises:
        CompileError: there is no compiler, or it fails.
    """
    from ninja.ninja_syntax import Writer, escape

    folder.mkdir(parents=True, exist_ok=True)
    cxx = find_compiler()
    with (folder / "build.ninja").open("w", encoding="utf-8") as file:
        ninja = Writer(file, width=120)
        ninja.variable("builddir", escape(str(folder)))
        compile_command = escape(shlex.join(cxx + COMPILE)) + " $flags -MD -MF $out.d -c $in -o $out"
        ninja.rule("compile", compile_command, "compile $in", "$out.d", deps="gcc")
        ninja.rule("link", f"{escape(shlex.join(cxx))} $in {escape(shlex.join(LINK))} -o $out")
        objects: list[str] = []
        for source, flags in list_units(cxx, folder):
            objects.append(str((folder / source).with_suffix(".o")))
            ninja.build(objects[-1:], "compile", [f"csrc/{source}"], variables={"flags": escape(shlex.join(flags))})
        ninja.build([str(folder / module.name)], "link", objects)
    command = [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja")]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(run.stdout, flush=True)
    if run.returncode != 0:
        # Units compile in parallel, so that warnings about others may follow the error.
        lines = [line[-300:] for line in run.stdout.splitlines() if line.strip() and not line.startswith("ninja:")]
        errors = [line for line in lines if "error:" in line or "undefined reference" in line]
        raise CompileError("\n".join(errors[:4] or lines[-6:]))
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
                why = "RPSFT_NATIVE=1" if WISH == "1" else f"{VARIABLE} asks for kernels (RPSFT_NATIVE=0: no launcher)"
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
        # Neither kernels nor a reason of an earlier build may pass for this one's.
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(NO_KERNELS).unlink(missing_ok=True)
        if self.editable_mode:
            return
        if not WANTED.targets:
            print(*WANTED.notes, sep="\n", flush=True)
            return
        # The engine comes first: fail on a missing compiler before spending minutes on kernels.
        engine = bool(self.extensions) or not WANTED.launchable or WISH == "0"
        failure = build_kernels(folder) if engine else "the CPU engine, which launches them, was not built"
        if failure and WANTED.required:
            raise CompileError(f"the GPU kernels that {VARIABLE} or RPSFT_STRICT asks for were not built: {failure}")
        if failure:
            folder.with_name(NO_KERNELS).write_text(f"they could not be compiled: {failure}\n", encoding="utf-8")
            print(
                f"WARNING: rpsft_kernels is installed without kernels for this machine's GPU: {failure} "
                f"({VARIABLE}=none does without them, {VARIABLE}=native makes this an error)",
                file=sys.stderr,
                flush=True,
            )


def build_kernels(folder: Path) -> str | None:
    """Compile kernels into the folder; returns the reason of a failure, or None."""
    # This takes a process of its own, because Triton needs an environment of its own.
    command = [sys.executable, str(Path("build_tools", "compile_kernels.py").resolve())]
    # The process reads the list from its variable, so that errors in the list name the variable.
    command += ["--output", str(folder)] + ([] if os.environ.get(VARIABLE, "").strip() else ["--arch", WANTED.words])
    command += ["--prebuilt", PREBUILT] if PREBUILT else []
    sys.stdout.flush()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        last = ""
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
    return None if process.returncode == 0 else last or f"their compilation ended with status {process.returncode}"


# The keywords are fixed before kernels are compiled, so they name only kernels without which the build fails.
HELD = [f"kernels-{target.arch}" for target in WANTED.targets if WANTED.required]

setup(
    keywords=["fine-tuning", "regularization", "pytorch", *HELD],
    ext_modules=[
        Extension(
            "rpsft_kernels._native",
            [f"csrc/{entry['source']}" for entry in SOURCES["library"] + SOURCES["bindings"]],
            optional=not REQUIRED,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
