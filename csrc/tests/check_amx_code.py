"""Reads the machine code of the kernels for AMX: an emulator runs it in tests, but does not show how fast it is.

    python check_amx_code.py OBJDUMP OBJECT    the object file of csrc/cpu/isa/amx_bf16.cpp, optimised

Every loop around products must have four of them and four loads of tiles, each product with the sums and the operands
that the kernel means, and nothing else that touches a tile or a vector: sums stay in their registers from the first
step to the last. A few addresses may lie on the stack, where a loop calls what packs or writes: the four products take
64 cycles.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import NamedTuple

_FUNCTION = re.compile(r"^([0-9a-f]+) <(.*)>:$")
_LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*?)\s*$")
_TILE = re.compile(r"%tmm(\d)")
# Sums, left and right operand.
_PRODUCTS = [("0", "4", "6"), ("1", "4", "7"), ("2", "5", "6"), ("3", "5", "7")]
# A block's loops: written and added, alone, while packing, while writing the gradient, and both.
_LOOPS_AT_LEAST = 4
# Products and loads of tiles, addresses and counters, and what is asked before packing or writing anything.
_LENGTH_AT_MOST, _STACK_AT_MOST = 48, 8


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    def __str__(self) -> str:
        return f"{self.address:x}: {self.name} {self.operands}"


def read_functions(text: str) -> dict[str, list[Instruction]]:
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            # Addresses make names unique: objdump cuts none, but clones of a function may share theirs.
            current = functions.setdefault(f"{match[2]} at {match[1]}", [])
        elif match := _LINE.match(line):
            current.append(Instruction(int(match[1], 16), match[2], match[3]))
    return functions


def follow(code: list[Instruction]) -> dict[int, list[int]]:
    """The addresses that can follow each instruction within its function; calls come back."""
    edges: dict[int, list[int]] = {}
    for number, each in enumerate(code):
        next_ = [code[number + 1].address] if number + 1 < len(code) else []
        if each.name.startswith("j"):
            target = int(each.operands.split()[0], 16)
            edges[each.address] = [target] if each.name.startswith("jmp") else [target, *next_]
        else:
            edges[each.address] = [] if each.name.startswith(("ret", "ud2")) else next_
    return edges


def reach(edges: dict[int, list[int]], start: int) -> set[int]:
    found: set[int] = set()
    waiting = list(edges.get(start, []))
    while waiting:
        address = waiting.pop()
        if address not in found:
            found.add(address)
            waiting += edges.get(address, [])
    return found


def loop_around(code: list[Instruction], address: int) -> list[Instruction]:
    edges = follow(code)
    back: dict[int, list[int]] = {}
    for source, targets in edges.items():
        for target in targets:
            back.setdefault(target, []).append(source)
    inside = reach(edges, address) & reach(back, address)
    return [each for each in code if each.address in inside]


def loops_of(code: list[Instruction]) -> list[list[Instruction]]:
    """The loops around products; an empty one where a product is in none."""
    loops: dict[int, list[Instruction]] = {}
    for each in code:
        if each.name == "tdpbf16ps":
            loop = loop_around(code, each.address)
            loops[loop[0].address if loop else each.address] = loop
    return list(loops.values())


def faults_of(loop: list[Instruction]) -> list[str]:
    if not loop:
        return ["a product in no loop"]
    faults = []
    # The assembler's order of operands is the reverse of the manual's.
    got = sorted(tuple(reversed(_TILE.findall(each.operands))) for each in loop if each.name == "tdpbf16ps")
    if got != _PRODUCTS:
        faults.append(f"products {got}, expected {_PRODUCTS}")
    loaded = sorted(_TILE.findall(each.operands)[0] for each in loop if each.name == "tileloadd")
    if loaded != ["4", "5", "6", "7"]:
        faults.append(f"loads of tiles {loaded}, expected 4 to 7, each once")
    for each in loop:
        tiles = _TILE.findall(each.operands)
        if each.name not in ("tileloadd", "tdpbf16ps") and (tiles or "tile" in each.name):
            faults.append(f"{each}: not between products")
        if re.search(r"%[xyz]mm", each.operands) or (tiles and "%rsp" in each.operands):
            faults.append(f"{each}: a vector, or a tile on the stack")
    on_stack = sum("(%rsp" in each.operands for each in loop)
    if on_stack > _STACK_AT_MOST or len(loop) > _LENGTH_AT_MOST:
        faults.append(f"{len(loop)} instructions, {on_stack} on the stack; at most {_LENGTH_AT_MOST}, {_STACK_AT_MOST}")
    return faults


def sums_kept(code: list[Instruction]) -> bool:
    """Whether the four sums, and nothing else, are stored once."""
    return sorted(_TILE.findall(each.operands)[0] for each in code if each.name == "tilestored") == list("0123")


def main() -> int:
    objdump, path = sys.argv[1:]
    command = [objdump, "-d", "--no-show-raw-insn", path]
    functions = read_functions(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    multiplying = {name: code for name, code in functions.items() if any(each.name == "tdpbf16ps" for each in code)}
    faults = [f"{name}: its sums are not stored once" for name, code in multiplying.items() if not sums_kept(code)]
    for name, code in multiplying.items():
        for loop in loops_of(code):
            faults += [f"{name}: {fault}" for fault in faults_of(loop)]
            print(f"{name[:60]}...: a loop of {len(loop)} instructions")
    if len(multiplying) < _LOOPS_AT_LEAST:
        faults.append(f"{len(multiplying)} functions multiply tiles, expected at least {_LOOPS_AT_LEAST}")
    names = [each.name for code in functions.values() for each in code]
    for name in ("ldtilecfg", "tilerelease"):
        # Once per thread and call; never in a kernel.
        if names.count(name) != 1:
            faults.append(f"{name} occurs {names.count(name)} times, expected once")
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
