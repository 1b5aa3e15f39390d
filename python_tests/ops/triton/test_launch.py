"""A prepared launch: when a kernel is looked for, when it is started, and what a watcher is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rpsft_kernels.ops.triton import launch as launches
from rpsft_kernels.ops.triton.aot.dispatch import ImageRefused, NoKernel
from rpsft_kernels.ops.triton.launch import Launch, watch_launches
from rpsft_kernels.ops.triton.variants import Variant, squares_variant
from world import DEVICE

SQUARES = squares_variant()
ARGUMENTS = tuple(torch.zeros(4) for _ in range(3))


class Kernels:
    """The results of looking for a launch's kernel, one after the other: functions that start it, or errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Any] = []
        self.asked: list[tuple[Any, ...]] = []
        self.started: list[str] = []
        monkeypatch.setattr(launches, "find_start", self._find)

    def _find(self, *asked: Any) -> Callable[[], None]:
        self.asked.append(asked)
        found = self.found.pop(0)
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[no-any-return]

    def start(self, name: str) -> Callable[[], None]:
        return lambda: self.started.append(name)

    def fail(self, error: Exception) -> Callable[[], None]:
        def start() -> None:
            self.started.append(type(error).__name__)
            raise error

        return start


class Told:
    """A watcher that writes down."""

    def __init__(self) -> None:
        self.launches: list[tuple[Variant, int, tuple[Tensor, ...]]] = []
        self.refusals: list[tuple[Variant, Exception]] = []

    def on_launch(self, variant: Variant, programs: int, arguments: tuple[Tensor, ...]) -> None:
        self.launches.append((variant, programs, arguments))

    def on_refusal(self, variant: Variant, error: Exception) -> None:
        self.refusals.append((variant, error))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return Kernels(monkeypatch)


def test_a_kernel_is_looked_for_once_and_started_at_every_call(kernels: Kernels) -> None:
    kernels.found = [kernels.start("first")]
    launch = Launch(SQUARES, 5, DEVICE, *ARGUMENTS)
    assert kernels.asked == [(SQUARES, 5, DEVICE, ARGUMENTS)] and kernels.started == []
    told = Told()
    with watch_launches(told):
        launch()
        launch()
    launch()
    assert kernels.started == ["first"] * 3 and len(kernels.asked) == 1
    assert told.launches == [(SQUARES, 5, ARGUMENTS)] * 2 and told.refusals == []


def test_no_programs_are_nothing_to_look_for(kernels: Kernels) -> None:
    told = Told()
    with watch_launches(told):
        Launch(SQUARES, 0, DEVICE, *ARGUMENTS)()
    assert kernels.asked == [] and told.launches == []


def test_an_image_that_the_driver_refuses_is_followed_by_what_is_found_next(kernels: Kernels) -> None:
    refused = kernels.fail(ImageRefused("no kernel image"))
    kernels.found = [refused, refused, kernels.start("third")]
    launch = Launch(SQUARES, 5, DEVICE, *ARGUMENTS)
    told = Told()
    with watch_launches(told):
        launch()
    assert kernels.started == ["ImageRefused", "ImageRefused", "third"]
    assert told.launches == [(SQUARES, 5, ARGUMENTS)], "one launch, however many images were tried"
    launch()
    assert kernels.started[3:] == ["third"] and len(kernels.asked) == 3


@pytest.mark.parametrize("error", [NoKernel("there is none"), ValueError("it may compute wrong numbers")], ids=repr)
def test_a_refusal_comes_when_the_launch_is_prepared_and_is_told(error: Exception, kernels: Kernels) -> None:
    kernels.found = [error]
    told = Told()
    with watch_launches(told), pytest.raises(type(error), match=str(error)):
        Launch(SQUARES, 5, DEVICE, *ARGUMENTS)
    assert told.refusals == [(SQUARES, error)] and told.launches == []


def test_after_a_refused_image_there_may_be_no_kernel(kernels: Kernels) -> None:
    none = NoKernel("the driver refused its image, and nothing may be compiled")
    kernels.found = [kernels.fail(ImageRefused("no kernel image")), none]
    launch = Launch(SQUARES, 5, DEVICE, *ARGUMENTS)
    told = Told()
    with watch_launches(told), pytest.raises(NoKernel, match="nothing may be compiled"):
        launch()
    assert told.refusals == [(SQUARES, none)] and told.launches == []


def test_other_failures_of_a_start_are_no_refusals(kernels: Kernels) -> None:
    kernels.found = [kernels.fail(RuntimeError("an illegal memory access was encountered"))]
    launch = Launch(SQUARES, 5, DEVICE, *ARGUMENTS)
    told = Told()
    with watch_launches(told), pytest.raises(RuntimeError, match="illegal memory access"):
        launch()
    assert told.refusals == [] and told.launches == [] and len(kernels.asked) == 1


def test_watchers_are_of_their_block_alone(kernels: Kernels) -> None:
    kernels.found = [kernels.start("it")]
    launch = Launch(SQUARES, 5, DEVICE, *ARGUMENTS)
    outer, inner = Told(), Told()
    with watch_launches(outer):
        with watch_launches(inner):
            launch()
        launch()
        launch()
    assert (len(outer.launches), len(inner.launches)) == (2, 1)
