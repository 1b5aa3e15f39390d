"""Lets a CUDA build of torch be imported, for the CPU, without the gigabytes of CUDA libraries that it is linked to.

The registry has old versions of torch for x86-64 Linux as CUDA builds only. Every library that torch's own ask for
and that is nowhere to be found gets a stand-in beside them, whose functions return an error. A run on the CPU calls
none.

    python stand_in_cuda.py    in the environment of that torch; takes a C compiler (CC) and binutils
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

_CUDA = re.compile(r"cu[A-Z_]|cublas|cudnn|cufft|cufile|cupti|curand|cusolver|cusparse|nccl|nvshmem|nvrtc|nvtx")


def _output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def _needed(libraries: list[Path]) -> set[str]:
    """The CUDA libraries that these ask for and that lie neither beside them nor in a package of NVIDIA's."""
    names: set[str] = set()
    for library in libraries:
        names |= set(re.findall(r"\(NEEDED\).*\[(lib(?:cu|nv|nccl)[^\]]*)\]", _output("readelf", "-d", library)))
    here = libraries[0].parent
    found = {path.name for path in here.iterdir()}
    found |= {path.name for path in here.parents[1].glob("nvidia/*/lib/*.so*")}
    # Of those that torch loads when it is imported; the driver and others are looked for when they are used.
    return names - found - {"libcuda.so.1"}


def _undefined(libraries: list[Path]) -> set[str]:
    names: set[str] = set()
    for library in libraries:
        listed = _output("nm", "-D", "--undefined-only", library).split()
        names |= {name.split("@")[0] for name in listed if _CUDA.match(name)}
    return names


def _versions(libraries: list[Path]) -> dict[str, set[str]]:
    """The versions under which symbols of each library are asked for: mostly its own name."""
    found: dict[str, set[str]] = {}
    for library in libraries:
        for name, said in re.findall(
            r"File: (\S+)\s+Cnt: \d+\n((?:.*Name: .*\n)*)", _output("readelf", "-VW", library)
        ):
            found.setdefault(name, set()).update(re.findall(r"Name: (\S+)", said))
    return found


def main() -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    libraries = sorted(folder.glob("lib*.so"))
    if not libraries or not _needed(libraries):
        return
    versions = _versions(libraries)
    functions = "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(_undefined(libraries)))
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as name:
        source, script = Path(name, "stand_in.c"), Path(name, "versions")
        source.write_text(functions)
        for library in sorted(_needed(libraries)):
            first, *others = sorted(versions.get(library, {library}))
            script.write_text("".join([f"{first} {{ *; }};\n", *(f"{other} {{ }};\n" for other in others)]))
            options = ["-shared", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{library},--version-script={script}"]
            subprocess.run([*compiler, *options, str(source), "-o", str(folder / library)], check=True)
            print(f"stand-in: {library}")


if __name__ == "__main__":
    main()
