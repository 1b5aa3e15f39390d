"""A model of the demo's architecture that is small enough to train in a test, and the real one."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rpsft_kernels as rk
from rpsft_kernels.demo.model import load_smollm2
from small_models import tiny_llama

VOCABULARY = 160


class Characters:
    """A tokenizer of one token per character; it serves all that the demo asks of one."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) % VOCABULARY for character in text]}


@pytest.fixture
def tokenizer() -> Characters:
    return Characters()


@pytest.fixture
def tiny() -> PreTrainedModel:
    """Two layers of width 32, random, float32, in eval mode; a new one for each test."""
    return tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=2048).eval()


@pytest.fixture
def anchors(tiny: PreTrainedModel) -> rk.Anchors:
    return rk.Anchors.from_model(tiny, rank=8, progress=False)


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer; shared, so that no test may change them."""
    return load_smollm2()
