"""Compiles the GPU kernels of this source tree with Triton alone: ``python build_tools/compile_kernels.py --help``.

This does the same as ``python -m rpsft_kernels.ops.triton.aot.build``, which imports the whole package, hence torch.
"""

from __future__ import annotations

import sys

from bare_package import load

# At module level, because the processes that compile import this file under another name before they get their tasks.
main = load("ops.triton.aot.build").main

if __name__ == "__main__":
    sys.exit(main())
