"""Finds machine code that touches registers of an asynchronous product before it has waited for that product.

On compute capability 9.0 a warpgroup's matrix product (HGMMA, IGMMA, QGMMA, BGMMA) runs on after its instruction. Until
``WARPGROUP.DEPBAR.LE gsb0, N`` covers it, the registers of an operand A that comes from registers must not be written,
and its accumulators neither written nor read, but by a later product on the same accumulators in the same shape. The
product that names gsb0 ends a group; the wait leaves at most the N newest groups running. Nothing in the hardware holds
back an instruction that breaks this: the product computes with whatever is there. Compilers have broken it.

The analysis covers all paths: it carries the products that may be pending, each with the number of groups ended since,
along branches and around loops until nothing changes. It does not follow predicates, so every path of the text counts.
An instruction or a jump target that it does not understand is a finding too: no finding means that the rule is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .control_flow import Worklist, find_edges
from .cubin import disassemble_image
from .sass import PRODUCTS, Disassembly, Instruction, Unknown, parse, register_number

# Increase this with every change of the rules: code that an older version passed is then scanned again.
RULES = 1
# A register operand A of every shape: 64 rows of 16 bytes of K, over 128 threads.
_OPERAND_REGISTERS = 4
_PRODUCT = re.compile(rf"\b(?:{'|'.join(sorted(PRODUCTS))})\b")


def scan_cubin(image: bytes) -> list[str]:
    """Apply :func:`find_hazards` to a cubin.

    Raises:
        ValueError: there is no disassembler, or it cannot read the file.
    """
    return find_hazards(disassemble_image(image))


def find_hazards(sass: str) -> list[str]:
    """The places in nvdisasm's output that break the rule or may break it, a line each; [] if there are none.

    Text without an asynchronous product is clean, whatever else it contains.
    """
    if not _PRODUCT.search(sass):
        return []
    try:
        return list(_Analysis(parse(sass)).findings())
    except Unknown as error:
        return [str(error)]
    except (LookupError, ValueError) as error:
        # An operand is missing, or there is one where none was expected.
        return [f"the machine code is of a form that is not known here: {type(error).__name__}: {error}"]


@dataclass(frozen=True)
class _Product:
    """A product. Until the wait, ``read`` registers must not change and ``accumulators`` must not be touched."""

    instruction: Instruction
    shape: str
    accumulators: frozenset[int]
    read: frozenset[int]
    commits: bool

    @classmethod
    def of(cls, each: Instruction) -> _Product:
        """Read a product's operands.

        Raises:
            Unknown: the operands are not as expected.
        """
        size = next((match for m in each.modifiers if (match := re.fullmatch(r"64x(\d+)x\d+", m))), None)
        descriptors = [i for i, operand in enumerate(each.operands) if operand.startswith("gdesc[")]
        first = register_number(each.operands[0]) if each.operands else None
        barriers = [operand for operand in each.operands if "gsb" in operand]
        if size is None or not descriptors or first is None or barriers not in ([], ["gsb0"]):
            raise Unknown(f"{each} is a product of a form that is not known here")
        types = each.modifiers[each.modifiers.index(size[0]) + 1 :]
        # A thread holds 1/128 of the 64 x N sums, which have 4 bytes, or 2 bytes in half precision.
        count = int(size[1]) // (4 if types[:1] == ("F16",) else 2)
        accumulators = frozenset(range(first, first + count))
        read = set[int]()
        for operand in each.operands[1 : descriptors[0]]:
            read |= _register_range(register_number(operand), _OPERAND_REGISTERS)
        for position, operand in enumerate(each.operands[descriptors[-1] + 1 :]):
            # The sum to add to, which is usually the accumulators; after it the positions of a sparse product.
            if position or register_number(operand) != first:
                read |= _register_range(register_number(operand), 1 if position else count)
        shape = f"{each.name}.{size[0]}.{'.'.join(types[:1])}"
        return cls(each, shape, accumulators, frozenset(read), bool(barriers))

    def continues(self, other: _Product) -> bool:
        """Whether it may use the accumulators of another product without a wait."""
        return self.accumulators == other.accumulators and self.shape == other.shape


def _register_range(first: int | None, count: int) -> set[int]:
    return set() if first is None else set(range(first, first + count))


class _Analysis:
    """Represents pending products as a bit set: one bit for each product and each number of groups that ended since it
    began, up to the number that all waits of the code cover.
    """

    def __init__(self, code: Disassembly) -> None:
        self.code = code
        self.products: dict[int, _Product] = {}
        self.waits: dict[int, int] = {}
        for each in code.instructions:
            if each.name in PRODUCTS:
                self.products[each.number] = _Product.of(each)
            elif each.name == "WARPGROUP" and "DEPBAR" in each.modifiers:
                self.waits[each.number] = _left_pending(each)
        self.index = {number: i for i, number in enumerate(self.products)}
        self.ages = max(self.waits.values(), default=0) + 2
        self.oldest = self._of_ages(self.ages - 1, self.ages)

    def _of_ages(self, first: int, last: int) -> int:
        """The bits of all products for these numbers of groups."""
        bits = sum(1 << age for age in range(first, last))
        return sum(bits << (i * self.ages) for i in range(len(self.products)))

    def _bits(self, number: int) -> int:
        return ((1 << self.ages) - 1) << (self.index[number] * self.ages)

    @cached_property
    def _no_write(self) -> dict[int, int]:
        """The products during which a register must not be written, by register."""
        forbidden: dict[int, int] = {}
        for number, product in self.products.items():
            for each in product.read | product.accumulators:
                forbidden[each] = forbidden.get(each, 0) | self._bits(number)
        return forbidden

    @cached_property
    def _no_read(self) -> dict[int, int]:
        """The products during which a register must not be read, by register."""
        forbidden: dict[int, int] = {}
        for number, product in self.products.items():
            for each in product.accumulators:
                forbidden[each] = forbidden.get(each, 0) | self._bits(number)
        return forbidden

    def _after(self, number: int, state: int) -> int:
        """The products that may be pending after an instruction."""
        product, left = self.products.get(number), self.waits.get(number)
        if left is not None:
            remaining = state & self._kept[left]
        elif product is not None:
            remaining = state | 1 << (self.index[number] * self.ages)
            if product.commits:
                remaining = (remaining & ~self.oldest) << 1 | (remaining & self.oldest)
        else:
            return state
        return remaining | state if self.code.instructions[number].guarded else remaining

    @cached_property
    def _kept(self) -> dict[int, int]:
        return {left: self._of_ages(0, left + 1) for left in self.waits.values()}

    def _states(self) -> dict[int, int]:
        """The products that may be pending before each reachable instruction."""
        following = find_edges(self.code)
        states = dict.fromkeys(self.code.entries, 0)
        work = Worklist(self.code.entries)
        for number in work:
            after = self._after(number, states[number])
            for place in following[number]:
                before = states.get(place)
                if before is None or after & ~before:
                    states[place] = after | (before or 0)
                    work.add(place)
        return states

    def findings(self) -> Iterator[str]:
        states = self._states()
        for each in self.code.instructions:
            state, product = states.get(each.number), self.products.get(each.number)
            if state is None:
                if product is not None:
                    yield f"{each.function}: {each} is reached on no way that is known here"
            elif product is not None:
                yield from self._check_product(product, state)
            else:
                yield from self._check_other(each, state)

    def _check_other(self, each: Instruction, state: int) -> Iterator[str]:
        try:
            each.check_known()
        except Unknown as error:
            yield f"{each.function}: {error}"
            return
        if state:
            yield from self._check_registers(each, "writes", each.writes, self._no_write, state)
            yield from self._check_registers(each, "reads", each.reads, self._no_read, state)

    def _check_product(self, product: _Product, state: int) -> Iterator[str]:
        each = product.instruction
        if both := sorted(product.read & product.accumulators):
            yield f"{each.function}: {each} reads {_ranges(both)} while it accumulates there"
        others = state
        for number, other in self.products.items():
            if product.continues(other):
                others &= ~self._bits(number)
        yield from self._check_registers(each, "writes", product.accumulators, self._no_write, others)
        yield from self._check_registers(each, "reads", product.read, self._no_read, state)

    def _check_registers(
        self, each: Instruction, how: str, registers: Iterable[int], forbidden: dict[int, int], state: int
    ) -> Iterator[str]:
        touched = [(r, bits) for r in sorted(registers) if (bits := forbidden.get(r, 0) & state)]
        if not touched:
            return
        pending = 0
        for _, bits in touched:
            pending |= bits
        numbers = [n for n in self.products if pending & self._bits(n)]
        first = self.products[numbers[0]].instruction
        age = next(a for a in range(self.ages) if pending >> (self.index[numbers[0]] * self.ages + a) & 1)
        more = f" (or {len(numbers) - 1} more)" if len(numbers) > 1 else ""
        bound = f"{age - 1:#x} or less" if age > 1 else "0x0"
        wait = f"WARPGROUP.DEPBAR.LE gsb0, {bound}, lies between" if age else "wait covers a group that has not ended"
        yield (
            f"{each.function}: {each} {how} {_ranges([r for r, _ in touched])} while {first}{more} may still use them: "
            f"no {wait}"
        )


def _left_pending(each: Instruction) -> int:
    """The number of groups that a wait leaves running."""
    match = re.fullmatch(r"gsb0, (0x[0-9a-f]+|\d+)", each.rest)
    if each.modifiers != ("DEPBAR", "LE") or match is None:
        raise Unknown(f"{each} is a wait of a form that is not known here")
    return int(match[1], 0)


@lru_cache(maxsize=256)
def _range(first: int, last: int) -> str:
    return f"R{first}" if first == last else f"R{first}-R{last}"


def _ranges(registers: list[int]) -> str:
    """Registers as text, such as ``R4-R7, R9``."""
    spans: list[list[int]] = []
    for each in registers:
        if spans and spans[-1][1] == each - 1:
            spans[-1][1] = each
        else:
            spans.append([each, each])
    return ", ".join(_range(first, last) for first, last in spans)
