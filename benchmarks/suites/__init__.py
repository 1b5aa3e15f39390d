"""The benchmarks: their cases, the providers that take part, and how each step is measured."""
