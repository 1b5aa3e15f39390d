"""sm_90: mbarriers, the bulk-copy engine (TMA) and wgmma.

Asynchronous work is done as late as the program allows: bulk loads only when every warp waits, bulk stores and
wgmma only at the wait that covers them. A missing wait then gives an error or a wrong result, not luck."""

import re

import numpy as np

from .errors import MemoryFault, PtxError, RaceError, RegisterHazard
from .memory import SHARED_BASE, WIDE
from .mma import decode
from .ops import GlobalAccess, address_of, op, selection, unsupported
from .parser import Imm, Mem, Reg, Vec

PENDING = np.iinfo(np.int32).max  # clock of a read that has not finished

# ---- tensor maps: the 128 bytes are opaque to programs; this is our own layout -------------------

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

    def elements(self, coords):
        """Global addresses of the box's elements (innermost dimension last) and which are inside the tensor."""
        addr, inside = np.zeros((1,), np.int64) + self.base, np.ones((1,), bool)
        for d in reversed(range(self.n)):
            c = np.int64(coords[d]) + np.arange(self.box[d])
            addr = addr[..., None] + c * self.stride[d]
            inside = inside[..., None] & ((c >= 0) & (c < self.dim[d]))
        return addr.reshape(-1), inside.reshape(-1)


class MBarrier:
    def __init__(self, count, actors):
        self.expected = self.pending = count
        self.tx = self.phase = 0
        self.vc, self.fence = np.zeros(actors, np.int32), np.zeros(actors, np.int32)
        self.done_vc, self.done_fence = self.vc.copy(), self.fence.copy()

    def settle(self):
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.expected
            self.done_vc, self.done_fence = self.vc.copy(), self.fence.copy()


