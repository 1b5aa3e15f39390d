"""Scratch memory: it only grows, says when it moves, and lives as long as a program uses it."""

from __future__ import annotations

import gc

import pytest
import torch

from rpsft_kernels.ops.triton.scratch import Scratch, Sizes, scratch_of

CPU = torch.device("cpu")
BUFFERS = Sizes._fields


def addresses(scratch: Scratch) -> dict[str, int]:
    return {name: getattr(scratch, name).data_ptr() for name in BUFFERS}


def test_it_grows_where_more_is_asked_for_and_counts_its_moves() -> None:
    scratch = Scratch(CPU)
    assert (scratch.generation, scratch.nbytes) == (0, 0)
    scratch.reserve(Sizes(planes=100, slots=10))
    before = addresses(scratch)
    assert scratch.generation == 1 and scratch.nbytes == 2 * 100 + 4 * 10
    for less in (Sizes(), Sizes(planes=100), Sizes(planes=1, slots=10)):
        scratch.reserve(less)
        assert scratch.generation == 1 and addresses(scratch) == before
    scratch.reserve(Sizes(planes=50, slots=5000))
    assert scratch.generation == 2 and scratch.nbytes == 2 * 100 + 4 * 5000
    assert scratch.planes.data_ptr() == before["planes"], "what is large enough stays"


@pytest.mark.parametrize("name", BUFFERS)
def test_each_buffer_has_its_size_and_dtype(name: str) -> None:
    scratch = Scratch(CPU)
    scratch.reserve(Sizes(**{name: 33}))
    sizes = {each: getattr(scratch, each).numel() for each in BUFFERS}
    assert sizes == dict.fromkeys(BUFFERS, 0) | {name: 33}
    assert getattr(scratch, name).dtype == (torch.bfloat16 if name == "planes" else torch.float32)
    assert getattr(scratch, name).data_ptr() % 16 == 0


def test_a_stream_has_one_as_long_as_it_is_used() -> None:
    one = scratch_of(CPU, 7)
    assert scratch_of(CPU, 7) is one
    assert scratch_of(CPU, 8) is not one
    one.reserve(Sizes(planes=5))
    del one
    gc.collect()
    assert scratch_of(CPU, 7).nbytes == 0, "the memory of programs that are gone is given back"


def test_no_memory_leaves_nothing_that_looks_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that were bound to freed buffers are stale, and the same request may succeed later."""
    scratch = Scratch(CPU)
    scratch.reserve(Sizes(planes=100, slots=10))
    empty = scratch._empty

    def none_left(name: str, size: int) -> torch.Tensor:
        if name == "planes" and size:
            raise torch.OutOfMemoryError("none left")
        return empty(name, size)

    monkeypatch.setattr(scratch, "_empty", none_left)
    with pytest.raises(torch.OutOfMemoryError):
        scratch.reserve(Sizes(planes=200))
    assert scratch.generation == 2 and scratch.planes.numel() == 0
    monkeypatch.undo()
    scratch.reserve(Sizes(planes=100))
    assert scratch.generation == 3 and scratch.planes.numel() == 100 and scratch.slots.numel() == 10
