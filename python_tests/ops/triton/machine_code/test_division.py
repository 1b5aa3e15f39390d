"""The machine code of the warp-specialised kernels, as it is built and with what compilers do to it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from rpsft_kernels.ops.triton.kernels import hopper
from rpsft_kernels.ops.triton.machine_code import division
from rpsft_kernels.ops.triton.machine_code.cubin import disassemble_image
from rpsft_kernels.ops.triton.machine_code.division import find_losses
from rpsft_kernels.ops.triton.machine_code.register_hazards import find_hazards
from sass_text import cubin, put, text_of

pytestmark = pytest.mark.xdist_group("aot")
NAMES = ("hopper_project", "hopper_pull", "hopper_gradient")
# Of tiles 128 x 256, and 128 x 128 for the gradient.
CONSTANTS = {"BLOCK_K": 64}
Change = Callable[[str], str]


@pytest.mark.parametrize("kernel", NAMES)
def test_what_was_built_has_lost_nothing(kernel: str) -> None:
    sass = text_of("3.9.0", kernel)
    assert find_losses(sass, kernel, CONSTANTS) == []
    # One group for each consumer, of 4 products; of 8 where each has 128 rows.
    products = re.findall(r"HGMMA.*", sass)
    assert len(products) == (16 if kernel == "hopper_gradient" else 8)
    assert len([each for each in products if "gsb0" in each]) == 2


def from_shared_memory(sass: str) -> str:
    return re.sub(r"(HGMMA\S* R\d+), R\d+,", r"\1, gdesc[UR60],", sass, count=1)


def from_registers(sass: str) -> str:
    return re.sub(r"(HGMMA\S* R\d+), gdesc\[UR(\d+)\](\S*),", r"\1, R200, gdesc[UR\2]\3,", sass, count=1)


def serialised(sass: str) -> str:
    """As ptxas does it where the sums are touched between two products."""
    sass = re.sub(r"(HGMMA.*?) ;", lambda found: f"{found[1].removesuffix(', gsb0')}, gsb0 ;", sass, count=1)
    return put(sass, "WARPGROUP.DEPBAR.LE gsb0, 0x0", behind="HGMMA")


def without_handing_over(sass: str) -> str:
    return re.sub(r"USETMAXREG\S* (?:UP\d+, )?0x\w+", "NOP", sass)


def without_taking(sass: str) -> str:
    return re.sub(r"(TRY_ALLOC\S* UP\d+), 0xe8", r"\1, 0xa8", sass)


def without_giving(sass: str) -> str:
    return re.sub(r"(DEALLOC\S*) 0x28", r"\1 0xa8", sass)


LEFT = r"reads its left operand from shared memory, expected from registers"
GIVEN = "no USETMAXREG.DEALLOC with 40 registers of a thread for the producer"
TAKEN = "no USETMAXREG.TRY_ALLOC with 232 registers of a thread for the second consumer"


@pytest.mark.parametrize(
    ("kernel", "change", "loss"),
    [
        ("hopper_project", from_shared_memory, LEFT),
        ("hopper_pull", from_registers, r"reads its left operand from registers, expected from shared memory"),
        ("hopper_gradient", from_registers, r"reads its left operand from registers, expected from shared memory"),
        *((name, serialised, r"ends a group of 1 products, expected \d: they wait for") for name in NAMES),
        *((name, without_handing_over, GIVEN) for name in NAMES),
        ("hopper_project", without_taking, TAKEN),
        ("hopper_project", without_giving, GIVEN),
        (
            "hopper_project",
            lambda sass: re.sub(r"HGMMA.*;", "NOP ;", sass),
            "0 groups of asynchronous products, expected at least one for each of two consumers",
        ),
        (
            "hopper_pull",
            lambda sass: put(sass, "STL [R1], R40", before="HGMMA"),
            r"STL .* is spilled into local",
        ),
        ("hopper_pull", lambda sass: put(sass, "LDL.64 R40, [R1]", before="HGMMA"), r"LDL\.64 .* is spilled"),
        ("hopper_pull", lambda sass: put(sass, "USETMAXREG.HALF 0x28", before="HGMMA"), "in a form that is not known"),
        ("hopper_pull", lambda sass: f"{sass}\nnonsense", "is no line that is known here"),
    ],
)
def test_what_is_lost_is_named(kernel: str, change: Change, loss: str) -> None:
    sass = text_of("3.9.0", kernel)
    changed = change(sass)
    assert changed != sass
    found = find_losses(changed, kernel, CONSTANTS)
    assert any(re.search(loss, each) for each in found), found


def test_serialised_products_give_right_numbers_and_are_a_loss_all_the_same() -> None:
    sass = disassemble_image(cubin("3.9.0", "hopper_pull"))
    assert find_hazards(sass) == find_hazards(serialised(sass)) == []
    assert find_losses(sass, "hopper_pull", CONSTANTS) == []
    assert find_losses(serialised(sass), "hopper_pull", CONSTANTS) != []


def test_a_plain_kernel_in_the_place_of_a_specialised_one_is_found() -> None:
    plain = text_of("3.9.0", "pull")
    assert find_losses(plain, "pull", {}) == []
    assert {GIVEN, TAKEN} <= set(find_losses(plain, "hopper_pull", CONSTANTS))


def test_the_registers_are_those_that_the_kernels_ask_for() -> None:
    assert hopper.CONSUMER_REGISTERS.value == division.CONSUMER_REGISTERS
    assert hopper.PRODUCER_REGISTERS.value == division.PRODUCER_REGISTERS