class Hopper:
    """Per-CTA state of the asynchronous units."""

    def __init__(self, m):
        self.m = m
        self.chunk_cache = {}
        # ordinary data over an mbarrier ends its life (some Triton versions reuse the memory without mbarrier.inval)
        m.smem.mbarrier_overwritten = lambda offset: self.bars.pop(offset + SHARED_BASE, None)

    def reset(self):
        self.bars = {}
        self.loads = []  # bulk loads in flight: (mbarrier, function), in order of issue
        self.wg = {}  # warpgroup -> [open group, [closed groups]] of wgmma

    # ---- mbarriers --------------------------------------------------------------------------
    def barrier(self, addr, ins, t):
        b = self.bars.get(addr)
        if b is None:
            raise PtxError(f"mbarrier at shared offset {addr - SHARED_BASE} was not initialised{self.m.where(ins, t)}")
        r = self.m.smem.races
        if r and t >= 0 and r.vc[t // 32, b.owner[0]] < b.owner[1]:
            raise RaceError(
                f"mbarrier at shared offset {addr - SHARED_BASE} used without synchronisation with its "
                f"initialisation by warp {b.owner[0]}{self.m.where(ins, t)}"
            )
        return b

    def init(self, addr, count, ins, t):
        m = self.m
        idx = m.smem.locate(lambda _: m.where(ins, t), np.array([addr]), 8, None)
        r = m.smem.races
        b = self.bars[addr] = MBarrier(count, r.n if r else 1)
        b.owner = (t // 32, int(r.vc[t // 32, t // 32]) if r else 0)
        m.smem.set_state(idx, 8, m.smem.MBAR)

    def invalidate(self, addr, ins, t):
        self.barrier(addr, ins, t)
        del self.bars[addr]
        self.m.smem.set_state(np.array([(addr - SHARED_BASE) >> 3]), 8, self.m.smem.FREE)

    def arrive(self, addr, count, tx, ins, t):
        b = self.barrier(addr, ins, t)
        r = self.m.smem.races
        if r:
            w = t // 32
            b.vc, b.fence = np.maximum(b.vc, r.vc[w]), np.maximum(b.fence, r.fence[w])
            r.vc[w, w] += 1
        b.tx += tx
        b.pending -= count
        if b.pending < 0:
            raise PtxError(
                f"mbarrier at shared offset {addr - SHARED_BASE}: more arrivals than the {b.expected} "
                f"expected{self.m.where(ins, t)}"
            )
        if count:
            b.settle()

    def compile_wait(self, ins):
        """mbarrier.try_wait/test_wait: the agent sleeps until the phase is complete."""
        m = self.m
        if ins.guard is not None or "parity" not in ins.parts:
            raise NotImplementedError(f"PTX instruction not supported: {ins.text()}")
        A, P = address_of(m, ins, ins.ops[1], "u32"), m.source(ins.ops[2], "u32", ins)
        D = m.rows[ins.ops[0].index]

        def sync(agent):
            mask = agent.top()[1]
            sel = selection(mask)
            addr, par = A(sel), (P if sel is None else P[sel]) & np.uint32(1)
            pairs = np.unique(addr.astype(np.int64) * 2 + par)
            t = 0 if sel is None else int(sel[0])
            waits = [(self.barrier(int(p) >> 1, ins, t), int(p) & 1) for p in pairs]

            def ready():
                return all(b.phase & 1 != p for b, p in waits)

            if not ready():
                agent.wait = ("mbarrier", ready, [b for b, _ in waits])
                return False
            r = m.smem.races
            if r:
                w = slice(0, m.nw) if mask is None else np.flatnonzero(mask.reshape(m.nw, 32).any(1))
                for b, _ in waits:
                    r.vc[w] = np.maximum(r.vc[w], b.done_vc)
                    r.fence[w] = np.maximum(r.fence[w], b.done_fence)
            if sel is None:
                D.fill(True)
            else:
                D[sel] = True
            return True

        return sync

    # ---- bulk copies ------------------------------------------------------------------------
    def progress(self):
        """All agents wait: let the copy engine finish one load that somebody waits for; False if there is none."""
        waited = {id(b) for a in self.m.agents if a.wait[0] == "mbarrier" for b in a.wait[2]}
        for i, (bar, copy) in enumerate(self.loads):
            if id(bar) in waited:
                del self.loads[i]
                copy()
                return True
        return False

    def finish(self):
        if self.loads:
            raise PtxError(f"CTA {self.m.cta} exits with bulk loads never waited for")
        for open_, groups in self.wg.values():
            if open_ or any(groups):
                raise PtxError(f"CTA {self.m.cta} exits with wgmma operations never waited for")

    def chunks(self, start, nbytes, swizzle):
        """Element numbers (16 bytes each) of a dense box in shared memory, and their race granules."""
        key = (start, nbytes, swizzle)
        e = self.chunk_cache.get(key)
        if e is None:
            a = swizzled(start + np.arange(nbytes // 16, dtype=np.int64) * 16, swizzle)
            idx = (a - SHARED_BASE) >> 4
            e = self.chunk_cache[key] = (idx, self.m.smem.granules(idx, 16))
        return e

    def box_check(self, start, tm, ins, t):
        m = self.m
        align = 128
        off = start - SHARED_BASE
        if start % align:
            raise MemoryFault(f"bulk copy: shared offset {off} is not a multiple of {align}{m.where(ins, t)}")
        if off < 0 or off + tm.bytes > m.smem.limit:
            raise MemoryFault(
                f"bulk copy of {tm.bytes} bytes at shared offset {off} of {m.smem.limit}{m.where(ins, t)}"
            )

    def read_map(self, addr, ins, t):
        m = self.m

        def complain(why):
            raise PtxError(f"bad tensor map at {addr:#x}: {why}{m.where(ins, t)}")

        if addr % 64:
            complain("not aligned to 64 bytes")
        return TensorMap(m.gmem.read_bytes(lambda _: m.where(ins, t), addr, 128), complain)

    def issue_load(self, start, tm, coords, bar_addr, ins, t):
        m, s = self.m, self.m.smem
        w = t // 32
        where = lambda _: m.where(ins, t)  # noqa: E731
        self.box_check(start, tm, ins, t)
        bar = self.barrier(bar_addr, ins, t)
        idx, g = self.chunks(start, tm.bytes, tm.swizzle)
        s.check_not_in_flight(where, idx, 16, None)
        r = s.races
        if r:
            act = np.full(len(idx), r.engine)
            r.vc[r.engine] = np.maximum(r.vc[r.engine], r.vc[w])
            r.write(ins, where, g, act, None, generic=False)
        s.view[16][idx] = complex(np.nan, np.nan)
        s.set_state(idx, 16, s.FLIGHT)

        def copy():
            data = self.fetch(tm, coords, ins, t)
            s.view[16][idx] = data
            s.set_state(idx, 16, s.VALID)
            if r:
                r.wclk[g] = r.vc[r.engine, r.engine]
                bar.vc = np.maximum(bar.vc, r.vc[r.engine])
                r.vc[r.engine, r.engine] += 1
            bar.tx -= tm.bytes
            bar.settle()

        self.loads.append((bar, copy))

    def fetch(self, tm, coords, ins, t):
        """The box as 16-byte elements, with the fill value outside the tensor."""
        m = self.m
        where = lambda _: m.where(ins, t)  # noqa: E731
        addr, inside = tm.elements(coords)
        raw = np.zeros(len(addr), WIDE[tm.es])
        if tm.fill and tm.elemtype in NAN_BITS:
            raw[:] = NAN_BITS[tm.elemtype]
        k = np.flatnonzero(inside)
        if len(k):
            a = addr[k].view(np.uint64)
            m.gmem.check(where, a, tm.es, np.full(len(k), t), False, [None])
            raw[k] = m.gmem.gather(a, tm.es)
        return raw.view(WIDE[16])

    def build_bulk(self, ins):
        m, p = self.m, ins.parts
        if "commit_group" in p or "wait_group" in p:  # groups of bulk stores, of which there are none
            return lambda mask: None
        if "prefetch" in p:
            return lambda mask: None
        to_shared = any(x.startswith("mbarrier::complete_tx") for x in p)
        if {"multicast::cluster", "im2col", "tile::gather4"} & set(p) or "tensor" not in p or not to_shared:
            unsupported(ins)
        rank = next(int(x[0]) for x in p if re.fullmatch(r"[1-5]d", x))
        smem, tensor, bar = ins.ops[:3]
        if len(tensor.coords) != rank:
            unsupported(ins)
        M = address_of(m, ins, Mem(tensor.base, tensor.offset), "u64")
        A = address_of(m, ins, smem, "u32")
        C = [m.source(c, "s32", ins) for c in tensor.coords]
        B = address_of(m, ins, bar, "u32")

        def run(mask):
            for t in m.tid if mask is None else np.flatnonzero(mask):
                sel = np.array([t])
                t = int(t)
                tm = self.read_map(int(M(sel)[0]), ins, t)
                if tm.n != rank:
                    raise PtxError(f"tensor map of rank {tm.n}{m.where(ins, t)}")
                coords, start = [int(c[t]) for c in C], int(A(sel)[0])
                self.issue_load(start, tm, coords, int(B(sel)[0]), ins, t)

        return run

    # ---- wgmma ------------------------------------------------------------------------------
    def tile_chunks(self, desc, rows, kbytes, mn_major, ins):
        """Shared-memory elements (16 bytes) of an operand tile. K-major: (rows, kbytes / 16). MN-major, for 2-byte
        elements: (K, rows / 8)."""
        key = (desc, rows, kbytes, mn_major)
        e = self.chunk_cache.get(key)
        if e is not None:
            return e
        start, lead, stride = (desc & 0x3FFF) << 4, (desc >> 16 & 0x3FFF) << 4, (desc >> 32 & 0x3FFF) << 4
        mode = {0: 0, 1: 3, 2: 2, 3: 1}[desc >> 62 & 3]  # as swizzle_mode of tensor maps
        if desc >> 49 & 7:
            unsupported(ins, "matrix descriptor with a base offset")
        span = 16 << mode
        if not mn_major:
            r, c = np.arange(rows)[:, None], np.arange(kbytes // 16)[None, :]
            if mode:
                a = start + r // 8 * stride + r % 8 * span + c * 16
            else:
                a = start + r // 8 * stride + c * lead + r % 8 * 16
        else:
            k, j = np.arange(kbytes // 2)[:, None], np.arange(rows // 8)[None, :]
            if mode:
                per = span // 16
                a = start + j // per * lead + k // 8 * stride + k % 8 * span + j % per * 16
            else:
                a = start + j * stride + k // 8 * lead + k % 8 * 16
        a = swizzled(a, mode)
        off = a - SHARED_BASE
        if off.min() < 0 or off.max() + 16 > self.m.smem.limit:
            raise MemoryFault(
                f"wgmma operand outside shared memory: offsets {int(off.min())}..{int(off.max()) + 16} of "
                f"{self.m.smem.limit}{self.m.where(ins, -1)}"
            )
        idx = off >> 4
        if len(self.chunk_cache) > 4096:
            self.chunk_cache.clear()
        e = self.chunk_cache[key] = (idx, self.m.smem.granules(idx.reshape(-1), 16))
        return e

    def check_registers(self, ins, hits, mask):
        """ins is about to touch registers of wgmmas (hits, see Program.wgmma_hazards): none may be in flight."""
        for g, (open_, groups) in self.wg.items():
            active = None if mask is None else mask[128 * g : 128 * g + 128]
            if active is not None and not active.any():
                continue  # another warpgroup's registers
            for k, group in enumerate([*groups, open_]):
                for o in group:
                    hit = hits.get(o.sh.ins)
                    if hit is None:
                        continue
                    m = self.m
                    t = 128 * g + (0 if active is None else int(active.argmax()))
                    left = len(groups) - 1 - k
                    state = (
                        "not committed yet"
                        if left < 0
                        else f"committed and not waited for; wgmma.wait_group {left} or less would cover it"
                    )
                    raise RegisterHazard(
                        f"register {hit[0]} {hit[1]} of a wgmma in flight{m.where(ins, t)}\n  that wgmma "
                        f"({state}):{m.where(o.sh.ins, -1)}"
                    )

    def build_wgmma(self, ins):
        m, p = self.m, ins.parts
        if p[1] == "fence":
            return lambda mask: None
        groups = lambda mask: sorted({int(w) // 4 for w in np.arange(m.nw)[m.warps_of(mask, ins)]})  # noqa: E731
        if p[1] == "commit_group":

            def commit(mask):
                for g in groups(mask):
                    e = self.wg.setdefault(g, [[], []])
                    e[1].append(e[0])
                    e[0] = []

            return commit
        if p[1] == "wait_group":
            n = ins.ops[0].value

            def wait(mask):
                for g in groups(mask):
                    e = self.wg.get(g)
                    if e is None:
                        continue
                    while len(e[1]) > n:
                        for o in e[1].pop(0):
                            o.execute()
                    for o in [x for q in e[1] for x in q] + e[0]:
                        o.mark()

            return wait
        shape = WgmmaShape(self, ins)

        def run(mask):
            ws = np.arange(m.nw)[m.warps_of(mask, ins)]
            gs = groups(mask)
            if len(ws) != 4 * len(gs):
                raise PtxError(f"wgmma executed by part of a warpgroup only{m.where(ins, int(ws[0]) * 32)}")
            for g in gs:
                self.wg.setdefault(g, [[], []])[0].append(shape.issue(g))

        return run


class WgmmaShape:
    def __init__(self, h, ins):
        m = self.m = h.m
        self.h, self.ins = h, ins
        s = re.fullmatch(r"m64n(\d+)k16", ins.parts[4])
        dty, self.aty, self.bty = ins.parts[5:8]
        if not s or "sp" in ins.parts or dty != "f32" or not {self.aty, self.bty} <= {"f16", "bf16"}:
            unsupported(ins)
        self.N, self.K = int(s.group(1)), 16
        ops = ins.ops
        self.rows = np.array([r.row for r in ops[0].items])
        regs = self.N // 2
        if len(self.rows) != regs or not all(isinstance(r, Reg) for r in ops[0].items):
            unsupported(ins, "accumulator")
        self.a_rows = np.array([r.row for r in ops[1].items]) if isinstance(ops[1], Vec) else None
        self.a_desc = None if self.a_rows is not None else m.source(ops[1], "u64", ins)
        self.b_desc = m.source(ops[2], "u64", ins)
        self.scale_d = m.source(ops[3], "pred", ins)
        imm = [o.value for o in ops[4:]]
        self.sa, self.sb = imm[:2]
        self.ta, self.tb = ([0] if self.a_rows is not None else []) + imm[2:]
        self.F = m.files[4].reshape(-1, m.nw, 32)
        # accumulator position (row, column) of (register, warp, lane)
        j, w, lane = np.ogrid[:regs, :4, :32]
        self.d_map = (16 * w + 8 * (j // 2 % 2) + lane // 4) * self.N + j // 4 * 8 + lane % 4 * 2 + j % 2
        if self.a_rows is not None:
            r, w, lane, i = np.ogrid[: len(self.a_rows), :4, :32, :2]
            pos = (16 * w + 8 * (r % 2) + lane // 4) * self.K + r // 2 * 8 + lane % 4 * 2 + i
            self.a_map = np.argsort(pos.reshape(-1))

    def issue(self, g):
        return WgmmaOp(self, g)

    def operand(self, desc, rows, mn_major):
        """(rows, K) matrix, its granules and chunks."""
        idx, gran = self.h.tile_chunks(desc, rows, 2 * self.K, mn_major, self.ins)
        return idx, gran

    def load(self, idx, mn_major, ty, rows):
        raw = np.ascontiguousarray(self.m.smem.view[16][idx]).view(np.uint16)
        x = decode(raw.reshape(-1), ty)
        return x.reshape(self.K, rows).T if mn_major else x.reshape(rows, self.K)


class WgmmaOp:
    def __init__(self, sh, g):
        m = sh.m
        self.sh, self.g = sh, g
        t = g * 128
        sl = slice(t, t + 128)
        self.scale_d = bool(sh.scale_d[t])
        descs = [(sh.b_desc, sh.N, sh.tb)] + ([(sh.a_desc, 64, sh.ta)] if sh.a_desc is not None else [])
        self.tiles = []
        s = m.smem
        where = lambda _: m.where(sh.ins, t)  # noqa: E731
        for d, rows, tr in descs:
            if (d[sl] != d[t]).any():
                raise PtxError(f"wgmma descriptor differs within the warpgroup{m.where(sh.ins, t)}")
            idx, gran = sh.operand(int(d[t]), rows, tr)
            s.check_valid(where, idx.reshape(-1), 16, None)
            self.tiles.append((idx, gran, tr, rows))
            if s.races:
                for w in range(4 * g, 4 * g + 4):
                    s.races.async_read(sh.ins, where, gran, w)
        if s.races:
            s.races.pending += 1
        self.mark()

    def mark(self):
        r = self.sh.m.smem.races
        if r:
            for _, gran, _, _ in self.tiles:
                r.rclk[4 * self.g : 4 * self.g + 4, gran] = PENDING

    def execute(self):
        sh, m, g = self.sh, self.sh.m, self.g
        ws = slice(4 * g, 4 * g + 4)
        idx, _, tr, _ = self.tiles[0]
        b = sh.load(idx, tr, sh.bty, sh.N)
        if sh.a_rows is not None:
            raw = np.ascontiguousarray(sh.F[sh.a_rows, ws]).view(np.uint16).reshape(-1)
            a = decode(raw[sh.a_map], sh.aty).reshape(64, sh.K)
        else:
            idx, _, tr, _ = self.tiles[1]
            a = sh.load(idx, tr, sh.aty, 64)
        d = a @ b.T
        if sh.sa * sh.sb < 0:
            d = -d
        acc = np.ascontiguousarray(sh.F[sh.rows, ws])
        new = d.reshape(-1)[sh.d_map.reshape(-1)]
        if self.scale_d:
            new = new + acc.view(np.float32).reshape(-1)
        out = new.astype(np.float32).view(np.uint32)
        sh.F[sh.rows, ws] = out.reshape(len(sh.rows), 4, 32)
        r = m.smem.races
        if r:
            r.pending -= 1
            w = np.arange(4 * g, 4 * g + 4)
            for _, gran, _, _ in self.tiles:
                r.rclk[w[:, None], gran.reshape(1, -1)] = r.vc[w, w][:, None]


@op("wgmma")
def b_wgmma(m, ins):
    return m.hopper.build_wgmma(ins)


@op("mbarrier")
def b_mbarrier(m, ins):
    h, p = m.hopper, ins.parts
    kind = p[1]
    if any("cluster" in x for x in p) or kind not in ("init", "inval", "arrive", "expect_tx"):
        unsupported(ins)
    ops = list(ins.ops)
    if kind == "arrive" and not isinstance(ops[0], Mem):
        if isinstance(ops.pop(0), Reg):
            unsupported(ins, "mbarrier state operand")
    A = address_of(m, ins, ops[0], "u32")
    N = m.source(ops[1], "u32", ins) if len(ops) > 1 else None
    expect = "expect_tx" in p

    def run(mask):
        for t in m.tid if mask is None else np.flatnonzero(mask):
            t = int(t)
            a = int(A(np.array([t]))[0])
            n = 1 if N is None else int(N[t])
            if kind == "init":
                h.init(a, n, ins, t)
            elif kind == "inval":
                h.invalidate(a, ins, t)
            elif kind == "expect_tx":
                h.barrier(a, ins, t).tx += n
            elif expect:
                h.arrive(a, 1, n, ins, t)
            else:
                h.arrive(a, n, 0, ins, t)

    return run


@op("tensormap")
def b_tensormap(m, ins):
    if ins.parts[1] == "cp_fenceproxy":
        D, S = address_of(m, ins, ins.ops[0], "u64"), address_of(m, ins, ins.ops[1], "u32")
        if ins.ops[2].value != 128 or "global" not in ins.parts[2]:
            unsupported(ins)
        acc = GlobalAccess(m, ins, 16, True)

        def run(mask):
            for w in np.arange(m.nw)[m.warps_of(mask, ins)]:
                sel = np.array([w * 32])
                src, dst = int(S(sel)[0]) - SHARED_BASE, int(D(sel)[0])
                idx = np.arange(src >> 4, (src >> 4) + 8)
                where = lambda _: m.where(ins, int(w) * 32)  # noqa: B023, E731
                m.smem.check_valid(where, idx, 16, None)
                if m.smem.races:
                    m.smem.races.read(ins, where, m.smem.granules(idx, 16), np.full(8, w), None)
                if dst % 128:
                    raise MemoryFault(f"tensor map copied to {dst:#x}, not a multiple of 128{where(0)}")
                a = (dst + 16 * np.arange(8)).astype(np.uint64)
                acc.check(a, np.full(8, w * 32))
                m.gmem.scatter(a, 16, m.smem.view[16][idx])

        return run
    if ins.parts[1] != "replace" or ins.parts[2] != "tile" or ins.parts[3] not in FIELD:
        unsupported(ins)
    name, ty = FIELD[ins.parts[3]]
    if "shared" not in ins.op:
        unsupported(ins)
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
