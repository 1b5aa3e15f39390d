from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rpsft_kernels.anchors.whole_file import write_whole

_WRITES_UNTIL_KILLED = """
import sys, time
from rpsft_kernels.anchors.whole_file import write_whole
with write_whole(sys.argv[1]) as file:
    file.write(b"half")
    print("writing", flush=True)
    time.sleep(600)
"""


def _write(path: Path, content: bytes = b"new") -> None:
    with write_whole(path) as file:
        file.write(content)


def _start_writer(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITES_UNTIL_KILLED, str(path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    return writer


def _write_half(path: Path, error: BaseException) -> None:
    with write_whole(path) as file:
        file.write(b"half")
        raise error


def test_a_file_is_replaced_when_all_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with write_whole(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]


def test_what_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        _write_half(path, KeyboardInterrupt())
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_a_full_disk_is_an_os_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device; nothing was written.*my anchors") as raised:
        _write_half(tmp_path / "my anchors", OSError(errno.ENOSPC, "No space left on device"))
    assert raised.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_the_mode(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        _write(tmp_path / "f")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    target = tmp_path / "scratch" / "f"
    target.write_bytes(b"old")
    for name, points_to in (("link", "scratch/f"), ("link to a link", "link")):
        (tmp_path / name).symlink_to(points_to)
        _write(tmp_path / name, name.encode())
        assert (tmp_path / name).is_symlink() and target.read_bytes() == name.encode()
    target.unlink()
    _write(tmp_path / "link", b"where nothing was")
    assert (tmp_path / "link").is_symlink() and target.read_bytes() == b"where nothing was"


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match="path: got .*circle', a symbolic link in a circle"):
        _write(tmp_path / "circle")
    (tmp_path / "dangling").symlink_to("absent/f")
    with pytest.raises(ValueError, match="path: got .*dangling', expected a file name in an existing folder"):
        _write(tmp_path / "dangling")


def test_what_is_no_regular_file_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    with socket.socket(socket.AF_UNIX) as listener:
        # The path of a socket has few characters.
        before = os.getcwd()
        os.chdir(tmp_path)
        try:
            listener.bind("socket")
        finally:
            os.chdir(before)
        for name, kind in (("pipe", "a named pipe"), ("null", "a device"), ("socket", "a socket")):
            with pytest.raises(ValueError, match=f"path: got .*{name}', {kind}, expected a regular file"):
                _write(tmp_path / name)
    with pytest.raises(ValueError, match="path: got '/dev/null', a device"):
        _write(Path(os.devnull))
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe", "socket"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_killed_writer_leaves_nothing_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "f"
    writer = _start_writer(path)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert len(os.listdir(tmp_path)) == 1
    _write(tmp_path / "another")
    _write(tmp_path / "f2")
    assert len(os.listdir(tmp_path)) == 3, "the temporary file belongs to another target"
    _write(path)
    assert sorted(os.listdir(tmp_path)) == ["another", "f", "f2"]


def test_a_living_writer_keeps_its_temporary_file(tmp_path: Path) -> None:
    writer = _start_writer(tmp_path / "f")
    try:
        _write(tmp_path / "f")
        assert len(os.listdir(tmp_path)) == 2
    finally:
        writer.kill()
        writer.communicate()
    with write_whole(tmp_path / "f") as first:
        first.write(b"first")
        _write(tmp_path / "f", b"second")
    assert (tmp_path / "f").read_bytes() == b"first" and os.listdir(tmp_path) == ["f"]


def test_temporary_files_of_other_hosts_go_after_a_day(tmp_path: Path) -> None:
    for age, digit in ((25 * 3600, "0"), (23 * 3600, "1")):
        temporary = tmp_path / f".f.{digit * 32}.tmp"
        temporary.write_bytes(b"half")
        os.utime(temporary, (time.time() - age,) * 2)
    _write(tmp_path / "f")
    assert sorted(os.listdir(tmp_path)) == [f".f.{'1' * 32}.tmp", "f"]
