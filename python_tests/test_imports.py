"""Imports go downwards only. Every import statement of the package is read, also those inside functions and under
TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "rpsft_kernels"
ROOT = Path(__file__).parents[1]
# The rooms of the package, the ground first. A file imports from its own room and from those on lower floors; rooms of
# one floor do not know each other. A room is a folder or a file right below the package, "" the package itself.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("checks", "costs", "private_names", "version"),
    ("ops", "distributed"),
    ("low_rank",),
    ("anchors",),
    ("evaluation",),
    ("penalty",),
    ("training",),
    ("",),
    ("tools", "integrations"),
    ("demo", "__main__"),
)
# Inside ops: everything in the package that files below a name may import. A name stands for everything below it, too.
TRITON = f"{PACKAGE}.ops.triton"
AOT = f"{TRITON}.aot"
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    f"{PACKAGE}.ops": (
        f"{PACKAGE}.ops",
        f"{PACKAGE}.checks",
        f"{PACKAGE}.costs",
        f"{PACKAGE}.private_names",
        f"{PACKAGE}.version",
    ),
    f"{PACKAGE}.ops.operands": (),
    f"{PACKAGE}.ops.buckets": (f"{PACKAGE}.ops.operands", f"{PACKAGE}.costs"),
    f"{PACKAGE}.ops.products": (),
    f"{PACKAGE}.ops.runs": (f"{PACKAGE}.ops.operands",),
    # The Triton backend: no other backend, no dispatch and no self-test.
    TRITON: (TRITON, f"{PACKAGE}.costs", f"{PACKAGE}.ops.operands", f"{PACKAGE}.ops.runs", f"{PACKAGE}.private_names"),
    # The kernels' digest names a build, and has to cover everything that they import.
    f"{TRITON}.kernels": (f"{TRITON}.kernels", f"{TRITON}.fields", f"{TRITON}.variants"),
    f"{TRITON}.machine_code": (f"{TRITON}.machine_code", f"{AOT}.targets"),
    # setup.py loads these by their paths, before anything of the package can be imported.
    f"{AOT}.targets": (),
    f"{AOT}.devices": (),
    f"{AOT}.wanted": (f"{AOT}.targets", f"{AOT}.devices"),
}
# Modules outside the package and the standard library that files may import; the longest name that fits a file decides.
MAY_REQUIRE: dict[str, set[str]] = {
    f"{TRITON}.kernels": {"triton"},
    f"{TRITON}.machine_code": {"triton"},
    # These are imported where there is no torch: by setup.py, and by the build of a wheel.
    AOT: set(),
    f"{AOT}.build": {"triton"},
    f"{AOT}.dispatch": {"torch"},
    f"{TRITON}.fields": set(),
    f"{TRITON}.variants": set(),
    f"{TRITON}.tile_table": set(),
    f"{TRITON}.toolchain": set(),
    f"{TRITON}.schedule": {"numpy"},
    # All others plan and launch without Triton, but for those whose purpose it is to compile.
    TRITON: {"torch", "numpy"},
    f"{TRITON}.jit": {"torch", "triton"},
    f"{TRITON}.compiler": {"triton"},
    f"{TRITON}.vetting": {"torch", "triton"},
}


def modules(root: Path, package: str = PACKAGE) -> dict[str, Path]:
    """Return every file of the package below ``root``, by the name of its module."""
    paths = {}
    for path in sorted((root / package).rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        paths[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return paths


def imported(name: str, known: Mapping[str, Path]) -> set[str]:
    """Return all modules that a module of ``known`` imports, wherever the statement stands."""
    path = known[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(_names(ast.parse(path.read_text(encoding="utf-8")), package, known)) - {name}


def _names(tree: ast.AST, package: str, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            # A name that is imported from a package may be one of its modules, or defined in its __init__.py.
            yield from (f"{module}.{a.name}" if f"{module}.{a.name}" in known else module for a in node.names)


def graph(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """Return the modules of ``known`` that each of them imports."""
    return {name: imported(name, known) & known.keys() for name in known}


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Return the names along a circle of imports; empty if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        names: list[str] = error.args[1]
        return names
    return []


def is_below(name: str, top: str) -> bool:
    return name == top or name.startswith(f"{top}.")


def longest(name: str, tops: Mapping[str, object]) -> str | None:
    """Return the longest of the names that ``name`` is or is below."""
    return max((top for top in tops if is_below(name, top)), key=len, default=None)


def room(name: str) -> str:
    return (name.split(".") + [""])[1]


KNOWN = modules(ROOT)
ARROWS = graph(KNOWN)


def test_every_room_has_a_floor() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert sorted(rooms) == sorted({room(name) for name in KNOWN}), "a new room goes on a floor of FLOORS"


def test_rooms_import_from_lower_floors_only() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    upwards = [
        f"{name} imports {other}"
        for name, others in ARROWS.items()
        for other in sorted(others)
        if room(name) != room(other) and floor_of[room(name)] <= floor_of[room(other)]
    ]
    assert upwards == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert " imports ".join(circle(ARROWS)) == ""


def test_files_of_the_operations_import_what_they_may() -> None:
    assert all(top in KNOWN for top in MAY_IMPORT), "a rule for a file that is not there"
    wrong = [
        f"{name} imports {other}, beside {rule}"
        for name, others in ARROWS.items()
        for rule in MAY_IMPORT
        if is_below(name, rule)
        for other in sorted(others)
        if not any(is_below(other, top) for top in MAY_IMPORT[rule])
    ]
    assert wrong == []


def test_other_packages_are_imported_where_they_may_be() -> None:
    assert all(top in KNOWN for top in MAY_REQUIRE), "a rule for a file that is not there"
    wrong = []
    for name in KNOWN:
        rule = longest(name, MAY_REQUIRE)
        if rule is not None:
            distributions = {other.split(".")[0] for other in imported(name, KNOWN)}
            foreign = distributions - set(sys.stdlib_module_names) - {PACKAGE} - MAY_REQUIRE[rule]
            wrong += [f"{name} imports {other}, beside {rule}" for other in sorted(foreign)]
    assert wrong == []


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import house.cellar.pipes", {"house.cellar.pipes"}),
        ("from house.cellar import pipes, lamp", {"house.cellar.pipes", "house.cellar"}),
        ("from . import beside, NAME", {"house.attic.beside", "house.attic"}),
        ("from .beside import NAME", {"house.attic.beside"}),
        ("from ..cellar import pipes as other", {"house.cellar.pipes"}),
        ("from .. import cellar", {"house.cellar"}),
        ("def late():\n    from ..cellar.pipes import NAME", {"house.cellar.pipes"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import beside", {"house.attic.beside"}),
    ],
)
def test_every_import_statement_is_read(statement: str, expected: set[str], tmp_path: Path) -> None:
    for name in ("house", "house/cellar", "house/attic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    for name in ("cellar/pipes", "attic/beside"):
        (tmp_path / "house" / f"{name}.py").write_text("from house.attic import here\n")
    (tmp_path / "house" / "attic" / "here.py").write_text(statement)
    arrows = graph(modules(tmp_path, "house"))
    assert arrows["house.attic.here"] == expected
    module = {"house.cellar.pipes", "house.attic.beside"} & expected
    assert set(circle(arrows)) == (module and {*module, "house.attic.here"})
