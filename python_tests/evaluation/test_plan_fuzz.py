"""A model is changed at random between steps; each call must equal one that prepares its own plan."""

from __future__ import annotations

import os
import random
import time

import pytest
import torch

import rpsft_kernels as rk
from mutations import MUTATIONS
from plans import Case, forget

# Wall time of each backend: a slow machine takes fewer steps of the same sequence.
SECONDS = {"native": 8.0, "torch": 8.0, "triton": 12.0}
STEPS = 250
SEED = 20261126
# A gradient of another dtype than its weight's cannot come back with the weight's own; those are in test_plan.
LEFT_OUT = {"gradients of another dtype", "from meta"}


@pytest.mark.filterwarnings("ignore:.*the anchor's block was computed by:UserWarning")
@pytest.mark.parametrize("backend", SECONDS)
def test_any_sequence_of_changes(backend: str) -> None:
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels on the CPU take TRITON_INTERPRET=1, set before the start")
    forget()
    chosen, case = random.Random(SEED), Case.make()
    names = [name for name in MUTATIONS if name not in LEFT_OUT]
    until, done = time.monotonic() + SECONDS[backend], []
    with rk.use_backend(backend):
        while len(done) < STEPS and time.monotonic() < until:
            for name in chosen.sample(names, chosen.choice((0, 1, 1, 2, 4))):
                done.append(name)
                MUTATIONS[name](case)
            if all(not parameter.requires_grad for parameter in case.parameters()):
                case.model.requires_grad_(True)
            if chosen.random() < 0.3:
                done.append("back to float32")
                case.model.zero_grad()
                case.model.float()
            # The weights would move further and further away otherwise.
            with torch.no_grad():
                for parameter in case.model.parameters():
                    parameter.clamp_(-1.0, 1.0)
            try:
                case.check(lists=chosen.random() < 0.3)
            except Exception as error:
                raise AssertionError(f"after {done[-8:]}, step {len(done)}, seed {SEED}") from error
            case.kept = case.kept[-5:]
    forget()
    assert done
