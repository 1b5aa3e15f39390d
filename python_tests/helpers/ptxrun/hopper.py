"""sm_90: mbarriers and wgmma.

Asynchronous work is done as late as the program allows, a wgmma at the wait that covers it. A missing wait then gives
an error or a wrong result, not luck."""

import re

import numpy as np

from .bulk import BulkCopies
from .errors import MemoryFault, PtxError, RaceError, RegisterHazard
from .memory import MAX_MBARRIERS, PENDING, SHARED_BASE
from .mma import decode
from .ops import address_of, op, selection, unsupported
from .parser import Mem, Reg, Vec
from .tensormap import TensorMaps, swizzled


class MBarrier:
    """``actor``: its number for the race detector, for which ``clock`` counts its phases, those of mbarriers that were
    at its address before included. ``passed``: the phase after which a wait passed last."""

    def __init__(self, offset, count, before, actor, races):
        self.offset, self.actor = offset, actor
        self.expected = self.pending = count
        self.tx = self.phase = self.passed = 0
        self.clock = before.clock if before else 0
        self.vc, self.fence = np.zeros((2, races.n if races else actor + 1), np.int32)
        self.done_vc, self.done_fence = self.vc.copy(), self.fence.copy()

    def settle(self, where):
        if self.pending == 0 and self.tx == 0:
            if self.passed < self.phase:
                raise PtxError(
                    f"mbarrier at shared offset {self.offset} completes phase {self.phase} (counted from 0), and "
                    f"nothing waited for the one before: a wait cannot tell them apart{where(0)}"
                )
            self.phase += 1
            self.clock += 1
            self.pending = self.expected
            self.vc[self.actor] = self.clock
            self.done_vc, self.done_fence = self.vc.copy(), self.fence.copy()


class Hopper:
    """Per-CTA state of the asynchronous units."""

    def __init__(self, m):
        self.m = m
        self.copies = BulkCopies(m)
        self.maps = TensorMaps(m)
        self.chunk_cache = {}
        # ordinary data over an mbarrier ends its life (some Triton versions reuse the memory without mbarrier.inval)
        m.smem.mbarrier_overwritten = lambda offset: self.bars.pop(offset + SHARED_BASE, None)

    def reset(self):
        self.copies.reset()
        self.maps.reset()
        self.bars = {}
        self.known = {}  # the mbarrier that was at an address last
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
        before = self.known.get(addr)
        actor = before.actor if before else m.nw + len(self.known)
        if len(self.known) > MAX_MBARRIERS:
            raise NotImplementedError(f"more than {MAX_MBARRIERS} mbarriers in a CTA")
        b = self.bars[addr] = self.known[addr] = MBarrier(addr - SHARED_BASE, count, before, actor, r)
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
            b.settle(lambda _: self.m.where(ins, t))

    def describe(self, waits):
        """What each mbarrier of [(mbarrier, parity that is waited for)] lacks."""
        return "; ".join(
            f"mbarrier at shared offset {b.offset}: parity {parity} of phase {b.phase} (counted from 0), which lacks "
            f"{b.pending} arrivals of {b.expected} and {b.tx} bytes"
            for b, parity in waits
        )

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
                agent.wait = ("mbarrier", ready, waits)
                return False
            for b, _ in waits:
                b.passed = b.phase
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

    # ---- bulk copies and wgmma in flight ----------------------------------------------------
    def progress(self):
        """Let one bulk load land that somebody waits for; False if there is none."""
        waits = [a.wait for a in self.m.agents if a.wait and a.wait[0] == "mbarrier"]
        return self.copies.progress({barrier for wait in waits for barrier, _ in wait[2]})

    def finish(self):
        self.copies.finish()
        for open_, groups in self.wg.values():
            if open_ or any(groups):
                raise PtxError(f"CTA {self.m.cta} exits with wgmma operations never waited for")

    def mark_reads(self, warpgroup):
        """What a warpgroup has in flight still reads shared memory."""
        open_, groups = self.wg.get(warpgroup, ([], []))
        for o in [x for group in groups for x in group] + open_:
            o.mark()
        self.copies.mark_reads(warpgroup)

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
                    self.mark_reads(g)

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
                s.races.async_read(sh.ins, where, gran, range(4 * g, 4 * g + 4))
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
