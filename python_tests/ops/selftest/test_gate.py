"""The record of a pass, and the quick part before the first launch on a GPU: on a made-up one."""

from __future__ import annotations

import json
import logging
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rpsft_kernels import ops
from rpsft_kernels.ops.selftest import gate, record, subjects
from rpsft_kernels.ops.selftest.checks import Subject
from rpsft_kernels.ops.selftest.suite import SelfTestResult
from rpsft_kernels.ops.triton import toolchain
from rpsft_kernels.ops.triton.aot import dispatch as aot_dispatch
from rpsft_kernels.tools.environment import environment_report

GPU = torch.device("cuda", 0)


class Machine:
    """A GPU whose driver and kernels can be changed, with the number of times that it was tested."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.monkeypatch = cache, monkeypatch
        self.runs = 0
        self.failures: list[str] = []
        self.capturing = False
        self.properties = SimpleNamespace(name="Imaginary H100", major=9, minor=0, uuid="1234")
        self.driver = cache / "driver"
        self.driver.parent.mkdir(exist_ok=True)
        self.driver.write_text("580.1\n")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "user"))
        monkeypatch.setattr(record, "_DRIVER", self.driver)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: self.properties)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(subjects, "run_quick_part", self._run)
        self.restart()

    def _run(self, device: torch.device) -> SelfTestResult:
        self.runs += 1
        return SelfTestResult(Subject("triton", device), failures=list(self.failures))

    def restart(self) -> None:
        """A new process."""
        self.monkeypatch.setattr(gate, "_passed", set())
        self.monkeypatch.setattr(gate, "_failed", {})

    def records(self) -> list[Path]:
        return sorted((self.cache / "user" / "rpsft_kernels").glob("*"))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    for name in ("RPSFT_SELFTEST", "RPSFT_AOT", "RPSFT_TILES"):
        monkeypatch.delenv(name, raising=False)
    return Machine(tmp_path, monkeypatch)


def test_it_runs_once_in_a_process_and_once_for_all_processes(machine: Machine) -> None:
    for _ in range(3):
        ops.make_ready("triton", GPU)
    assert machine.runs == 1
    machine.restart()
    gate.ensure(GPU)
    assert machine.runs == 1
    (file,) = machine.records()
    facts = json.loads(file.read_text())["facts"]
    assert facts["device"] == "Imaginary H100" and facts["capability"] == "9.0" and "580.1" in facts["driver"]
    assert gate.state(GPU).startswith("passed 20") and str(file) in gate.state(GPU)


def test_other_backends_and_devices_are_not_asked(machine: Machine) -> None:
    ops.make_ready("torch", GPU)
    ops.make_ready("torch", torch.device("cpu"))
    ops.make_ready("triton", torch.device("cpu"))
    assert machine.runs == 0


@pytest.mark.parametrize(
    "changed",
    [
        "driver",
        "device",
        "capability",
        "uuid",
        "mode",
        "package",
        "kernels",
        "tiles",
        "compiler",
        "options",
        "launcher",
        "C compiler",
    ],
)
def test_what_a_pass_depends_on_brings_it_back(
    changed: str, machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if changed == "launcher":
        (tmp_path / "manifest.json").write_text("{}")
        monkeypatch.setattr(aot_dispatch, "installed_library", lambda: SimpleNamespace(folder=tmp_path))
    gate.ensure(GPU)
    machine.restart()
    if changed == "driver":
        machine.driver.write_text("590.2\n")
    elif changed == "device":
        machine.properties.name = "Imaginary H200"
    elif changed == "capability":
        machine.properties.major = 10
    elif changed == "uuid":
        machine.properties.uuid = "5678"
    elif changed == "mode":
        monkeypatch.setenv("RPSFT_AOT", "0")
    elif changed == "package":
        monkeypatch.setattr(record, "__version__", "9.9")
    elif changed == "kernels":
        (tmp_path / "manifest.json").write_text("{}")
        monkeypatch.setattr(aot_dispatch, "installed_library", lambda: SimpleNamespace(folder=tmp_path))
    elif changed == "compiler":
        monkeypatch.setenv("TRITON_PTXAS_PATH", "/opt/ptxas")
    elif changed == "options":
        monkeypatch.setenv("PTXAS_OPTIONS", "-O1")
    elif changed == "C compiler":
        missing = toolchain.jit_missing()
        monkeypatch.setattr(toolchain, "jit_missing", lambda: None if missing else "there is none")
    elif changed == "launcher":
        # Without one Triton compiles; with one, kernels that were there already are launched.
        before, version = record.loader.launcher(), record._driver_version()
        monkeypatch.setattr(record.loader, "launcher", lambda: SimpleNamespace() if before is None else None)
        monkeypatch.setattr(record, "_driver_version", lambda: version)
    else:
        (tmp_path / "tiles.json").write_text("{}")
        monkeypatch.setenv("RPSFT_TILES", str(tmp_path / "tiles.json"))
    gate.ensure(GPU)
    assert machine.runs == 2
    assert len(machine.records()) == 2


def test_where_triton_keeps_its_code_is_no_other_code(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.ensure(GPU)
    machine.restart()
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    gate.ensure(GPU)
    assert machine.runs == 1


def test_another_manifest_or_tile_table_is_another_digest(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(aot_dispatch, "installed_library", lambda: SimpleNamespace(folder=tmp_path))
    monkeypatch.setenv("RPSFT_TILES", str(tmp_path / "tiles.json"))
    digests = set()
    for manifest, tiles in (("a", "b"), ("ab", ""), ("a", "c"), ("d", "b")):
        (tmp_path / "manifest.json").write_text(manifest)
        (tmp_path / "tiles.json").write_text(tiles)
        digests.add(record.kernels_digest())
    assert len(digests) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"passed": 1}', '{"passed": "now", "facts": {"device": "other"}}'])
def test_a_broken_record_is_none(content: str, machine: Machine) -> None:
    gate.ensure(GPU)
    (file,) = machine.records()
    file.write_text(content)
    machine.restart()
    gate.ensure(GPU)
    assert machine.runs == 2
    assert json.loads(file.read_text())["facts"]["uuid"] == "1234"


def test_a_folder_that_cannot_be_written_only_costs_time(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A file in the folder's place stops even root.
    (machine.cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine.cache / "file"))
    for runs in (1, 2):
        machine.restart()
        with caplog.at_level(logging.INFO, "rpsft_kernels"):
            gate.ensure(GPU)
            gate.ensure(GPU)
        assert machine.runs == runs
    assert "cannot be written" in caplog.text and "it will run again in the next process" in caplog.text


def test_a_failure_is_an_error_at_every_call_and_no_record(machine: Machine) -> None:
    machine.failures = ["drift of base anchors (W bf16): C of weight 0: got 3, expected 4", "another"]
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            gate.ensure(GPU)
        message = str(raised.value)
        for words in ("cuda:0 (Imaginary H100)", machine.failures[0], "2 failures", "RPSFT_BACKEND=torch", "selftest"):
            assert words in message
    assert machine.runs == 1
    assert machine.records() == []
    assert "no record" in gate.state(GPU)
    machine.restart()
    machine.failures = []
    gate.ensure(GPU)
    assert machine.runs == 2


def test_it_can_be_switched_off(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_SELFTEST", "0")
    machine.failures = ["wrong"]
    gate.ensure(GPU)
    assert machine.runs == 0
    assert machine.records() == []
    assert gate.state(GPU).startswith("RPSFT_SELFTEST=0")
    machine.restart()
    monkeypatch.setenv("RPSFT_SELFTEST", "no")
    with pytest.raises(ValueError, match="RPSFT_SELFTEST: got 'no', expected 0 or 1"):
        gate.ensure(GPU)


def test_a_captured_graph_needs_a_record(machine: Machine) -> None:
    machine.capturing = True
    with pytest.raises(RuntimeError, match="run one step before the capture"):
        gate.ensure(GPU)
    assert machine.runs == 0
    machine.capturing = False
    gate.ensure(GPU)
    machine.restart()
    machine.capturing = True
    gate.ensure(GPU)
    assert machine.runs == 1, "what has passed may be captured"


def test_threads_wait_for_one_run(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    started, leave = threading.Event(), threading.Event()
    run = subjects.run_quick_part

    def slow(device: torch.device) -> SelfTestResult:
        started.set()
        assert leave.wait(30)
        return run(device)

    monkeypatch.setattr(subjects, "run_quick_part", slow)
    threads = [threading.Thread(target=gate.ensure, args=(GPU,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    assert all(thread.is_alive() for thread in threads)
    leave.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert machine.runs == 1


def test_a_bug_report_tells_of_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    lines = [line for line in environment_report().splitlines() if line.startswith("cuda:0 self-test")]
    assert len(lines) == 1 and lines[0].endswith("no record: the quick part runs before the first launch")
