"""Where the tests run: on a GPU where there is one, else on the CPU with Triton's interpreter."""

from __future__ import annotations

import os

import torch

# Before anything imports triton: the variable is read when kernels are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from wheels import FullWheel, build_full_wheel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device-tests",
        choices=("only", "none"),
        help="only, or none, of the tests that run on a GPU where there is one: those that ask for a device",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wish = config.getoption("--device-tests")
    if wish is None:
        return
    kept: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        # A fixture of conftest.py, or a parameter of the test's own.
        on_device = "device" in getattr(item, "fixturenames", ())
        kept[on_device == (wish == "only")].append(item)
    config.hook.pytest_deselected(items=kept[False])
    items[:] = kept[True]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which every backend can run: a GPU, or the CPU with interpreted kernels."""
    return DEVICE


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _chosen_by_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend or tile table that the environment asks for must not decide what a test tests."""
    for name in ("RPSFT_BACKEND", "RPSFT_TILES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def reference_arithmetic(_chosen_by_the_test: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the layers above the backends, whose bounds are those of the reference's arithmetic."""
    monkeypatch.setenv("RPSFT_BACKEND", "torch")


@pytest.fixture(scope="session")
def full_wheel(tmp_path_factory: pytest.TempPathFactory) -> FullWheel:
    """A wheel with every kernel for sm_90. Its tests are of the xdist group "full wheel": one worker builds it."""
    return build_full_wheel(tmp_path_factory.mktemp("full"))
