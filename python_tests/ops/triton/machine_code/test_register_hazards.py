"""Registers of pending products: which instructions touch them, followed through all of control flow."""

from __future__ import annotations

import pytest

from rpsft_kernels.ops.triton.machine_code.register_hazards import find_hazards
from sass_text import program

pytestmark = pytest.mark.xdist_group("aot")
# Accumulators R24 to R39; the operand in R51 to R54, where compilers would not put it: so that what is wide reaches it.
PRODUCT = "HGMMA.64x32x16.F32.BF16 R24, R51, gdesc[UR12], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WRITE = "MOV R51, R2"


def _split(text: str) -> list[str]:
    return [" ".join(each.split()) for each in text.split(";")]


def find_between(instruction: str) -> list[str]:
    """The findings with an instruction between a product and its wait; behind the wait there are none."""
    assert find_hazards(program(PRODUCT, WAIT, instruction)) == []
    return find_hazards(program(PRODUCT, instruction, WAIT))


TOUCHING = """
    MOV R51, R2; MOV R54, 0x10; @P0 MOV R51, R2; @!UP1 MOV R51, R2; LDS R54, [R2]; LDS.U16 R51, [R2]; LDS.64 R50,
    [R2]; LDS.128 R48, [R2+UR4+0x400]; LDS.128 R52, [R2]; LDG.E.128.CONSTANT R48, desc[UR4][R2.64]; LDG.E.U16 R51,
    desc[UR4][R2.64]; LDL.64 R50, [R1]; LDC.64 R50, c[0x0][0x210]; LDSM.16.M88.4 R48, [R2]; LDSM.16.MT88.2 R50,
    [R2]; LDSM.16.M88 R51, [R2]; IMAD.WIDE.U32 R50, R2, R3, RZ; CS2R R50, SRZ; S2R R51, SR_TID.X; DADD R50, R2, R4;
    F2F.F64.F32 R50, R2; I2F.F64 R50, R2; F2I.S64.F64 R50, R2; HMMA.16816.F32.BF16 R48, R4, R8, RZ; DMMA.884 R48,
    R4, R8, R60; MUFU.RCP R51, R2; PRMT R51, R2, 0x7610, R3; SHFL.IDX PT, R51, R2, R3, 0x1f; VOTE.ANY R51, PT, P0;
    P2R R51, PR, RZ, 0x7f; MATCH.ALL PT, R51, R2; ATOMG.E.ADD.STRONG.GPU PT, R51, desc[UR4][R2.64], R5;
    ATOMG.E.ADD.64.STRONG.GPU PT, R50, desc[UR4][R2.64], R6; ATOMS.CAS R51, [R2], R4, R5; F2FP.BF16.F32.PACK_AB R51,
    R3, R2; MOVM.16.MT88 R51, R2; LEPC R50; IADD3 R51, P0, R2, R3, RZ; LOP3.LUT P0, R51, R2, R3, RZ, 0xc0, !PT;
    BMOV.32.CLEAR R51, B0; SYNCS.ARRIVE.TRANS64 R50, [UR4], R2; HADD2.BF16_V2 R51, R2, -R3; FADD R51, R51.reuse,
    -R3; SEL R51, R2, R3, P0; LDGMC.E.ADD.BF16x2 R48, desc[UR4][R2.64]; QMMA.16832.F32.E4M3.E4M3 R48, R4, R8, RZ
"""


@pytest.mark.parametrize("instruction", _split(TOUCHING))
def test_a_write_of_the_operand_is_found(instruction: str) -> None:
    (found,) = find_between(instruction)
    assert found.startswith(f"made: {instruction} at 0x10 writes R5")
    assert f"while {PRODUCT} at 0x0 may still use them: no WARPGROUP.DEPBAR.LE gsb0, 0x0, lies between" in found


