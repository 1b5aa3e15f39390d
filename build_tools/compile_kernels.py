"""Compiles the GPU kernels of this source tree with Triton alone: ``python build_tools/compile_kernels.py --help``.

The same as ``python -m rpsft_kernels.ops.triton.aot.build``, which imports the whole package, and torch with it.
"""

from __future__ import annotations

import sys

from bare_package import load

# Not below: processes that compile run this file, under another name, before they are told what to compile.
main = load("ops.triton.aot.build").main

if __name__ == "__main__":
    sys.exit(main())
