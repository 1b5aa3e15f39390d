"""Token sequences in which only some positions are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of the answer that is scored after it; neither is empty."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples side by side.

    Attributes:
        ids: Shape (rows, length), int64, padded on the right with 0.
        row, position: Shape (scored,), int64: the places where answer tokens are predicted, in the order of the
            examples and of their tokens.
        target: Shape (scored,), int64: the right token of each place.
    """

    ids: Tensor
    row: Tensor
    position: Tensor
    target: Tensor


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """Make one batch of ``examples`` on ``device``."""
    # Padding stands behind everything that is scored, and attention is causal: no mask is needed.
    ids = torch.zeros(len(examples), max(map(len, examples)), dtype=torch.int64)
    row, position, target = [], [], []
    for i, example in enumerate(examples):
        ids[i, : len(example)] = torch.tensor(example.prompt + example.answer)
        for j, token in enumerate(example.answer):
            row.append(i)
            position.append(len(example.prompt) + j - 1)
            target.append(token)
    scored = (torch.tensor(values, device=device) for values in (row, position, target))
    return Batch(ids.to(device), *scored)


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Compute the logits (scored, vocabulary) where answers are predicted; the head is not applied anywhere else."""
    hidden = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden[batch.row, batch.position])
    return logits.float()
