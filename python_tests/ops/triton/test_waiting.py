"""Waits for a GPU that end even where its work does not: with events and a clock that are made up."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from rpsft_kernels.ops.triton.waiting import PATIENCE, Stalled, wait_for_stream

GPU = torch.device("cuda", 1)


class Clock:
    """The machine's time, which passes while a program sleeps; ``stopped`` seconds more pass at the first sleep."""

    def __init__(self) -> None:
        self.now, self.stopped = 1000.0, 0.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds + self.stopped
        self.stopped = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made.monotonic)
    monkeypatch.setattr(time, "sleep", made.sleep)
    return made


def give_event(monkeypatch: pytest.MonkeyPatch, query: Callable[[], bool]) -> None:
    event = SimpleNamespace(query=query)
    streams = {GPU: SimpleNamespace(record_event=lambda: event)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)


def test_it_returns_when_the_work_has_ended(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in (0.0, 1e-4, 3.0):
        end = clock.now + seconds
        give_event(monkeypatch, lambda end=end: clock.now >= end)  # type: ignore[misc]
        wait_for_stream(GPU)
        assert end <= clock.now <= end + 0.1
    assert clock.sleeps[0] < 1e-4 and max(clock.sleeps) < 0.1, "short work is not waited for long, nor long work often"


def test_it_gives_up_on_work_that_does_not_end(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    give_event(monkeypatch, lambda: False)
    with pytest.raises(Stalled, match=r"cuda:1 has not come to the end of its launches within 60 s"):
        wait_for_stream(GPU)
    assert PATIENCE <= clock.now - 1000.0 < PATIENCE + 1


def test_a_process_that_was_stopped_looks_once_more(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A debugger, or a terminal that is suspended, takes none of the patience for work that has ended meanwhile."""
    clock.stopped = 3600.0
    give_event(monkeypatch, lambda: clock.now > 2000.0)
    wait_for_stream(GPU)


def test_a_failure_is_told(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    give_event(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="illegal memory access") as raised:
        wait_for_stream(GPU)
    assert not isinstance(raised.value, Stalled)
