"""Makes the package's modules importable without torch and the package's other requirements.

The package's ``__init__`` files import these; setup.py and the compilation of kernels need none of them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

_PACKAGES = (
    "rpsft_kernels",
    "rpsft_kernels.ops",
    "rpsft_kernels.ops.triton",
    "rpsft_kernels.ops.triton.aot",
    "rpsft_kernels.ops.triton.machine_code",
)
_ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    """The package's module of that name (``"ops.triton.aot.build"``), from the source tree around this file.

    From the first call on, the process has the package and its subpackages without the contents of their ``__init__``
    files, so this is only for processes that build the package.
    """
    if _PACKAGES[0] not in sys.modules:
        for package in _PACKAGES:
            spec = ModuleSpec(package, None, is_package=True)
            spec.submodule_search_locations = [str(_ROOT.joinpath(*package.split(".")))]
            sys.modules[package] = module_from_spec(spec)
            above, _, last = package.rpartition(".")
            if above:
                setattr(sys.modules[above], last, sys.modules[package])
    return import_module(f"{_PACKAGES[0]}.{name}")
