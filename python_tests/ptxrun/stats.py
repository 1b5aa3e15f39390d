"""What a launch did."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(eq=False)
class Stats:
    """``instructions``: executions by a warp of each opcode (also where its guard was false)."""

    ctas: int = 0
    instructions: Counter = field(default_factory=Counter)

    def count(self, prefix):
        """Executions of the opcodes that begin with ``prefix``."""
        return sum(n for op, n in self.instructions.items() if op.startswith(prefix))
