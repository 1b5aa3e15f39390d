"""Executes one CTA at a time. Every register is an array over the CTA's threads; all warps run in lock-step.

Divergence uses a stack of (block, mask) with reconvergence at the immediate post-dominator. Where a barrier may be
reached inside a divergent region (warp specialisation), the CTA splits into agents, groups of whole warps that run
on their own until they block on a barrier; agents that meet at the same barrier instruction merge again."""

from functools import partial

import numpy as np

from .alu import ALU, BITS, NP, SIGNED, UNSIGNED
from .errors import Deadlock, PtxError, UninitialisedRead
from .hopper import Hopper
from .memory import SHARED_BASE, LocalMemory, SharedMemory
from .mma import fuse_mma
from .ops import OPS
from .parser import SINK, Imm, Mem, Not, Reg, Sym
from .program import defs_uses

POISON = {1: 0x7F, 2: 0x7FFF, 4: 0x7FFF7FFF, 8: 0x7FFF7FFF7FFF7FFF}  # NaN, and no valid address


class Ctx:
    """The context in which a builder compiles one instruction: arrays of its operands and the place of the result."""

    def __init__(self, m, ins, masked):
        self.m, self.ins, self.parts, self.ops = m, ins, ins.parts, ins.ops
        self.masked = masked
        self.copies, self.pre = [], []

    def src(self, x, ty):
        if isinstance(x, Not):
            row = self.m.rows[x.reg.index]
            out = np.empty_like(row)
            self.pre.append(partial(np.invert, row, out))
            return out
        return self.m.source(x, ty, self.ins)

    def row(self, x):
        row = self.m.rows[x.index]
        if not self.masked:
            return row
        tmp = np.zeros_like(row)
        self.copies.append((row, tmp))
        return tmp

    def dst(self, x, ty):
        if x is SINK:
            return np.empty(self.m.T * (2 if ty.endswith("x2") else 1), NP[ty])
        if not isinstance(x, Reg) or x.size * 8 != BITS[ty]:
            raise NotImplementedError(f"destination {x} of type {ty} in {self.ins.text()}")
        return self.row(x).view(NP[ty])

    def put(self, x, ty):
        """Function that stores values of type ty into a register at least as wide (sign or zero extended)."""
        if x is SINK:
            return lambda v: None
        row = self.row(x)
        n, t = x.size * 8, NP[ty]
        if n < BITS[ty]:
            raise NotImplementedError(f"destination {x} too narrow in {self.ins.text()}")
        if n == BITS[ty]:
            D = row.view(t)
            return lambda v: np.copyto(D, v.view(t) if v.dtype != t else v)
        if ty[0] == "s":
            D = row.view(SIGNED[n])
            return lambda v: np.copyto(D, v)
        D, u = row.view(UNSIGNED[n]), UNSIGNED[BITS[ty]]
        return lambda v: np.copyto(D, v.view(u))


class Agent:
    """A group of warps that executes together."""

    def __init__(self, stack):
        self.stack = stack  # entries [block, mask (None = all threads), reconvergence block, thread count]
        self.wait = None  # None, "bar" or a function telling whether the agent may go on

    def top(self):
        return self.stack[-1]


