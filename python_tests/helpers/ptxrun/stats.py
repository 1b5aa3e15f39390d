"""Counts of a launch, and the hazards of its program."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(eq=False)
class Stats:
    """``instructions``: executions by a warp of each opcode (also where its guard was false). ``hazards``: the
    instructions that may touch a register of a wgmma in flight on some path, taken or not; none is a proof.
    """

    ctas: int = 0
    instructions: Counter = field(default_factory=Counter)
    hazards: list[str] = field(default_factory=list)

    def count(self, prefix):
        """Count the executions of the opcodes that begin with ``prefix``."""
        return sum(n for op, n in self.instructions.items() if op.startswith(prefix))
