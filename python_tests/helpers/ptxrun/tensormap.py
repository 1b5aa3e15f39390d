"""sm_90: tensor maps, which tell the bulk-copy engine where a tensor lies and how its boxes lie in shared memory."""

from dataclasses import dataclass, field

import numpy as np

from .errors import MemoryFault, PtxError, RaceError
from .memory import PENDING, SHARED_BASE, WIDE
from .ops import GlobalAccess, address_of, op, unsupported
from .parser import Imm

# The 128 bytes are opaque to programs; this is our own layout.
TENSOR_MAP = np.dtype(
    {
        "names": [
            "address",
            "rank",
            "elemtype",
            "interleave",
            "swizzle",
            "fill",
            "box",
            "dim",
            "stride",
            "estride",
            "magic",
        ],
        "formats": ["u8", "u1", "u1", "u1", "u1", "u1", "(5,)u4", "(5,)u4", "(4,)u8", "(5,)u4", "u4"],
        "offsets": [0, 8, 9, 10, 11, 12, 16, 36, 56, 88, 112],
        "itemsize": 128,
    }
)
MAGIC = 0x50545852
FIELD = {
    "global_address": ("address", "u8"),
    "rank": ("rank", "u1"),
    "box_dim": ("box", "u4"),
    "global_dim": ("dim", "u4"),
    "global_stride": ("stride", "u8"),
    "element_stride": ("estride", "u4"),
    "elemtype": ("elemtype", "u1"),
    "interleave_layout": ("interleave", "u1"),
    "swizzle_mode": ("swizzle", "u1"),
    "fill_mode": ("fill", "u1"),
}
ELEMENT_SIZE = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}
NAN_BITS = {6: 0x7FFF, 7: 0x7FFFFFFF, 8: 0x7FFFFFFF, 9: 0x7FFFFFFFFFFFFFFF, 10: 0x7FFF, 11: 0x7FFFFFFF, 12: 0x7FFFFFFF}


def tensor_map(address, elemtype, shape, strides, box, swizzle, fill=0):
    """Tensor map made by the host. shape, strides (elements), box: outermost dimension first."""
    t = np.zeros(1, TENSOR_MAP)
    n = len(shape)
    t["address"], t["rank"], t["elemtype"], t["swizzle"], t["fill"], t["magic"] = (
        address,
        n - 1,
        elemtype,
        swizzle,
        fill,
        MAGIC,
    )
    t["box"][0, :n], t["dim"][0, :n], t["estride"][0, :n] = box[::-1], shape[::-1], 1
    t["stride"][0, : n - 1] = [s * ELEMENT_SIZE[elemtype] for s in strides[-2::-1]]
    return t.tobytes()


def swizzled(addr, mode):
    """XOR the 16-byte chunk number (bits 4..) with the 128-byte line number (bits 7..)."""
    mask = {0: 0, 1: 1, 2: 3, 3: 7}[mode]
    return addr ^ (((addr >> 7) & mask) << 4)


