"""A library in the place of NVIDIA's driver that knows how many GPUs there are and what they can compute, no more."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

_SOURCE = """
extern "C" int cuInit(unsigned) {{ return {init}; }}
static const int found[] = {{{capabilities} 0}};
extern "C" int cuDeviceGetCount(int* count) {{ *count = sizeof found / sizeof *found - 1; return 0; }}
extern "C" int cuDeviceGet(int* device, int ordinal) {{ *device = 7 + ordinal; return 0; }}
extern "C" int cuDeviceGetAttribute(int* value, int attribute, int device) {{
  if (attribute != 75 && attribute != 76) return 1;
  *value = attribute == 75 ? found[device - 7] / 10 : found[device - 7] % 10;
  return 0;
}}
"""


def fake_driver(folder: Path, *capabilities: int, init: int = 0) -> str:
    """The path of a new one, for RPSFT_CUDA_DRIVER. ``init``: what cuInit returns."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "driver.cpp"
    source.write_text(_SOURCE.format(init=init, capabilities="".join(f"{number}, " for number in capabilities)))
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    library = folder / "driver.so"
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return str(library)
