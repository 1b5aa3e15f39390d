"""The parts of ``tune``."""

# Seconds that a search may take, unless its caller says otherwise.
DEFAULT_BUDGET = 110.0
