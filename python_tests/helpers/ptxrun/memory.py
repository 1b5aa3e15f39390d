"""Memory spaces.

Global addresses are real host addresses: the registered buffers are accessed in place through NumPy
arrays that start near address 0, after every address has been checked against the registered regions.
Shared memory is a private byte array per CTA with shadow state: which bytes were written, which are the
target of an asynchronous copy still in flight, and (race detector) who touched them last.
"""

import bisect

import numpy as np

from .errors import MemoryFault, RaceError, UninitialisedRead

FLAT_BASE = 4096
MAX_MBARRIERS = 64  # of a CTA
PENDING = np.iinfo(np.int32).max  # clock of what has not happened yet
SHARED_BASE = 1024  # address of the first byte of shared memory; 0..1023 is never valid
SHARED_WINDOW = 1 << 60  # generic addresses of shared memory: SHARED_WINDOW + shared address
LOCAL_WINDOW = 1 << 61

WIDE = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
    16: np.dtype(np.complex128),
}  # dtype that moves W bytes at once; complex128 serves as a 16-byte element
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}


class _Flat:
    def __init__(self, dtype):
        self.__array_interface__ = {
            "data": (FLAT_BASE, False),
            "typestr": dtype.str,
            "version": 3,
            "shape": (((1 << 47) - FLAT_BASE) // dtype.itemsize,),
        }


FLAT = {w: np.asarray(_Flat(d)) for w, d in WIDE.items()}


class Region:
    """Memory that a kernel may touch.

    ``valid``: which bytes belong to it (None: all). ``written``: which bytes hold something (None: all).
    """

    def __init__(self, base, size, name, writable=True, valid=None, keep=None, written=None):
        self.base, self.size, self.end = base, size, base + size
        self.name, self.writable, self.valid, self.keep, self.written = name, writable, valid, keep, written
        self.owner = None  # race detector: CTA (+1) that last wrote each byte

    def __repr__(self):
        return f"{self.name} [{self.base:#x}, {self.end:#x})"


def strided_region(base, shape, strides, itemsize, name, writable=True, keep=None, unwritten=False):
    """Region of a strided array (strides in bytes); the bytes in its gaps are not valid. None for an empty one."""
    if any(s == 0 for s in shape):
        return None
    lo = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0)
    hi = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s > 0) + itemsize
    valid = None
    count = itemsize
    for n, s in zip(shape, strides, strict=True):
        count *= n if s else 1
    if count < hi - lo:
        valid = np.zeros(hi - lo, bool)
        v = np.lib.stride_tricks.as_strided(valid[-lo:], tuple(shape) + (itemsize,), tuple(strides) + (1,))
        v[...] = True
    return Region(base + lo, hi - lo, name, writable, valid, keep, np.zeros(hi - lo, bool) if unwritten else None)


