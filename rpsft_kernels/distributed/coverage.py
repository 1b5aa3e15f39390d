"""Checks that the shards of a weight cover every element exactly once, from one number per rank.

No rank has to know where every other rank's shard lies. Each element (row r, column c) weighs x^r y^c modulo a prime p,
with x and y drawn from the parameter's name. A shard weighs the sum over its elements, and shards that make up the
matrix add up to the matrix's own weight. Any other multiset of elements differs from it by a polynomial in x and y that
is not zero and has degree at most m + n; such a polynomial vanishes at no more than a share of (m + n) / p of all
points (Schwartz and Zippel), about one in 10^7 for matrices of 50,000 rows and columns.
"""

from __future__ import annotations

import hashlib

from .shard import Shard

# A prime. The sum of 2^23 ranks' measures modulo it fits into an int64.
MODULUS = (1 << 40) - 87


def measure(name: str, shard: Shard) -> int:
    """Measure a shard of the parameter ``name``: its weight times (x - 1) (y - 1), two geometric sums a rectangle."""
    seed = hashlib.blake2b(name.encode(), digest_size=16).digest()
    x, y = (int.from_bytes(half, "little") % (MODULUS - 2) + 2 for half in (seed[:8], seed[8:]))
    return sum(
        (pow(x, rect.rows[1], MODULUS) - pow(x, rect.rows[0], MODULUS))
        * (pow(y, rect.cols[1], MODULUS) - pow(y, rect.cols[0], MODULUS))
        for rect in shard.rects
    )
