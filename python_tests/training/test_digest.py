from __future__ import annotations

import pytest

import rpsft_kernels as rk
from rpsft_kernels.training.digest import digest_anchors
from small_models import linear_layers


@pytest.mark.parametrize("changed", [{"seed": 4}, {"subspace": "singular"}, {"rank": 7}])
def test_a_resumed_run_knows_other_subspaces_of_the_same_weights(changed: dict[str, object]) -> None:
    model = linear_layers((24, 32, 16))
    options = {"rank": 8, "subspace": "random", "seed": 3, "progress": False}

    def digest(**others: object) -> str:
        return digest_anchors(rk.Anchors.from_model(model, **{**options, **others}))  # type: ignore[arg-type]

    assert digest() == digest() != digest(**changed)
