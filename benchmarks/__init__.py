"""Benchmarks: times and memory (suites), gradients against float64 (fidelity), and result files (reporting)."""