class Machine:
    def __init__(self, module, program, threads, shared_bytes, gmem, opts):
        if threads % 32:
            raise ValueError("the number of threads must be a multiple of 32")
        self.module, self.program, self.T, self.nw = module, program, threads, threads // 32
        self.fn = program.fn
        self.gmem, self.opts = gmem, opts
        self.tid = np.arange(threads)
        self.warp = self.tid // 32
        self.lane = self.tid % 32
        self.clock = 0
        self._registers()
        self._variables(shared_bytes)
        self._special()
        self.consts = {}
        self.smem = SharedMemory(self.shared_size, self.nw, self._granule(), opts["races"])
        self.lmem = LocalMemory(self.local_size, threads)
        self.hopper = Hopper(self)
        self.hazards = self.program.wgmma_hazards if opts["wgmma_registers"] else {}
        for b in self.program.blocks:
            b.full = b.masked = None
            b.warps = 0
            if b.kind == "sync":
                b.sync = self._compile_sync(b.term)

    # ---- state ------------------------------------------------------------------------------
    def _registers(self):
        count = {}
        for r in self.fn.registers:
            key = "pred" if r.type == "pred" else r.size
            r.row = count.get(key, 0)
            count[key] = r.row + 1
        self.files = {k: np.zeros((n, self.T), bool if k == "pred" else UNSIGNED[8 * k]) for k, n in count.items()}
        self.rows = [self.files["pred" if r.type == "pred" else r.size][r.row] for r in self.fn.registers]
        self.init = {r: np.zeros(self.T, bool) for r in self.program.maybe_uninit}

    def _variables(self, shared_bytes):
        self.symbols = {}  # name -> (space, address)
        top = SHARED_BASE
        dynamic = []
        variables = [*self.module.variables.values(), *self.fn.variables]
        for v in variables:
            if v.space == "shared":
                if v.extern:
                    dynamic.append(v)
                else:
                    top = -(-top // v.align) * v.align
                    self.symbols[v.name] = ("shared", top)
                    top += v.size
        top = -(-top // 1024) * 1024  # static variables first, then the dynamic part
        for v in dynamic:
            self.symbols[v.name] = ("shared", top)
        self.shared_size = top - SHARED_BASE + shared_bytes
        local = 0
        for v in variables:
            if v.space in ("local", "param"):
                a = max(v.align, 8)
                local = -(-local // a) * a
                self.symbols[v.name] = ("local", local)
                local += v.size
            elif v.space in ("global", "const"):
                self.symbols[v.name] = ("global", self.opts["module_addresses"][v.name])
        self.local_size = local
        for p in self.fn.params:
            self.symbols[p.name] = ("param", self.opts["param_offsets"][p.name])

    def _special(self):
        T, u32 = self.T, np.uint32
        nx, ny, nz = self.opts["block"]
        gx, gy, gz = self.opts["grid"]
        lane = self.lane.astype(u32)
        one = u32(1)
        full = lambda v: np.full(T, v, u32)  # noqa: E731
        self.special = {
            "%tid.x": (self.tid % nx).astype(u32),
            "%tid.y": (self.tid // nx % ny).astype(u32),
            "%tid.z": (self.tid // (nx * ny)).astype(u32),
            "%ntid.x": full(nx),
            "%ntid.y": full(ny),
            "%ntid.z": full(nz),
            "%ctaid.x": full(0),
            "%ctaid.y": full(0),
            "%ctaid.z": full(0),
            "%nctaid.x": full(gx),
            "%nctaid.y": full(gy),
            "%nctaid.z": full(gz),
            "%clusterid.x": full(0),
            "%clusterid.y": full(0),
            "%clusterid.z": full(0),
            "%nclusterid.x": full(gx),
            "%nclusterid.y": full(gy),
            "%nclusterid.z": full(gz),
            "%cluster_ctaid.x": full(0),
            "%cluster_ctaid.y": full(0),
            "%cluster_ctaid.z": full(0),
            "%cluster_nctaid.x": full(1),
            "%cluster_nctaid.y": full(1),
            "%cluster_nctaid.z": full(1),
            "%cluster_ctarank": full(0),
            "%cluster_nctarank": full(1),
            "%laneid": lane,
            "%warpid": self.warp.astype(u32),
            "%nwarpid": full(self.nw),
            "%smid": full(0),
            "%nsmid": full(1),
            "%gridid": full(0),
            "%lanemask_eq": one << lane,
            "%lanemask_lt": (one << lane) - one,
            "%lanemask_le": ((one << lane) - one) | (one << lane),
            "%lanemask_gt": ~(((one << lane) - one) | (one << lane)),
            "%lanemask_ge": ~((one << lane) - one),
            "%dynamic_smem_size": full(self.opts["shared_bytes"]),
            "%total_smem_size": full(self.shared_size),
        }

    def _granule(self):
        """Race-detector granule: the narrowest shared access of the kernel."""
        g = 16
        for i in self.fn.instrs:
            p = i.parts
            if p[0] in ("ld", "st"):
                if "shared" in i.op or not any(x in i.op for x in ("global", "local", "param", "const")):
                    g = min(
                        g, max(BITS.get(p[-1], 8) // 8, 1) * next((int(x[1]) for x in p if x in ("v2", "v4", "v8")), 1)
                    )
            elif i.op.startswith("cp.async.ca"):
                g = min(g, 4)
        return g

    # ---- operands ---------------------------------------------------------------------------
    def const(self, value, dtype):
        dtype = np.dtype(dtype)
        key = (value, dtype)
        row = self.consts.get(key)
        if row is None:
            row = np.empty(self.T, dtype)
            if dtype.kind == "b":
                row.fill(bool(value))
            else:
                row.view(UNSIGNED[dtype.itemsize * 8]).fill(value & ((1 << dtype.itemsize * 8) - 1))
            row.flags.writeable = False
            self.consts[key] = row
        return row

    def source(self, x, ty, ins):
        t = NP[ty]
        if isinstance(x, Reg):
            row = self.rows[x.index]
            if x.type == "pred" or ty == "pred":
                if x.type != "pred" or ty != "pred":
                    raise NotImplementedError(f"predicate used as {ty} in {ins.text()}")
                return row
            want = BITS[ty] // 8
            if x.size == want:
                return row.view(t)
            if x.size > want:
                return row.view(t)[:: x.size // want]
            raise NotImplementedError(f"operand {x} too narrow for {ty} in {ins.text()}")
        if isinstance(x, Imm):
            if x.kind == "dec":
                bits = int(np.array(x.value, t).view(UNSIGNED[BITS[ty]]))
            elif x.kind == "f64" and ty == "f32":
                bits = int(np.array(x.value, np.uint64).view(np.float64).astype(np.float32).view(np.uint32))
            else:
                bits = x.value
            if ty.endswith("x2"):
                return self.const(bits, np.uint32).view(np.uint16)
            return self.const(bits, t)
        if isinstance(x, Sym):
            if x.name in self.special:
                r = self.special[x.name]
                return r if BITS[ty] == 32 else r.astype(t)
            if x.name == "WARP_SZ":
                return self.const(32, t)
            if x.name in self.symbols:
                return self.const(self.symbols[x.name][1], t)
        if isinstance(x, Mem) and isinstance(x.base, Sym) and x.base.name in self.symbols:
            return self.const(self.symbols[x.base.name][1] + x.offset, t)
        raise NotImplementedError(f"operand {x!r} in {ins.text()}")

    def where(self, ins, t):
        """Describes an instruction and thread for messages."""
        s = f"\n  at PTX line {ins.line}, instruction #{ins.index}: {ins.text()}"
        if ins.loc:
            s += f"\n  source {self.module.files.get(ins.loc[0], '?')}:{ins.loc[1]}"
        if t >= 0:
            s += f"\n  CTA {self.cta}, thread {t} (warp {t // 32}, lane {t % 32})"
        return s

    def warps_of(self, mask, ins):
        """Warp numbers of a mask (slice when all); every warp must be wholly active or inactive."""
        if mask is None:
            return slice(None)
        m = mask.reshape(self.nw, 32)
        full = m.all(1)
        if (m.any(1) != full).any():
            w = int(np.flatnonzero(m.any(1) != full)[0])
            raise PtxError(f"warp-wide instruction executed by part of warp {w} only{self.where(ins, w * 32)}")
        return np.flatnonzero(full)

    # ---- compilation ------------------------------------------------------------------------
    def _compile_alu(self, ins, masked):
        c = Ctx(self, ins, masked)
        try:
            f = ALU[ins.parts[0]](c)
        except (KeyError, ValueError, IndexError) as e:
            raise NotImplementedError(f"PTX instruction not supported: {ins.text()} ({type(e).__name__}: {e})") from e
        if c.pre:
            inner, pre = f, c.pre

            def f():
                for p in pre:
                    p()
                inner()

        if not masked:
            return f
        copies = c.copies

        def run(mask):
            f()
            for d, s in copies:
                np.copyto(d, s, where=mask)

        return run

    def _guarded(self, ins, op):
        """op(mask) under the instruction's guard."""
        neg = isinstance(ins.guard, Not)
        p = self.rows[(ins.guard.reg if neg else ins.guard).index]
        T = self.T

        def run(mask):
            m = ~p if neg else p
            if mask is not None:
                m = m & mask
            n = np.count_nonzero(m)
            if n == T:
                op(None)
            elif n:
                op(m.copy() if m is p else m)

        return run

    def compile(self, ins, masked):
        """A callable taking no argument (all threads active) or the mask."""
        name = ins.parts[0]
        if name in ALU:
            if ins.guard is None:
                f = self._compile_alu(ins, masked)
            else:
                full, part = self._compile_alu(ins, False), self._compile_alu(ins, True)
                g = self._guarded(ins, lambda m: full() if m is None else part(m))
                f = g if masked else partial(g, None)
        else:
            build = OPS.get(name)
            if build is None:
                raise NotImplementedError(f"PTX instruction not supported: {ins.text()}")
            g = build(self, ins)
            if ins.guard is not None:
                g = self._guarded(ins, g)
            f = g if masked else partial(g, None)
        if self.init:
            f = self._track_uninit(ins, f, masked)
        return self._track_wgmma(ins, f, masked) if ins in self.hazards else f

    def _wgmma_check(self, ins):
        """Function(mask): error if the instruction touches a register of a wgmma in flight."""
        check = partial(self.hopper.check_registers, ins, self.hazards[ins])
        return check if ins.guard is None else self._guarded(ins, check)

    def _track_wgmma(self, ins, f, masked):
        check = self._wgmma_check(ins)

        def run(mask=None):
            check(mask)
            f(mask) if masked else f()

        return run

    def _track_uninit(self, ins, f, masked):
        d, u = defs_uses(ins)
        reads = [r for r in u if r in self.init]
        writes = [r for r in d if r in self.init]
        if not reads and not writes:
            return f
        neg = isinstance(ins.guard, Not)
        p = None if ins.guard is None else self.rows[(ins.guard.reg if neg else ins.guard).index]

        def run(mask=None):
            m = mask
            if p is not None:
                m = (~p if neg else p.copy()) if m is None else ((~p if neg else p) & m)
            for r in reads:
                bad = ~self.init[r]
                if m is not None and r is not (ins.guard.reg if neg else ins.guard):
                    bad &= m
                if bad.any():
                    self._uninit(ins, r, int(np.flatnonzero(bad)[0]))
            f(mask) if masked else f()
            for r in writes:
                if m is None:
                    self.init[r].fill(True)
                else:
                    self.init[r] |= m

        return run if masked else partial(run, None)

    def _uninit(self, ins, reg, t):
        raise UninitialisedRead(f"register {reg} read before it was written{self.where(ins, t)}")

    def _compile_block(self, b, masked):
        ops = []
        for ins in fuse_mma(self, b.instrs):
            if isinstance(ins, tuple):  # a run of mma.sync compiled as one operation
                g = ins[0]
                ops.append(g if masked else partial(g, None))
            else:
                ops.append(self.compile(ins, masked))
        if b.term in self.hazards:
            check = self._wgmma_check(b.term)
            ops.append(check if masked else partial(check, None))
        return ops

    def _compile_sync(self, ins):
        if ins.parts[0] == "mbarrier":
            return self.hopper.compile_wait(ins)
        if ins.parts[0] == "setmaxnreg":
            return self._compile_more_registers(ins)
        return self._compile_barrier(ins)

    # ---- hardware registers -----------------------------------------------------------------
    def set_registers(self, mask, ins):
        """setmaxnreg: whether the CTA has that many for these warps. A thread begins with ``.maxnreg``."""
        if "maxnreg" not in self.fn.directives:
            return True
        wanted = self.hardware_registers.copy()
        wanted[self.warps_of(mask, ins)] = ins.ops[0].value
        enough = wanted.sum() <= self.nw * int(self.fn.directives["maxnreg"])
        if enough:
            self.hardware_registers = wanted
        return enough

    def _compile_more_registers(self, ins):
        if ins.guard is not None:
            raise NotImplementedError(f"guarded setmaxnreg: {ins.text()}")

        def sync(agent):
            mask = agent.top()[1]
            if self.set_registers(mask, ins):
                return True
            agent.wait = ("registers", lambda: self.set_registers(mask, ins))
            return False

        return sync

    # ---- barriers ---------------------------------------------------------------------------
    def uniform(self, x, ins, mask):
        """Value of an operand that must be the same in all active threads."""
        if isinstance(x, Imm):
            return x.value
        v = self.source(x, "u32", ins)
        v = v if mask is None else v[mask]
        if (v != v[0]).any():
            raise PtxError(f"operand {x} is not uniform{self.where(ins, 0)}")
        return int(v[0])

    def _compile_barrier(self, ins):
        if "red" in ins.parts or "cluster" in ins.parts:
            raise NotImplementedError(f"PTX instruction not supported: {ins.text()}")
        if ins.guard is not None:
            raise NotImplementedError(f"guarded barrier: {ins.text()}")
        op_id, op_n = ins.ops[0], ins.ops[1] if len(ins.ops) > 1 else None

        def sync(agent):
            mask = agent.top()[1]
            if mask is None and (op_n is None or (isinstance(op_n, Imm) and op_n.value == self.T)):
                if self.smem.races:
                    self.smem.races.barrier(None)
                return True
            n = self.live if op_n is None else self.uniform(op_n, ins, mask)
            return self.arrive(self.uniform(op_id, ins, mask), n, mask, ins, agent)

        return sync

    def arrive(self, bar_id, expected, mask, ins, agent):
        """Arrive at a named barrier (agent None: bar.arrive). False if the agent has to wait, else "moved": the barrier
        is complete and its agents stand behind it."""
        if mask is not None:
            w = mask.reshape(self.nw, 32)
            alive = self.alive.reshape(self.nw, 32)
            part = w.any(1) & (w != alive).any(1)
            if part.any():
                k = int(np.flatnonzero(part)[0])
                raise PtxError(f"barrier executed by part of warp {k} only{self.where(ins, k * 32)}")
            warps = np.flatnonzero(w.any(1))
        else:
            warps = np.arange(self.nw)
        bar = self.bars.setdefault(
            bar_id, {"count": 0, "agents": [], "warps": [], "snaps": [], "n": expected, "ins": ins}
        )
        if bar["n"] != expected:
            raise PtxError(f"barrier {bar_id} used with thread counts {bar['n']} and {expected}{self.where(ins, 0)}")
        bar["count"] += (
            32 * len(warps) if bar["n"] % 32 == 0 else int(np.count_nonzero(self.alive.reshape(-1, 32)[warps]))
        )
        r = self.smem.races
        if r:
            bar["snaps"].append((r.vc[warps].max(0), r.fence[warps].max(0)))
            if agent is None:
                r.tick(warps)
        if agent is not None:
            bar["agents"].append(agent)
            bar["warps"] += list(warps)
        if bar["count"] > expected:
            raise PtxError(f"barrier {bar_id}: {bar['count']} threads arrived, {expected} expected{self.where(ins, 0)}")
        if bar["count"] < expected:
            if agent is not None:
                agent.wait = ("bar", bar_id)
            return False
        del self.bars[bar_id]
        if r and bar["warps"]:
            r.vc[bar["warps"]] = np.maximum(r.vc[bar["warps"]], np.max([s[0] for s in bar["snaps"]], axis=0))
            r.fence[bar["warps"]] = np.maximum(r.fence[bar["warps"]], np.max([s[1] for s in bar["snaps"]], axis=0))
            r.tick(bar["warps"])
        for a in bar["agents"]:
            if a is not agent:
                a.wait = None
                a.top()[0] = a.top()[0].next
        if agent is not None:
            agent.top()[0] = agent.top()[0].next
            self.merge([agent] + [a for a in bar["agents"] if a is not agent])
        return "moved"

    def merge(self, agents):
        """Join agents that stand at the same place into the first one."""
        for i, a in enumerate(agents):
            for b in agents[i + 1 :]:
                if (
                    b in self.agents
                    and a in self.agents
                    and len(a.stack) == len(b.stack)
                    and all(x[0] is y[0] and x[2] is y[2] for x, y in zip(a.stack, b.stack, strict=True))
                ):
                    for x, y in zip(a.stack, b.stack, strict=True):
                        m = None if x[1] is None or y[1] is None else x[1] | y[1]
                        if m is not None and m.all():
                            m = None
                        x[1], x[3] = m, self.T if m is None else int(np.count_nonzero(m))
                    self.agents.remove(b)

    # ---- execution --------------------------------------------------------------------------
    def run_cta(self, cta, number):
        self.cta, self.cta_number = cta, number
        self.gmem.current_cta = number
        for k, v in zip("xyz", cta, strict=True):
            self.special[f"%ctaid.{k}"].fill(v)
            self.special[f"%clusterid.{k}"].fill(v)
        for k, f in self.files.items():
            f.fill(False if k == "pred" else POISON[k])
        for r in self.init.values():
            r.fill(False)
        self.smem.reset()
        self.hopper.reset()
        self.bars = {}
        self.alive = np.ones(self.T, bool)
        self.live = self.T
        self.hardware_registers = np.full(self.nw, int(self.fn.directives.get("maxnreg", 0)))
        self.async_groups = []  # cp.async copies in flight, see ops.wait_group
        self.groups = np.zeros(self.T, np.int64)
        self.groups_uniform = True
        self.steps = self.opts["max_steps"]
        self.agents = [Agent([[self.program.blocks[0], None, None, self.T]])]
        self.rng = np.random.default_rng(number) if self.opts["order"] == "random" else None
        while self.agents:
            moved = False
            agents = list(self.agents)[:: -1 if self.opts["order"] == "reverse" else 1]
            for a in agents if self.rng is None else self.rng.permutation(np.array(agents, object)):
                if a not in self.agents:
                    continue
                if a.wait is not None:
                    if a.wait[0] == "bar" or not a.wait[1]():
                        continue
                    a.wait = None
                self.run_agent(a)
                moved = True
            early = moved and self.rng is not None and self.rng.integers(2)
            landed = (early or not moved) and self.hopper.progress()
            if not moved and not landed:
                self.deadlock()
        self.hopper.finish()
        if self.async_groups:
            raise PtxError(f"CTA {self.cta} exits with cp.async copies never waited for")

    def deadlock(self):
        lines = []
        for a in self.agents:
            b, mask, _, _ = a.top()
            ws = "all" if mask is None else np.flatnonzero(mask.reshape(self.nw, 32).any(1)).tolist()
            kind, *what = a.wait
            if kind == "bar":
                on = self._describe_barrier(*what)
            elif kind == "mbarrier":
                on = self.hopper.describe(what[1])
            else:
                on = f"registers of a thread, by warp: {self.hardware_registers.tolist()}"
            lines.append(f"  warps {ws} wait at PTX line {b.term.line}: {b.term.text()}\n    {on}")
        raise Deadlock(f"deadlock in CTA {self.cta}:\n" + "\n".join(lines))

    def _describe_barrier(self, number):
        bar = self.bars[number]
        return f"barrier {number}: {bar['count']} threads of {bar['n']} arrived, warps {sorted(map(int, bar['warps']))}"

    def run_agent(self, a):
        stack = a.stack
        nw, T = self.nw, self.T
        while True:
            if not stack:
                self.agents.remove(a)
                return
            entry = stack[-1]
            blk, mask = entry[0], entry[1]
            if blk is entry[2]:  # reconvergence point: the entry below goes on from here
                stack.pop()
                continue
            if mask is not None and self.live != T:  # threads of this entry may have exited meanwhile
                mask = entry[1] = mask & self.alive
                entry[3] = int(np.count_nonzero(mask))
                if entry[3] == 0:
                    stack.pop()
                    continue
            self.steps -= 1
            if self.steps < 0:
                raise Deadlock(
                    f"CTA {self.cta} executed more than {self.opts['max_steps']} basic blocks (endless loop, or "
                    f"a spin on another CTA?){self.where(blk.all_instrs()[0], -1) if blk.all_instrs() else ''}"
                )
            f = None
            try:
                if mask is None:
                    blk.warps += nw
                    ops = blk.full
                    if ops is None:
                        ops = blk.full = self._compile_block(blk, False)
                    for f in ops:
                        f()
                else:
                    blk.warps += int(np.count_nonzero(mask.reshape(nw, 32).any(1)))
                    ops = blk.masked
                    if ops is None:
                        ops = blk.masked = self._compile_block(blk, True)
                    for f in ops:
                        f(mask)
            except (PtxError, NotImplementedError):
                raise
            except Exception as e:
                k = ops.index(f) if f is not None else 0
                raise RuntimeError(
                    f"internal error ({type(e).__name__}: {e}) in block {blk.index}, operation {k}: "
                    f"{[i.text() for i in blk.instrs][: k + 1][-1:]}"
                ) from e
            kind = blk.kind
            if kind == "fall":
                entry[0] = blk.next
            elif kind == "bra":
                entry[0] = blk.target
            elif kind == "sync":
                r = blk.sync(a)
                if r is True:
                    entry[0] = blk.next
                elif r is False or a not in self.agents:
                    return
            elif kind == "cbra":
                p = self.rows[(blk.term.guard.reg if isinstance(blk.term.guard, Not) else blk.term.guard).index]
                if self.init:
                    self._check_guard(blk.term, mask)
                if isinstance(blk.term.guard, Not):
                    p = ~p
                taken = p if mask is None else p & mask
                n = int(np.count_nonzero(taken))
                if n == 0:
                    entry[0] = blk.next
                elif n == entry[3]:
                    entry[0] = blk.target
                else:
                    taken = taken.copy()
                    rest = ~taken if mask is None else mask & ~taken
                    if self._diverge(a, blk, [(blk.next, rest, entry[3] - n), (blk.target, taken, n)]):
                        return
            elif kind == "brx":
                idx = self.source(blk.term.ops[0], "u32", blk.term)
                idx = idx if mask is None else idx[mask]
                if int(idx.max()) >= len(blk.targets):
                    raise PtxError(f"brx.idx index {int(idx.max())} out of range{self.where(blk.term, -1)}")
                vals = np.unique(idx)
                if len(vals) == 1:
                    entry[0] = blk.targets[int(vals[0])]
                else:
                    full = self.source(blk.term.ops[0], "u32", blk.term)
                    groups = []
                    for v in vals:
                        m = (full == v) if mask is None else (full == v) & mask
                        groups.append((blk.targets[int(v)], m, int(np.count_nonzero(m))))
                    if self._diverge(a, blk, groups):
                        return
            elif kind in ("ret", "cret"):
                gone = np.ones(T, bool) if mask is None else mask.copy()
                if kind == "cret":
                    neg = isinstance(blk.term.guard, Not)
                    p = self.rows[(blk.term.guard.reg if neg else blk.term.guard).index]
                    gone &= ~p if neg else p
                    entry[0] = blk.next
                self.alive &= ~gone
                self.live = int(np.count_nonzero(self.alive))
                if kind == "ret":
                    stack.pop()
                elif gone.any():
                    m = (np.ones(T, bool) if mask is None else mask) & ~gone
                    entry[1], entry[3] = m, int(np.count_nonzero(m))
                if gone.any():
                    for e in stack:
                        if e[1] is None:
                            e[1] = self.alive.copy()
                            e[3] = self.live
                    if len(self.agents) > 1:
                        self._exit_releases()

    def _check_guard(self, ins, mask):
        r = ins.guard.reg if isinstance(ins.guard, Not) else ins.guard
        if r in self.init:
            bad = ~self.init[r] if mask is None else ~self.init[r] & mask
            if bad.any():
                self._uninit(ins, r, int(np.flatnonzero(bad)[0]))

    def _exit_releases(self):
        """Threads exited: barriers that wait for all live threads may be complete now."""
        for bid, bar in list(self.bars.items()):
            if len(bar["ins"].ops) == 1 and bar["count"] >= self.live:
                bar["n"] = bar["count"]
                del self.bars[bid]
                r = self.smem.races
                if r:
                    r.barrier(bar["warps"])
                for a in bar["agents"]:
                    a.wait = None
                    a.top()[0] = a.top()[0].next
                self.merge(bar["agents"])

    def _diverge(self, a, blk, groups):
        """Active threads of the top entry go to several blocks: groups = [(block, mask, count)].

        Returns whether agents that split off go on first.
        """
        entry = a.stack[-1]
        if blk.forks:
            by_warp = [g[1].reshape(self.nw, 32).any(1) for g in groups]
            if (np.sum(by_warp, axis=0) <= 1).all():  # every warp goes one way: separate agents
                for target, m, n in groups[1:]:
                    stack = []
                    for e in a.stack[:-1]:
                        em = m if e[1] is None else e[1] & self._warp_mask(m)
                        stack.append([e[0], em, e[2], int(np.count_nonzero(em))])
                    self.agents.append(Agent([*stack, [target, m, entry[2], n]]))
                target, m, n = groups[0]
                wm = self._warp_mask(m)
                for e in a.stack[:-1]:
                    e[1] = wm.copy() if e[1] is None else e[1] & wm
                    e[3] = int(np.count_nonzero(e[1]))
                entry[0], entry[1], entry[3] = target, m, n
                return self.opts["order"] == "reverse" if self.rng is None else bool(self.rng.integers(2))
        rec = blk.reconv
        if rec is None or rec is entry[2]:
            a.stack.pop()  # the paths meet only at exit, or where the entry below continues anyway
        else:
            entry[0] = rec
        for target, m, n in sorted(groups, key=lambda g: g[0].dies):  # the last one runs first
            if target is not rec:
                a.stack.append([target, m, rec, n])
        return False

    def _warp_mask(self, m):
        return np.repeat(m.reshape(self.nw, 32).any(1), 32)
