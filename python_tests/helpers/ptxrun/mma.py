"""Warp-level matrix instructions (mma.sync). Runs of independent mma.sync are executed as one batched product.

Products are exact; sums are float32. The hardware's own summation order and
truncation inside one instruction are not modelled."""

import re

import numpy as np

from .alu import bf16_to_f32
from .ops import OPS, unsupported
from .parser import Reg, Vec


def decode(x, ty):
    """Raw elements (uint16, contiguous) -> float32."""
    return bf16_to_f32(x) if ty == "bf16" else x.view(np.float16).astype(np.float32)


class Shape:
    """The places of the elements of the fragments: positions in (register, lane, element) order."""

    def __init__(self, op):
        p = op.split(".")
        s = re.fullmatch(r"m16n8k(8|16)", p[3])
        dty, self.aty, self.bty, cty = p[-4:]
        ok = s and p[1:3] == ["sync", "aligned"] and p[4:-4] == ["row", "col"] and dty == cty == "f32"
        if not ok or not {self.aty, self.bty} <= {"bf16", "f16"}:
            raise NotImplementedError(f"PTX instruction not supported: {op}")
        self.M, self.N, self.K = 16, 8, int(s.group(1))
        row, col = np.divmod(np.arange(self.M * self.K), self.K)
        r = row // 8 + 2 * (col // 8)
        self.a_map = (r * 32 + row % 8 * 4 + col % 8 // 2) * 2 + col % 2
        self.a_regs = self.M * self.K // 64
        k, n = np.divmod(np.arange(self.K * 8), 8)
        self.b_map = (k // 8 * 32 + n * 4 + k % 8 // 2) * 2 + k % 2
        self.b_regs = self.K * 8 // 64
        row, col = np.divmod(np.arange(self.M * 8), 8)
        lane = row % 8 * 4 + col // 2
        self.c_regs = 4
        self.c_map = np.argsort((row // 8 * 2 + col % 2) * 32 + lane)  # element at each position


SHAPES = {}


def shape_of(op):
    if op not in SHAPES:
        SHAPES[op] = Shape(op)
    return SHAPES[op]


def registers(x):
    items = x.items if isinstance(x, Vec) else (x,)
    if not all(isinstance(r, Reg) for r in items):
        raise NotImplementedError(f"mma operand {x}")
    return tuple(r.row for r in items)


def compile_run(m, instrs):
    """One function for mma instructions that do not depend on each other."""
    op = instrs[0].op
    sh = shape_of(op)
    D, A, B, C = ([registers(i.ops[k]) for i in instrs] for k in range(4))
    n = len(instrs)
    ua, ub = list(dict.fromkeys(A)), list(dict.fromkeys(B))
    if len(ua[0]) != sh.a_regs or len(ub[0]) != sh.b_regs or len(D[0]) != sh.c_regs:
        unsupported(instrs[0], "fragment size")
    ia, ib = np.array([ua.index(a) for a in A]), np.array([ub.index(b) for b in B])
    rows_a, rows_b = np.array(ua).reshape(-1), np.array(ub).reshape(-1)
    rows_c, rows_d = np.array(C).reshape(-1), np.array(D).reshape(-1)
    F = m.files[4]
    Fw = F.reshape(len(F), m.nw, 32)
    na, nb, M, N, K = len(ua), len(ub), sh.M, 8, sh.K
    outer = n * 2 > na * nb

    def fragments(rows, ws, u, regs, index, ty):
        x = Fw[rows] if ws is None else Fw[rows][:, ws]
        x = x.reshape(u, regs, -1, 32).transpose(2, 0, 1, 3)
        x = np.ascontiguousarray(x).view(np.uint16).reshape(x.shape[0], u, -1)
        return decode(np.take(x, index, axis=2), ty)

    def run(mask):
        ws = m.warps_of(mask, instrs[0])
        w = m.nw if mask is None else len(ws)
        ws = None if mask is None else ws
        a = fragments(rows_a, ws, na, sh.a_regs, sh.a_map, sh.aty).reshape(w, na, M, K)
        b = fragments(rows_b, ws, nb, sh.b_regs, sh.b_map, sh.bty).reshape(w, nb, K, N)
        if outer:
            p = np.matmul(a.reshape(w, na * M, K), b.transpose(0, 2, 1, 3).reshape(w, K, nb * N))
            p = p.reshape(w, na, M, nb, N).transpose(1, 3, 0, 2, 4)[ia, ib]  # (n, w, M, N)
        else:
            p = np.matmul(a[:, ia], b[:, ib]).transpose(1, 0, 2, 3)
        p = p.reshape(n, w, M * N)[:, :, sh.c_map]
        c = Fw[rows_c] if ws is None else Fw[rows_c][:, ws]
        p = p.reshape(n, w, sh.c_regs, 32).transpose(0, 2, 1, 3)
        r = np.ascontiguousarray(p + c.view(np.float32).reshape(n, sh.c_regs, w, 32)).view(F.dtype)
        r = r.reshape(n * sh.c_regs, w, 32)
        if ws is None:
            Fw[rows_d] = r
        else:
            Fw[rows_d[:, None], ws] = r

    return run


def fuse_mma(m, instrs):
    """Replace runs of independent, unguarded mma.sync by (function,) tuples."""
    out, run, written = [], [], set()

    def flush():
        if run:
            out.append((compile_run(m, list(run)), len(run)))
            run.clear()
            written.clear()

    for ins in instrs:
        if ins.parts[0] != "mma" or ins.guard is not None or m.init or ins in m.hazards:
            flush()
            out.append(ins)
            continue
        d, a, b, c = (registers(o) for o in ins.ops[:4])
        if run and (run[0].op != ins.op or written & {*d, *a, *b, *c}):
            flush()
        run.append(ins)
        written.update(d)
    flush()
    return out


def b_mma(m, ins):
    return compile_run(m, [ins])


OPS["mma"] = b_mma
