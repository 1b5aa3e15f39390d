"""Writes a file whole or not at all: under another name in its folder first, which is then renamed."""

from __future__ import annotations

import os
import platform
import re
import stat
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment, unused-ignore]

# A temporary file of another host, or of one without locks, is left over when nobody has written to it for a day.
_STALE_SECONDS = 24 * 3600.0


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file to write that takes the place of ``path`` when the block ends, and is removed where it raises.

    A symbolic link is followed. The mode is that of any new file (the umask decides). Temporary files that a killed
    writer of the same ``path`` has left behind are removed; those of living writers are locked and stay.

    Raises:
        ValueError: as :func:`resolve_target`.
        OSError: it cannot be written; the error names ``path``.
    """
    target = resolve_target(path)
    remove_stale(target.parent, re.escape(target.name))
    temporary: Path | None = None
    try:
        with _create(target) as file:
            temporary = Path(file.name)
            yield file
            # The name must not outlive the data in a crash.
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                # While the lock is still held.
                os.replace(temporary, target)
        if fcntl is None:
            os.replace(temporary, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{error.strerror}; nothing was written", os.fspath(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def resolve_target(path: str | os.PathLike[str]) -> Path:
    """Follow symbolic links to the file that is written.

    Raises:
        ValueError: ``path`` is a folder, a device or a pipe, or lies in a folder that does not exist.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if target.is_symlink():
        raise ValueError(f"path: got {str(path)!r}, a symbolic link in a circle, expected a file name; remove the link")
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(
            f"path: got {str(path)!r}, expected a file name in an existing folder; create the folder first"
        )
    check_regular(target, path)
    return target


def check_regular(file: Path, path: str | os.PathLike[str]) -> None:
    """Raise a ValueError where ``file``, given as ``path``, is there and is a device, a pipe or a socket."""
    if file.exists() and not file.is_file():
        mode = file.stat().st_mode
        kinds = {"a device": stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a named pipe": stat.S_ISFIFO(mode)}
        kind = next((name for name, holds in kinds.items() if holds), "a socket")
        raise ValueError(f"path: got {str(path)!r}, {kind}, expected a regular file; choose another name")


def remove_stale(folder: Path, name: str) -> None:
    """Remove temporary files in ``folder`` that nobody writes any more, of targets that ``name`` (a regex) matches."""
    pattern = re.compile(rf"\.{name}\.([0-9a-f]{{8}})[0-9a-f]{{24}}\.tmp")
    try:
        candidates = [(folder / entry, match[1]) for entry in os.listdir(folder) if (match := pattern.fullmatch(entry))]
    except OSError:
        return
    for candidate, host in candidates:
        # What is not ours to open or to remove stays.
        with suppress(OSError):
            _remove_if_stale(candidate, host)


def _remove_if_stale(candidate: Path, host: str) -> None:
    with open(candidate, "rb+") as file:
        locked = _try_lock(file)
        # A lock tells of writers on this host; some file systems keep it from others.
        here = locked is not None and host == _host()
        if locked is False or not (here or time.time() - os.fstat(file.fileno()).st_mtime > _STALE_SECONDS):
            return
        candidate.unlink()


def _create(target: Path) -> BinaryIO:
    """Open a new, locked file beside ``target``."""
    while True:
        temporary = target.with_name(f".{target.name}.{_host()}{uuid.uuid4().hex[:24]}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115
        # Another writer may take the file for a stale one before it is locked.
        if _try_lock(file) is not False and temporary.exists():
            return file
        file.close()
        temporary.unlink(missing_ok=True)


def _try_lock(file: BinaryIO) -> bool | None:
    """Lock ``file`` until it is closed; False where another has it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"
