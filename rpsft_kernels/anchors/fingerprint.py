"""A fingerprint identifies a pretrained weight by its name, shape, dtype and a checksum of its bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..checks import dtype_name

# Words share one table of multipliers per segment. The table takes 2 MiB of int64, and the products as much.
_SEGMENT = 1 << 18
# Elements of one contiguous copy made of a strided tensor.
_CHUNK = 1 << 20
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_WRAP = 1 << 64


@dataclass(frozen=True)
class Fingerprint:
    """A weight as it was when it was anchored.

    Attributes:
        name: The parameter's canonical name in its model.
        shape: (m, n).
        dtype: The dtype's name, such as ``"bfloat16"``.
        checksum: :func:`content_checksum` of the weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    checksum: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Fingerprint:
        """Take the fingerprint of a dense ``tensor`` (any shape and strides) under ``name``."""
        return cls(name, tuple(tensor.shape), dtype_name(tensor.dtype), content_checksum(tensor))

    def to_json(self) -> dict[str, object]:
        """Return plain values for ``json.dumps``."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "checksum": self.checksum}

    @classmethod
    def from_json(cls, record: object) -> Fingerprint:
        """Undo :meth:`to_json`.

        Raises:
            ValueError: ``record`` has not the keys and types that :meth:`to_json` gives.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"fingerprint: got {record!r}, expected a JSON object")
        name, shape, dtype, checksum = (record.get(key) for key in ("name", "shape", "dtype", "checksum"))
        if not (isinstance(name, str) and isinstance(dtype, str) and isinstance(checksum, str)):
            raise ValueError(f"fingerprint: got {dict(record)!r}, expected strings for name, dtype and checksum")
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise ValueError(f"fingerprint: got shape {shape!r}, expected a list of ints")
        return cls(name, tuple(shape), dtype, checksum)


def content_checksum(tensor: Tensor, offset: int = 0) -> str:
    """Write :func:`content_sum` as sixteen hexadecimal digits."""
    return f"{content_sum(tensor, offset):016x}"


def content_sum(tensor: Tensor, offset: int = 0, row_stride: int | None = None) -> int:
    """Compute a checksum of a tensor's bits, in [0, 2^64): the sum over elements of bits times h(index) mod 2^64.

    It uses integers only, hence it is the same on every device and for every split: the sums over contiguous
    ranges, each with the flat row-major index of its first element as ``offset``, add up (mod 2^64) to the whole's.
    NaN payloads and the sign of zero count; strides do not: a transposed view has the checksum of its own
    row-major order. h is odd, so that a change of one bit always shows; a swap of two unlike elements goes
    unseen with probability below 2^-30. Trailing zeros add nothing: compare shapes too. It finds mistakes,
    not forgeries.

    Args:
        tensor: Any shape, dense, real, of 1, 2, 4 or 8 bytes per element. Temporaries stay below 10 MiB.
        offset: Flat index of its first element in the whole tensor.
        row_stride: Columns of the whole tensor, where ``tensor`` (2-D) has only some of them.

    Raises:
        ValueError: the tensor is sparse, complex, or has no data; or ``offset`` is negative.
    """
    if tensor.layout != torch.strided or tensor.is_complex() or tensor.device.type == "meta":
        raise ValueError(
            f"tensor: got {tensor.dtype} with layout {tensor.layout} on {tensor.device}, "
            "expected a dense real tensor with data"
        )
    if offset < 0:
        raise ValueError(f"offset: got {offset}, expected the flat index of the first element, 0 or more")
    if row_stride is not None and row_stride != tensor.shape[1]:
        return _rectangle_sum(tensor.detach(), offset, row_stride)
    # Words have at most 32 bits, so that a difference of two has few enough factors of 2 not to cancel mod 2^64.
    word = _WORDS[min(tensor.element_size(), 4)]
    position = offset * (tensor.element_size() // word.itemsize)
    table = _multipliers(tensor.device)
    buffer = torch.empty_like(table)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    with torch.no_grad():
        for chunk in _chunks(tensor.detach()):
            words = chunk.view(word)
            for start, stop, segment, low in _segments(position, words.numel()):
                products = buffer[: stop - start].copy_(words[start:stop])
                products.mul_(table[low : low + stop - start])
                total += products.sum() * _segment_multiplier(segment)
            position += words.numel()
    return int(total) % _WRAP


def _rectangle_sum(tensor: Tensor, offset: int, row_stride: int) -> int:
    """Compute :func:`content_sum` of some columns: elements of a row follow each other, rows do not."""
    word = _WORDS[min(tensor.element_size(), 4)]
    per = tensor.element_size() // word.itemsize
    table, total = _multipliers(tensor.device), 0
    rows, cols = tensor.shape
    step = max(1, _CHUNK // max(1, cols * per))
    for row in range(0, rows if cols else 0, step):
        words = tensor[row : row + step].contiguous().view(word).to(torch.int64)
        first = (offset + row * row_stride) * per
        down = torch.arange(words.shape[0], device=tensor.device) * (row_stride * per)
        index = first + down[:, None] + torch.arange(words.shape[1], device=tensor.device)
        low, high = first // _SEGMENT, int(index[-1, -1]) // _SEGMENT
        factors = torch.tensor([_segment_multiplier(i) for i in range(low, high + 1)], device=tensor.device)
        total += int((words * table[index % _SEGMENT] * factors[index // _SEGMENT - low]).sum())
    return total % _WRAP


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements in row-major order as contiguous 1-D tensors, copied a chunk at a time where strided."""
    if tensor.is_contiguous():
        yield tensor.view(-1)
    elif tensor.numel() <= _CHUNK:
        yield tensor.reshape(-1)
    elif tensor.shape[0] == 1:
        yield from _chunks(tensor[0])
    else:
        for rows in torch.split(tensor, max(1, _CHUNK * tensor.shape[0] // tensor.numel())):
            yield from _chunks(rows)


def _segments(position: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut [position, position + count) where segments end, into (start, stop, segment, index in the segment)."""
    start = 0
    while start < count:
        segment, low = divmod(position + start, _SEGMENT)
        stop = min(count, start + _SEGMENT - low)
        yield start, stop, segment, low
        start = stop


# h(index) = table[index % _SEGMENT] * _segment_multiplier(index // _SEGMENT) takes one multiplication per word. It is
# odd, as a product of odd numbers.
@lru_cache(maxsize=16)
def _multipliers(device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _mix(torch.arange(_SEGMENT, dtype=torch.int64, device="cpu")).to(device)


@lru_cache(maxsize=1 << 16)
def _segment_multiplier(segment: int) -> int:
    return int(_mix(torch.tensor([-1 - segment], device="cpu")))


def _mix(index: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser in int64, and make the result odd."""
    z = (index + 1) * _as_signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shift_right(z, shift)) * _as_signed(factor)
    return (z ^ _shift_right(z, 31)) | 1


def _as_signed(word: int) -> int:
    return word - _WRAP if word >= _WRAP // 2 else word


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # torch's >> keeps the sign; the mask makes it a shift of the unsigned word.
    return (z >> bits) & ((1 << (64 - bits)) - 1)
