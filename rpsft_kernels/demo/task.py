"""The task that the demo fine-tunes on: sums of two two-digit numbers, in a chat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from .batch import Example, answer_logits, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sum:
    """``left + right``, both from 10 to 99."""

    left: int
    right: int

    @property
    def question(self) -> str:
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        return str(self.left + self.right)


@dataclass(frozen=True)
class TaskScore:
    """The score of a model on the held-out sums.

    Attributes:
        loss: Mean cross-entropy of the answers' tokens (end of turn included), in nats.
        accuracy: Share of sums whose greedy answer is right to the last token.
    """

    loss: float
    accuracy: float


def make_sums(train: int, held_out: int, seed: int) -> tuple[list[Sum], list[Sum]]:
    """Make ``train`` sums, in the order of training, and ``held_out`` others.

    No sum is in both lists, and none twice in either unless ``train`` exceeds the 8100 - ``held_out`` that are left.
    """
    sums = [Sum(left, right) for left in range(10, 100) for right in range(10, 100)]
    generator = random.Random(seed)
    generator.shuffle(sums)
    tests, rest = sums[:held_out], sums[held_out:]
    drawn: list[Sum] = []
    while len(drawn) < train:
        generator.shuffle(rest)
        drawn += rest
    return drawn[:train], tests


def chat_prompt(question: str) -> str:
    """Write a user's turn and the beginning of the assistant's."""
    # The chat template would add a default system prompt, which doubles the length.
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def encode_sums(tokenizer: PreTrainedTokenizerBase, sums: Sequence[Sum]) -> list[Example]:
    """Encode each sum as a user's turn, and its result as the assistant's turn with the end of the turn."""
    return [
        Example(
            tuple(_ids(tokenizer, chat_prompt(s.question))),
            tuple(_ids(tokenizer, f"{s.answer}<|im_end|>")),
        )
        for s in sums
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def score_task(model: PreTrainedModel, examples: Sequence[Example], chunk: int = 64) -> TaskScore:
    """Compute loss and accuracy on ``examples``, ``chunk`` of them at a time."""
    # Greedy decoding follows the right answer until its first wrong token. It thus gives the whole answer exactly if
    # every token of the answer is the most likely one after the right tokens before it.
    device = next(model.parameters()).device
    loss, tokens, right = 0.0, 0, 0
    for start in range(0, len(examples), chunk):
        batch = collate(examples[start : start + chunk], device)
        logits = answer_logits(model, batch)
        loss += cross_entropy(logits, batch.target, reduction="sum").item()
        tokens += batch.target.numel()
        missed = set(batch.row[logits.argmax(-1) != batch.target].tolist())
        right += batch.ids.shape[0] - len(missed)
    return TaskScore(loss / tokens, right / len(examples))