class TensorMap:
    def __init__(self, raw, complain):
        t = np.frombuffer(raw, TENSOR_MAP)[0]
        if int(t["magic"]) != MAGIC:
            complain("not a tensor map (or not initialised)")
        self.n = n = int(t["rank"]) + 1
        self.es = ELEMENT_SIZE.get(int(t["elemtype"]), 0)
        self.base = int(t["address"])
        self.box = [int(x) for x in t["box"][:n]]
        self.dim = [int(x) for x in t["dim"][:n]]
        self.stride = [self.es] + [int(x) for x in t["stride"][: n - 1]]
        self.swizzle, self.fill, self.elemtype = int(t["swizzle"]), int(t["fill"]), int(t["elemtype"])
        inner = self.box[0] * self.es
        if not self.es or int(t["interleave"]) or any(int(x) != 1 for x in t["estride"][:n]):
            complain(
                f"tensor map with element type {self.elemtype}, interleave {int(t['interleave'])}, element strides "
                f"{t['estride'][:n].tolist()}"
            )
        if self.base % 16 or any(s % 16 for s in self.stride[1:]):
            complain(f"address {self.base:#x} or strides {self.stride[1:]} not multiples of 16")
        if any(not 1 <= b <= 256 for b in self.box) or inner % 16 or any(d == 0 for d in self.dim):
            complain(f"box {self.box} of {self.es}-byte elements in {self.dim}")
        if self.swizzle and inner > 16 << self.swizzle:
            complain(f"inner box dimension of {inner} bytes exceeds the swizzle span {16 << self.swizzle}")
        self.bytes = inner
        for b in self.box[1:]:
            self.bytes *= b

    def units(self, coords):
        """The box in units that lie wholly inside or outside the tensor: 16 bytes, or else elements.

        Returns their size, their addresses in the order of the box, innermost dimension last, and which are inside.
        """
        edges = (coords[0] * self.es, self.dim[0] * self.es)
        size = self.es if any(x % 16 for x in edges) else 16
        first = [edges[0] // size, *coords[1:]]
        count = [self.box[0] * self.es // size, *self.box[1:]]
        end = [edges[1] // size, *self.dim[1:]]
        addr, inside = np.full((1,), self.base, np.int64), np.ones((1,), bool)
        for c, n, limit, stride in reversed(list(zip(first, count, end, [size, *self.stride[1:]], strict=True))):
            at = np.int64(c) + np.arange(n)
            addr = addr[..., None] + at * stride
            inside = inside[..., None] & ((at >= 0) & (at < limit))
        return size, addr.reshape(-1).view(np.uint64), inside.reshape(-1)

    def load(self, gmem, where, coords, t):
        """The box as 16-byte elements, with the fill value outside the tensor."""
        size, addr, inside = self.units(coords)
        raw = np.zeros(self.bytes // self.es, WIDE[self.es])
        if self.fill and self.elemtype in NAN_BITS:
            raw[:] = NAN_BITS[self.elemtype]
        raw = raw.view(WIDE[size])
        k = np.flatnonzero(inside)
        if len(k):
            a = addr[k]
            gmem.check(where, a, size, np.full(len(k), t), False, [None])
            raw[k] = gmem.gather(a, size)
        return raw.view(WIDE[16])

    def store(self, gmem, where, coords, t, values):
        """Write the box, which is given as 16-byte elements, as far as it lies inside the tensor."""
        size, addr, inside = self.units(coords)
        k = np.flatnonzero(inside)
        if len(k):
            a = addr[k]
            gmem.check(where, a, size, np.full(len(k), t), True, [None])
            gmem.scatter(a, size, values.view(WIDE[size])[k])


@dataclass(eq=False)
class MadeMap:
    """A tensor map that a kernel wrote: by which warp, at which clock; the warps that acquired it, and their clocks.

    ``uses``: copies that may have used it since.
    """

    maker: int
    clock: int
    acquired: dict[int, int] = field(default_factory=dict)
    uses: list = field(default_factory=list)


class TensorMaps:
    """The tensor maps that a CTA uses, and those that it writes."""

    def __init__(self, m):
        self.m = m
        self.parsed = {}  # by their bytes

    def reset(self):
        self.made = {}  # address -> MadeMap

    def read(self, addr, ins, t):
        m = self.m

        def complain(why):
            raise PtxError(f"bad tensor map at {addr:#x}: {why}{m.where(ins, t)}")

        if addr % 64:
            complain("not aligned to 64 bytes")
        raw = m.gmem.read_bytes(lambda _: m.where(ins, t), addr, 128)
        if raw not in self.parsed:
            self.parsed[raw] = TensorMap(raw, complain)
        return self.parsed[raw]

    def write(self, addr, ins, w):
        """A warp writes the map at this address: no copy that uses what was there before may still be in flight."""
        m, r = self.m, self.m.smem.races
        if not r:
            return
        before = self.made.get(addr)
        for copy in before.uses if before else ():
            if copy.over > r.vc[w, copy.actor]:
                raise RaceError(
                    f"tensor map at {addr:#x} replaced by warp {w} while a {copy.kind} that uses it may be in flight: "
                    f"its end is {'not waited for' if copy.over == PENDING else 'not known to this warp'}"
                    f"{m.where(ins, 32 * w)}\n  that {copy.kind}:{copy.where(0)}"
                )
        self.made[addr] = MadeMap(w, int(r.vc[w, w]))

    def acquire(self, addr, w):
        """fence.proxy.tensormap: the warp may use the map, if its writing happened before."""
        r, made = self.m.smem.races, self.made.get(addr)
        if r and made and r.vc[w, made.maker] >= made.clock:
            made.acquired[w] = int(r.vc[w, w])

    def use(self, addr, copy):
        r, made = self.m.smem.races, self.made.get(addr)
        if not r or not made:
            return
        if not any(r.vc[copy.warp, w] >= clock for w, clock in made.acquired.items()):
            raise RaceError(
                f"{copy.kind} uses the tensor map at {addr:#x}, which warp {made.maker} wrote, with no "
                f"fence.proxy.tensormap acquire known to warp {copy.warp}{copy.where(0)}"
            )
        made.uses.append(copy)

    def build_acquire(self, ins):
        """fence.proxy.tensormap::generic.acquire [address], 128."""
        if "acquire" not in ins.parts:
            return lambda mask: None
        A = address_of(self.m, ins, ins.ops[0], "u64")

        def run(mask):
            active = np.ones(self.m.T, bool) if mask is None else mask
            for w in np.flatnonzero(active.reshape(-1, 32).any(1)):
                t = 32 * int(w) + int(active[32 * w :][:32].argmax())
                self.acquire(int(A(np.array([t]))[0]), int(w))

        return run


@op("tensormap")
def b_tensormap(m, ins):
    if ins.parts[1] == "cp_fenceproxy":
        return build_write(m, ins)
    if ins.parts[1] != "replace" or ins.parts[2] != "tile" or ins.parts[3] not in FIELD or "shared" not in ins.op:
        unsupported(ins)
    name, ty = FIELD[ins.parts[3]]
    A = address_of(m, ins, ins.ops[0], "u32")
    ordinal = ins.ops[1].value if len(ins.ops) == 3 else 0
    val = ins.ops[-1]
    V = m.source(val, "u64" if isinstance(val, Imm) or val.size == 8 else "u32", ins)
    offset = TENSOR_MAP.fields[name][1] + ordinal * np.dtype(ty).itemsize
    magic = TENSOR_MAP.fields["magic"][1]

    def run(mask):
        for t in m.tid if mask is None else np.flatnonzero(mask):
            t = int(t)
            where = lambda _: m.where(ins, t)  # noqa: B023, E731
            a = int(A(np.array([t]))[0])
            v = np.array([int(V[t]) & ((1 << 8 * np.dtype(ty).itemsize) - 1)], ty).view(np.uint8)
            mg = np.array([MAGIC], "u4").view(np.uint8)
            s = m.smem
            idx = s.locate(where, np.array([a]), 16, None) + np.arange(8)
            s.check_valid(where, idx, 16, None)
            if s.races:
                s.races.write(ins, where, s.granules(idx, 16), np.full(8, t // 32), None)
            at = a - SHARED_BASE
            s.buf[at + offset : at + offset + len(v)] = v
            s.buf[at + magic : at + magic + 4] = mg

    return run


def build_write(m, ins):
    """tensormap.cp_fenceproxy: a map goes from shared to global memory."""
    D, S = address_of(m, ins, ins.ops[0], "u64"), address_of(m, ins, ins.ops[1], "u32")
    if ins.ops[2].value != 128 or "global" not in ins.parts[2]:
        unsupported(ins)
    acc = GlobalAccess(m, ins, 16, True)

    def run(mask):
        for w in np.arange(m.nw)[m.warps_of(mask, ins)]:
            w = int(w)
            sel = np.array([w * 32])
            src, dst = int(S(sel)[0]) - SHARED_BASE, int(D(sel)[0])
            idx = np.arange(src >> 4, (src >> 4) + 8)
            where = lambda _: m.where(ins, w * 32)  # noqa: B023, E731
            m.smem.check_valid(where, idx, 16, None)
            if m.smem.races:
                m.smem.races.read(ins, where, m.smem.granules(idx, 16), np.full(8, w), None)
            if dst % 128:
                raise MemoryFault(f"tensor map copied to {dst:#x}, not a multiple of 128{where(0)}")
            m.hopper.maps.write(dst, ins, w)
            a = (dst + 16 * np.arange(8)).astype(np.uint64)
            acc.check(a, np.full(8, w * 32))
            m.gmem.scatter(a, 16, m.smem.view[16][idx])

    return run
