"""Programs and operators give the same bits of first and second derivatives; gradients of replicas keep an order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from rpsft_kernels import ops
from rpsft_kernels.distributed import ReplicatedWeight, Shard
from rpsft_kernels.evaluation.bucket import make_buckets
from rpsft_kernels.evaluation.pairing import AnchoredWeight, pair
from rpsft_kernels.evaluation.projection import ProjectionFunction, gather_replicas
from support import random_matrix

# Full anchors have no drifts.
OUTPUTS = [("full", "squares")]
OUTPUTS += [(form, outputs) for form in ("base", "block") for outputs in ("squares", "drifts", "squares and drifts")]


def _pair(form: str) -> list[AnchoredWeight]:
    """Weights of one bucket, the second of which is frozen."""
    paired = []
    for seed in range(3):
        pretrained = random_matrix(24, 40, scale=0.2, seed=seed)
        anchor = rk.Anchor.from_weight(pretrained, 24 if form == "full" else 4, keep_base=form != "block")
        assert anchor.form == form
        weight = (1.1 * pretrained).requires_grad_(seed != 1)
        paired += pair([weight], [anchor])
    return paired


def _project(weights: list[AnchoredWeight], program: ops.Program | None) -> tuple[Tensor, list[Tensor]]:
    """Squares and drifts, of a program or of the operator."""
    (bucket,) = make_buckets(weights)
    operands = bucket.gather(weights).operands
    if program is None:
        drifts, squares = ops.project_drift(operands, bucket.backend)
        return squares, drifts
    with ops.open_run(program) as run:
        run.stage_projection(0, operands, True)
        run.send()
        squares, *drifts = ProjectionFunction.apply(  # type: ignore[no-untyped-call, unused-ignore]
            program, run, 0, bucket.backend, operands, *operands.weights
        )
    return squares, drifts


def _loss(weights: list[AnchoredWeight], program: ops.Program | None, outputs: str) -> Tensor:
    """A function of some of the projection's outputs; the others have no gradient."""
    squares, drifts = _project(weights, program)
    summands = [3 * squares[:2].sum()] if "squares" in outputs else []
    if "drifts" in outputs:
        summands += [(drift * random_matrix(4, 4, seed=9)).sum() for drift in drifts[1:]]
    return torch.stack(summands).sum()


@pytest.mark.parametrize(("form", "outputs"), OUTPUTS)
def test_programs_and_operators_give_the_same_gradients(form: str, outputs: str, backend: str) -> None:
    weights = _pair(form)
    leaves = [anchored.weight.parameter for anchored in weights if anchored.weight.requires_grad]
    results = []
    for program in (ops.prepare_program(backend, torch.device("cpu"), [len(weights)]), None):
        once = torch.autograd.grad(_loss(weights, program, outputs), leaves, materialize_grads=True)
        loss = _loss(weights, program, outputs)
        first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        assert all(map(torch.equal, once, first))
        along = torch.stack([gradient.square().sum() for gradient in first]).sum()
        # R is of the second degree, the drifts of the first.
        second = torch.autograd.grad(along, leaves, materialize_grads=True) if "squares" in outputs else ()
        results.append((loss.detach(), *once, *second))
    assert all(map(torch.equal, *results))


def arrivals(waiting: int, shares: list[bool]) -> list[int]:
    """Return the order in which weights get their gradients, while other nodes of the graph wait to be run."""
    parameters = [nn.Parameter(torch.ones(2, 3)) for _ in shares]
    order: list[int] = []
    for i, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(lambda _, i=i: order.append(i))
    # These come first, so that their gradients come last.
    before = [nn.Parameter(torch.ones(1)).mul(2) for _ in range(waiting)]
    weights = [
        ReplicatedWeight(p, (2, 3), Shard.whole((2, 3)), gradient_error="kept by the engine") for p in parameters
    ]
    joint, values = gather_replicas(weights)
    summands = [value.sum() for value, own in zip(values, shares, strict=True) if own]
    torch.cat([joint, torch.stack([*summands, *(b.sum() for b in before)])]).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    return order


@pytest.mark.parametrize("count", [5, 9])
def test_gradients_that_an_engine_averages_arrive_in_one_order_on_every_rank(count: int) -> None:
    orders = {
        tuple(arrivals(waiting, [i % 2 == rank for i in range(count)])) for waiting in range(1, 9) for rank in range(2)
    }
    assert len(orders) == 1
