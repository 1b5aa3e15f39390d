"""Knowledge that the model has before and that the task does not train: plain English, and facts asked in a chat."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, nll_loss

from .batch import Example, answer_logits, collate
from .task import chat_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Log-probabilities of the whole vocabulary are compared for a few paragraphs at a time: 20 MB each.
_PARAGRAPHS = 3


@dataclass(frozen=True)
class Fact:
    """A sentence without its end, and four ways to end it; the first is the true one."""

    prompt: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class EncodedFact:
    """Token ids of a :class:`Fact`."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.choices))


@dataclass(frozen=True)
class Knowledge:
    """The facts and the prose that are scored, as token ids."""

    facts: tuple[EncodedFact, ...]
    prose: tuple[Example, ...]


@dataclass(frozen=True)
class KnowledgeScore:
    """The scores of a model's knowledge.

    Attributes:
        divergence: Mean over the prose's tokens of KL(pretrained || this model), in nats: how far the predictions for
            plain English have moved. 0 for the pretrained model.
        perplexity: exp of the mean cross-entropy, in nats, of the prose's tokens.
        fact_loss: Mean negative log-likelihood of the facts' true ends, in nats per end.
        facts: Share of facts whose true end is more likely than each of the other three.
    """

    divergence: float
    perplexity: float
    fact_loss: float
    facts: float


def read_facts() -> list[Fact]:
    """Read the facts that are shipped with the package."""
    lines = _read("facts.tsv").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return [Fact(row[0], tuple(row[1:])) for row in rows]


def read_prose() -> list[str]:
    """Read the paragraphs of English that are shipped with the package."""
    return [paragraph.strip() for paragraph in _read("prose.txt").split("\n\n")]


def _read(name: str) -> str:
    return (resources.files(__package__) / "data" / name).read_text(encoding="utf-8")


def encode_knowledge(tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], prose: Sequence[str]) -> Knowledge:
    """Encode facts and paragraphs as token ids.

    A fact is asked in the chat format of the task, so that it shows whether the model still answers what it is asked
    there. All tokens of a paragraph but the first are scored.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    encoded = tuple(
        # The assistant's turn begins with the sentence: otherwise the first token would decide, which is any beginning
        # of an answer.
        EncodedFact(
            ids(chat_prompt(f"Complete the sentence: {f.prompt}") + f.prompt), tuple(ids(f" {c}") for c in f.choices)
        )
        for f in facts
    )
    paragraphs = tuple(Example(tokens[:1], tokens[1:]) for tokens in map(ids, prose))
    return Knowledge(encoded, paragraphs)


@torch.no_grad()
def predict_prose(model: PreTrainedModel, prose: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute log-probabilities (scored, vocabulary) and right tokens (scored,), some paragraphs at a time."""
    device = next(model.parameters()).device
    for start in range(0, len(prose), _PARAGRAPHS):
        batch = collate(prose[start : start + _PARAGRAPHS], device)
        yield answer_logits(model, batch).log_softmax(-1), batch.target


@torch.no_grad()
def score_knowledge(
    model: PreTrainedModel, knowledge: Knowledge, pretrained: Sequence[Tensor], chunk: int = 25
) -> KnowledgeScore:
    """Score ``model`` on facts and prose.

    Args:
        model: The model after some steps.
        knowledge: The facts and the prose.
        pretrained: The log-probabilities that :func:`predict_prose` gave for the pretrained model.
        chunk: Facts that are scored at a time.
    """
    # Facts of about the same length side by side leave little padding.
    facts = sorted(knowledge.facts, key=len)
    scores = torch.cat([score_choices(model, facts[i : i + chunk]) for i in range(0, len(facts), chunk)])
    known = scores[:, 0] > scores[:, 1:].amax(1)
    divergence, loss, tokens = 0.0, 0.0, 0
    for (predicted, target), before in zip(predict_prose(model, knowledge.prose), pretrained, strict=True):
        divergence += (before.exp() * (before - predicted)).sum(-1).double().sum().item()
        loss += nll_loss(predicted, target, reduction="sum").item()
        tokens += target.numel()
    return KnowledgeScore(
        divergence / tokens, math.exp(loss / tokens), -scores[:, 0].mean().item(), known.float().mean().item()
    )


def score_choices(model: PreTrainedModel, facts: Sequence[EncodedFact]) -> Tensor:
    """Compute the log-likelihood, in nats, of each choice of each fact after its prompt.

    A prompt and all its choices are one sequence, in which no choice sees another: position and mask put each of
    them directly behind the prompt, which is thus computed only once.

    Returns:
        Shape (facts, choices), float32, on the CPU.
    """
    device = next(model.parameters()).device
    rows, length = len(facts), max(map(len, facts))
    ids = torch.zeros(rows, length, dtype=torch.int64)
    places = torch.zeros(rows, length, dtype=torch.int64)
    # A padded position sees itself, so that its softmax is not over an empty set.
    seen = torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1)
    row: list[int] = []
    position: list[int] = []
    target: list[int] = []
    choice: list[int] = []
    for i, fact in enumerate(facts):
        end = len(fact.prompt)
        ids[i, :end] = torch.tensor(fact.prompt)
        places[i, :end] = torch.arange(end)
        seen[i, :end, :end] = torch.ones(end, end).tril().bool()
        start = end
        for c, tokens in enumerate(fact.choices):
            stop = start + len(tokens)
            ids[i, start:stop] = torch.tensor(tokens)
            places[i, start:stop] = torch.arange(end, end + len(tokens))
            seen[i, start:stop, :end] = True
            seen[i, start:stop, start:stop] = torch.ones(len(tokens), len(tokens)).tril().bool()
            row += [i] * len(tokens)
            position += [end - 1, *range(start, stop - 1)]
            target += tokens
            choice += [c] * len(tokens)
            start = stop

    dtype = next(model.parameters()).dtype
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    hidden = model.get_decoder()(
        input_ids=ids.to(device),
        position_ids=places.to(device),
        attention_mask=mask[:, None].to(device),
        use_cache=False,
    ).last_hidden_state
    logits = model.get_output_embeddings()(hidden[row, position]).float()
    likelihood = -cross_entropy(logits, torch.tensor(target, device=device), reduction="none")
    scores = torch.zeros(rows, len(facts[0].choices))
    return scores.index_put_((torch.tensor(row), torch.tensor(choice)), likelihood.cpu(), accumulate=True)
