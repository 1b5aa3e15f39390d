"""Benchmarks: what is timed (suites), how exact gradients are (fidelity), how result files are shown (reporting)."""
