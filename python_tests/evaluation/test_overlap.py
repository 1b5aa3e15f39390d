from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rpsft_kernels.evaluation.overlap import find_overlap, lie_apart, overlaps_itself


def _addresses(tensor: Tensor) -> list[int]:
    size = tensor.element_size()
    rows, cols = tensor.shape
    down, across = tensor.stride()
    return [tensor.data_ptr() + size * (i * down + j * across) for i in range(rows) for j in range(cols)]


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (3, 4), (4, 3), (2, 2), (1, 1)])
def test_every_pair_of_strides(shape: tuple[int, int]) -> None:
    memory = torch.zeros(200)
    for down in range(9):
        for across in range(9):
            view = memory.as_strided(shape, (down, across))
            addresses = _addresses(view)
            assert overlaps_itself(view) == (len(set(addresses)) < len(addresses)), (down, across)


def test_flat_and_empty_tensors() -> None:
    assert overlaps_itself(torch.zeros(1).expand(3))
    assert not overlaps_itself(torch.zeros(6)[::2])
    assert not overlaps_itself(torch.zeros(1, 1).expand(0, 3))
    assert not overlaps_itself(torch.zeros(()))


def test_views_of_one_buffer() -> None:
    memory = torch.zeros(12, 10)
    apart = [memory[:4], memory[4:, :3], memory[4:, 3:7].T, memory[4:, 7:]]
    assert find_overlap(apart) is None
    assert find_overlap([]) is None
    assert find_overlap([*apart, torch.zeros(3, 3)]) is None
    assert find_overlap([torch.zeros(3, 3), *apart, memory[3:4, 2:4]]) == (1, 5)
    assert find_overlap([*apart, memory[11:, 9:]]) == (3, 4)
    assert find_overlap([apart[2], apart[1], memory[5:8, 2:4].T]) in ((0, 2), (1, 2))


def test_dtypes_and_steps() -> None:
    memory = torch.zeros(24, dtype=torch.float32)
    halves = memory.view(torch.float16)
    even, odd = halves[::2].view(4, 6), halves[1::2].view(4, 6)
    assert find_overlap([even, odd]) is None
    assert find_overlap([even, memory.view(4, 6)]) == (0, 1)
    assert find_overlap([even, memory[2:4].view(1, 2)]) == (0, 1)


def test_tensors_that_lie_apart() -> None:
    memory = torch.zeros(12, 10)
    assert lie_apart([])
    assert lie_apart([memory[4:], memory[:4]])
    assert not lie_apart([memory[4:], memory[:5]])
    assert lie_apart([memory[:5, :3], memory[5:, 3:]])
    # Their spans overlap, they do not.
    assert not lie_apart([memory[:, :3], memory[:, 3:]])
