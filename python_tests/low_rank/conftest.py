from __future__ import annotations

from importlib.util import find_spec

# Environments of older versions have no PEFT.
_WITH_PEFT = ("costs", "formulas", "names", "quantised", "ranks", "refusals", "steps")
collect_ignore = [] if find_spec("peft") else [f"test_{name}.py" for name in _WITH_PEFT]
