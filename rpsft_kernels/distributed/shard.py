"""The elements of a weight that one rank holds: a rectangle of it, or a flat range of its row-major order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Span = tuple[int, int]


@dataclass(frozen=True)
class Rect:
    """A rectangle of a weight: half-open spans of its rows and columns."""

    rows: Span
    cols: Span

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    def common(self, other: Rect) -> Rect | None:
        """Intersect two rectangles; None where they share nothing."""
        rows = max(self.rows[0], other.rows[0]), min(self.rows[1], other.rows[1])
        cols = max(self.cols[0], other.cols[0]), min(self.cols[1], other.cols[1])
        return Rect(rows, cols) if rows[0] < rows[1] and cols[0] < cols[1] else None

    def within(self, outer: Rect) -> tuple[slice, slice]:
        """Index this rectangle in a matrix that holds ``outer``."""
        row, col = outer.rows[0], outer.cols[0]
        return slice(self.rows[0] - row, self.rows[1] - row), slice(self.cols[0] - col, self.cols[1] - col)


@dataclass(frozen=True)
class Shard:
    """The elements that one rank holds of a weight of ``shape`` (m, n).

    Make one with :meth:`whole`, :meth:`nothing`, :meth:`rectangle` or :meth:`range`. ``rows`` and ``cols`` are the
    spans that it touches, of U and V respectively; both (0, 0) where it is empty. ``flat`` is the half-open range of
    row-major indices where the shard is no rectangle. ``unsharded`` says that one rank, this or another, holds the
    whole weight, so that its C need not be summed. ``division`` is equal only where all ranks' shards are: an empty one
    does not tell what the others hold. It is None where nobody asks for that.
    """

    shape: tuple[int, int]
    rows: Span
    cols: Span
    flat: Span | None = None
    unsharded: bool = False
    division: tuple[int, int] | None = None

    @classmethod
    def whole(cls, shape: tuple[int, int]) -> Shard:
        return cls(shape, (0, shape[0]), (0, shape[1]), unsharded=True)

    @classmethod
    def nothing(cls, shape: tuple[int, int], unsharded: bool = False) -> Shard:
        return cls(shape, (0, 0), (0, 0), unsharded=unsharded)

    @classmethod
    def rectangle(cls, shape: tuple[int, int], rows: Span, cols: Span) -> Shard:
        if rows[0] >= rows[1] or cols[0] >= cols[1]:
            return cls.nothing(shape)
        return cls(shape, rows, cols)

    @classmethod
    def range(cls, shape: tuple[int, int], begin: int, end: int) -> Shard:
        """Make the shard of elements ``begin`` to ``end`` of the flattened weight."""
        if begin >= end:
            return cls.nothing(shape)
        n = shape[1]
        first, last = begin // n, -(-end // n)
        cols = (begin - first * n, end - first * n) if last - first == 1 else (0, n)
        return cls(shape, (first, last), cols, flat=(begin, end))

    @property
    def numel(self) -> int:
        if self.flat is not None:
            return self.flat[1] - self.flat[0]
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])

    @property
    def bounds(self) -> Rect:
        """The least rectangle around it: the rows of U and of V that belong to it."""
        return Rect(self.rows, self.cols)

    @property
    def is_whole(self) -> bool:
        return self.numel == self.shape[0] * self.shape[1]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that holds it: two sizes, or one for a flat range."""
        if self.flat is not None:
            return (self.numel,)
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def rects(self) -> list[Rect]:
        """Its rectangles in row-major order: none where it is empty, up to three for a flat range, otherwise one."""
        if not self.numel:
            return []
        if self.flat is None or self.rows[1] - self.rows[0] == 1:
            return [Rect(self.rows, self.cols)]
        (begin, end), n = self.flat, self.shape[1]
        body = -(-begin // n), end // n
        rects = []
        if begin % n:
            rects.append(Rect((body[0] - 1, body[0]), (begin % n, n)))
        if body[0] < body[1]:
            rects.append(Rect(body, (0, n)))
        if end % n:
            rects.append(Rect((body[1], body[1] + 1), (0, end % n)))
        return rects

    def views(self, local: Tensor) -> Iterator[tuple[Rect, Tensor]]:
        """Yield each rectangle with its matrix in ``local``, a tensor of :attr:`local_shape`."""
        if self.flat is None:
            if self.numel:
                yield self.rects[0], local
            return
        offset = 0
        for rect in self.rects:
            rows, cols = rect.shape
            yield rect, local[offset : offset + rows * cols].view(rows, cols)
            offset += rows * cols

    def of(self, whole: Tensor) -> Tensor:
        """Take this shard of a tensor (m, n): a view, but for a flat range of a tensor that is not contiguous."""
        if self.flat is not None:
            return whole.reshape(-1)[self.flat[0] : self.flat[1]]
        if self.is_whole:
            return whole
        return whole[self.rows[0] : self.rows[1], self.cols[0] : self.cols[1]]
