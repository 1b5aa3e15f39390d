"""A pure Python wheel: no compiler is needed. What it is made of stands in pyproject.toml."""

from setuptools import setup

setup()
