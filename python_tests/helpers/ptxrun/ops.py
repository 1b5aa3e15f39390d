"""Instructions that touch memory or cross lanes. build(machine, instr) -> function(mask), mask None = all threads.

Guards are applied by the machine, so `mask` already has them."""

import re

import numpy as np

from .alu import BITS, NP
from .errors import PtxError, RaceError
from .memory import LOCAL_WINDOW, SHARED_WINDOW, WIDE
from .parser import SINK, Imm, Pair, Reg, Sym, Vec

OPS = {}


def op(*names):
    def deco(f):
        for n in names:
            OPS[n] = f
        return f

    return deco


def unsupported(ins, why=""):
    raise NotImplementedError(f"PTX instruction not supported: {ins.text()}{' (' + why + ')' if why else ''}")


def selection(mask):
    return None if mask is None else np.flatnonzero(mask)


def address_of(m, ins, mem, ty):
    """Function(sel) -> addresses of the selected threads, as uint32 or uint64."""
    t = NP[ty]
    if isinstance(mem.base, Reg):
        row = m.source(mem.base, f"u{mem.base.size * 8}", ins)
        if row.dtype != t:
            if row.itemsize > t().itemsize:
                row = row.view(t)[:: row.itemsize // t().itemsize]  # low half: a 32-bit address space
            else:
                narrow = row
                off = t(mem.offset & ((1 << BITS[ty]) - 1))
                return lambda sel: (narrow if sel is None else narrow[sel]).astype(t) + off
        if mem.offset == 0:
            return lambda sel: row if sel is None else row[sel]
        off = t(mem.offset & ((1 << BITS[ty]) - 1))
        return lambda sel: (row if sel is None else row[sel]) + off
    if mem.base is None:
        row = m.const(mem.offset, t)
    else:
        row = m.source(mem, ty, ins)
    return lambda sel: row if sel is None else row[sel]


def space_of(ins):
    for p in ins.parts[1:]:
        p = p.split("::")[0]
        if p in ("global", "shared", "local", "param", "const"):
            return p
    return "generic"


def vector_width(ins):
    return next((int(p[1:]) for p in ins.parts if re.fullmatch(r"v[248]", p)), 1)


class GlobalAccess:
    """Checked access to global memory by one instruction."""

    def __init__(self, m, ins, width, write):
        if width not in WIDE:
            unsupported(ins, f"{width}-byte access")
        self.m, self.width, self.write = m, width, write
        self.cache = [None]
        self.where = lambda t: m.where(ins, t)

    def check(self, addr, sel):
        self.m.gmem.check(self.where, addr, self.width, sel, self.write, self.cache)


class SharedAccess:
    """Checked access to shared memory by one instruction, with race detection."""

    def __init__(self, m, ins, width):
        if width not in WIDE:
            unsupported(ins, f"{width}-byte access")
        self.m, self.ins, self.width, self.s = m, ins, width, m.smem
        self.where = lambda t: m.where(ins, t)
        self.cache = {}

    def locate(self, addr, sel):
        """-> element indices, race granules, actors (cached by address pattern)."""
        key = (addr.tobytes(), None if sel is None else sel.tobytes())
        e = self.cache.get(key)
        m = self.m
        if e is None:
            idx = self.s.locate(self.where, addr, self.width, sel)
            warps = m.warp if sel is None else m.warp[sel]
            g = self.s.granules(idx, self.width) if self.s.races else None
            if len(self.cache) > 512:
                self.cache.clear()
            e = self.cache[key] = (idx, g, warps)
        return e

    def load(self, addr, sel):
        idx, g, act = self.locate(addr, sel)
        s = self.s
        s.check_valid(self.where, idx, self.width, sel)
        if g is not None:
            s.races.read(self.ins, self.where, g, act, sel)
        return s.view[self.width][idx]

    def store(self, addr, sel, values):
        idx, g, act = self.locate(addr, sel)
        s = self.s
        s.check_not_in_flight(self.where, idx, self.width, sel)
        if g is not None:
            s.races.write(self.ins, self.where, g, act, sel)
        s.view[self.width][idx] = values
        s.set_state(idx, self.width, s.VALID)
        if g is not None:
            bad = differ(s.view[self.width][idx], values, self.width)
            if bad.any():
                k = int(np.flatnonzero(bad)[0])
                raise RaceError(
                    f"threads store different values to shared offset {int(idx[k]) * self.width} in one instruction"
                    f"{self.where(k if sel is None else int(sel[k]))}"
                )


def differ(now, stored, width):
    """Tell which threads do not find the value that they just stored."""
    if width == 16:
        return (now.view(np.uint64) != stored.view(np.uint64)).reshape(-1, 2).any(1)
    return now != stored


class LocalAccess:
    def __init__(self, m, ins, width):
        if width not in WIDE:
            unsupported(ins, f"{width}-byte access")
        self.mem, self.width, self.where = m.lmem, width, lambda t: m.where(ins, t)

    def load(self, addr, sel):
        return self.mem.view[self.width][self.mem.locate(self.where, addr, self.width, sel)]

    def store(self, addr, sel, values):
        self.mem.view[self.width][self.mem.locate(self.where, addr, self.width, sel)] = values


# ---- ld / st ------------------------------------------------------------------------------------


def destinations(m, ins, x, ty):
    """Rows (at full register width, typed so that assignment extends) that a load writes."""
    es = BITS[ty] // 8
    out = []
    for r in x.items if isinstance(x, Vec) else (x,):
        if r is SINK:
            out.append(None)
            continue
        row = m.rows[r.index]
        if r.size < es or r.type == "pred":
            unsupported(ins, f"destination {r}")
        out.append(row.view(NP[f"{'s' if ty[0] == 's' else 'u'}{r.size * 8}"]))
    return out


def writer(m, ins, x, ty, n):
    """Function(raw, sel) that spreads wide elements over the destination registers."""
    D = destinations(m, ins, x, ty)
    if len(D) != n:
        unsupported(ins, "vector length")
    elem = NP[("s" if ty[0] == "s" else "u") + str(BITS[ty])]

    def put(raw, sel):
        v = raw.view(elem)
        if n > 1:
            v = v.reshape(-1, n)
        for i, d in enumerate(D):
            if d is None:
                continue
            c = v if n == 1 else v[:, i]
            if sel is None:
                d[...] = c
            else:
                d[sel] = c

    return put


def reader(m, ins, x, ty, n):
    """Function(sel) that packs the source registers into wide elements."""
    u = f"u{BITS[ty]}"
    S = [m.source(r, u, ins) for r in (x.items if isinstance(x, Vec) else (x,))]
    if len(S) != n:
        unsupported(ins, "vector length")
    width = n * BITS[ty] // 8
    wide, t = WIDE.get(width), NP[u]
    if wide is None:
        unsupported(ins, f"{width}-byte access")

    def get(sel):
        if n == 1:
            return np.ascontiguousarray(S[0]) if sel is None else S[0][sel]
        v = np.empty((len(S[0]) if sel is None else len(sel), n), t)
        for i, s in enumerate(S):
            v[:, i] = s if sel is None else s[sel]
        return v.view(wide).reshape(-1)

    return get


def store_global(m, ins, addr, width, values, sel):
    m.gmem.scatter(addr, width, values)
    bad = differ(m.gmem.gather(addr, width), values, width)
    if bad.any():
        k = int(np.flatnonzero(bad)[0])
        raise RaceError(
            f"threads of one CTA store different values to {int(addr[k]):#x} in one instruction"
            f"{m.where(ins, k if sel is None else int(sel[k]))}"
        )


@op("ld", "ldu")
def b_ld(m, ins):
    ty, n = ins.parts[-1], vector_width(ins)
    width = n * BITS[ty] // 8
    mem = ins.ops[1]
    space = space_of(ins)
    put = writer(m, ins, ins.ops[0], ty, n)
    if space == "param" and isinstance(mem.base, Sym):
        kind, addr = m.symbols[mem.base.name]
        if kind == "param":  # kernel parameter: the same in all threads
            raw = np.frombuffer(
                m.gmem.read_bytes(lambda t: m.where(ins, t), m.opts["param_base"] + addr + mem.offset, width), np.uint8
            )
            vals = np.ascontiguousarray(np.broadcast_to(raw, (m.T, width))).view(WIDE[width]).reshape(-1)
            return lambda mask: put(vals if mask is None else vals[mask], selection(mask))
        space = "local"  # parameter of a call
    elif space == "param":
        unsupported(ins, "parameter address in a register")
    return space_access(m, ins, space, width, mem, "load", put)


def space_access(m, ins, space, width, mem, kind, fn):
    """Load: fn(raw, sel). Store: fn(sel) -> raw."""
    load = kind == "load"
    if space in ("global", "const"):
        A, acc = address_of(m, ins, mem, "u64"), GlobalAccess(m, ins, width, not load)
        g = m.gmem

        def run(mask):
            sel = selection(mask)
            addr = A(sel)
            acc.check(addr, sel)
            if load:
                fn(g.gather(addr, width), sel)
            else:
                store_global(m, ins, addr, width, fn(sel), sel)

        return run
    if space == "shared" or space == "local":
        A = address_of(m, ins, mem, "u32")
        acc = SharedAccess(m, ins, width) if space == "shared" else LocalAccess(m, ins, width)
        if load:

            def run(mask):
                sel = selection(mask)
                fn(acc.load(A(sel), sel), sel)
        else:

            def run(mask):
                sel = selection(mask)
                acc.store(A(sel), sel, fn(sel))

        return run
    A = address_of(m, ins, mem, "u64")  # generic address: look at the first active thread
    made = {}

    def run(mask):
        sel = selection(mask)
        addr = A(sel)
        if len(addr) == 0:
            return
        windows = np.unique(addr >> np.uint64(60))
        if len(windows) > 1:
            unsupported(ins, "generic access to several spaces at once")
        w = int(windows[0])
        s = "shared" if w == SHARED_WINDOW >> 60 else "local" if w == LOCAL_WINDOW >> 60 else "global"
        acc = made.get(s)
        if acc is None:
            acc = made[s] = (
                SharedAccess(m, ins, width)
                if s == "shared"
                else LocalAccess(m, ins, width)
                if s == "local"
                else GlobalAccess(m, ins, width, not load)
            )
        if s == "global":
            acc.check(addr, sel)
            if load:
                fn(m.gmem.gather(addr, width), sel)
            else:
                store_global(m, ins, addr, width, fn(sel), sel)
            return
        off = (addr - np.uint64(SHARED_WINDOW if s == "shared" else LOCAL_WINDOW)).astype(np.uint32)
        if load:
            fn(acc.load(off, sel), sel)
        else:
            acc.store(off, sel, fn(sel))

    return run


@op("st")
def b_st(m, ins):
    if "async" in ins.parts or "bulk" in ins.parts:
        unsupported(ins)
    ty, n = ins.parts[-1], vector_width(ins)
    width = n * BITS[ty] // 8
    space = "local" if space_of(ins) == "param" else space_of(ins)
    return space_access(m, ins, space, width, ins.ops[0], "store", reader(m, ins, ins.ops[1], ty, n))


# ---- cp.async -----------------------------------------------------------------------------------


@op("cp")
def b_cp(m, ins):
    if "bulk" in ins.parts or "reduce" in ins.parts or "mbarrier" in ins.parts:
        return m.hopper.copies.build(ins)
    if ins.parts[1] != "async":
        unsupported(ins)
    if "commit_group" in ins.parts:
        return lambda mask: commit_group(m, mask)
    if "wait_group" in ins.parts:
        n = ins.ops[0].value
        return lambda mask: wait_group(m, mask, n)
    if "wait_all" in ins.parts:

        def wait_all(mask):
            commit_group(m, mask)
            wait_group(m, mask, 0)

        return wait_all
    size = ins.ops[2].value
    extra = list(ins.ops[3:])
    if any("cache_hint" in p for p in ins.parts):
        extra.pop()
    S = ignore = None
    if extra:
        if isinstance(extra[0], Reg) and extra[0].type == "pred":
            ignore = m.source(extra[0], "pred", ins)
        else:
            S = m.source(extra[0], "u32", ins)
    D = address_of(m, ins, ins.ops[0], "u32")
    A = address_of(m, ins, ins.ops[1], "u64")
    ga = GlobalAccess(m, ins, size, False)
    sa = SharedAccess(m, ins, size)
    wide = WIDE[size]
    poison = np.frombuffer(b"\xff" * size, wide)[0]

    def run(mask):
        sel = selection(mask)
        idx, g, act = sa.locate(D(sel), sel)
        addr = A(sel)
        n = len(idx)
        have = np.full(n, size, np.uint32) if S is None else (S if sel is None else S[sel])
        if ignore is not None:
            have = np.where(ignore if sel is None else ignore[sel], np.uint32(0), have)
        full = have == size
        if full.all():
            ga.check(addr, sel)
            data = m.gmem.gather(addr, size)
        else:
            data = np.zeros(n, wide)
            k = np.flatnonzero(full)
            tids = k if sel is None else sel[k]
            if len(k):
                ga.check(addr[k], tids)
                data[k] = m.gmem.gather(addr[k], size)
            part = np.flatnonzero(~full & (have != 0))
            for i in part:
                h = int(have[i])
                t = int(i) if sel is None else int(sel[i])
                if h > size or int(addr[i]) % size:
                    raise PtxError(f"cp.async with source size {h} of {size} at {int(addr[i]):#x}{m.where(ins, t)}")
                data[i : i + 1].view(np.uint8)[:h] = np.frombuffer(
                    m.gmem.read_bytes(ga.where, int(addr[i]), h), np.uint8
                )
        m.smem.check_not_in_flight(sa.where, idx, size, sel)
        if g is not None:
            m.smem.races.write(ins, sa.where, g, act, sel)
        m.smem.view[size][idx] = poison
        m.smem.set_state(idx, size, m.smem.FLIGHT)
        tids = m.tid if sel is None else sel
        gid = int(m.groups[0]) if m.groups_uniform else m.groups[tids]
        m.async_groups.append((gid, tids, idx, size, data, g, act))

    return run


def commit_group(m, mask):
    if mask is None:
        m.groups += 1
    else:
        m.groups_uniform = False
        m.groups[mask] += 1
        for i, e in enumerate(m.async_groups):
            if isinstance(e[0], int):
                m.async_groups[i] = (np.full(len(e[1]), e[0]), *e[1:])


def wait_group(m, mask, n):
    keep = []
    for e in m.async_groups:
        gid, tids, idx, size, data, g, act = e
        if mask is None and isinstance(gid, int):
            done = gid < int(m.groups[0]) - n
            if done:
                land(m, idx, size, data, g, act)
            else:
                keep.append(e)
            continue
        done = gid < m.groups[tids] - n
        if mask is not None:
            done &= mask[tids]
        k = np.flatnonzero(done)
        if len(k):
            land(m, idx[k], size, data[k], None if g is None else g[k], act[k])
        if len(k) < len(tids):
            r = np.flatnonzero(~done)
            gid = gid if isinstance(gid, int) else gid[r]
            keep.append((gid, tids[r], idx[r], size, data[r], None if g is None else g[r], act[r]))
    m.async_groups[:] = keep


def land(m, idx, size, data, g, act):
    """A copy becomes visible to the thread that waited for it."""
    s = m.smem
    s.view[size][idx] = data
    s.set_state(idx, size, s.VALID)
    if g is not None:
        s.races.wact[g] = act[:, None]
        s.races.wclk[g] = s.races.vc[act, act][:, None]


# ---- matrices in shared memory ------------------------------------------------------------------


def matrix_lanes(m, ins, count):
    """Thread numbers whose addresses count, for all warps: (nw, 8 * count)."""
    return (np.arange(m.nw)[:, None] * 32 + np.arange(8 * count)).astype(np.int64)


def matrix_shape(ins):
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16":
        unsupported(ins)
    return next(int(p[1]) for p in ins.parts if p in ("x1", "x2", "x4")), "trans" in ins.parts


@op("ldmatrix")
def b_ldmatrix(m, ins):
    x, trans = matrix_shape(ins)
    lanes = matrix_lanes(m, ins, x)
    A = address_of(m, ins, ins.ops[1], "u32")
    acc = SharedAccess(m, ins, 16)
    D = [
        m.rows[r.index].reshape(m.nw, 32) for r in (ins.ops[0].items if isinstance(ins.ops[0], Vec) else (ins.ops[0],))
    ]
    if len(D) != x:
        unsupported(ins)

    def run(mask):
        ws = m.warps_of(mask, ins)
        sel = lanes[ws].reshape(-1)
        raw = acc.load(A(None if x == 4 and mask is None else sel), None if x == 4 and mask is None else sel)
        if trans:
            v = raw.view(np.uint16).reshape(-1, x, 8, 8).swapaxes(2, 3)
            v = np.ascontiguousarray(v).view(np.uint32).reshape(-1, x, 32)
        else:
            v = raw.view(np.uint32).reshape(-1, x, 32)
        for i, d in enumerate(D):
            d[ws] = v[:, i]

    return run


@op("stmatrix")
def b_stmatrix(m, ins):
    x, trans = matrix_shape(ins)
    lanes = matrix_lanes(m, ins, x)
    A = address_of(m, ins, ins.ops[0], "u32")
    acc = SharedAccess(m, ins, 16)
    S = [
        m.source(r, "u32", ins).reshape(m.nw, 32)
        for r in (ins.ops[1].items if isinstance(ins.ops[1], Vec) else (ins.ops[1],))
    ]
    if len(S) != x:
        unsupported(ins)

    def run(mask):
        ws = m.warps_of(mask, ins)
        sel = lanes[ws].reshape(-1)
        v = np.stack([s[ws] for s in S], axis=1)  # (w, x, 32)
        if trans:
            v = np.ascontiguousarray(v).view(np.uint16).reshape(-1, x, 8, 8).swapaxes(2, 3)
        raw = np.ascontiguousarray(v).view(np.uint8).reshape(-1).view(WIDE[16])
        acc.store(A(sel), sel, raw)

    return run


# ---- across lanes -------------------------------------------------------------------------------


def member_mask(m, ins, x):
    """Function(mask) that checks the membermask operand."""
    V = m.source(x, "u32", ins)

    def check(mask):
        v = V if mask is None else V[mask]
        if mask is None and (v == np.uint32(0xFFFFFFFF)).all():
            return
        lanes = m.lane if mask is None else m.lane[mask]
        if ((v >> lanes.astype(np.uint32)) & 1 == 0).any():
            raise PtxError(f"a thread that is not in the membermask executes{m.where(ins, 0)}")
        act = m.alive if mask is None else mask
        bits = (act.reshape(m.nw, 32) << np.arange(32)).sum(1).astype(np.uint32)
        alive = (m.alive.reshape(m.nw, 32) << np.arange(32)).sum(1).astype(np.uint32)
        w = m.warp if mask is None else m.warp[mask]
        if (v & alive[w] & ~bits[w]).any():
            raise PtxError(
                f"threads named in the membermask do not take part (divergent .sync instruction){m.where(ins, 0)}"
            )

    return check


@op("shfl")
def b_shfl(m, ins):
    if ins.parts[1] != "sync":
        unsupported(ins)
    mode = ins.parts[2]
    dst, pred = (ins.ops[0].first, ins.ops[0].second) if isinstance(ins.ops[0], Pair) else (ins.ops[0], None)
    S = m.source(ins.ops[1], "u32", ins)
    B, C = m.source(ins.ops[2], "u32", ins), m.source(ins.ops[3], "u32", ins)
    D = None if dst is SINK else m.rows[dst.index]
    P = None if pred is None or pred is SINK else m.rows[pred.index]
    check = member_mask(m, ins, ins.ops[4])
    lane, first = m.lane, m.warp * 32

    def pattern():
        b, c = (B & np.uint32(31)).astype(np.int64), (C & np.uint32(31)).astype(np.int64)
        seg = ((C >> np.uint32(8)) & np.uint32(31)).astype(np.int64)
        hi = (lane & seg) | (c & ~seg)
        lo = lane & seg
        if mode == "up":
            j = lane - b
            p = j >= hi
        else:
            j = lane + b if mode == "down" else lane ^ b if mode == "bfly" else lo | (b & ~seg)
            p = j <= hi
        return first + np.where(p, j, lane), p

    fixed = pattern() if isinstance(ins.ops[2], Imm) and isinstance(ins.ops[3], Imm) else None

    def run(mask):
        check(mask)
        src, p = fixed or pattern()
        if mask is None:
            v = S[src]
            if D is not None:
                D[...] = v
            if P is not None:
                P[...] = p
            return
        bad = mask & ~mask[src]
        if bad.any():
            raise PtxError(f"shfl reads from an inactive lane{m.where(ins, int(np.flatnonzero(bad)[0]))}")
        v = S[src]
        if D is not None:
            np.copyto(D, v, where=mask)
        if P is not None:
            np.copyto(P, p, where=mask)

    return run


def put_row(m, x, values, mask):
    if x is not SINK:
        np.copyto(m.rows[x.index], values, where=True if mask is None else mask)


@op("vote")
def b_vote(m, ins):
    if ins.parts[1] != "sync":
        unsupported(ins)
    mode = ins.parts[2]
    x, neg = ins.ops[1], False
    if not isinstance(x, (Reg, Imm)):
        x, neg = x.reg, True
    S = m.source(x, "pred", ins)
    check = member_mask(m, ins, ins.ops[2])

    def run(mask):
        check(mask)
        act = np.ones(m.T, bool) if mask is None else mask
        p = ((~S if neg else S) & act).reshape(m.nw, 32)
        a = act.reshape(m.nw, 32)
        if mode == "ballot":
            r = (p.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        elif mode == "any":
            r = p.any(1)
        elif mode == "all":
            r = (p | ~a).all(1)
        elif mode == "uni":
            r = (p | ~a).all(1) | ~p.any(1)
        else:
            unsupported(ins)
        put_row(m, ins.ops[0], np.repeat(r, 32), mask)

    return run


@op("elect")
def b_elect(m, ins):
    """The lowest active lane is elected (the hardware may choose another, always the same one)."""
    dst, pred = ins.ops[0].first, ins.ops[0].second
    check = member_mask(m, ins, ins.ops[1])

    def run(mask):
        check(mask)
        act = (np.ones(m.T, bool) if mask is None else mask).reshape(m.nw, 32)
        leader = act.argmax(1)
        put_row(m, dst, np.repeat(leader, 32).astype(np.uint32), mask)
        put_row(m, pred, m.lane == np.repeat(leader, 32), mask)

    return run


# ---- no effect here, or on control only ---------------------------------------------------------


@op("membar", "prefetch", "prefetchu", "nanosleep", "applypriority")
def b_nothing(m, ins):
    """Memory order (all accesses happen in program order here), cache hints and scheduling hints."""
    return lambda mask: None


@op("setmaxnreg")
def b_setmaxnreg(m, ins):
    """Registers are given back; see ``Machine`` for those that are asked for."""
    return lambda mask: m.set_registers(mask, ins)


@op("fence")
def b_fence(m, ins):
    if "proxy" not in ins.parts:
        return lambda mask: None
    kind = ins.parts[ins.parts.index("proxy") + 1]
    if kind.startswith("tensormap"):
        return m.hopper.maps.build_acquire(ins)
    if kind != "async" and not kind.startswith("async"):
        unsupported(ins)
    r = m.smem.races
    if r is None:
        return lambda mask: None

    def run(mask):
        w = slice(0, m.nw) if mask is None else np.flatnonzero(mask.reshape(m.nw, 32).any(1))
        r.fence[w] = np.maximum(r.fence[w], r.vc[w])
        r.tick(w)  # what comes later is not fenced

    return run


@op("bar", "barrier")
def b_bar(m, ins):
    if "warp" in ins.parts:
        return member_mask(m, ins, ins.ops[0])
    if "arrive" not in ins.parts or "cluster" in ins.parts:
        unsupported(ins)

    def run(mask):
        m.arrive(m.uniform(ins.ops[0], ins, mask), m.uniform(ins.ops[1], ins, mask), mask, ins, None)

    return run


@op("trap", "brkpt")
def b_trap(m, ins):
    def run(mask):
        t = 0 if mask is None else int(np.flatnonzero(mask)[0])
        raise PtxError(f"{ins.op}{m.where(ins, t)}")

    return run
