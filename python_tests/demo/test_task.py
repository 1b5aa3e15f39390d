from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rpsft_kernels.demo.batch import Example
from rpsft_kernels.demo.task import Sum, encode_sums, make_sums, score_task


def test_sums_are_reproducible_and_never_shared() -> None:
    train, held_out = make_sums(500, 128, seed=3)
    assert (train, held_out) == make_sums(500, 128, seed=3)
    assert (train, held_out) != make_sums(500, 128, seed=4)
    assert (len(train), len(set(train)), len(held_out), len(set(held_out))) == (500, 500, 128, 128)
    assert not set(train) & set(held_out)


def test_held_out_sums_and_their_predecessors_do_not_depend_on_the_length_of_training() -> None:
    short, held_out = make_sums(10, 128, seed=0)
    long, same = make_sums(9000, 128, seed=0)
    assert (long[:10], same) == (short, held_out)
    assert len(long) == 9000
    assert len(set(long)) == 8100 - 128
    assert not set(long) & set(held_out)


def test_a_sum_is_a_user_turn_and_an_assistant_turn(tokenizer: Any) -> None:
    (example,) = encode_sums(tokenizer, [Sum(47, 58)])
    text = "".join(map(chr, example.prompt))
    assert text == "<|im_start|>user\n47+58=<|im_end|>\n<|im_start|>assistant\n"
    assert "".join(map(chr, example.answer)) == "105<|im_end|>"


def test_accuracy_is_that_of_greedy_decoding(tiny: PreTrainedModel) -> None:
    prompts = [(7, 11, 13), (2, 3), (100, 101, 102, 103)] * 2
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(4):
            ids = torch.cat([ids, tiny(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        answers.append(tuple(ids[0, len(prompt) :].tolist()))
    # Two of six answers are wrong, one in its first token and one in its last.
    answers[0] = ((answers[0][0] + 1) % 160, *answers[0][1:])
    answers[4] = (*answers[4][:-1], (answers[4][-1] + 1) % 160)
    examples = [Example(p, a) for p, a in zip(prompts, answers, strict=True)]
    for chunk in (1, 4, 64):
        assert score_task(tiny, examples, chunk).accuracy == pytest.approx(4 / 6)


def test_loss_is_the_mean_over_all_answer_tokens(tiny: PreTrainedModel) -> None:
    examples = [Example((5, 6), (7, 8, 9)), Example((1, 2, 3), (4,))]
    score = score_task(tiny, examples, chunk=1)
    exact = tiny.double()
    losses = []
    for e in examples:
        logits = exact(torch.tensor([e.prompt + e.answer])).logits[0, len(e.prompt) - 1 : -1]
        losses += (-logits.log_softmax(-1)[range(len(e.answer)), list(e.answer)]).tolist()
    assert score.loss == pytest.approx(sum(losses) / 4, rel=1e-5)
