"""Register-only instructions. A builder turns one instruction into a zero-argument function that computes
its result for all threads of the CTA at once; masking and guards are added by the machine."""

from functools import partial

import numpy as np

from .memory import LOCAL_WINDOW, SHARED_WINDOW
from .parser import SINK, Imm, Pair, Reg, Sym, Vec

NP = {
    "u8": np.uint8,
    "s8": np.int8,
    "b8": np.uint8,
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "f16": np.float16,
    "bf16": np.uint16,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
    "f16x2": np.uint16,
    "bf16x2": np.uint16,
}
HALF = {"f16", "bf16", "f16x2", "bf16x2"}
FLOAT = HALF | {"f32", "f64"}
BITS = {k: np.dtype(v).itemsize * 8 for k, v in NP.items()} | {"f16x2": 32, "bf16x2": 32}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}

ALU = {}


def alu(*names):
    def deco(f):
        for n in names:
            ALU[n] = f
        return f

    return deco


def unsupported(c, why=""):
    raise NotImplementedError(f"PTX instruction not supported: {c.ins.text()}{' (' + why + ')' if why else ''}")


# ---- float formats ------------------------------------------------------------------------------


def bf16_to_f32(u):
    return (u.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(f, rz=False):
    b = np.ascontiguousarray(f, np.float32).view(np.uint32)
    if rz:
        out = (b >> np.uint32(16)).astype(np.uint16)
    else:
        out = ((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    out[nan] = 0x7FFF
    return out


def f64_to_f32_odd(x):
    """Round to odd, so that a second rounding to a narrower format is exact."""
    r = x.astype(np.float32)
    b = r.view(np.uint32)
    back = r.astype(np.float64)
    b -= (np.abs(back) > np.abs(x)).astype(np.uint32)
    b |= ((back != x) & ~np.isnan(x)).astype(np.uint32)
    return r


def f64_to_bf16(x):
    return f32_to_bf16(f64_to_f32_odd(x))


def half_load(a, ty):
    """f16/bf16 bits or values -> float32."""
    return bf16_to_f32(a) if ty.startswith("b") else a.view(np.float16).astype(np.float32)


def half_store(d, x, ty):
    """float32/float64 -> f16/bf16 into d."""
    if ty.startswith("b"):
        d[...] = f64_to_bf16(x) if x.dtype == np.float64 else f32_to_bf16(x)
    else:
        v = d.view(np.float16)
        v[...] = x
        np.copyto(v.view(np.uint16), np.uint16(0x7FFF), where=np.isnan(v))


def flush(x):
    """Subnormal float32 -> zero of the same sign."""
    b = x.view(np.uint32)
    return np.where((b & np.uint32(0x7F800000)) == 0, b & np.uint32(0x80000000), b).view(np.float32)


def two_sum_error(a, b, s):
    bb = s - a
    return (a - (s - bb)) + (b - bb)


def fma_f32(a, b, c, out):
    p = np.multiply(a, b, dtype=np.float64)
    s = p + c
    tie = (s.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if tie.any():  # on a midpoint between two floats: the part lost in s decides
        e = two_sum_error(p, c.astype(np.float64), s)
        fix = tie & (e != 0) & np.isfinite(s)
        if fix.any():
            s = np.where(fix, np.nextafter(s, np.where(e > 0, np.inf, -np.inf)), s)
    np.copyto(out, s, casting="same_kind")


# ---- helpers ------------------------------------------------------------------------------------


def rounding(c):
    for r in ("rn", "rz", "rm", "rp"):
        if r in c.parts:
            return r
    return None


def saturate(x):
    """Clamp to [+0, 1]; NaN gives 0."""
    return (np.where(np.isnan(x), 0, np.clip(x, 0, 1)) + 0.0).astype(x.dtype)


def float_fn(c, fn, nsrc, ty=None, check_rounding=True, f64=False):
    """Builder body for a float operation computed by fn(float arrays) -> float array."""
    ty = ty or c.parts[-1]
    S = [c.src(o, ty) for o in c.ops[1 : 1 + nsrc]]
    D = c.dst(c.ops[0], ty)
    ftz, sat, relu = "ftz" in c.parts, "sat" in c.parts, "relu" in c.parts
    if check_rounding and rounding(c) not in (None, "rn"):
        unsupported(c, "rounding mode")
    half = ty in HALF

    def run():
        xs = S
        if half:
            xs = [half_load(x, ty) for x in xs]
            if f64:
                xs = [x.astype(np.float64) for x in xs]
        elif ftz:
            xs = [flush(x) for x in xs]
        r = fn(*xs)
        if sat:
            r = saturate(r)
        if relu:
            r = np.where(r > 0, r, np.where(np.isnan(r), r, 0)).astype(r.dtype)
        if half:
            half_store(D, r, ty)
        else:
            D[...] = flush(np.ascontiguousarray(r, np.float32)) if ftz else r

    return run


def simple_float(c, ufunc, nsrc=2):
    ty = c.parts[-1]
    if ty in ("f32", "f64") and not ({"ftz", "sat"} & set(c.parts)) and rounding(c) in (None, "rn"):
        return partial(ufunc, *[c.src(o, ty) for o in c.ops[1 : 1 + nsrc]], c.dst(c.ops[0], ty))
    return float_fn(c, ufunc, nsrc, f64=True)


@alu("add", "sub")
def b_add(c):
    ty = c.parts[-1]
    f = np.add if c.parts[0] == "add" else np.subtract
    if ty in FLOAT:
        return simple_float(c, f)
    if "cc" in c.parts or "sat" in c.parts:
        unsupported(c)
    u = "u" + str(BITS[ty])
    return partial(f, c.src(c.ops[1], u), c.src(c.ops[2], u), c.dst(c.ops[0], u))


def product(c, a_op, b_op, ty, mode):
    """Function returning the lo/hi/wide product array."""
    n = BITS[ty]
    signed = ty[0] == "s"
    if mode == "lo":
        a, b = c.src(a_op, f"u{n}"), c.src(b_op, f"u{n}")
        return partial(np.multiply, a, b)
    a, b = c.src(a_op, ty), c.src(b_op, ty)
    if mode == "wide":
        return partial(np.multiply, a, b, dtype=(SIGNED if signed else UNSIGNED)[2 * n])
    if n == 64:
        unsupported(c)
    wide = (SIGNED if signed else UNSIGNED)[2 * n]
    return lambda: (np.multiply(a, b, dtype=wide) >> wide(n)).astype(NP[ty])


@alu("mul")
def b_mul(c):
    ty = c.parts[-1]
    if ty in FLOAT:
        return simple_float(c, np.multiply)
    mode = c.parts[1]
    n = BITS[ty]
    if mode == "lo":
        u = f"u{n}"
        return partial(np.multiply, c.src(c.ops[1], u), c.src(c.ops[2], u), c.dst(c.ops[0], u))
    if mode == "wide":
        w = ty[0] + str(2 * n)
        return partial(np.multiply, c.src(c.ops[1], ty), c.src(c.ops[2], ty), c.dst(c.ops[0], w), dtype=NP[w])
    if mode != "hi":
        unsupported(c)
    p, D = product(c, c.ops[1], c.ops[2], ty, "hi"), c.dst(c.ops[0], ty)
    return lambda: np.copyto(D, p())


@alu("mad")
def b_mad(c):
    ty = c.parts[-1]
    if ty in FLOAT:
        return b_fma(c)
    mode = c.parts[1]
    n = BITS[ty]
    p = product(c, c.ops[1], c.ops[2], ty, mode)
    w = ty if mode != "wide" else ty[0] + str(2 * n)
    u = f"u{BITS[w]}"
    C, D = c.src(c.ops[3], u), c.dst(c.ops[0], u)
    if "cc" in c.parts or "sat" in c.parts:
        unsupported(c)
    if mode == "lo":
        return lambda: np.add(p(), C, D)
    return lambda: np.add(p().view(NP[u]), C, D)


@alu("fma")
def b_fma(c):
    ty = c.parts[-1]
    if rounding(c) not in (None, "rn") or {"ftz", "sat", "relu"} & set(c.parts) or ty == "f64":
        unsupported(c)
    if ty == "f32":
        return partial(fma_f32, *[c.src(o, ty) for o in c.ops[1:4]], c.dst(c.ops[0], ty))
    return float_fn(c, lambda a, b, d: a * b + d, 3, f64=True)


@alu("div")
def b_div(c):
    ty = c.parts[-1]
    if ty in FLOAT:
        return float_fn(c, np.divide, 2) if {"ftz", "sat"} & set(c.parts) or ty in HALF else simple_float(c, np.divide)
    a, b, D = c.src(c.ops[1], ty), c.src(c.ops[2], ty), c.dst(c.ops[0], ty)
    if ty[0] == "u":
        return partial(np.floor_divide, a, b, D)

    def run():  # truncation towards zero
        q = a // b
        D[...] = q + ((a % b != 0) & ((a < 0) != (b < 0)))

    return run


@alu("rem")
def b_rem(c):
    ty = c.parts[-1]
    a, b, D = c.src(c.ops[1], ty), c.src(c.ops[2], ty), c.dst(c.ops[0], ty)
    return partial(np.fmod, a, b, D)


@alu("abs")
def b_abs(c):
    ty = c.parts[-1]
    if ty in FLOAT:
        return sign_op(c, ty, np.bitwise_and, False)
    return partial(np.abs, c.src(c.ops[1], ty), c.dst(c.ops[0], ty))


@alu("neg")
def b_neg(c):
    ty = c.parts[-1]
    if ty in FLOAT:
        return sign_op(c, ty, np.bitwise_xor, True)
    return partial(np.negative, c.src(c.ops[1], ty), c.dst(c.ops[0], ty))


def sign_op(c, ty, op, bit):
    n = 16 if ty in HALF else BITS[ty]
    u = UNSIGNED[n]
    a, D = c.src(c.ops[1], ty).view(u), c.dst(c.ops[0], ty).view(u)
    k = u(1 << (n - 1)) if bit else u((1 << (n - 1)) - 1)
    if "ftz" in c.parts:
        if ty != "f32":
            return partial(op, a, k, D)
        return lambda: op(flush(a.view(np.float32)).view(u), k, D)
    return partial(op, a, k, D)


def minmax(a, b, is_min, nan):
    """Float min/max with PTX rules: -0 < +0; NaN loses unless nan."""
    f = (np.minimum if nan else np.fmin) if is_min else (np.maximum if nan else np.fmax)
    r = f(a, b)
    z = a == b
    u = UNSIGNED[r.dtype.itemsize * 8]
    bits = (a.view(u) | b.view(u)) if is_min else (a.view(u) & b.view(u))
    return np.where(z, bits, r.view(u)).view(r.dtype)


@alu("min", "max")
def b_minmax(c):
    ty = c.parts[-1]
    is_min = c.parts[0] == "min"
    if ty not in FLOAT:
        if ty in ("u16x2", "s16x2"):
            unsupported(c)
        return partial(
            np.minimum if is_min else np.maximum, c.src(c.ops[1], ty), c.src(c.ops[2], ty), out=c.dst(c.ops[0], ty)
        )
    if "xorsign" in c.parts or len(c.ops) != 3:
        unsupported(c)
    nan = "NaN" in c.parts
    return float_fn(c, lambda a, b: minmax(np.ascontiguousarray(a), np.ascontiguousarray(b), is_min, nan), 2)


@alu("and", "or", "xor")
def b_logic(c):
    ty = c.parts[-1]
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[c.parts[0]]
    return partial(f, c.src(c.ops[1], ty), c.src(c.ops[2], ty), c.dst(c.ops[0], ty))


@alu("not")
def b_not(c):
    ty = c.parts[-1]
    return partial(np.invert, c.src(c.ops[1], ty), c.dst(c.ops[0], ty))


@alu("shl", "shr")
def b_shift(c):
    ty = c.parts[-1]
    left = c.parts[0] == "shl"
    t = ty.replace("s", "u") if left else ty
    a, b, D = c.src(c.ops[1], t), c.src(c.ops[2], "u32"), c.dst(c.ops[0], t)
    n = BITS[ty]
    if isinstance(c.ops[2], Imm):
        k = NP[t](min(c.ops[2].value, n))
        return partial(np.left_shift if left else np.right_shift, a, k, D)
    f = np.left_shift if left else np.right_shift

    def run():
        D[...] = f(a, np.minimum(b, np.uint32(n)).astype(a.dtype))

    return run


@alu("shf")
def b_shf(c):
    _, way, mode, _ = c.parts
    lo, hi, n = (c.src(o, "u32") for o in c.ops[1:4])
    D = c.dst(c.ops[0], "u32")

    def run():
        k = (n & np.uint32(31) if mode == "wrap" else np.minimum(n, np.uint32(32))).astype(np.uint64)
        w = (hi.astype(np.uint64) << np.uint64(32)) | lo
        D[...] = ((w << k) >> np.uint64(32) if way == "l" else w >> k).astype(np.uint32)

    return run


@alu("bfe")
def b_bfe(c):
    ty = c.parts[-1]
    n = BITS[ty]
    D = c.dst(c.ops[0], ty)
    if isinstance(c.ops[2], Imm) and isinstance(c.ops[3], Imm):
        pos, ln = c.ops[2].value & 0xFF, c.ops[3].value & 0xFF
        if 0 < ln and pos + ln <= n:
            if ty[0] == "u":
                a, p, m = c.src(c.ops[1], ty), NP[ty](pos), NP[ty]((1 << ln) - 1)

                def run():
                    np.right_shift(a, p, D)
                    np.bitwise_and(D, m, D)
            else:
                a, up, down = c.src(c.ops[1], ty), NP[ty](n - pos - ln), NP[ty](n - ln)

                def run():
                    np.left_shift(a, up, D)
                    np.right_shift(D, down, D)

            return run
    a, b, length = c.src(c.ops[1], f"u{n}"), c.src(c.ops[2], "u32"), c.src(c.ops[3], "u32")
    signed = ty[0] == "s"

    def run():
        pos = (b & np.uint32(0xFF)).astype(np.int64)
        ln = (length & np.uint32(0xFF)).astype(np.int64)
        u = UNSIGNED[n]
        field = np.where(pos < n, a >> np.minimum(pos, n - 1).astype(u), 0).astype(u)
        mask = np.where(ln >= n, u(2**n - 1), (u(1) << np.minimum(ln, n - 1).astype(u)) - u(1)).astype(u)
        field = field & mask
        if signed:
            sbit = (a >> np.minimum(pos + ln - 1, n - 1).clip(0).astype(u)) & u(1)
            sbit = np.where(ln == 0, 0, sbit)
            top = np.minimum(ln, np.maximum(n - pos, 0))  # bits that come from a
            ext = np.where(top >= n, u(0), ~((u(1) << np.minimum(top, n - 1).astype(u)) - u(1))).astype(u)
            field = np.where(sbit == 1, field | ext, field)
        D.view(u)[...] = field

    return run


@alu("prmt")
def b_prmt(c):
    a, b, s = (c.src(o, "u32") for o in c.ops[1:4])
    D = c.dst(c.ops[0], "u32")
    mode = c.parts[2] if len(c.parts) > 2 else None

    def select(sel):
        """selector nibbles (T, 4) from the control value and mode"""
        k = (sel & np.uint32(3)).astype(np.int64)[:, None]
        i = np.arange(4)
        if mode == "f4e":
            return i + k
        if mode == "b4e":
            return (k - i) % 8
        if mode == "rc8":
            return np.broadcast_to(k, (len(sel), 4))
        if mode == "ecl":
            return np.maximum(i, k)
        if mode == "ecr":
            return np.minimum(i, k)
        if mode == "rc16":
            return (i & 1) + 2 * (k & 1)
        return (sel[:, None] >> (4 * i).astype(np.uint32)).astype(np.int64) & 15

    fixed = select(s.copy()) if isinstance(c.ops[3], Imm) else None
    rows = np.arange(len(a))[:, None]

    def run():
        n = select(s) if fixed is None else fixed
        src = np.stack((a, b), axis=1).view(np.uint8)  # (T, 8)
        out = src[rows, n & 7]
        if mode is None:
            out = np.where(n & 8, np.where(out & 0x80, np.uint8(0xFF), np.uint8(0)), out)
        D[...] = np.ascontiguousarray(out).view(np.uint32).reshape(-1)

    return run


@alu("lop3")
def b_lop3(c):
    if len(c.ops) != 5 or c.parts[-1] != "b32":
        unsupported(c)
    a, b, d = (c.src(o, "u32") for o in c.ops[1:4])
    D, lut = c.dst(c.ops[0], "u32"), c.ops[4].value & 0xFF
    terms = [i for i in range(8) if lut >> i & 1]

    def run():
        r = np.zeros(len(a), np.uint32)
        for i in terms:
            r |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (d if i & 1 else ~d)
        D[...] = r

    return run


# ---- comparison and selection -------------------------------------------------------------------

CMP = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def compare(c, ty, cmp, a, b):
    """Function returning the boolean result of a comparison."""
    if ty not in FLOAT:
        return partial(CMP[cmp], a, b)
    ftz = "ftz" in c.parts and ty == "f32"

    def run():
        x, y = (half_load(a, ty), half_load(b, ty)) if ty in HALF else (a, b)
        if ftz:
            x, y = flush(x), flush(y)
        if cmp in ("num", "nan"):
            n = np.isnan(x) | np.isnan(y)
            return n if cmp == "nan" else ~n
        if cmp == "ne":
            return (x != y) & ~(np.isnan(x) | np.isnan(y))
        if cmp in CMP:
            return CMP[cmp](x, y)
        if cmp == "neu":
            return x != y
        return CMP[cmp[:-1]](x, y) | np.isnan(x) | np.isnan(y)

    return run


@alu("setp")
def b_setp(c):
    cmp, ty = c.parts[1], c.parts[-1]
    boolop = next((p for p in c.parts[2:-1] if p in ("and", "or", "xor")), None)
    t = ("u" + ty[1:]) if ty[0] == "b" and ty not in HALF else ty
    if cmp in ("lo", "ls", "hi", "hs"):
        t = "u" + t[1:]
    a, b = c.src(c.ops[1], t), c.src(c.ops[2], t)
    f = compare(c, t, cmp, a, b)
    dst = c.ops[0]
    if ty.endswith("x2"):
        if not isinstance(dst, Pair):
            unsupported(c)
        P, Q = c.dst(dst.first, "pred"), c.dst(dst.second, "pred")
        C = c.src(c.ops[3], "pred") if boolop else None

        def run():
            r = f().reshape(-1, 2)
            if boolop:
                r = CMPBOOL[boolop](r, C[:, None])
            P[...] = r[:, 0]
            Q[...] = r[:, 1]

        return run
    if isinstance(dst, Pair):
        P, Q = c.dst(dst.first, "pred"), c.dst(dst.second, "pred")
        C = c.src(c.ops[3], "pred") if boolop else None

        def run():
            r = f()
            q = ~r
            if boolop:
                r, q = CMPBOOL[boolop](r, C), CMPBOOL[boolop](q, C)
            P[...] = r
            Q[...] = q

        return run
    P = c.dst(dst, "pred")
    if boolop is None:
        if t not in FLOAT or (t in ("f32", "f64") and cmp in CMP and cmp != "ne" and "ftz" not in c.parts):
            return partial(CMP[cmp], a, b, P)
        return lambda: np.copyto(P, f())
    C = c.src(c.ops[3], "pred")
    return lambda: CMPBOOL[boolop](f(), C, P)


CMPBOOL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@alu("selp")
def b_selp(c):
    ty = c.parts[-1]
    u = ty if ty == "pred" else f"u{BITS[ty]}"
    a, b, p, D = c.src(c.ops[1], u), c.src(c.ops[2], u), c.src(c.ops[3], "pred"), c.dst(c.ops[0], u)
    return lambda: np.copyto(D, np.where(p, a, b))


# ---- data movement ------------------------------------------------------------------------------


@alu("mov")
def b_mov(c):
    ty = c.parts[-1]
    d, s = c.ops[0], c.ops[1]
    if isinstance(d, Vec):
        n = BITS[ty] // len(d.items)
        parts = c.src(s, f"u{BITS[ty]}").view(UNSIGNED[n]).reshape(-1, len(d.items))
        D = [(c.dst(x, f"u{n}"), parts[:, i]) for i, x in enumerate(d.items) if x is not SINK]

        def run():
            for x, y in D:
                np.copyto(x, y)

        return run
    if isinstance(s, Vec):
        n = BITS[ty] // len(s.items)
        D = c.dst(d, f"u{BITS[ty]}").view(UNSIGNED[n]).reshape(-1, len(s.items))
        S = [(D[:, i], c.src(x, f"u{n}")) for i, x in enumerate(s.items)]

        def run():
            for x, y in S:
                np.copyto(x, y)

        return run
    if isinstance(s, Sym) and s.name in ("%clock", "%clock64", "%globaltimer", "%clock_hi", "%globaltimer_lo"):
        D, m = c.dst(d, ty), c.m

        def run():
            m.clock += 100
            D[...] = m.clock

        return run
    t = ty if ty == "pred" else f"u{BITS[ty]}"
    return partial(np.copyto, c.dst(d, t), c.src(s, t))


@alu("cvta")
def b_cvta(c):
    to = c.parts[1] == "to"
    space = c.parts[2] if to else c.parts[1]
    space = space.split("::")[0]
    ty = c.parts[-1]
    off = {"global": 0, "const": 0, "param": c.m.opts["param_base"], "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}[
        space
    ]
    short = isinstance(c.ops[1], Reg) and c.ops[1].size == 4  # 32-bit address of a short pointer
    s, D, k = c.src(c.ops[1], "u32" if short else ty), c.dst(c.ops[0], ty), np.uint64(off)

    def run():
        x = s.astype(np.uint64)
        D[...] = x - k if to else x + k

    return run


# ---- conversion ---------------------------------------------------------------------------------


def int_range(ty):
    n = BITS[ty]
    return (-(1 << (n - 1)), (1 << (n - 1)) - 1) if ty[0] == "s" else (0, (1 << n) - 1)


INT_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_int(x, ty, rnd):
    """Saturating; NaN gives 0 (the hardware gives 0 for <= 32 bits; 0x8000.. for 64)."""
    lo, hi = int_range(ty)
    x = INT_ROUND[rnd](x.astype(np.float64))
    out = np.empty(x.shape, NP[ty])
    nan = np.isnan(x)
    big, small = x >= float(hi) if hi < 2**53 else x >= float(hi + 1), x <= float(lo)
    ok = ~(nan | big | small)
    out[ok] = x[ok].astype(NP[ty])
    out[big] = hi
    out[small] = lo
    out[nan] = 0 if BITS[ty] <= 32 else np.array(1 << 63, np.uint64).astype(NP[ty])
    return out


@alu("cvt")
def b_cvt(c):
    dty, sty = c.parts[-2], c.parts[-1]
    mods = c.parts[1:-2]
    rnd = next((p for p in mods if p[0] == "r" and p != "relu"), None)
    ftz, sat, relu = "ftz" in mods, "sat" in mods, "relu" in mods
    for p in mods:
        if p not in ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "satfinite", "relu"):
            unsupported(c)
    if dty in ("f16x2", "bf16x2"):  # d = {hi: a, lo: b}
        if sty != "f32" or rnd not in ("rn", "rz"):
            unsupported(c)
        hi, lo, D = (
            c.src(c.ops[1], "f32"),
            c.src(c.ops[2], "f32"),
            c.dst(c.ops[0], "u32").view(np.uint16).reshape(-1, 2),
        )
        t = dty[:-2]

        def run():
            for k, x in ((0, lo), (1, hi)):
                if relu:
                    x = np.where(x > 0, x, np.where(np.isnan(x), x, np.float32(0)))
                D[:, k] = f32_to_half(x, t, rnd)

        return run
    s_float, d_float = sty in FLOAT, dty in FLOAT
    if sty in ("f16x2", "bf16x2") or sty not in NP or dty not in NP:
        unsupported(c)
    a = c.src(c.ops[1], sty)
    put = c.put(c.ops[0], dty)
    if not s_float and not d_float:

        def run():
            x = a
            if sat:
                lo, hi = int_range(dty)
                slo, shi = int_range(sty)
                x = np.clip(x, max(lo, slo), min(hi, shi))
            put(x.astype(NP[dty]))

        if not sat and isinstance(c.ops[0], Reg) and c.ops[0].size * 8 == BITS[dty]:
            D = c.dst(c.ops[0], dty)
            return partial(np.copyto, D, a, "unsafe")
        return run
    if not s_float:  # int -> float
        if rnd not in (None, "rn"):
            unsupported(c, "rounding mode")

        def run():
            if dty == "f64":
                put(a.astype(np.float64))
            elif dty == "f32":
                put(a.astype(np.float32))
            else:  # integers of <= 53 bits are exact in float64
                put(f64_to_bf16(a.astype(np.float64)) if dty == "bf16" else a.astype(np.float64).astype(np.float16))

        return run
    if not d_float:  # float -> int
        if rnd not in INT_ROUND:
            unsupported(c, "rounding mode")

        def run():
            x = half_load(a, sty) if sty in HALF else a
            if ftz and sty == "f32":
                x = flush(x)
            put(float_to_int(x, dty, rnd))

        return run

    def run():  # float -> float
        x = half_load(a, sty) if sty in HALF else a
        if ftz and sty == "f32":
            x = flush(np.ascontiguousarray(x))
        if rnd in INT_ROUND:
            x = INT_ROUND[rnd](x)
        if sat:
            x = saturate(x)
        if relu:
            x = np.where(x > 0, x, np.where(np.isnan(x), x, 0)).astype(x.dtype)
        if dty == "bf16":
            put(f64_to_bf16(x) if x.dtype == np.float64 else f32_to_bf16(x, rnd == "rz"))
        elif dty == "f16":
            put(f32_to_half(x, "f16", rnd))
        else:
            r = x.astype(NP[dty])
            put(flush(r) if ftz and dty == "f32" else r)

    if rnd not in (None, "rn", *INT_ROUND) and not (rnd == "rz" and dty in ("f16", "bf16") and sty == "f32"):
        unsupported(c, "rounding mode")
    return run


def f32_to_half(x, t, rnd):
    """float -> f16/bf16 bits."""
    if t == "bf16":
        return f32_to_bf16(x, rnd == "rz")
    h = x.astype(np.float16)
    b = h.view(np.uint16)
    if rnd == "rz":
        over = np.abs(h.astype(np.float64)) > np.abs(x.astype(np.float64))
        b = np.where(over & ~np.isnan(h), b - np.uint16(1), b)
    return np.where(np.isnan(h), np.uint16(0x7FFF), b)


@alu("createpolicy")
def b_createpolicy(c):  # an opaque cache hint
    D = c.dst(c.ops[0], "u64")
    return lambda: D.fill(0)