class GlobalMemory:
    def __init__(self, check_races=False):
        self.regions = []
        self.check_races = check_races
        self.bases = []

    def add(self, region):
        if region is None:
            return
        for r in [r for r in self.regions if r.base < region.end and region.base < r.end]:
            self.regions.remove(r)
            region = self._merge(r, region)
        self.regions.append(region)
        self._index()

    def _index(self):
        self.regions.sort(key=lambda r: r.base)
        self.bases = [r.base for r in self.regions]
        self._bases = np.array(self.bases, np.uint64)
        self._ends = np.array([r.end for r in self.regions], np.uint64)

    @staticmethod
    def _merge(a, b):
        base, end = min(a.base, b.base), max(a.end, b.end)
        valid = None
        if not ((a.valid is None and a.size == end - base) or (b.valid is None and b.size == end - base)):
            valid = np.zeros(end - base, bool)
            for r in (a, b):
                valid[r.base - base : r.end - base] |= True if r.valid is None else r.valid
        written = None
        if a.written is not None or b.written is not None:
            written = np.zeros(end - base, bool)
            for r in (a, b):  # the newer one last: what it says of its bytes holds
                written[r.base - base : r.end - base] = True if r.written is None else r.written
        name = a.name if a.name == b.name else f"{a.name}+{b.name}"
        return Region(base, end - base, name, a.writable or b.writable, valid, (a.keep, b.keep), written)

    def add_new(self, region):
        """Add a region, unless all of it is known: then what is known of it holds."""
        if region is not None:
            known = self.find(region.base)
            if known is None or region.end > known.end:
                self.add(region)

    def remove(self, region):
        self.regions.remove(region)
        self._index()

    def begin_launch(self):
        """Forget who wrote: the writes of one launch are no race for the next."""
        for r in self.regions:
            r.owner = None

    def find(self, addr):
        i = bisect.bisect_right(self.bases, addr) - 1
        return self.regions[i] if i >= 0 and addr < self.regions[i].end else None

    def describe(self, addr, width):
        """Why an access is out of bounds."""
        near = min(self.regions, key=lambda r: min(abs(addr - r.base), abs(addr - r.end)), default=None)
        if near is None:
            return "no buffer is registered"
        if near.base <= addr < near.end:
            if addr + width > near.end:
                return f"runs {addr + width - near.end} bytes past the end of {near}"
            return f"byte {addr - near.base} of {near} is in a gap between the rows of that strided array"
        if addr >= near.end:
            return f"{addr - near.end} bytes past the end of {near}"
        return f"{near.base - addr} bytes before {near}"

    def check(self, where, addr, width, tids, write, cache):
        """Alignment and bounds of accesses of `width` bytes at addr (uint64); tids: thread numbers or None = all.
        cache: one-element list with the region that this instruction hit last."""
        if width > 1:
            off = addr & np.uint64(width - 1)
            if off.any():
                k = int(np.flatnonzero(off)[0])
                raise MemoryFault(
                    f"misaligned {width}-byte global access at {int(addr[k]):#x} "
                    f"(address % {width} = {int(off[k])}){where(k if tids is None else int(tids[k]))}"
                )
        lo, hi = int(addr.min()), int(addr.max())
        r = cache[0]
        if r is None or lo < r.base or hi + width > r.end:
            r = self.find(lo)
            if r is None or hi + width > r.end:
                return self._check_many(where, addr, width, tids, write)
            cache[0] = r
        if r.valid is not None or r.written is not None or (write and not r.writable) or self.check_races:
            self._check_region(where, r, addr, width, tids, write)

    def _check_many(self, where, addr, width, tids, write):
        i = np.searchsorted(self._bases, addr, "right").astype(np.int64) - 1
        bad = i < 0
        if len(self._ends):
            bad |= (addr + np.uint64(width) > self._ends[i]) | (addr > np.uint64((1 << 47) - 4096))
        else:
            bad[:] = True
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            a = int(addr[k])
            raise MemoryFault(
                f"out-of-bounds {width}-byte global {'store' if write else 'load'} at {a:#x}: "
                f"{self.describe(a, width)}{where(k if tids is None else int(tids[k]))}"
            )
        for j in np.unique(i):
            sel = np.flatnonzero(i == j)
            self._check_region(where, self.regions[j], addr[sel], width, sel if tids is None else tids[sel], write)

    def _check_region(self, where, r, addr, width, tids, write):
        if write and not r.writable:
            raise MemoryFault(f"store to read-only {r}{where(0 if tids is None else int(tids[0]))}")
        if r.valid is None and r.written is None and not self.check_races:
            return
        off = (addr - np.uint64(r.base)).astype(np.int64)[:, None] + np.arange(width)
        if r.valid is not None:
            bad = ~r.valid[off].all(1)
            if bad.any():
                k = int(np.flatnonzero(bad)[0])
                a = int(addr[k])
                raise MemoryFault(
                    f"out-of-bounds {width}-byte global {'store' if write else 'load'} at {a:#x}: "
                    f"{self.describe(a, width)}{where(k if tids is None else int(tids[k]))}"
                )
        if r.written is not None:
            if write:
                r.written[off] = True
            else:
                bad = ~r.written[off].all(1)
                if bad.any():
                    k = int(np.flatnonzero(bad)[0])
                    raise UninitialisedRead(
                        f"{width}-byte global load of byte {int(off[k, 0])} of {r}, to which nothing was written"
                        f"{where(k if tids is None else int(tids[k]))}"
                    )
        if self.check_races:
            if r.owner is None:
                r.owner = np.zeros(r.size, np.int32)
            me = self.current_cta + 1
            own = r.owner[off]
            bad = ((own != 0) & (own != me)).any(1)
            if bad.any():
                k = int(np.flatnonzero(bad)[0])
                raise RaceError(
                    f"global {'store to' if write else 'load of'} byte {int(off[k, 0])} of {r}, which CTA number "
                    f"{int(own[k].max()) - 1} wrote in the same launch"
                    f"{where(k if tids is None else int(tids[k]))}"
                )
            if write:
                r.owner[off] = me

    @staticmethod
    def index(addr, width):
        return ((addr - np.uint64(FLAT_BASE)) >> np.uint64(SHIFT[width])).view(np.int64)

    def gather(self, addr, width):
        return FLAT[width][self.index(addr, width)]

    def scatter(self, addr, width, values):
        FLAT[width][self.index(addr, width)] = values

    def read_bytes(self, where, addr, n):
        r = self.find(addr)
        if r is None or addr + n > r.end:
            raise MemoryFault(f"out-of-bounds {n}-byte read at {addr:#x}: {self.describe(addr, n)}{where(0)}")
        if r.written is not None and not r.written[addr - r.base : addr - r.base + n].all():
            raise UninitialisedRead(f"{n}-byte read at {addr:#x} of {r}, to which nothing was written{where(0)}")
        i = addr - FLAT_BASE
        return FLAT[1][i : i + n].tobytes()


