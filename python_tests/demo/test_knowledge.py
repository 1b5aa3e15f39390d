from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpsft_kernels.demo.knowledge import (
    EncodedFact,
    Fact,
    encode_knowledge,
    predict_prose,
    read_facts,
    read_prose,
    score_choices,
    score_knowledge,
)

FACTS = [
    EncodedFact((3, 4, 5), ((6,), (7, 8), (9,), (10, 11, 12))),
    EncodedFact((20,), ((21, 22), (21,), (23,), (24,))),
]


def exact_likelihood(model: PreTrainedModel, prompt: tuple[int, ...], end: tuple[int, ...]) -> Tensor:
    """log p(end | prompt) of a float64 model, for one end, in a sequence of its own."""
    logits = model(torch.tensor([prompt + end])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(end)), list(end)].sum()


def test_shipped_facts_have_one_true_and_three_other_ends() -> None:
    facts = read_facts()
    assert 100 <= len(facts) <= 160
    assert len({fact.prompt for fact in facts}) == len(facts)
    for fact in facts:
        assert len(fact.choices) == len(set(fact.choices)) == 4
        assert all(text and text == text.strip() for text in (fact.prompt, *fact.choices))


def test_shipped_prose_is_plain_english_paragraphs() -> None:
    prose = read_prose()
    assert len(prose) >= 10
    assert sum(len(paragraph.split()) for paragraph in prose) > 1000
    assert all(paragraph and "\n" not in paragraph for paragraph in prose)


def test_choices_that_share_a_sequence_do_not_see_each_other(tiny: PreTrainedModel) -> None:
    scores = score_choices(tiny, FACTS)
    exact = tiny.double()
    expected = torch.stack([torch.stack([exact_likelihood(exact, f.prompt, c) for c in f.choices]) for f in FACTS])
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_scores_of_facts_and_prose(tiny: PreTrainedModel, tokenizer: Any) -> None:
    facts = [Fact("ab", ("c", "d", "ef", "g")), Fact("the sky", ("is", "was", "x", "y")), Fact("q", tuple("rstu"))]
    prose = ["A dog.", "Two cats, and a bird!", "Rain.", "It snows."]
    knowledge = encode_knowledge(tokenizer, facts, prose)
    before = [predicted for predicted, _ in predict_prose(tiny, knowledge.prose)]
    assert len(before) == 2
    start = {name: p.detach().double() for name, p in tiny.named_parameters()}
    assert score_knowledge(tiny, knowledge, before).divergence == 0
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    score = score_knowledge(tiny, knowledge, before, chunk=2)

    exact = tiny.double()
    table = torch.stack(
        [torch.stack([exact_likelihood(exact, f.prompt, c) for c in f.choices]) for f in knowledge.facts]
    )
    assert score.facts == pytest.approx((table.argmax(1) == 0).double().mean().item())
    assert score.fact_loss == pytest.approx(-table[:, 0].mean().item(), rel=1e-5)
    tokens = sum(map(len, prose)) - len(prose)
    likelihood, after = 0.0, []
    for example in knowledge.prose:
        likelihood += exact_likelihood(exact, example.prompt, example.answer).item()
        after.append(exact(torch.tensor([example.prompt + example.answer])).logits[0, :-1].log_softmax(-1))
    assert score.perplexity == pytest.approx(math.exp(-likelihood / tokens), rel=1e-4)
    with torch.no_grad():
        for name, parameter in tiny.named_parameters():
            parameter.copy_(start[name])
    divergence = 0.0
    for example, moved in zip(knowledge.prose, after, strict=True):
        first = exact(torch.tensor([example.prompt + example.answer])).logits[0, :-1].log_softmax(-1)
        divergence += (first.exp() * (first - moved)).sum().item()
    assert score.divergence == pytest.approx(divergence / tokens, rel=1e-4)
    assert score.divergence > 1e-3


def test_a_fact_is_asked_in_the_chat_of_the_task(tokenizer: Any) -> None:
    knowledge = encode_knowledge(tokenizer, [Fact("a b", ("c", "d", "e", "f"))], ["xy"])
    (fact,) = knowledge.facts
    assert "".join(map(chr, fact.prompt + fact.choices[0])) == (
        "<|im_start|>user\nComplete the sentence: a b<|im_end|>\n<|im_start|>assistant\na b c"
    )


@pytest.mark.xdist_group("smollm2")
def test_the_pretrained_model_knows_most_facts(smollm2: Any) -> None:
    model, tokenizer = smollm2
    knowledge = encode_knowledge(tokenizer, read_facts()[::4], read_prose()[:2])
    score = score_knowledge(model, knowledge, [predicted for predicted, _ in predict_prose(model, knowledge.prose)])
    # Guessing gives a quarter; a model that lost its weights or its tokenizer has a perplexity of thousands.
    assert score.facts > 0.7
    assert score.perplexity < 40
    assert score.divergence == 0
