"""Single instructions against Python's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ptxrun.handwritten import apply

EDGE = (0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0x12345678)


def ints(bits: int = 32, seed: int = 0) -> list[int]:
    generator = np.random.default_rng(seed)
    top = (1 << bits) - 1
    values = [int(v) for v in generator.integers(0, top, 100, dtype=np.uint64, endpoint=True)]
    edges = [v & top for v in EDGE] + [-v & top for v in EDGE]
    generator.shuffle(edges)
    return edges + values


def s(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def quotient(a: int, b: int) -> int:
    return -(abs(a) // abs(b)) if (a < 0) != (b < 0) else abs(a) // abs(b)


def bfe(a: int, position: int, length: int, signed: bool) -> int:
    field = (a >> position) & ((1 << length) - 1)
    sign = signed and length and (a >> min(position + length - 1, 31)) & 1
    return field | (-1 << min(length, 32 - position)) if sign else field


A, B, C, SMALL = ints(seed=1), ints(seed=2), ints(seed=3), [v % 41 for v in ints(seed=4)]
NONZERO = [v or 1 for v in B]
A64, B64, C64 = ints(64, 5), ints(64, 6), ints(64, 7)
NONZERO64 = [v or 1 for v in B64]


@pytest.mark.parametrize(
    ("code", "inputs", "function"),
    [
        ("add.s32", (A, B), lambda x, y: x + y),
        ("sub.u32", (A, B), lambda x, y: x - y),
        ("mul.lo.s32", (A, B), lambda x, y: x * y),
        ("mul.hi.u32", (A, B), lambda x, y: x * y >> 32),
        ("mul.wide.s32", (A, B), lambda x, y: s(x) * s(y)),
        ("mul.wide.u32", (A, B), lambda x, y: x * y),
        ("mad.lo.s32", (A, B, C), lambda x, y, z: x * y + z),
        ("mad.wide.s32", (A, B, C64), lambda x, y, z: s(x) * s(y) + z),
        ("mad.wide.u32", (A, B, C64), lambda x, y, z: x * y + z),
        ("mul.lo.s64", (A64, B64), lambda x, y: x * y),
        ("mad.lo.s64", (A64, B64, C64), lambda x, y, z: x * y + z),
        ("neg.s32", (A,), lambda x: -x),
        ("abs.s32", (A,), lambda x: abs(s(x))),
        ("min.s32", (A, B), lambda x, y: min(s(x), s(y))),
        ("max.u32", (A, B), max),
        ("min.s64", (A64, B64), lambda x, y: min(s(x, 64), s(y, 64))),
        ("div.s32", (A, NONZERO), lambda x, y: quotient(s(x), s(y))),
        ("div.u32", (A, NONZERO), lambda x, y: x // y),
        ("div.s64", (A64, NONZERO64), lambda x, y: quotient(s(x, 64), s(y, 64))),
        ("rem.s32", (A, NONZERO), lambda x, y: s(x) - quotient(s(x), s(y)) * s(y)),
        ("and.b32", (A, B), lambda x, y: x & y),
        ("or.b32", (A, B), lambda x, y: x | y),
        ("xor.b32", (A, B), lambda x, y: x ^ y),
        ("not.b64", (A64,), lambda x: ~x),
        ("shl.b32", (A, SMALL), lambda x, n: x << n),
        ("shr.u32", (A, SMALL), lambda x, n: x >> n),
        ("shr.s32", (A, SMALL), lambda x, n: s(x) >> n),
        ("shr.s64", (A64, B), lambda x, n: s(x, 64) >> n),
        ("shf.l.wrap.b32", (A, B, C), lambda low, high, n: ((high << 32 | low) << (n & 31)) >> 32),
        ("cvt.s64.s32", (A,), s),
        ("cvt.u64.u32", (A,), lambda x: x),
        ("cvt.u32.u64", (A64,), lambda x: x),
    ],
)
def test_integers(code: str, inputs: tuple[list[int], ...], function: Callable[..., int]) -> None:
    bits = {"s32": 32, "u32": 32, "b32": 32, "s64": 64, "u64": 64, "b64": 64}[code.split(".")[-1]]
    out = 64 if "wide" in code or code.startswith("cvt.s64") or code.startswith("cvt.u64") else bits
    out = 32 if code.startswith("cvt.u32") else out
    widths = [64 if values in (A64, B64, C64, NONZERO64) else 32 for values in inputs]
    operands = ", ".join(f"{{{i}}}" for i in range(len(inputs)))
    got = apply(f"{code} {{d}}, {operands};", [f"b{w}" for w in widths], f"b{out}", *inputs)
    expected = [function(*values) & ((1 << out) - 1) for values in zip(*inputs, strict=True)]
    assert got.tolist() == expected


@pytest.mark.parametrize(("position", "length"), [(0, 32), (3, 4), (31, 1), (5, 27), (0, 7)])
@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_bit_fields(kind: str, position: int, length: int) -> None:
    got = apply(f"bfe.{kind} {{d}}, {{0}}, {position}, {length};", ["b32"], "b32", A)
    assert got.tolist() == [bfe(a, position, length, kind == "s32") & 0xFFFFFFFF for a in A]


def test_moves_and_predicates() -> None:
    swapped = apply("mov.b32 {%h1, %h2}, {0}; mov.b32 {d}, {%h2, %h1};", ["b32"], "b32", A)
    assert swapped.tolist() == [(x >> 16) | (x << 16) & 0xFFFFFFFF for x in A]
    assert apply("mov.b64 {_, {d}}, {0};", ["b64"], "b32", A64).tolist() == [x >> 32 for x in A64]
    code = "setp.gt.u32 %p3, {0}, 100; setp.hi.and.u32 %p1, {0}, {1}, %p3; selp.b32 {d}, 1, 0, %p1;"
    assert apply(code, ["b32"] * 2, "b32", A, B).tolist() == [x > y and x > 100 for x, y in zip(A, B, strict=True)]
    code = "setp.lt.s64 %p1, {0}, {1}; @%p1 mov.b32 {d}, 5; @!%p1 mov.b32 {d}, 6;"
    expected = [5 if s(x, 64) < s(y, 64) else 6 for x, y in zip(A64, B64, strict=True)]
    assert apply(code, ["b64"] * 2, "b32", A64, B64).tolist() == expected


def floats(seed: int) -> npt.NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(200) * 10.0 ** generator.integers(-6, 6, 200)
    edges = np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3.4e38, 0.5, 1.5, 2.5, 65504, 65520, 1e9])
    generator.shuffle(edges)
    return np.concatenate([edges, values]).astype(np.float32)


FA, FB, FC = floats(1), floats(2), floats(3)


def same(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> bool:
    equal = (got == expected) & (np.signbit(got) == np.signbit(expected))
    return bool((equal | (np.isnan(got) & np.isnan(expected))).all())


def test_float32() -> None:
    with np.errstate(all="ignore"):
        for code, expected in (("add", FA + FB), ("sub.rn", FA - FB), ("mul.rn", FA * FB), ("div.rn", FA / FB)):
            got = apply(f"{code}.f32 {{d}}, {{0}}, {{1}};", ["f32"] * 2, "f32", FA, FB).view(np.float32)
            assert same(got, expected), code
        assert same(apply("neg.f32 {d}, {0};", ["f32"], "f32", FA).view(np.float32), -FA)


def test_fma_rounds_once() -> None:
    """Where float64's own rounding of the sum is exactly half way between two float32."""
    a, b, c = (np.array([v], np.float32) for v in (1 + 2.0**-12, 1 - 2.0**-12, 2.0**24 + 2))
    exact = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0]))
    got = apply("fma.rn.f32 {d}, {0}, {1}, {2};", ["f32"] * 3, "f32", a, b, c).view(np.float32)[0]
    below, above = np.float32(2.0**24 + 2), np.float32(2.0**24 + 4)
    assert abs(Fraction(float(got)) - exact) == min(abs(Fraction(float(v)) - exact) for v in (below, above))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Conversions round to nearest even and keep infinities; packed pairs hold the second operand below."""
    finite = FA[~np.isnan(FA)]
    expected = torch.from_numpy(finite).to(dtype).view(torch.int16).numpy().view(np.uint16)
    got = apply(f"cvt.rn.{name}.f32 {{d}}, {{0}};", ["f32"], "b16", finite)
    assert got.tolist() == expected.tolist()
    back = apply(f"cvt.f32.{name} {{d}}, {{0}};", ["b16"], "f32", expected).view(np.float32)
    assert same(back, torch.from_numpy(finite).to(dtype).float().numpy())
    pairs = apply(f"cvt.rn.{name}x2.f32 {{d}}, {{0}}, {{1}};", ["f32"] * 2, "b32", finite, finite[::-1].copy())
    assert pairs.tolist() == [int(a) << 16 | int(b) for a, b in zip(expected, expected[::-1], strict=True)]


def test_packed_bfloat16() -> None:
    """One rounding each, of the exact result."""
    halves = [torch.from_numpy(x[16:]).to(torch.bfloat16) for x in (FA, FB, FC)]
    words = [h.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for h in halves]
    pairs = [w | (w << 16) for w in words]
    a, b, c = (h.double() for h in halves)
    for code, operands, exact in (("sub.rn", 2, a - b), ("fma.rn", 3, a * b + c)):
        text = ", ".join(f"{{{i}}}" for i in range(operands))
        got = apply(f"{code}.bf16x2 {{d}}, {text};", ["b32"] * operands, "b32", *pairs[:operands], target="sm_90")
        low = torch.from_numpy((got & 0xFFFF).astype(np.uint16).view(np.int16)).view(torch.bfloat16)
        assert torch.equal(low, torch.from_numpy((got >> 16).astype(np.uint16).view(np.int16)).view(torch.bfloat16))
        assert ((low.double() - exact).abs() <= 2.0**-8 * exact.abs()).all()
