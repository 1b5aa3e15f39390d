"""NVIDIA machine code of compute capability 9.0 as text: its instructions, and the registers that they read and write.

The text is the output of ``nvdisasm -c``. Anything that is not known here raises ``Unknown`` and is never guessed,
because a caller that asks whether registers are safe must learn when the answer is open.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property


class Unknown(ValueError):
    """An instruction or a line that is not understood."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Instructions that write a general register, their first operand behind predicates.
_VALUES = _words(
    """
    FADD FADD32I FFMA FFMA32I FMNMX FMUL FMUL32I FSEL FSET FSWZADD MUFU HADD2 HADD2_32I HFMA2 HFMA2_32I HMMA
    HMNMX2 HMUL2 HMUL2_32I HSET2 DADD DFMA DMMA DMNMX DMUL BMMA BMSK BREV FLO IABS IADD IADD3 IADD32I IDP IDP4A
    IMAD IMMA IMNMX IMUL IMUL32I ISCADD ISCADD32I LEA LOP LOP3 LOP32I POPC SHF SHL SHR VABSDIFF VABSDIFF4 VHMNMX
    VIADD VIADDMNMX VIMNMX VIMNMX3 F2F F2I I2F I2I I2IP I2FP F2IP FRND F2FP MOV MOV32I MOVM PRMT SEL SGXT SHFL
    P2R LD LDC LDG LDGMC LDL LDS LDSM MATCH QSPC ATOM ATOMS ATOMG SYNCS B2R CS2R GETLMEMBASE LEPC S2R VOTE BMOV
    QMMA
    """
)
# Instructions that write predicates, uniform registers, memory or nothing.
_OTHERS = _words(
    """
    FCHK FSETP HSETP2 DSETP ISETP PLOP3 PSETP R2P FENCE LDGDEPBAR LDGSTS STSM ST STG STL STS STAS REDAS REDG RED
    CCTL CCTLL CCTLT ERRBAR MEMBAR R2UR REDUX CREDUX S2UR UBMSK UBREV UCLEA UF2FP UFLO UIADD3 UIMAD UISETP ULDC
    ULEA ULOP ULOP3 ULOP32I UMOV UP2UR UPLOP3 UPOPC UPRMT UPSETP UR2UP USEL USETMAXREG USGXT USHF USHL USHR
    VOTEU UBLKCP UBLKPF UBLKRED UTMACCTL UTMACMDFLUSH UTMALDG UTMAPF UTMAREDG UTMASTG ACQBULK BPT BREAK BSSY
    CGAERRBAR ELECT ENDCOLLECTIVE NANOSLEEP PREEXIT YIELD BAR DEPBAR NOP PMTRIG SETCTAID SETLMEMBASE UCGABAR_ARV
    UCGABAR_WAIT ARRIVES ACQSHMINIT WARPGROUP WARPGROUPSET R2B
    """
)
JUMPS = _words("BRA BRX BRXU BSYNC CALL EXIT JMP JMX JMXU KILL RET WARPSYNC")
PRODUCTS = _words("HGMMA IGMMA QGMMA BGMMA")
_KNOWN = _VALUES | _OTHERS | JUMPS | PRODUCTS

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;\s*$")
_LABEL = re.compile(r"([^\s:]+):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_TARGETS = re.compile(r'"BRANCH_TARGETS ([^"]+)"')
_REGISTER = re.compile(r"\bR(\d+)\b")
_BARE = re.compile(r"[-~|!]*R(?:(\d+)|Z)(?:\.\w+)*\|?(?:\.\w+)*$")
_PREDICATE = re.compile(r"!?U?P(?:\d+|T)$")
_ALWAYS = ("", "PT", "UPT")
_MATRICES = ("HMMA", "IMMA", "BMMA", "QMMA")
_ATOMICS = ("ATOM", "ATOMS", "ATOMG", "RED", "REDG", "REDAS", "LDGMC")
# Modifiers with which an atomic instruction reads or writes more than one register. "16x2" is one register.
_WIDE_ATOMIC = re.compile(r"CAS|CAST|\d*64|128|(?:F32|16)x[24]|x4|x8|V\d|VEC.*")
_DOUBLES = ("DADD", "DFMA", "DMUL", "DMNMX", "DSETP")


@dataclass(frozen=True)
class Instruction:
    """One line of the text. ``number``: its place in the disassembly; ``function``: its section."""

    number: int
    function: str
    address: int
    guard: str
    opcode: str
    rest: str
    # The labels that an indirect branch may go to, if nvdisasm prints them.
    targets: tuple[str, ...] = ()

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {self.rest}".strip() + f" at {self.address:#x}"

    @property
    def guarded(self) -> bool:
        """Whether the instruction may be skipped."""
        return self.guard not in _ALWAYS

    @cached_property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @cached_property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(operand.strip() for operand in self.rest.split(",")) if self.rest else ()

    @property
    def target(self) -> str | None:
        """The label that the instruction names."""
        match = _TARGET.search(self.rest)
        return match[1] if match else None

    def check_known(self) -> None:
        if self.name not in _KNOWN:
            raise Unknown(f"{self} is an instruction that is not known here")

    @cached_property
    def writes(self) -> frozenset[int]:
        """General registers that the instruction writes if it is executed; not for products.

        Raises:
            Unknown: the instruction is not in the tables.
        """
        self.check_known()
        place = self._destination()
        first = None if place is None else register_number(self.operands[place])
        return frozenset() if first is None else frozenset(range(first, first + self._width_written()))

    @cached_property
    def reads(self) -> frozenset[int]:
        """General registers that the instruction reads, or may read if its text does not tell an operand's width."""
        self.check_known()
        place, registers = self._destination(), set[int]()
        for index, operand in enumerate(self.operands):
            if index == place:
                continue
            for match in _REGISTER.finditer(operand):
                first = int(match[1])
                width = 2 if operand.startswith(".64", match.end()) else self._width_read(operand, index)
                registers.update(range(first, first + width))
        return frozenset(registers)

    def _destination(self) -> int | None:
        """The place of the operand that is the general register written."""
        if self.name not in _VALUES:
            return None
        for index, operand in enumerate(self.operands):
            if _BARE.match(operand):
                return index
            if not _PREDICATE.match(operand):
                return None
        return None

    def _width_written(self) -> int:
        name, modifiers = self.name, self.modifiers
        if name == "LDSM":
            return _matrix_count(modifiers)
        if name in _MATRICES:
            return 4
        if name in _ATOMICS:
            return self._width_of_atomic()
        if name == "DMMA":
            return 8
        if name == "IMAD" or name == "IMUL":
            return 2 if "WIDE" in modifiers else 1
        if name == "CS2R":
            return 1 if "32" in modifiers else 2
        if name in _DOUBLES or name in ("LEPC", "GETLMEMBASE", "SYNCS"):
            return 2
        if name == "F2F":
            # F2F.F64.F32: the first type is the result's.
            types = [each for each in modifiers if re.fullmatch(r"(?:B?F|TF)\d+", each)]
            return 2 if not types or types[0] == "F64" else 1
        if name in ("F2I", "I2I", "I2F", "FRND"):
            return 2 if any(each.endswith("64") for each in modifiers) else 1
        return _plain_width(modifiers)

    def _width_read(self, operand: str, index: int) -> int:
        name, modifiers = self.name, self.modifiers
        if "[" in operand:
            return 2 if "E" in modifiers else 1
        if name == "STSM":
            return _matrix_count(modifiers)
        if name in _MATRICES:
            return 4
        if name in _ATOMICS:
            return self._width_of_atomic()
        if name == "DMMA":
            return 8
        if name == "IMAD":
            return 2 if "WIDE" in modifiers and index == len(self.operands) - 1 else 1
        if name in _DOUBLES or name in JUMPS:
            return 2
        if name in ("F2F", "F2I", "I2I", "I2F", "FRND"):
            return 2 if any(each.endswith("64") for each in modifiers) else 1
        return _plain_width(modifiers)

    def _width_of_atomic(self) -> int:
        # Modifiers spell widths in many ways, so anything wider than one register counts as the widest.
        return 4 if self.name == "LDGMC" or any(map(_WIDE_ATOMIC.fullmatch, self.modifiers)) else 1


def register_number(operand: str) -> int | None:
    """The number of an operand that is a single register; None for RZ and for anything else."""
    match = _BARE.match(operand)
    return int(match[1]) if match and match[1] else None


def _matrix_count(modifiers: Sequence[str]) -> int:
    """The number of 8 x 8 matrices that are moved, with one register each."""
    return 4 if "4" in modifiers else 2 if "2" in modifiers else 1


def _plain_width(modifiers: Sequence[str]) -> int:
    return next((width for name, width in (("256", 8), ("128", 4), ("64", 2)) if name in modifiers), 1)


@dataclass
class Disassembly:
    """The instructions of all sections, in order.

    Attributes:
        labels: the number of the instruction after each label.
        entries: the numbers of the instructions that sections begin with.
    """

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    entries: list[int] = field(default_factory=list)


def parse(text: str) -> Disassembly:
    """Parse the output of ``nvdisasm -c``.

    Raises:
        Unknown: a line is no instruction, label, directive or comment.
    """
    code, function = Disassembly(), ""
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            number, address = len(code.instructions), int(match[1], 16)
            if not number or code.instructions[-1].function != function:
                code.entries.append(number)
            elif address != code.instructions[-1].address + 16:
                raise Unknown(f"{line.strip()} does not follow on {code.instructions[-1]}")
            rest, _, remark = match[4].partition("(*")
            targets = _TARGETS.match(remark)
            instruction = Instruction(
                number=number,
                function=function,
                address=address,
                guard=match[2] or "",
                opcode=match[3],
                rest=rest.rstrip(),
                targets=tuple(targets[1].split(",")) if targets else (),
            )
            code.instructions.append(instruction)
            continue
        label = _LABEL.match(line)
        if label:
            if label[1].startswith(".text."):
                function = label[1].removeprefix(".text.")
            code.labels[label[1]] = len(code.instructions)
        elif line.strip() and not line.strip().startswith((".", "//")):
            raise Unknown(f"{line.strip()!r} is no line that is known here")
    return code
