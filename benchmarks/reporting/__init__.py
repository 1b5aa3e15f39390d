"""Result files of the benchmarks: written, read, compared and shown."""