# Accumulators end at R39.
HARMLESS = """
    MOV R50, R51; MOV R55, R54; LDS.64 R48, [R51]; LDS R50, [R2]; LDS.128 R44, [R2]; LDS.64 R40, [R2]; LDG.E.LTC128B
    R50, desc[UR4][R2.64]; LDG.E.64 R48, desc[UR4][R52.64]; LDSM.16.M88 R50, [R2]; LDSM.16.M88.2 R48, [R2]; IMAD
    R50, R2, R3, R51; IMAD.HI.U32 R50, R2, R3, RZ; IMAD.WIDE R48, R51, R3, R52; SHF.R.S64 R50, RZ, 0x1e, R2;
    SHF.L.U64.HI R50, R2, 0x1, R3; CS2R.32 R50, SR_CLOCKLO; F2F.F32.F64 R50, R2; ISETP.GE.AND P0, PT, R51, R2, PT;
    FSETP.GEU.AND P0, PT, |R51|, R2, PT; STS.128 [R51], R52; STG.E.64 desc[UR4][R2.64], R52; R2UR UR51, R51;
    REDUX.SUM UR4, R51; R2P PR, R51, 0x7f; ULDC.64 UR50, c[0x0][0x208]; S2UR UR51, SR_CTAID.X; ATOMS.ADD RZ, [R2],
    R51; ATOMG.E.EXCH.STRONG.GPU PT, RZ, [R2], R51; RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R51; SHFL.IDX
    P0, R50, R51, RZ, 0x1f; IADD3 R50, P0, R51, R3, RZ; SYNCS.ARRIVE.TRANS64 RZ, [UR4], R51;
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R51; UTMALDG.2D [UR4], [UR8]; LOP3.LUT P0, RZ, R51, 0x7f, RZ, 0xc0,
    !PT; BAR.SYNC.DEFER_BLOCKING 0x0; VOTEU.ANY UP0, P0; DEPBAR.LE SB0, 0x1; LDGSTS.E.128 [R51], desc[UR4][R52.64];
    UMOV UR51, 0x400; WARPGROUP.ARRIVE; BMOV.32 B0, R51; MOV R40, R40; STS.128 [R2], R40; FADD R23, R40, R23; STS.64
    [R2], R22; IMAD.WIDE R2, R4, R5, R22
"""


@pytest.mark.parametrize("instruction", _split(HARMLESS))
def test_what_touches_nothing_of_it_is_left_alone(instruction: str) -> None:
    assert find_between(instruction) == []


@pytest.mark.parametrize(
    ("instruction", "how"),
    [
        ("FADD R2, R24, R3", "reads R24"),
        ("HADD2.F32 R2, -RZ, R39.H0_H0", "reads R39"),
        ("STS.128 [R2], R36", "reads R36-R39"),
        ("STG.E.128 desc[UR4][R2.64], R21", "reads R24"),
        ("STSM.16.M88.4 [R2], R21", "reads R24"),
        ("IMAD.WIDE R2, R4, R5, R23", "reads R24"),
        ("LDG.E R2, desc[UR4][R24.64]", "reads R24-R25"),
        ("@!P3 F2FP.BF16.F32.PACK_AB R2, R31, R30", "reads R30-R31"),
        ("R2UR UR4, R38", "reads R38"),
        ("HMMA.16816.F32.BF16 R4, R8, R23, R4", "reads R24-R26"),
        ("ISETP.GE.AND P0, PT, R39, R2, PT", "reads R39"),
        ("CS2R R38, SRZ", "writes R38-R39"),
        ("LDS.64 R22, [R25]", "reads R25"),
        ("LDS.128 R21, [R2]", "writes R24"),
        ("SYNCS.ARRIVE.TRANS64 RZ, [UR4], R39", "reads R39"),
        ("SHFL.BFLY PT, R2, R39, 0x1, 0x1f", "reads R39"),
        ("ATOMG.E.CAS.STRONG.GPU PT, R4, desc[UR4][R2.64], R23, R6", "reads R24-R26"),
    ],
)
def test_accumulators_are_neither_read_nor_written(instruction: str, how: str) -> None:
    assert any(f"{instruction} at 0x10 {how} while" in each for each in find_between(instruction))


@pytest.mark.parametrize(
    ("product", "last"),
    [
        ("HGMMA.64x8x8.F32.TF32", 27),
        ("HGMMA.64x32x16.F32", 39),
        ("HGMMA.64x32x16.F16", 31),
        ("HGMMA.64x256x16.F32.BF16", 151),
        ("QGMMA.64x32x32.F32.E4M3.E5M2", 39),
        ("QGMMA.64x32x32.F16.E4M3.E4M3", 31),
        ("IGMMA.64x32x32.S8.S8", 39),
        ("IGMMA.64x32x32.U8.S8.SAT", 39),
        ("BGMMA.64x16x256.AND.POPC", 31),
    ],
)
def test_how_many_accumulators_a_shape_has(product: str, last: int) -> None:
    product = f"{product} R24, gdesc[UR12], R24, gsb0"
    assert find_hazards(program(product, f"MOV R{last + 1}, RZ", WAIT)) == []
    assert len(find_hazards(program(product, f"MOV R{last}, RZ", WAIT))) == 1


