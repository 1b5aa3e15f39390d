"""A call that fails leaves no gradient that it has made, and none that it has not computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import rpsft_kernels as rk
from mutations import MUTATIONS
from plan_ranks import Failures, failures
from plans import COEFF, RANK, Case, copied, forget, same
from ranks import needs_fsdp2, run_ranks
from rpsft_kernels.ops import native
from rpsft_kernels.ops.triton import launch

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels on the CPU take TRITON_INTERPRET=1, set before the start"
)


@pytest.fixture(autouse=True)
def _no_plans() -> Iterator[None]:
    forget()
    yield
    forget()


@interpreted
@pytest.mark.parametrize("kernel", ["project", "drift", "squares", "pull", "gradient", "full_drift", "full_gradient"])
def test_a_kernel_that_is_refused_is_refused_again(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is refused before anything is computed, until the kernel can be started."""
    case = Case.make()
    MUTATIONS["some gradients"](case)
    before = [copied(parameter.grad) for parameter in case.parameters()]
    find = launch.find_start

    def refuse(variant: Any, *rest: Any) -> Callable[[], None]:
        if variant.kernel == kernel:
            raise ValueError("it may compute wrong numbers")
        return find(variant, *rest)

    with rk.use_backend("triton"):
        monkeypatch.setattr(launch, "find_start", refuse)
        for _ in range(2):
            with pytest.raises(ValueError, match="it may compute wrong numbers"):
                rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)
            # The forward pass alone would not need this kernel.
            with pytest.raises(ValueError, match="it may compute wrong numbers"):
                rk.rotation_penalty(case.model, case.anchors)
            assert all(same(p.grad, grad) for p, grad in zip(case.parameters(), before, strict=True))
        monkeypatch.undo()
        case.check(lists=False)


@interpreted
def test_a_gradient_that_no_kernel_writes_is_refused_again() -> None:
    """An operation that was planned for the previous gradient is not used on it."""
    case = Case.make()
    with rk.use_backend("triton"):
        rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)
        rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)
        weight = case.model.first.weight
        wide = torch.zeros(40, 24, dtype=torch.float64)
        weight.grad.data = wide  # type: ignore[union-attr]
        for _ in range(2):
            with pytest.raises(ValueError, match=r"got a gradient in float64"):
                rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)
            assert wide.eq(0).all()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_gradients_that_were_not_computed_are_removed(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a call ends between two launches, the first bucket has its gradients and the others have none."""
    weights = [torch.randn(24, 40).to(dtype).requires_grad_() for dtype in (torch.float32, torch.bfloat16)]
    anchors = [rk.Anchor.from_weight(weight, RANK) for weight in weights]
    pull_back_into, calls = native.pull_back_into, [0]

    def interrupted(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise error
        pull_back_into(*arguments, **options)

    monkeypatch.setattr(native, "pull_back_into", interrupted)
    with rk.use_backend("native"), pytest.raises(error):
        rk.accumulate_rotation_grad_(weights, anchors, COEFF)
    assert [weight.grad is not None for weight in weights] == [True, False]
    assert weights[0].grad is not None and weights[0].grad.isfinite().all()


@needs_fsdp2
@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp"])
def test_ranks_that_fail_make_no_gradients(wrapper: str) -> None:
    """A weight of one rank is not finite, a rank refuses, a rank has died: no rank is left with a new gradient."""
    results: list[Failures | None] = run_ranks(3, failures, wrapper, killed=(2,))
    for result in results[:2]:
        assert result is not None
        assert set(result.messages) == {"not finite", "refused", "after", "dead"}
        assert "finite" in result.messages["not finite"]
        assert result.messages["after"] == "", "a call after failed ones succeeds"
        assert result.messages["refused"] and result.messages["dead"]
        assert result.left == []
