"""Lists of architectures, as people and containers write them."""

from __future__ import annotations

import re

import pytest

from rpsft_kernels.ops.triton.aot.targets import parse_architectures, skipped_words


@pytest.mark.parametrize("word", ["9.5", "75", "8.0a", "Hopper", "sm_90", "gfx90a", "gfx942+PTX", "8.0+ptx", ""])
def test_unknown_architectures_are_refused_by_name(word: str) -> None:
    with pytest.raises(ValueError, match=rf"^--arch: got {re.escape(repr(word))}, expected some of 8\.0"):
        parse_architectures(f"9.0;{word}" if word else "", "--arch")


def test_architectures_are_read_as_torch_writes_them() -> None:
    def read(text: str) -> list[tuple[str, str, bool]]:
        return [(target.arch, target.table, target.ptx) for target in parse_architectures(text)]

    assert read("8.0;9.0;10.0") == [("sm_80", "sm_80", True), ("sm_90a", "sm_90", False), ("sm_100a", "sm_100", False)]
    assert read("gfx942 10.0a, 8.9") == [
        ("sm_89", "sm_86", True),
        ("sm_100a", "sm_100", False),
        ("gfx942", "gfx942", False),
    ]
    assert read("8.0;9.0") == read("8.0 9.0") == read("8.0,9.0") == read(" 8.0; 9.0 ;")
    assert read("9.0 9.0+PTX 9.0a") == [("sm_90a", "sm_90", True)]
    assert read("8.6 8.0+PTX") == [("sm_80", "sm_80", True), ("sm_86", "sm_86", True)]


def test_what_containers_export_is_no_error() -> None:
    """GPUs that are too old for any kernel, or that no kernel was tried for, are left out, not refused."""
    text = "7.0 7.5 8.0 8.6 9.0 11.0 12.0+PTX"
    assert [target.arch for target in parse_architectures(text)] == ["sm_80", "sm_86", "sm_90a", "sm_120a"]
    assert skipped_words(text) == ["7.0", "7.5", "11.0"]
    assert skipped_words("8.0;9.0") == []
    for nothing in ("7.5", "7.0;7.5+PTX", "11.0"):
        with pytest.raises(ValueError, match=rf"got {re.escape(repr(nothing))}, expected some of 8\.0"):
            parse_architectures(nothing)
