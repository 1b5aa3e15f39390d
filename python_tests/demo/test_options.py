from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rpsft_kernels import ops
from rpsft_kernels.demo.options import choose_autocast, find_device, parse_options


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the default output is made in the current one."""
    monkeypatch.chdir(tmp_path)


def test_defaults_make_the_folder_of_the_output(tmp_path: Path) -> None:
    options = parse_options([])
    assert (options.backend, options.seeds, options.arms) == (None, (0,), ("sft", "rpsft", "random"))
    assert (options.rank, options.coeff, options.lr) == (432, 1.0, 1.5e-4)
    assert (tmp_path / options.output.parent).is_dir()
    assert options.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_every_option_is_taken(tmp_path: Path) -> None:
    numbers = ["--steps", "3", "--rank", "5", "--coeff", "0", "--lr", "1e-5", "--batch", "2", "--seeds", "7", "3"]
    options = parse_options([*numbers, "--device", "cpu", "--backend", "torch", "--output", "a/b.png"])
    assert (options.steps, options.rank, options.coeff, options.lr, options.batch) == (3, 5, 0.0, 1e-5, 2)
    assert (options.device, options.backend, options.seeds) == (torch.device("cpu"), "torch", (7, 3))
    assert parse_options(["--arms", "random", "sft"]).arms == ("random", "sft")
    assert options.output == Path("a/b.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: got 0, expected a whole number of at least 1"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--rank 0", "--rank: got 0, expected a whole number of at least 1"),
        ("--rank -3", "--rank: got -3"),
        ("--batch 0", "--batch: got 0"),
        ("--arms sft lora", "argument --arms: invalid choice: 'lora'"),
        ("--arms sft sft", "--arms: got sft sft, expected each once"),
        ("--seeds 1 2 1", "--seeds: got 1 2 1, expected each once"),
        ("--seeds -1", "--seeds: got -1, expected whole numbers of at least 0"),
        ("--lr 0", "--lr: got 0.0, expected a positive number"),
        ("--lr nan", "--lr: got nan"),
        ("--coeff -1", "--coeff: got -1.0, expected a number of at least 0"),
        ("--coeff inf", "--coeff: got inf"),
        ("--backend cublas", "--backend: got 'cublas', expected one of torch, triton, native"),
        ("--device tpu", "--device: got 'tpu', expected auto, cpu, cuda or cuda:<number>"),
        ("--device meta", "--device: got 'meta', expected auto, cpu, cuda or cuda:<number>"),
        ("--output curves.pdf", "--output: got 'curves.pdf', expected a file name that ends in .png"),
        ("--output file/curves.png", "--output: cannot make the folder of 'file/curves.png'"),
        ("--output folder.png", "--output: cannot write 'folder.png'"),
    ],
)
def test_says_what_is_wrong(arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as exit_:
        parse_options(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=f"--device: got '{name}'.*sees 0 CUDA devices.*--device cpu"):
        find_device(name)


def test_cuda_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 0)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="sees 2 CUDA devices"):
        find_device("cuda:2")


def test_a_backend_that_cannot_serve_the_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RPSFT_BACKEND", "fastest")
    with pytest.raises(SystemExit):
        parse_options(["--device", "cpu"])
    assert "RPSFT_BACKEND: got 'fastest'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sets", "expected"), [((), False), (("avx2", "portable"), False), (("avx512_bf16", "avx2"), True)]
)
def test_autocast_is_chosen_where_the_processor_multiplies_bfloat16(
    sets: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.native, "instruction_sets", lambda: sets)
    assert parse_options(["--device", "cpu"]).autocast is expected
    assert parse_options(["--device", "cpu", "--autocast"]).autocast is True
    assert parse_options(["--device", "cpu", "--no-autocast"]).autocast is False
    assert choose_autocast(torch.device("cuda"))
