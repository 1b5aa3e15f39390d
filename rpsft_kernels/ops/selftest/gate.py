"""The quick self-test runs by itself before the first launch on a GPU whose kernels have no record of having passed.

RPSFT_SELFTEST=0 leaves it out. A failure is an error, here and at every later call of the process. So is a kernel that
does not end: the test looks at an event again and again, and gives up.
"""

from __future__ import annotations

import logging
import os
import threading

import torch

from . import record

_log = logging.getLogger("rpsft_kernels")
_lock = threading.RLock()
# GPUs of this process whose kernels may be launched, and error messages of the others.
_passed: set[torch.device] = set()
_failed: dict[torch.device, str] = {}


def is_switched_off() -> bool:
    """Return whether the environment variable RPSFT_SELFTEST is ``0``, which leaves the test out."""
    value = os.environ.get("RPSFT_SELFTEST", "") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"environment variable RPSFT_SELFTEST: got {value!r}, expected 0 or 1")
    return value == "0"


def ensure(device: torch.device) -> None:
    """Run the quick self-test of the kernels that serve ``device``, a GPU with its index, unless they have passed it.

    Raises:
        RuntimeError: they have failed it, or a CUDA graph is being captured, during which nothing can be tested.
    """
    if device not in _passed:
        _ensure(device)


def _ensure(device: torch.device) -> None:
    with _lock:
        if device in _passed:
            return
        if device in _failed:
            raise RuntimeError(_failed[device])
        if is_switched_off():
            _passed.add(device)
            return
        facts = record.collect_facts(device)
        if record.when_passed(facts) is None:
            if _is_capturing(device):
                raise RuntimeError(
                    f"{device}: a CUDA graph is being captured, and its kernels have not passed the self-test yet; run "
                    "one step before the capture, or python -m rpsft_kernels selftest --quick before the program"
                )
            _test(device)
            record.store(facts)
        _passed.add(device)


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _test(device: torch.device) -> None:
    from .subjects import run_quick_part

    _log.info(f"{device}: its kernels have no record of having passed the self-test: the quick part runs now")
    with torch.cuda.device(device):
        result = run_quick_part(device)
        if not result.stalled:
            # This would wait for the kernel that does not end.
            torch.cuda.empty_cache()
    if result.stalled:
        _failed[device] = _explain_stall(device, result.failures[-1])
        # Whoever catches the error may wait for the GPU before it is seen.
        _log.error(_failed[device])
        raise RuntimeError(_failed[device])
    if not result.passed:
        _failed[device] = _message(device, result.failures)
        raise RuntimeError(_failed[device])
    _log.info(f"{device}: self-test passed in {result.seconds:.1f} s")


def _message(device: torch.device, failures: list[str]) -> str:
    name = torch.cuda.get_device_properties(device).name
    return (
        f"the kernels of backend 'triton' compute wrong numbers on {device} ({name}), and were not run on yours: "
        f"{failures[0]}" + (f" ({len(failures)} failures)" if len(failures) > 1 else "") + ". See all of it: python -m "
        "rpsft_kernels selftest; what a bug report needs: python -m rpsft_kernels env. Ways out: another version of "
        "Triton or kernels compiled ahead of time by one, use_backend('torch') or RPSFT_BACKEND=torch; "
        "RPSFT_SELFTEST=0 runs them all the same"
    )


def _explain_stall(device: torch.device, failure: str) -> str:
    name = torch.cuda.get_device_properties(device).name
    return (
        f"a kernel of backend 'triton' hangs on {device} ({name}), in the self-test and not on your weights: "
        f"{failure}. This process cannot use that GPU any more: end it, with kill -9 where it does not end by itself. "
        "The way out: plain PyTorch, RPSFT_BACKEND=torch or use_backend('torch'). With RPSFT_SELFTEST=0 your own call "
        "may hang. What a bug report needs: python -m rpsft_kernels env, and python -m rpsft_kernels selftest"
    )


def state(device: torch.device) -> str:
    """Describe a GPU's record for ``python -m rpsft_kernels env``."""
    facts = record.collect_facts(device)
    when = record.when_passed(facts)
    words = (
        f"passed {when}, {record.path_of(facts)}" if when else "no record: the quick part runs before the first launch"
    )
    return f"RPSFT_SELFTEST=0: not run by itself; {words}" if is_switched_off() else words
