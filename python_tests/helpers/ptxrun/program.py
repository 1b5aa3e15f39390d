"""Control-flow graph of a function: basic blocks, reconvergence points, definite assignment."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .parser import Group, Imm, Instr, Mem, Not, Pair, Reg, Vec

# Age of a wgmma that is over (see wgmma_hazards): above every other.
LANDED = 1 << 40

# First word of opcodes that write no register.
_NO_DEST = {
    "st",
    "red",
    "bra",
    "brx",
    "bar",
    "barrier",
    "cp",
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "ret",
    "exit",
    "trap",
    "wgmma",
    "tensormap",
    "setmaxnreg",
    "griddepcontrol",
    "nanosleep",
    "stmatrix",
    "call",
    "discard",
    "applypriority",
    "brkpt",
    "pmevent",
    "stackrestore",
}


def _regs(x, out):
    if isinstance(x, Reg):
        out.append(x)
    elif isinstance(x, Not):
        _regs(x.reg, out)
    elif isinstance(x, (Vec, Group)):
        for y in x.items:
            _regs(y, out)
    elif isinstance(x, Pair):
        _regs(x.first, out)
        _regs(x.second, out)
    elif isinstance(x, Mem):
        _regs(x.base, out)
        for y in x.coords or ():
            _regs(y, out)
    return out


def defs_uses(ins: Instr):
    """Registers written and read by an instruction (the guard is read)."""
    defs, uses = [], []
    if ins.guard is not None:
        _regs(ins.guard, uses)
    ops = ins.ops
    first = 1
    if (
        ins.parts[0] in _NO_DEST
        or (
            ins.parts[0] == "mbarrier"
            and ins.parts[1]
            not in (
                "try_wait",
                "test_wait",
                "arrive",
                "arrive_drop",
                "pending_count",
            )
        )
        or (ins.parts[0] == "mbarrier" and ins.parts[1].startswith("arrive") and ops and isinstance(ops[0], Mem))
    ):
        first = 0
    if is_wgmma(ins):
        scale = ops[3] if isinstance(ops[1], (Reg, Vec)) and len(ops) > 3 else None
        _regs(ops[0], defs)
        if not (isinstance(scale, Imm) and scale.value == 0):
            _regs(ops[0], uses)
        first = 1
    elif ins.op.startswith(("bar.red", "barrier.red", "barrier.cta.red")):
        first = 1
        _regs(ops[0], defs)
    elif first and ops:
        _regs(ops[0], defs)
    for o in ops[first:]:
        _regs(o, uses)
    return defs, uses


def is_wgmma(ins: Instr):
    return ins.op.startswith("wgmma.mma_async")


def is_sync(ins: Instr):
    """Instructions at which a warp may have to wait for others: each is a block of its own."""
    p = ins.parts
    if p[0] in ("bar", "barrier"):
        return "arrive" not in p and "warp" not in p
    if p[0] == "setmaxnreg":
        return "inc" in p
    return p[0] == "mbarrier" and p[1] in ("try_wait", "test_wait")


@dataclass(eq=False)
class Block:
    index: int
    instrs: list = field(default_factory=list)  # straight-line instructions
    term: object = None  # the branch, ret or sync instruction that ends it; None = fall through
    kind: str = "fall"  # fall, bra, cbra, brx, ret, cret, sync
    target: object = None  # Block of a taken branch
    targets: list = None  # of brx
    next: object = None  # the block below
    reconv: object = None  # where divergent threads meet again (None: only at exit)
    dies: bool = False  # ends in a trap or a failed assertion
    forks: bool = False  # a barrier may be reached before reconv: split warps into agents

    def successors(self):
        s = []
        if self.kind in ("fall", "sync", "cbra", "cret"):
            s.append(self.next)
        if self.kind in ("bra", "cbra"):
            s.append(self.target)
        if self.kind == "brx":
            s += self.targets
        return s

    def all_instrs(self):
        return self.instrs + ([self.term] if self.term is not None else [])


class Program:
    """A function's blocks (blocks[0] is the entry) and what static analysis knows about it."""

    def __init__(self, fn):
        self.fn = fn
        self.blocks = self._build(fn.instrs)
        self._reconvergence()
        self._fork_regions()
        self.maybe_uninit = self._definite_assignment()
        for b in self.blocks:
            b.histogram = Counter(i.op for i in b.all_instrs())
            end = b.target if b.kind == "bra" and not b.instrs else b
            b.dies = any(i.parts[0] == "trap" or "__assertfail" in map(str, i.ops) for i in end.instrs)

    @staticmethod
    def _build(instrs):
        n = len(instrs)
        leaders = {0, n}
        for i, ins in enumerate(instrs):
            p0 = ins.parts[0]
            if p0 == "bra":
                leaders |= {i + 1, ins.ops[-1].index}
            elif p0 == "brx":
                leaders |= {i + 1, *(t.index for t in ins.ops[-1].targets)}
            elif p0 in ("ret", "exit"):
                leaders.add(i + 1)
            elif is_sync(ins):
                leaders |= {i, i + 1}
        starts = sorted(leaders)
        blocks = [Block(k) for k in range(len(starts))]  # the last one is empty: falling off the end returns
        at = dict(zip(starts, blocks, strict=True))
        for k, b in enumerate(blocks[:-1]):
            body = instrs[starts[k] : starts[k + 1]]
            b.next = blocks[k + 1]
            last = body[-1]
            p0 = last.parts[0]
            if p0 == "bra":
                b.kind = "bra" if last.guard is None else "cbra"
                b.target = at[last.ops[-1].index]
            elif p0 == "brx":
                b.kind, b.targets = "brx", [at[t.index] for t in last.ops[-1].targets]
            elif p0 in ("ret", "exit"):
                b.kind = "ret" if last.guard is None else "cret"
            elif is_sync(last):
                b.kind = "sync"
            if b.kind != "fall":
                b.term = last
                body = body[:-1]
            b.instrs = body
        blocks[-1].kind = "ret"
        return blocks

    def _reconvergence(self):
        """Immediate post-dominators (Cooper, Harvey and Kennedy on the reversed graph, with a virtual exit)."""
        n = len(self.blocks)
        exit_ = n
        succ = [[s.index for s in b.successors()] + ([exit_] if b.kind in ("ret", "cret") else []) for b in self.blocks]
        pred = [[] for _ in range(n + 1)]
        for i, ss in enumerate(succ):
            for s in ss:
                pred[s].append(i)
        order, seen = [], {exit_}  # postorder of the reversed graph from the exit
        stack = [(exit_, iter(pred[exit_]))]
        while stack:
            node, it = stack[-1]
            for p in it:
                if p not in seen:
                    seen.add(p)
                    stack.append((p, iter(pred[p])))
                    break
            else:
                order.append(node)
                stack.pop()
        rank = {b: i for i, b in enumerate(order)}
        ipdom = {exit_: exit_}

        def meet(a, b):
            while a != b:
                while rank[a] < rank[b]:
                    a = ipdom[a]
                while rank[b] < rank[a]:
                    b = ipdom[b]
            return a

        changed = True
        while changed:
            changed = False
            for b in reversed(order[:-1]):
                new = None
                for s in succ[b]:
                    if s in ipdom:
                        new = s if new is None else meet(new, s)
                if new is not None and ipdom.get(b) != new:
                    ipdom[b] = new
                    changed = True
        for b in self.blocks:
            d = ipdom.get(b.index, exit_)
            b.reconv = None if d == exit_ else self.blocks[d]

    def _fork_regions(self):
        for b in self.blocks:
            if b.kind not in ("cbra", "brx"):
                continue
            seen, todo = set(), list(b.successors())
            while todo:
                x = todo.pop()
                if x is b.reconv or x.index in seen:
                    continue
                seen.add(x.index)
                if x.kind == "sync":
                    b.forks = True
                    break
                todo += x.successors()

    @cached_property
    def wgmma_hazards(self):
        """Instruction -> {wgmma: (register, what happens to it)}: the wgmmas that may be in flight on some path when
        the instruction executes and whose registers it must leave alone until then. Only these instructions are
        checked at run time; a program without any keeps the rule whatever its input is.

        A forward analysis over all paths. The age of a wgmma is how many groups were committed after its own, -1 until
        it is committed; of several instances, and where paths meet, the youngest counts, which the fewest waits
        cover. ``wait_group N`` ends those of age N and more.
        """
        mmas = [i for b in self.blocks for i in b.instrs if is_wgmma(i)]
        if not mmas:
            return {}
        number = {w: k for k, w in enumerate(mmas)}
        acc = {w: tuple(_regs(w.ops[0], [])) for w in mmas}
        a = {w: tuple(_regs(w.ops[1], [])) if isinstance(w.ops[1], Vec) else () for w in mmas}
        acc_of, a_of = defaultdict(list), defaultdict(list)  # who has a register there
        for w in mmas:
            for r in acc[w]:
                acc_of[r].append(w)
            for r in a[w]:
                a_of[r].append(w)

        def step(ins, ages):
            kind = ins.parts[1]
            if kind == "mma_async":
                ages[number[ins]] = -1
            elif kind == "commit_group":
                # Behind a guard it may not happen: what is open may stay so, and nothing is older for sure.
                if ins.guard is None:
                    ages[ages < LANDED] += 1
            elif kind == "wait_group" and ins.guard is None:
                ages[(ages >= ins.ops[0].value) & (ages >= 0)] = LANDED

        events = [[i for i in b.instrs if i.parts[0] == "wgmma"] for b in self.blocks]
        state, todo = {0: np.full(len(mmas), LANDED)}, [0]  # block -> ages on entry
        while todo:
            k = todo.pop()
            ages = state[k].copy()
            for i in events[k]:
                step(i, ages)
            for b in self.blocks[k].successors():
                old = state.get(b.index)
                new = ages if old is None else np.minimum(ages, old)
                if old is None or (new != old).any():
                    state[b.index] = new.copy()
                    todo.append(b.index)

        found = {}
        for k, start in state.items():
            ages = start.copy()
            for ins in self.blocks[k].all_instrs():
                if (ages < LANDED).any():
                    if ins in number:  # may follow another one on the same accumulator in the same shape
                        checks = (
                            (a[ins], "read as A operand while it is an accumulator", acc_of),
                            (acc[ins], "used as accumulator while it is part of the A operand", a_of),
                            (acc[ins], "used in another accumulator or shape while it is an accumulator", acc_of),
                        )
                    else:
                        d, u = defs_uses(ins)
                        checks = (
                            (u, "read while it is an accumulator", acc_of),
                            (d, "written while it is an accumulator", acc_of),
                            (d, "written while it is part of the A operand", a_of),
                        )
                    hits = {}
                    for n, (regs, what, of) in enumerate(checks):
                        for r in regs:
                            for w in of[r]:
                                same = n == 2 and ins in number and acc[w] == acc[ins] and w.parts[4] == ins.parts[4]
                                if ages[number[w]] < LANDED and not same:
                                    hits.setdefault(w, (r, what))
                    if hits:
                        found[ins] = hits
                if ins.parts[0] == "wgmma":
                    step(ins, ages)
        return found

    def _definite_assignment(self):
        """Registers that some path may read before writing them; they are checked at run time."""
        blocks = self.blocks
        everything = (1 << len(self.fn.registers)) - 1
        gen = []
        for b in blocks:
            g = 0
            for ins in b.all_instrs():
                if ins.guard is None:
                    for r in defs_uses(ins)[0]:
                        g |= 1 << r.index
            gen.append(g)
        preds = [[] for _ in blocks]
        for b in blocks:
            for s in b.successors():
                preds[s.index].append(b.index)
        inn = [everything] * len(blocks)
        inn[0] = 0
        changed = True
        while changed:
            changed = False
            for b in blocks:
                v = 0 if b.index == 0 else everything
                for p in preds[b.index]:
                    v &= inn[p] | gen[p]
                if v != inn[b.index]:
                    inn[b.index] = v
                    changed = True
        maybe = set()
        for b in blocks:
            have = inn[b.index]
            for ins in b.all_instrs():
                d, u = defs_uses(ins)
                for r in u:
                    if not have >> r.index & 1:
                        maybe.add(r)
                if ins.guard is None:
                    for r in d:
                        have |= 1 << r.index
        return maybe
