"""What the benchmarks time: their cases, who takes part, how each step is measured."""