class SharedMemory:
    """Shared memory of the CTA that is running."""

    FREE, VALID, FLIGHT, MBAR = 0, 1, 2, 4  # MBAR: holds an mbarrier

    def __init__(self, size, nwarps, granule, races):
        n = self.size = -(-max(size, 1) // 16) * 16
        self.limit = size
        raw = np.empty(n + 4096, np.uint8)
        off = -raw.ctypes.data % 1024
        self.buf = raw[off : off + n]
        st = np.empty(n + 64, np.uint8)
        off = -st.ctypes.data % 16
        self.state = st[off : off + n]
        self.view = {w: self.buf.view(d) for w, d in WIDE.items()}
        self.sview = {w: self.state.view(d) for w, d in WIDE.items() if w <= 8}
        self.sview[16] = self.state.view(np.uint64).reshape(-1, 2)
        self.races = Races(n, nwarps, granule) if races else None
        self.granule = granule
        self.mbarrier_overwritten = lambda offset: None

    def reset(self):
        self.buf.fill(0xFF)  # NaN in every float format
        self.state.fill(self.FREE)
        if self.races:
            self.races.reset()

    def locate(self, where, addr, width, tids):
        """Bounds and alignment of shared addresses (any unsigned dtype) -> element indices into view[width]."""
        a = addr.astype(np.int64) - SHARED_BASE
        bad = (a < 0) | (a + width > self.limit) | ((a & (width - 1)) != 0)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            o = int(a[k])
            t = k if tids is None else int(tids[k])
            if o < 0 or o + width > self.limit:
                raise MemoryFault(
                    f"out-of-bounds {width}-byte shared access at offset {o} of {self.limit} bytes{where(t)}"
                )
            raise MemoryFault(
                f"misaligned {width}-byte shared access at offset {o} (offset % {width} = {o % width}){where(t)}"
            )
        return a >> SHIFT[width]

    def granules(self, idx, width):
        """Shadow granules of each access: (n, k) indices."""
        g = self.granule
        if width <= g:
            return (idx // (g // width))[:, None]
        k = width // g
        return idx[:, None] * k + np.arange(k)

    def check_valid(self, where, idx, width, tids):
        s = self.sview[width][idx]
        ok = s == (np.uint64(0x0101010101010101) if width >= 8 else s.dtype.type(0x01010101 >> (32 - 8 * width)))
        if ok.all():
            return
        if width == 16:
            ok = ok.all(1)
        k = int(np.flatnonzero(~ok)[0])
        o = int(idx[k]) * width
        t = k if tids is None else int(tids[k])
        flight = (self.state[o : o + width] == self.FLIGHT).any()
        if flight:
            raise UninitialisedRead(
                f"shared offset {o} read while an asynchronous copy into it is in flight (missing wait){where(t)}"
            )
        raise UninitialisedRead(f"read of never-written shared memory at offset {o}{where(t)}")

    def check_not_in_flight(self, where, idx, width, tids):
        """Writing to bytes that an asynchronous copy will still overwrite."""
        s = self.sview[width][idx]
        hit = s & (np.uint64(0x0606060606060606) if width >= 8 else s.dtype.type(0x06060606 >> (32 - 8 * width)))
        if hit.any():
            k = np.flatnonzero(hit.reshape(len(idx), -1).any(1))
            span = idx[k][:, None] * width + np.arange(width)
            state = self.state[span]
            for o in np.unique(span[state == self.MBAR] & ~7):
                self.mbarrier_overwritten(int(o))
            flight = (state == self.FLIGHT).any(1)
            if not flight.any():
                return
            k = int(k[flight.argmax()])
            raise UninitialisedRead(
                f"shared offset {int(idx[k]) * width} written while an asynchronous copy into it is in flight "
                f"(missing wait){where(k if tids is None else int(tids[k]))}"
            )

    def set_state(self, idx, width, value):
        if width == 16:
            self.sview[16][idx] = np.uint64(0x0101010101010101 * value)
        else:
            self.sview[width][idx] = WIDE[width].type(int.from_bytes(bytes([value]) * width, "little"))


class Races:
    """Happens-before race detector on granules of shared memory (FastTrack style).

    Actors are the warps and, for the bulk loads, the mbarriers by which their end is known; an mbarrier's clock counts
    its phases. vc[a, b] = latest clock of b known to warp a; fence[a, b] = the same, through a generic->async proxy
    fence."""

    def __init__(self, size, nwarps, granule):
        self.nw = nwarps
        self.n = nwarps + MAX_MBARRIERS
        self.count = -(-size // granule)
        self.granule = granule
        self.wact = np.empty(self.count, np.uint8)  # last writer
        self.wclk = np.empty(self.count, np.int32)
        self.wins = np.empty(self.count, np.int32)  # its instruction
        self.wgen = np.empty(self.count, bool)  # written through the generic proxy
        self.rclk = np.empty((nwarps, self.count), np.int32)
        self.rflat = self.rclk.reshape(-1)

    def reset(self):
        self.vc = np.zeros((self.nw, self.n), np.int32)
        np.fill_diagonal(self.vc, 1)
        self.fence = np.zeros((self.nw, self.n), np.int32)
        self.wact.fill(0)
        self.wclk.fill(0)
        self.wins.fill(-1)
        self.wgen.fill(True)
        self.rclk.fill(0)
        self.pending = 0  # wgmmas and bulk stores in flight: the clocks of their reads are not final

    def barrier(self, actors):
        """All of these warps (list of numbers, or None = every warp) met at a barrier."""
        a = slice(None) if actors is None else actors
        j = self.vc[a].max(0)
        self.vc[a] = j
        self.fence[a] = self.fence[a].max(0)
        self.tick(a)

    def tick(self, actors):
        i = np.arange(self.nw)[actors]
        self.vc[i, i] += 1

    def read(self, ins, where, gidx, act, tids):
        wa, wc = self.wact[gidx], self.wclk[gidx]
        a = act[:, None]
        bad = wc > self.vc[a, wa]
        if bad.any():
            self._fail(ins, where, gidx, act, tids, bad, "read of", "written")
        at = a * self.count + gidx
        if self.pending:  # a wgmma or bulk store of this warp may be reading the same bytes
            self.rflat[at] = np.maximum(self.rflat[at], self.vc[act, act][:, None])
        else:
            self.rflat[at] = self.vc[act, act][:, None]

    def async_read(self, ins, where, gidx, warps):
        """wgmma or bulk store of these warps reading: generic-proxy writes must have been fenced."""
        wa, wc, generic = self.wact[gidx], self.wclk[gidx], self.wgen[gidx]
        for w in warps:
            bad = wc > self.vc[w, wa]
            unfenced = (wc > self.fence[w, wa]) & generic
            if bad.any() or unfenced.any():
                act = np.full(len(gidx), w)
                if bad.any():
                    self._fail(ins, where, gidx, act, None, bad, "asynchronous read of", "written")
                what = "asynchronous read, without fence.proxy.async, of"
                self._fail(ins, where, gidx, act, None, unfenced, what, "written")

    def write(self, ins, where, gidx, act, tids):
        self._check_write(ins, where, gidx, act, tids, "write to")
        self.wact[gidx] = act[:, None]
        self.wclk[gidx] = self.vc[act, act][:, None]
        self.wins[gidx] = ins.index
        self.wgen[gidx] = True

    def async_write(self, ins, where, gidx, warp, actor):
        """A bulk load that a warp issues begins to write; it ends with a phase of the mbarrier ``actor``."""
        act = np.full(len(gidx), warp)
        self._check_write(ins, where, gidx, act, None, "bulk load to")
        bad = (self.wclk[gidx] > self.fence[warp, self.wact[gidx]]) & self.wgen[gidx]
        if bad.any():
            self._fail(ins, where, gidx, act, None, bad, "bulk load, without fence.proxy.async, to", "written")
        self.wact[gidx] = actor
        self.wclk[gidx] = PENDING
        self.wins[gidx] = ins.index
        self.wgen[gidx] = False

    def _check_write(self, ins, where, gidx, act, tids, what):
        wa, wc = self.wact[gidx], self.wclk[gidx]
        bad = wc > self.vc[act[:, None], wa]
        if bad.any():
            self._fail(ins, where, gidx, act, tids, bad, what, "written")
        rc = self.rclk.take(gidx, axis=1)
        bad = rc > self.vc[act].T[: self.nw, :, None]
        if bad.any():
            who = int(np.flatnonzero(bad.any((1, 2)))[0])
            self._fail(ins, where, gidx, act, tids, bad[who], what, "read", who)

    def _fail(self, ins, where, gidx, act, tids, bad, what, prev, who=None):
        k = int(np.flatnonzero(bad.any(1))[0])
        j = int(np.flatnonzero(bad[k])[0])
        g = int(gidx[k, j])
        if who is None:
            who = int(self.wact[g])
        name = f"warp {who}" if who < self.nw else "a bulk load"
        by = f" (by instruction #{int(self.wins[g])})" if prev == "written" else ""
        t = k if tids is None else int(tids[k])
        raise RaceError(
            f"shared-memory race: {what} offset {g * self.granule} by warp {int(act[k])}, {prev} by {name}{by} "
            f"with no synchronisation between{where(t)}"
        )


class LocalMemory:
    """.local variables and call parameters: `size` bytes per thread."""

    def __init__(self, size, threads):
        self.size = -(-max(size, 1) // 16) * 16
        self.buf = np.full(self.size * threads, 0xFF, np.uint8)
        self.view = {w: self.buf.view(d) for w, d in WIDE.items()}
        self.first = np.arange(threads, dtype=np.int64) * self.size

    def locate(self, where, addr, width, tids):
        a = addr.astype(np.int64)
        bad = (a < 0) | (a + width > self.size) | ((a & (width - 1)) != 0)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            raise MemoryFault(
                f"bad {width}-byte local access at offset {int(a[k])} of {self.size} bytes"
                f"{where(k if tids is None else int(tids[k]))}"
            )
        return (a + (self.first if tids is None else self.first[tids])) >> SHIFT[width]
