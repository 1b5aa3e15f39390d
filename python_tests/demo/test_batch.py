from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rpsft_kernels.demo.batch import Example, answer_logits, collate

EXAMPLES = [Example((5, 6, 7), (8, 9)), Example((4,), (3,)), Example((1, 2), (3, 4, 5))]


def test_collate_scores_each_answer_token_where_it_is_predicted() -> None:
    batch = collate(EXAMPLES, torch.device("cpu"))
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.row.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.position.tolist() == [2, 3, 0, 1, 2, 3]
    assert batch.target.tolist() == [8, 9, 3, 3, 4, 5]


def test_answer_logits_are_those_of_each_example_alone(tiny: PreTrainedModel) -> None:
    logits = answer_logits(tiny, collate(EXAMPLES, torch.device("cpu")))
    exact = tiny.double()
    alone = [exact(torch.tensor([e.prompt + e.answer])).logits[0, len(e.prompt) - 1 : -1] for e in EXAMPLES]
    torch.testing.assert_close(logits.double(), torch.cat(alone), rtol=1e-4, atol=1e-5)
