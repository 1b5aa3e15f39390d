"""The control flow of NVIDIA machine code: the edges between instructions that any path may take.

Predicates are not followed: a branch that may be taken counts as taken and as not taken.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator

from .sass import JUMPS, Disassembly, Instruction, Unknown


def find_edges(code: Disassembly) -> dict[int, tuple[int, ...]]:
    """The instructions that can follow each reachable instruction, all by their numbers.

    Raises:
        Unknown: the code does not tell where control goes.
    """
    return _Flow(code).find_edges()


class Worklist:
    """Numbers to visit, the smallest first, each once until it is added again. The order means that later
    instructions are visited after the earlier ones are complete.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self._heap = sorted(numbers)
        self._waiting = set(self._heap)

    def add(self, number: int) -> None:
        if number not in self._waiting:
            self._waiting.add(number)
            heapq.heappush(self._heap, number)

    def __iter__(self) -> Iterator[int]:
        while self._heap:
            number = heapq.heappop(self._heap)
            self._waiting.discard(number)
            yield number


class _Flow:
    """Finds the edges.

    ``BSSY B0, label`` begins a region; ``BSYNC B0`` at its end waits for all its threads, and control continues at the
    label. So the state carries the regions that may have begun: one bit for each barrier and the BSSY that set it last.
    """

    def __init__(self, code: Disassembly) -> None:
        self.code = code
        self.begins = [each for each in code.instructions if each.name == "BSSY"]
        set_here = {each.operands[0] for each in code.instructions if each.name in ("BSSY", "BMOV") and each.operands}
        self.barriers = {name: i for i, name in enumerate(sorted(n for n in set_here if n.startswith("B")))}
        self.returns = [each.number + 1 for each in code.instructions if each.name == "CALL"]

    def find_edges(self) -> dict[int, tuple[int, ...]]:
        states = dict.fromkeys(self.code.entries, 0)
        following: dict[int, tuple[int, ...]] = {}
        work = Worklist(self.code.entries)
        for number in work:
            state = states[number]
            following[number] = tuple(dict.fromkeys(self._next(self.code.instructions[number], state)))
            after = self._after(self.code.instructions[number], state)
            for place in following[number]:
                before = states.get(place)
                if before is None or after & ~before:
                    states[place] = after | (before or 0)
                    work.add(place)
        for number in following:
            each = self.code.instructions[number]
            if each.name == "BSYNC" and not states[number] & self._of_barrier(each.operands[0]):
                raise Unknown(f"{each} goes where cannot be told: nothing sets its barrier before")
        return following

    def _of_barrier(self, name: str) -> int:
        if name not in self.barriers:
            return 0
        return ((1 << len(self.begins)) - 1) << (self.barriers[name] * len(self.begins))

    def _after(self, each: Instruction, state: int) -> int:
        if each.name == "BSSY":
            kept = state if each.guarded else state & ~self._of_barrier(each.operands[0])
            place = self.barriers[each.operands[0]] * len(self.begins) + self.begins.index(each)
            return kept | 1 << place
        if each.name == "BMOV" and each.operands[0] in self.barriers:
            # The barrier is restored from a register, so it may be any of them.
            return state | self._of_barrier(each.operands[0])
        return state

    def _next(self, each: Instruction, state: int) -> Iterator[int]:
        falls_through = True
        if each.name in ("BRA", "JMP"):
            yield self._label(each)
            # An operand can be a condition too: BRA.U !UP0, BRA P1, BRA.DIV.
            falls_through = each.guarded or len(each.operands) != 1 or "DIV" in each.modifiers
        elif each.name == "WARPSYNC" and each.target is not None:
            yield self._label(each)
        elif each.name == "BSYNC":
            begun = (state & self._of_barrier(each.operands[0])) >> (
                self.barriers.get(each.operands[0], 0) * len(self.begins)
            )
            yield from (self._label(begin) for i, begin in enumerate(self.begins) if begun >> i & 1)
        elif each.name == "CALL":
            yield self._label(each)
            self._check_return(each)
            falls_through = each.guarded
        elif each.name == "RET":
            yield from self.returns
            falls_through = each.guarded
        elif each.name in ("BRX", "BRXU") and each.targets:
            yield from (self._place(each, label) for label in each.targets)
            falls_through = each.guarded
        elif each.name in ("EXIT", "KILL"):
            falls_through = each.guarded or bool(each.operands)
        elif each.name in JUMPS and each.name != "WARPSYNC":
            raise Unknown(f"{each} goes where cannot be told")
        if falls_through:
            behind = each.number + 1
            if behind == len(self.code.instructions) or self._at(behind).function != each.function:
                raise Unknown(f"{each} is followed by the end of {each.function}")
            yield behind

    def _at(self, number: int) -> Instruction:
        return self.code.instructions[number]

    def _label(self, each: Instruction) -> int:
        return self._place(each, each.target or "")

    def _place(self, each: Instruction, label: str) -> int:
        place = self.code.labels.get(label)
        if place is None or place == len(self.code.instructions):
            raise Unknown(f"{each} goes where cannot be told: no label of this code is its target")
        return place

    def _check_return(self, call: Instruction) -> None:
        """Check that some instruction puts the address after a call into a register, which is where a call returns."""
        behind = f"{call.address + 16:#x}"
        names = [re.escape(name) for name, place in self.code.labels.items() if place == call.number + 1]
        label = re.compile(rf"(?:{'|'.join(names)})(?![\w.$])") if names else None
        for each in self._of_function(call.function):
            if each.name in ("MOV", "IMAD") and (each.operands[-1] == behind or (label and label.search(each.rest))):
                return
        raise Unknown(f"{call} returns where cannot be told")

    def _of_function(self, name: str) -> Iterable[Instruction]:
        return (each for each in self.code.instructions if each.function == name)
