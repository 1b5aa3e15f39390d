"""Kernels compiled ahead of time: built, kept, chosen and launched."""
