"""sm_90: copies of the bulk-copy engine (TMA) between tensors in global memory and boxes in shared memory.

A load lands when no warp can go on without it. A store reads shared memory at the wait for its reads, and writes global
memory at the wait for its writes or where the program ends. A missing wait then gives an error or a wrong result, not
luck.
"""

import re

import numpy as np

from .errors import MemoryFault, PtxError
from .memory import PENDING, SHARED_BASE
from .ops import address_of, unsupported
from .parser import Mem
from .tensormap import swizzled


class Copy:
    """A copy in flight. It uses its tensor map and its source until ``actor`` has the clock ``over``."""

    def __init__(self, copies, start, tensor, coords, ins, t):
        self.m, self.tensor, self.coords, self.ins, self.t = copies.m, tensor, coords, ins, t
        self.warp = self.actor = t // 32
        self.over = PENDING
        off, limit = start - SHARED_BASE, self.m.smem.limit
        if start % 128:
            raise MemoryFault(f"bulk copy: shared offset {off} is not a multiple of 128{self.where(0)}")
        if off < 0 or off + tensor.bytes > limit:
            raise MemoryFault(f"bulk copy of {tensor.bytes} bytes at shared offset {off} of {limit}{self.where(0)}")
        self.idx, self.granules = copies.chunks(start, tensor.bytes, tensor.swizzle)

    def where(self, _):
        return self.m.where(self.ins, self.t)


class Load(Copy):
    kind = "bulk load"

    def __init__(self, copies, start, tensor, coords, ins, t, barrier):
        super().__init__(copies, start, tensor, coords, ins, t)
        self.barrier, self.actor = barrier, barrier.actor
        s = self.m.smem
        s.check_not_in_flight(self.where, self.idx, 16, None)
        if s.races:
            s.races.async_write(ins, self.where, self.granules, self.warp, self.actor)
        s.view[16][self.idx] = complex(np.nan, np.nan)
        s.set_state(self.idx, 16, s.FLIGHT)

    def land(self):
        s, barrier = self.m.smem, self.barrier
        s.view[16][self.idx] = self.tensor.load(self.m.gmem, self.where, self.coords, self.t)
        s.set_state(self.idx, 16, s.VALID)
        self.over = barrier.clock + 1  # of the phase that this load is part of
        if s.races:
            s.races.wclk[self.granules] = self.over
        barrier.tx -= self.tensor.bytes
        barrier.settle(self.where)


class Store(Copy):
    kind = "bulk store"

    def __init__(self, copies, start, tensor, coords, ins, t):
        super().__init__(copies, start, tensor, coords, ins, t)
        s = self.m.smem
        s.check_valid(self.where, self.idx, 16, None)
        if s.races:
            s.races.async_read(ins, self.where, self.granules, [self.warp])
            s.races.pending += 1
        self.mark()

    def mark(self):
        r = self.m.smem.races
        if r:
            r.rclk[self.warp][self.granules] = PENDING

    def read(self):
        self.values = self.m.smem.view[16][self.idx]
        r = self.m.smem.races
        if r:
            self.over = int(r.vc[self.warp, self.warp])
            r.pending -= 1
            r.rclk[self.warp][self.granules] = self.over

    def write(self):
        self.tensor.store(self.m.gmem, self.where, self.coords, self.t, self.values)


class Stores:
    """The bulk stores of a thread."""

    def __init__(self):
        self.open, self.groups = [], []
        self.read = []  # those that have read their source and not yet written

    def in_flight(self):
        return [*(store for group in self.groups for store in group), *self.open]


class BulkCopies:
    """The bulk copies of a CTA."""

    def __init__(self, m):
        self.m = m
        self.chunk_cache = {}

    def reset(self):
        self.loads = []  # in flight, in order of issue
        self.stores = {}  # thread -> Stores

    def progress(self, barriers):
        """Let one load land that is part of one of these mbarriers' phases; False if there is none."""
        for i, load in enumerate(self.loads):
            if load.barrier in barriers:
                del self.loads[i]
                load.land()
                return True
        return False

    def finish(self):
        if self.loads:
            raise PtxError(f"CTA {self.m.cta} exits with bulk loads never waited for{self.loads[0].where(0)}")
        for stores in self.stores.values():
            for store in stores.in_flight():
                raise PtxError(
                    f"CTA {self.m.cta} exits with bulk stores that may not have read their source (missing "
                    f"commit_group or wait_group){store.where(0)}"
                )
            for store in stores.read:
                store.write()

    def chunks(self, start, nbytes, swizzle):
        """Element numbers (16 bytes each) of a dense box in shared memory, and their race granules."""
        key = (start, nbytes, swizzle)
        e = self.chunk_cache.get(key)
        if e is None:
            a = swizzled(start + np.arange(nbytes // 16, dtype=np.int64) * 16, swizzle)
            idx = (a - SHARED_BASE) >> 4
            e = self.chunk_cache[key] = (idx, self.m.smem.granules(idx, 16))
        return e

    def commit(self, mask):
        for t, stores in self.stores.items():
            if mask is None or mask[t]:
                stores.groups.append(stores.open)
                stores.open = []

    def wait(self, mask, n, only_read):
        """All but the n newest groups of each thread have read their source, and else have written, too."""
        for t, stores in self.stores.items():
            if mask is None or mask[t]:
                while len(stores.groups) > n:
                    for store in stores.groups.pop(0):
                        store.read()
                        stores.read.append(store)
                if not only_read:
                    for store in stores.read:
                        store.write()
                    stores.read = []
                self.m.hopper.mark_reads(t // 128)

    def mark_reads(self, warpgroup):
        """The stores in flight of a warpgroup still read shared memory."""
        for t, stores in self.stores.items():
            if t // 128 == warpgroup:
                for store in stores.in_flight():
                    store.mark()

    def build(self, ins):
        m, p = self.m, ins.parts
        if "commit_group" in p:
            return self.commit
        if "wait_group" in p:
            n, only_read = ins.ops[0].value, "read" in p
            return lambda mask: self.wait(mask, n, only_read)
        if "prefetch" in p:
            return lambda mask: None
        is_load = any(x.startswith("mbarrier::complete_tx") for x in p)
        if {"multicast::cluster", "im2col", "tile::gather4", "tile::scatter4", "reduce"} & set(p) or "tensor" not in p:
            unsupported(ins)
        rank = next(int(x[0]) for x in p if re.fullmatch(r"[1-5]d", x))
        smem, tensor = ins.ops[:2] if is_load else ins.ops[1::-1]
        if len(tensor.coords) != rank:
            unsupported(ins)
        M = address_of(m, ins, Mem(tensor.base, tensor.offset), "u64")
        A = address_of(m, ins, smem, "u32")
        C = [m.source(c, "s32", ins) for c in tensor.coords]
        B = address_of(m, ins, ins.ops[2], "u32") if is_load else None

        def run(mask):
            for t in m.tid if mask is None else np.flatnonzero(mask):
                sel = np.array([t])
                t = int(t)
                at = int(M(sel)[0])
                tm = m.hopper.maps.read(at, ins, t)
                if tm.n != rank:
                    raise PtxError(f"tensor map of rank {tm.n}{m.where(ins, t)}")
                what = (self, int(A(sel)[0]), tm, [int(c[t]) for c in C], ins, t)
                if is_load:
                    copy = Load(*what, m.hopper.barrier(int(B(sel)[0]), ins, t))
                    self.loads.append(copy)
                else:
                    copy = Store(*what)
                    self.stores.setdefault(t, Stores()).open.append(copy)
                m.hopper.maps.use(at, copy)

        return run
