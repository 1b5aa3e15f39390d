"""Writes, reads, compares and shows result files of the benchmarks."""