def test_a_sum_without_what_was_there_and_a_sparse_product_are_read_too() -> None:
    fresh = "HGMMA.64x32x16.F32.BF16 R24, R51, gdesc[UR12].tnspB, RZ, !UPT, gsb0"
    assert find_hazards(program(fresh, "MOV R55, RZ", WAIT)) == []
    assert len(find_hazards(program(fresh, "MOV R54, RZ", WAIT))) == 1
    sparse = "HGMMA.SP.64x32x32.F32.BF16 R24, R51, gdesc[UR12], R24, R60, 0x0, gsb0"
    assert "writes R60" in find_hazards(program(sparse, "MOV R60, RZ", WAIT))[0]
    # Not what it adds to but another sum.
    apart = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R64, gsb0"
    assert "writes R79" in find_hazards(program(apart, "MOV R79, RZ", WAIT))[0]


@pytest.mark.parametrize(
    ("second", "finding"),
    [
        ("HGMMA.64x32x16.F32.BF16 R24, R60, gdesc[UR8], R24, gsb0", None),
        ("HGMMA.64x32x16.F32.BF16 R24, R51, gdesc[UR8], R24, gsb0", None),
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], gdesc[UR12], R24, gsb0", None),
        ("HGMMA.64x32x16.F32.BF16 R64, R51, gdesc[UR8], R64, gsb0", None),
        ("HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR8], R24, gsb0", "writes R24-R39, R51-R54 while"),
        ("HGMMA.64x16x16.F32.BF16 R24, R60, gdesc[UR8], R24, gsb0", "writes R24-R31 while"),
        ("HGMMA.64x64x16.F16 R24, R60, gdesc[UR8], R24, gsb0", "writes R24-R39 while"),
        ("HGMMA.64x32x16.F32.BF16 R40, R60, gdesc[UR8], R40, gsb0", "writes R51-R54 while"),
        ("HGMMA.64x32x16.F32.BF16 R64, R36, gdesc[UR8], R64, gsb0", "reads R36-R39 while"),
        ("HGMMA.64x32x16.F32.BF16 R64, gdesc[UR8], R24, gsb0", "reads R24-R39 while"),
        ("HGMMA.64x32x16.F32.BF16 R64, R76, gdesc[UR8], R64, gsb0", "reads R76-R79 while it accumulates there"),
    ],
)
def test_a_product_may_follow_on_the_same_accumulators_in_the_same_shape(second: str, finding: str | None) -> None:
    found = find_hazards(program(PRODUCT, second, WAIT))
    assert [each for each in found if finding is None or finding not in each] == []
    assert bool(found) == (finding is not None)


