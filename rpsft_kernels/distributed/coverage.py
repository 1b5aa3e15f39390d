"""Do the shards of a weight cover every element exactly once? One number per rank tells, so that no rank has to be told
where every other rank's shard lies.

Each element (row r, column c) weighs x^r y^c modulo a prime, with x and y drawn from the weight's name. The weight of a
shard is the sum over its elements, and shards that tile the matrix add up to the matrix's own weight. Any other
multiset of elements differs from it by a polynomial in x and y that is not zero and has degree at most m + n; such a
polynomial vanishes at no more than a share of (m + n) / p of all points (Schwartz and Zippel), about one in 10^7 for
matrices of 50,000 rows and columns.
"""

from __future__ import annotations

import hashlib

from .shard import Shard

# A prime; sums of what 2^23 ranks hold modulo it stay within an int64.
MODULUS = (1 << 40) - 87


def measure(name: str, part: Shard) -> int:
    """What a shard of the weight ``name`` weighs, times (x - 1) (y - 1): two geometric sums for each rectangle."""
    seed = hashlib.blake2b(name.encode(), digest_size=16).digest()
    x, y = (int.from_bytes(half, "little") % (MODULUS - 2) + 2 for half in (seed[:8], seed[8:]))
    return sum(
        (pow(x, tile.rows[1], MODULUS) - pow(x, tile.rows[0], MODULUS))
        * (pow(y, tile.cols[1], MODULUS) - pow(y, tile.cols[0], MODULUS))
        for tile in part.rects
    )
