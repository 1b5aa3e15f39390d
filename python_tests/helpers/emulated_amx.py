"""The compiled CPU engine with AMX on processors without it: the objects of the installation under test, linked with
the emulator of ``csrc/tests/amx_emulator`` in place of the question whether tiles may be used. A process of its own
imports it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[2]
_NAME = "rpsft_kernels._native"
# Asks the processor and the system; the emulator has another one.
_REPLACED = "cpu/amx/answer.cpp"


def link(folder: Path) -> Path:
    """Link the module into ``folder``.

    Raises:
        RuntimeError: the installation under test was built elsewhere, or of other sources, or a compiler fails.
    """
    sources = json.loads((REPOSITORY / "csrc" / "sources.json").read_text(encoding="utf-8"))
    built = REPOSITORY / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    kept = [each["source"] for part in ("library", "bindings") for each in sources[part] if each["source"] != _REPLACED]
    objects = [(built / source).with_suffix(".o") for source in kept]
    if missing := [str(path) for path in objects if not path.is_file()]:
        raise RuntimeError(f"{', '.join(missing)}: not there; install the package from this folder: pip install -e .")
    cxx = shlex.split(os.environ.get("CXX", "")) or ["c++" if shutil.which("c++") else "g++"]
    common = [*cxx, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Icsrc", "-Icsrc/tests"]
    for each in sources["amx_emulator"]:
        objects.append(folder / f"{Path(each['source']).stem}.o")
        _run([*common, *each.get("flags", []), "-c", f"csrc/{each['source']}", "-o", str(objects[-1])])
    module = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([*cxx, *map(str, objects), "-shared", "-pthread", "-ldl", "-o", str(module)])
    return module


def use(module: str) -> ModuleType:
    """Import a linked module as the package's own, before the package does."""
    spec = importlib.util.spec_from_file_location(_NAME, module)
    assert spec is not None and spec.loader is not None and _NAME not in sys.modules
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    sys.modules[_NAME] = engine
    return engine


def run(module: Path, code: str) -> str:
    """Run Python in a process of its own that uses the module, and return what it printed.

    Raises:
        RuntimeError: it failed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RPSFT_", "PYTEST_"))}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "python_tests" / "helpers")))
    return _run([sys.executable, "-c", f"import emulated_amx\nemulated_amx.use({str(module)!r})\n{code}"], environment)


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
    )
    if result.returncode != 0:
        raise RuntimeError(
            f"{shlex.join(command)[:300]} ended with status {result.returncode}:\n{result.stdout[-3000:]}"
        )
    return result.stdout
