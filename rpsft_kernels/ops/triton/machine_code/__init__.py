"""Reads machine code with the tools that come with Triton, and analyses it."""
