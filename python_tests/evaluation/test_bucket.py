"""Buckets depend on facts that all ranks share, and on nothing else."""

from __future__ import annotations

import pytest
import torch

import rpsft_kernels as rk
from rpsft_kernels.evaluation.bucket import make_buckets
from rpsft_kernels.evaluation.pairing import AnchoredWeight, pair
from rpsft_kernels.ops import available_backends, intermediate_parts, limits_of
from rpsft_kernels.ops.buckets import GPU_LIMITS
from rpsft_kernels.ops.triton.variants import Precision
from support import random_matrix

SHAPES = [(24, 40), (40, 24), (5, 3), (32, 32), (24, 40), (16, 64)]


def _pair(dtype: torch.dtype = torch.float32) -> list[AnchoredWeight]:
    """Weights in all three forms, in turn."""
    weights = [random_matrix(*shape, dtype, seed=i).requires_grad_() for i, shape in enumerate(SHAPES * 3)]
    anchors = [rk.Anchor.from_weight(weight, 4, keep_base=i % 2 == 0) for i, weight in enumerate(weights)]
    return pair(weights, anchors)


def _members(weights: list[AnchoredWeight]) -> list[list[int]]:
    return [bucket.members for bucket in make_buckets(weights)]


def test_every_weight_is_in_one_bucket_of_its_form() -> None:
    weights = _pair()
    buckets = make_buckets(weights)
    assert sorted(i for bucket in buckets for i in bucket.members) == list(range(len(weights)))
    for place, bucket in enumerate(buckets):
        assert bucket.place == place and bucket.busy == bucket.members and bucket.plain
        assert len({weights[i].anchor.form for i in bucket.members}) == 1
        assert bucket.full == (weights[bucket.members[0]].anchor.form == "full")


def test_gradients_and_backends_do_not_decide_buckets() -> None:
    """R is summed in the order of the buckets, which must be the same for all calls and all ranks."""
    weights = _pair()
    expected = _members(weights)
    for anchored in weights[::3]:
        anchored.weight.parameter.grad = torch.zeros(anchored.weight.shape)
    weights[1].weight.parameter.requires_grad_(False)
    assert _members(weights) == expected
    for backend, reason in available_backends(torch.device("cpu"), torch.float32).items():
        if reason is None:
            with rk.use_backend(backend):
                assert _members(weights) == expected


def test_limits_are_those_of_a_gpu_unless_all_weights_are_on_the_cpu() -> None:
    gpu = GPU_LIMITS
    assert limits_of(["cuda"], False) == limits_of(["cpu", "cuda"], True) == gpu
    cpu, shards = limits_of(["cpu", "cpu"], False), limits_of(["cpu"], True)
    assert cpu.weights == shards.weights < gpu.weights and cpu.drift_bytes < shards.drift_bytes < gpu.drift_bytes
    assert not cpu.one_orientation and not shards.one_orientation


@pytest.mark.parametrize("base", ["bf16", "fp32", None])
@pytest.mark.parametrize("basis", ["bf16", "fp32"])
@pytest.mark.parametrize("weight", ["bf16", "fp16", "fp32"])
def test_workspace_is_counted_in_the_parts_of_the_kernels(weight: str, basis: str, base: str | None) -> None:
    precision = Precision(weight, base, basis)  # type: ignore[arg-type]
    assert intermediate_parts(base is not None, basis == "bf16") == precision.planes
