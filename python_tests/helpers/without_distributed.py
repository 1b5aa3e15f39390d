"""Imported before torch: a torch that was built without torch.distributed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Attributes by which torch.distributed and its modules tell whether they are available.
_MARKS = ("_c10d_init", "_rpc_init", "_dist_autograd_init")


class _Bare:
    """Finds torch._C, and takes these away."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch._C":
            return None
        spec = PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            for name in _MARKS:
                delattr(module, name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Bare())  # type: ignore[arg-type]
