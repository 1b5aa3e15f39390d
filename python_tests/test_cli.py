from __future__ import annotations

import pytest

from rpsft_kernels.cli import main


def test_schedule_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--model", "qwen2.5-7b", "--rank", "768"]) == 0
    printed = capsys.readouterr().out
    assert "142 projected weights, 56 full" in printed
    assert "launches per step" in printed


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(SystemExit, match="--arch: got 'sm_70', expected one of sm_80"):
        main(["compile", "--arch", "sm_70"])
