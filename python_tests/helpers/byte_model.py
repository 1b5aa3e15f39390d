"""A language model of bytes, pretrained on Python's manual and fine-tuned on Python's sources: small, and real."""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, CONTEXT, BYTES = 32, 32, 128
PRETRAINING_STEPS = 120


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        projected = self.queries_keys_values(self.before_attention(hidden)).chunk(3, dim=-1)
        heads = [part.view(batch, length, 4, width // 4).transpose(1, 2) for part in projected]
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        mlp: Tensor = self.down(functional.gelu(self.up(self.before_mlp(hidden))))
        return hidden + mlp


class ByteModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.bytes(text) + self.places.weight
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


def _as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64).clamp(max=BYTES - 1)


@lru_cache(maxsize=1)
def manual() -> Tensor:
    """The text that ``help()`` shows of keywords and topics."""
    from pydoc_data.topics import topics

    return _as_bytes("\n".join(topics.values())[:200_000])


@lru_cache(maxsize=1)
def sources() -> Tensor:
    path = inspect.getsourcefile(inspect)
    assert path is not None
    return _as_bytes(Path(path).read_text(encoding="utf-8"))


def loss_of(model: nn.Module, text: Tensor, generator: torch.Generator, batch: int = 8) -> Tensor:
    """Return the loss of the next bytes on random pieces of a text."""
    starts = torch.randint(len(text) - CONTEXT, (batch,), generator=generator).tolist()
    pieces = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
    return functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


@lru_cache(maxsize=1)
def _pretrained() -> ByteModel:
    torch.manual_seed(0)
    model, generator = ByteModel(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(PRETRAINING_STEPS):
        loss_of(model, manual(), generator, batch=16).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def pretrained() -> ByteModel:
    """Return the pretrained model, a copy of its own for each caller; trained once in a process."""
    return copy.deepcopy(_pretrained())
