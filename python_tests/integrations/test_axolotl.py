from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recorded import batches_of
from small_models import tiny_llama

pytest.importorskip("axolotl", reason="axolotl is not installed: pip install --no-deps axolotl addict")

from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from transformers import Trainer, TrainingArguments

from rpsft_kernels.integrations.axolotl import RotationPenaltyConfig, RotationPenaltyPlugin

pytestmark = pytest.mark.xdist_group("integrations")
NAME = "rpsft_kernels.integrations.axolotl.RotationPenaltyPlugin"


@pytest.fixture
def manager() -> Any:
    """Axolotl's own, which finds the plugin by its name."""
    found = PluginManager.get_instance()
    found.register(NAME)
    yield found
    del found.plugins[NAME]


def trainer(folder: Path) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1
    )
    return Trainer(tiny_llama(vocab_size=64), args, train_dataset=batches_of(8, 64))


def test_the_plugin_gives_the_trainer_what_the_configuration_asks_for(manager: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    config = {"rotation": {"rank": 8, "budget": 0.01, "include": ["*q_proj*"]}}
    assert RotationPenaltyConfig(**config).rotation == config["rotation"]
    manager.post_trainer_create(DictDefault(config), made)
    made.train()
    assert made.rotation.step == 2 and len(made.rotation.anchors) == 2
    assert "rotation/budget_used" in made.state.log_history[0]


def test_without_options_there_is_no_penalty(manager: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    manager.post_trainer_create(DictDefault({}), made)
    assert type(made) is Trainer


def test_axolotl_finds_the_options(manager: Any) -> None:
    assert manager.get_input_args() == ["rpsft_kernels.integrations.axolotl.RotationPenaltyConfig"]
    assert isinstance(manager.plugins[NAME], RotationPenaltyPlugin)


def test_unknown_options_are_refused(manager: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rotation: got lambda, expected some of rank, coeff, warmup"):
        manager.post_trainer_create(DictDefault({"rotation": {"rank": 8, "lambda": 1.0}}), trainer(tmp_path))