SECOND = "HGMMA.64x32x16.F32.BF16 R24, R60, gdesc[UR8], R24, gsb0"
OPEN = "HGMMA.64x32x16.F32.BF16 R24, R51, gdesc[UR12], R24"
LOOP = "@P0 BRA `(.L_x_0)"
CASES: dict[str, tuple[list[str], str | None]] = {
    "a wait that leaves one group": ([PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", WRITE], "gsb0, 0x0, lies between"),
    "a wait that leaves the newer of two": ([PRODUCT, SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x1", WRITE], None),
    "a write of the newer of two": ([PRODUCT, SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R60, RZ"], "writes R60"),
    "a wait that leaves two of three": (
        [PRODUCT, SECOND, SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x3", WRITE, WAIT],
        "gsb0, 0x2 or less, lies between",
    ),
    "a group that has not ended": ([OPEN, WAIT, WRITE], "no wait covers a group that has not ended"),
    "a group that ends with a later product": ([OPEN, SECOND, WAIT, WRITE], None),
    "the wait of another scoreboard": ([PRODUCT, "DEPBAR.LE SB0, 0x0", WRITE, WAIT], "writes R51"),
    "a guarded wait": ([PRODUCT, "@P0 WARPGROUP.DEPBAR.LE gsb0, 0x0", WRITE], "writes R51"),
    "a wait on one branch": ([PRODUCT, "@P0 BRA `(.L_x_0)", WAIT, ".L_x_0:", WRITE], "writes R51"),
    "a write on one branch": ([PRODUCT, "@P0 BRA `(.L_x_0)", WRITE, ".L_x_0:", WAIT], "writes R51"),
    "waits on both branches": (
        [PRODUCT, "@P0 BRA `(.L_x_0)", WAIT, "BRA `(.L_x_1)", ".L_x_0:", WAIT, ".L_x_1:", WRITE],
        None,
    ),
    "a write that is jumped over": ([PRODUCT, "BRA `(.L_x_0)", WRITE, ".L_x_0:", WAIT], None),
    "a jump with a condition as an operand": ([PRODUCT, "BRA.U !UP0, `(.L_x_0)", WRITE, ".L_x_0:", WAIT], "writes R51"),
    "a jump where threads differ": ([PRODUCT, "BRA.DIV UR4, `(.L_x_0)", WAIT, ".L_x_0:", WRITE], "writes R51"),
    "an end that may not come": ([PRODUCT, "@P0 EXIT", WRITE, WAIT], "writes R51"),
    "an end": ([PRODUCT, "BRA `(.L_x_0)", ".L_x_1:", WRITE, WAIT, "EXIT", ".L_x_0:", WAIT, "@P0 BRA `(.L_x_1)"], None),
    "around a loop": ([".L_x_0:", WRITE, PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", LOOP, WAIT], "writes R51"),
    "around a loop with a wait": ([".L_x_0:", WRITE, PRODUCT, WAIT, LOOP], None),
    "around a loop, two ahead": (
        [".L_x_0:", WRITE, OPEN, SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x1", LOOP, WAIT],
        "gsb0, 0x0, lies between",
    ),
    "around a loop, two buffers": (
        [
            ".L_x_0:",
            WRITE,
            PRODUCT,
            "WARPGROUP.DEPBAR.LE gsb0, 0x1",
            "MOV R60, RZ",
            SECOND,
            "WARPGROUP.DEPBAR.LE gsb0, 0x1",
            LOOP,
            WAIT,
        ],
        None,
    ),
    "around a loop, by a branch inside": (
        [".L_x_0:", "@P1 BRA `(.L_x_1)", WAIT, ".L_x_1:", WRITE, PRODUCT, LOOP, WAIT],
        "writes R51",
    ),
    "more groups than any wait leaves": (
        [
            PRODUCT,
            ".L_x_0:",
            SECOND,
            "WARPGROUP.DEPBAR.LE gsb0, 0x2",
            "@P0 BRA `(.L_x_0)",
            "BRA `(.L_x_1)",
            ".L_x_1:",
            WRITE,
            WAIT,
        ],
        "writes R51",
    ),
    "a loop without any wait": ([".L_x_0:", SECOND, LOOP, "MOV R60, RZ"], "writes R60"),
    "a function that writes": (
        [PRODUCT, "MOV R2, 0x30", "CALL.REL.NOINC `(f)", WAIT, "EXIT", "f:", WRITE, "RET.REL.NODEC R2 `(made)"],
        "writes R51",
    ),
    "a function behind the wait": (
        [PRODUCT, WAIT, "MOV R2, 0x40", "CALL.REL.NOINC `(f)", "EXIT", "f:", WRITE, "RET.REL.NODEC R2 `(made)"],
        None,
    ),
    "a function that begins a product": (
        [
            "MOV R2, 32@lo((made + .L_x_1@srel))",
            "CALL.REL.NOINC `(f)",
            ".L_x_1:",
            WRITE,
            WAIT,
            "EXIT",
            "f:",
            PRODUCT,
            "RET.REL.NODEC R2 `(made)",
        ],
        "writes R51",
    ),
    "a function that waits": (
        [PRODUCT, "MOV R2, 0x30", "CALL.REL.NOINC `(f)", WRITE, "EXIT", "f:", WAIT, "RET.REL.NODEC R2 `(made)"],
        None,
    ),
    "a region's end": (
        ["BSSY B0, `(.L_x_0)", "@P0 BRA `(.L_x_1)", PRODUCT, "BSYNC B0", ".L_x_1:", "BSYNC B0", ".L_x_0:", WRITE, WAIT],
        "writes R51",
    ),
    "a region's end elsewhere": (
        ["BSSY B0, `(.L_x_0)", PRODUCT, "BSYNC B0", WAIT, "EXIT", ".L_x_0:", WRITE, WAIT],
        "writes R51",
    ),
    "two regions on one barrier": (
        [
            "BSSY B0, `(.L_x_0)",
            "BSYNC B0",
            ".L_x_0:",
            WRITE,
            PRODUCT,
            "BSSY B0, `(.L_x_1)",
            "BSYNC B0",
            ".L_x_1:",
            WAIT,
        ],
        None,
    ),
    "a barrier from a register": (
        [
            "BSSY B0, `(.L_x_0)",
            "BSYNC B0",
            ".L_x_0:",
            WRITE,
            PRODUCT,
            "BSSY B0, `(.L_x_1)",
            "BMOV.32 B0, R3",
            "BSYNC B0",
            ".L_x_1:",
            WAIT,
        ],
        "writes R51",
    ),
    "one of several jumps": (
        [PRODUCT, 'BRX R4 -0x30 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)', ".L_x_0:", WAIT, "EXIT", ".L_x_1:", WRITE, WAIT],
        "writes R51",
    ),
    "several jumps": (
        [
            PRODUCT,
            'BRX R4 -0x30 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)',
            ".L_x_0:",
            WAIT,
            WRITE,
            "EXIT",
            ".L_x_1:",
            WAIT,
            WRITE,
        ],
        None,
    ),
    "threads gathered elsewhere": (
        [PRODUCT, "WARPSYNC.COLLECTIVE R3, `(.L_x_0)", WAIT, ".L_x_0:", WRITE],
        "writes R51",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_followed_along_every_path(case: str) -> None:
    lines, finding = CASES[case]
    found = find_hazards(program(*lines))
    assert (finding in "\n".join(found)) if finding else (found == []), found


@pytest.mark.parametrize(
    ("lines", "finding"),
    [
        (["FROB R2, R3"], "FROB R2, R3 at 0x10 is an instruction that is not known here"),
        (["BRX R2 -0x30"], "BRX R2 -0x30 at 0x10 goes where cannot be told"),
        (["BRXU UR4 -0x30"], "goes where cannot be told"),
        (["JMX R2"], "goes where cannot be told"),
        (["BRA `(.L_x_7)"], "no label of this code is its target"),
        (["BRA 0x40"], "no label of this code is its target"),
        (["CALL.ABS.NOINC R2"], "goes where cannot be told"),
        (["CALL.ABS.NOINC `(vprintf)"], "goes where cannot be told"),
        (["CALL.REL.NOINC `(f)", "EXIT", "f:", "RET.REL.NODEC R2 `(made)"], "returns where cannot be told"),
        (["BSYNC B3"], "nothing sets its barrier before"),
        (["WARPGROUP.DEPBAR.LE gsb1, 0x0"], "a wait of a form that is not known"),
        (["WARPGROUP.DEPBAR.LE gsb0, R4"], "a wait of a form that is not known"),
        (["HGMMA.64x32x16.F32.BF16 R24, R51, gdesc[UR12], R24, gsb1"], "a product of a form that is not known"),
        (["HGMMA.M32 R24, R51, gdesc[UR12], R24, gsb0"], "a product of a form that is not known"),
        (["HGMMA.64x32x16.F32.BF16 R24, R51, R60, R24, gsb0"], "a product of a form that is not known"),
        (["EXIT", SECOND], f"{SECOND} at 0x20 is reached on no way that is known here"),
    ],
)
def test_what_is_not_understood_is_a_finding(lines: list[str], finding: str) -> None:
    found = find_hazards(program(PRODUCT, *lines, WAIT))
    assert len(found) == 1
    assert finding in found[0]


def test_text_that_cannot_be_read_is_a_finding() -> None:
    good = program(PRODUCT, WAIT, "NOP")
    assert find_hazards(good) == []
    assert "is no line that is known here" in find_hazards(good.replace("NOP ;", "{ NOP"))[0]
    assert "does not follow on" in find_hazards(good.replace("/*0020*/", "/*0030*/"))[0]
    assert "followed by the end of made" in find_hazards(good.replace("EXIT ;", "NOP ;"))[0]


def test_code_without_products_is_clean_whatever_it_is() -> None:
    assert find_hazards(program("FROB R2", "BRX R2 -0x20")) == []
    assert find_hazards("") == []
