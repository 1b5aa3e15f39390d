from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import rpsft_kernels.anchors.fingerprint as fingerprint
from rpsft_kernels.anchors.fingerprint import Fingerprint, content_checksum, content_sum

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool]
_MASK = (1 << 64) - 1


def _weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(dtype)


def _split_mix(index: int) -> int:
    z = ((index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) | 1


def _by_hand(words: list[int], position: int = 0) -> int:
    total = 0
    for i, word in enumerate(words, position):
        segment, low = divmod(i, fingerprint._SEGMENT)
        total += word * _split_mix(low) * _split_mix(-1 - segment)
    return total & _MASK


@pytest.mark.parametrize(
    ("dtype", "word"),
    [
        (torch.bfloat16, torch.int16),
        (torch.float32, torch.int32),
        (torch.float64, torch.int32),
        (torch.int8, torch.int8),
    ],
)
def test_sum_is_that_of_exact_integers(dtype: torch.dtype, word: torch.dtype) -> None:
    tensor = _weight(40, 3, dtype=dtype)
    words = tensor.view(-1).view(word).tolist()
    assert content_sum(tensor) == _by_hand(words)
    offset = fingerprint._SEGMENT - 50
    assert content_sum(tensor, offset) == _by_hand(words, offset * len(words) // tensor.numel())


def test_checksum_is_stable_across_versions() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert content_checksum(tensor) == f"{_by_hand(tensor.view(-1).view(torch.int32).tolist()):016x}"
    assert content_checksum(tensor) == "a84aeafb61200000"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_ranges_add_up(dtype: torch.dtype) -> None:
    tensor = _weight(23, 17, dtype=dtype).reshape(-1)
    cuts = [0, 1, 60, 61, 200, tensor.numel()]
    total = sum(content_sum(tensor[a:b], offset=a) for a, b in pairwise(cuts))
    assert total & _MASK == content_sum(tensor)


@pytest.mark.parametrize("chunk", [1, 7, 40, 1 << 20])
def test_strides_do_not_count(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_CHUNK", chunk)
    tensor = _weight(12, 9)
    expected = content_checksum(tensor)
    assert content_checksum(tensor.T.contiguous().T) == expected
    assert content_checksum(_embedded(tensor)) == expected
    assert content_checksum(tensor.T) == content_checksum(tensor.T.contiguous()) != expected
    assert content_checksum(tensor[None, :, :].transpose(1, 2)) == content_checksum(tensor.T)
    assert content_checksum(tensor[:1].expand(4, 9)) == content_checksum(tensor[:1].repeat(4, 1))


def _embedded(tensor: Tensor) -> Tensor:
    frame = torch.full((2 * tensor.shape[0], tensor.shape[1] + 5), float("nan"))
    frame[::2, 2:-3] = tensor
    return frame[::2, 2:-3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tensor = _weight(5, 3, dtype=dtype)
    seen = {content_checksum(tensor)}
    for element in range(tensor.numel()):
        for bit in range(8 * dtype.itemsize):
            changed = tensor.clone()
            mask = torch.tensor(1 << bit if bit < 8 * dtype.itemsize - 1 else -(1 << bit), dtype=word)
            changed.view(-1).view(word)[element] ^= mask
            seen.add(content_checksum(changed))
    assert len(seen) == 1 + tensor.numel() * 8 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_order_counts(dtype: torch.dtype) -> None:
    tensor = _weight(6, 4, dtype=dtype)
    seen = {content_checksum(tensor)}
    flat = tensor.view(-1)
    for i in range(24):
        for j in range(i):
            swapped = flat.clone()
            swapped[[i, j]] = flat[[j, i]]
            seen.add(content_checksum(swapped.view(6, 4)))
    assert len(seen) == 1 + 24 * 23 // 2


def test_swap_of_opposite_signs_far_apart_counts() -> None:
    tensor = torch.ones(3 * fingerprint._SEGMENT, dtype=torch.float64)
    tensor[5], tensor[-7] = -0.0, 0.0
    swapped = tensor.clone()
    swapped[5], swapped[-7] = 0.0, -0.0
    assert torch.equal(tensor, swapped)
    assert content_checksum(tensor) != content_checksum(swapped)


def test_nan_payloads_and_signed_zeros_count() -> None:
    payloads = torch.tensor([0x7FC0, 0x7FC1, 0x7F81], dtype=torch.int16).view(torch.bfloat16)
    assert payloads.isnan().all()
    assert len({content_checksum(payloads[i : i + 1]) for i in range(3)}) == 3
    assert content_checksum(torch.tensor([0.0])) != content_checksum(torch.tensor([-0.0]))


def test_temporaries_stay_small() -> None:
    tensor = _weight(2048, 2048, dtype=torch.bfloat16)
    content_sum(tensor[:1])
    for strided in (tensor, tensor.T):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            content_sum(strided)
        assert max(event.self_cpu_memory_usage for event in profile.events()) <= 4 << 20


def test_scalars_empty_tensors_and_parameters() -> None:
    assert content_sum(torch.zeros(0, 4)) == 0
    assert content_sum(torch.tensor(2.5)) == content_sum(torch.tensor([[2.5]]))
    weight = _weight(3, 3)
    assert content_sum(torch.nn.Parameter(weight)) == content_sum(weight)
    with torch.inference_mode():
        assert content_sum(weight.clone()) == content_sum(weight)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 2).to_sparse(), torch.ones(2, 2, device="meta"), torch.ones(2, dtype=torch.complex64)],
)
def test_no_dense_real_data(tensor: Tensor) -> None:
    with pytest.raises(ValueError, match="tensor: got .* expected a dense real tensor with data"):
        content_sum(tensor)


def test_negative_offset() -> None:
    with pytest.raises(ValueError, match="offset: got -1, expected the flat index"):
        content_checksum(torch.ones(2), offset=-1)


def test_fingerprint_survives_json() -> None:
    known = Fingerprint.of("layer.weight", _weight(4, 5, dtype=torch.bfloat16))
    assert (known.name, known.shape, known.dtype) == ("layer.weight", (4, 5), "bfloat16")
    assert Fingerprint.from_json(json.loads(json.dumps(known.to_json()))) == known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checksum": 5}, "expected strings for name, dtype and checksum"),
        ({"name": None}, "expected strings for name, dtype and checksum"),
        ({"shape": 3}, "expected a list of ints"),
        ({"shape": [3, "4"]}, "expected a list of ints"),
    ],
)
def test_damaged_json(change: dict[str, object], message: str) -> None:
    record = {**Fingerprint.of("w", _weight(2, 2)).to_json(), **change}
    with pytest.raises(ValueError, match=message):
        Fingerprint.from_json(record)
    with pytest.raises(ValueError, match="expected a JSON object"):
        Fingerprint.from_json([record])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 3, 64])
def test_rectangles_of_a_matrix_add_up(dtype: torch.dtype, columns: int) -> None:
    # Rows long enough for an index to pass several blocks of multipliers.
    whole = torch.randn(130, 5000).to(dtype)
    total = 0
    for begin in range(0, 5000, 5000 // columns):
        for rows in ((0, 1), (1, 97), (97, 130)):
            piece = whole[rows[0] : rows[1], begin : begin + 5000 // columns]
            total += content_sum(piece, rows[0] * 5000 + begin, 5000)
    assert total % 2**64 == content_sum(whole)
