"""Whether machine code of the warp-specialised kernels for compute capability 9.0 is what their speed rests on.

Compilers may take each of these back without a word, and the numbers stay right:

* project multiplies W - W0 from registers, where it was formed; pull and gradient read both operands from shared
  memory;
* the products of one step form one group. A compiler that cannot keep the sums in place ends a group, and waits, at
  each product ("serialized" in ptxas's words);
* the producer's warps give registers up, and the consumers' take them;
* nothing spills.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .sass import PRODUCTS, Instruction, Unknown, parse

# Registers of a thread of a consumer and of the producer, as ``kernels/hopper.py`` asks for them.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
# Rows and columns of the sum that one product takes.
_ROWS, _DEPTH = 64, 16
# Rows of a tile that one consumer multiplies, and whether its left operand comes from registers.
_KERNELS = {"hopper_project": (64, True), "hopper_pull": (64, False), "hopper_gradient": (128, False)}


def find_losses(sass: str, kernel: str, constants: Mapping[str, Any]) -> list[str]:
    """What a kernel's machine code has lost of its design, a line each; [] if nothing, or for a plain kernel.

    Args:
        sass: nvdisasm's output.
        kernel, constants: the variant's, as a manifest's entry has them.
    """
    if kernel not in _KERNELS:
        return []
    try:
        instructions = parse(sass).instructions
        rows, from_registers = _KERNELS[kernel]
        products = rows // _ROWS * constants["BLOCK_K"] // _DEPTH
        return [*_of_products(instructions, products, from_registers), *_of_registers(instructions)]
    except Unknown as error:
        return [str(error)]


def _of_products(instructions: list[Instruction], expected: int, from_registers: bool) -> Iterator[str]:
    group: list[Instruction] = []
    groups = 0
    for each in instructions:
        if each.name not in PRODUCTS:
            continue
        if len(each.operands) < 3:
            raise Unknown(f"{each} is a product of a form that is not known here")
        if each.operands[1].startswith("gdesc[") == from_registers:
            found, wanted = ("shared memory", "registers") if from_registers else ("registers", "shared memory")
            yield f"{each} reads its left operand from {found}, expected from {wanted}"
        group.append(each)
        if "gsb0" in each.operands:
            groups += 1
            if len(group) < expected:
                yield f"{each} ends a group of {len(group)} products, expected {expected}: they wait for one another"
            group = []
    # Each consumer has code of its own.
    if groups < 2:
        yield f"{groups} groups of asynchronous products, expected at least one for each of two consumers"


def _of_registers(instructions: list[Instruction]) -> Iterator[str]:
    counts: dict[str, set[int]] = {"DEALLOC": set(), "TRY_ALLOC": set()}
    for each in instructions:
        if each.name in ("LDL", "STL"):
            yield f"{each}: a register is spilled into local memory"
        if each.name == "USETMAXREG":
            count = re.fullmatch(r"0x[0-9a-f]+", each.operands[-1] if each.operands else "")
            if count is None or each.modifiers[:1] not in (("DEALLOC",), ("TRY_ALLOC",)):
                raise Unknown(f"{each} hands registers over in a form that is not known here")
            counts[each.modifiers[0]].add(int(count[0], 16))
    # The consumer that the program begins as has everything at first, so only the other one takes registers.
    wanted = (
        ("the producer", "DEALLOC", PRODUCER_REGISTERS),
        ("the first consumer", "DEALLOC", CONSUMER_REGISTERS),
        ("the second consumer", "TRY_ALLOC", CONSUMER_REGISTERS),
    )
    for who, how, registers in wanted:
        if registers not in counts[how]:
            yield f"no USETMAXREG.{how} with {registers} registers of a thread for {who}"
