"""Plans keep nothing alive that their user has dropped, and serve any number of threads."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from plans import COEFF, RANK, Case, both_calls, forget, same
from rpsft_kernels.evaluation import plan
from rpsft_kernels.ops.triton import scratch

BACKENDS = ("native", "torch", "triton")


def _accumulate(case: Case) -> None:
    rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)


def _backward(case: Case) -> None:
    rk.rotation_penalty(case.model, case.anchors).backward()  # type: ignore[no-untyped-call]


def _no_backward(case: Case) -> None:
    rk.rotation_penalty(case.model, case.anchors)


def _list(case: Case) -> None:
    rk.accumulate_rotation_grad_(case.parameters(), list(case.anchors.values()), COEFF)


def _refused(case: Case) -> None:
    with pytest.raises(ValueError, match="coeff"):
        rk.accumulate_rotation_grad_(case.model, case.anchors, float("inf"))
    with pytest.raises(ValueError, match="gone"):
        rk.rotation_penalty(case.model, {**case.anchors, "gone": case.anchors["first.weight"]})


USES: dict[str, Callable[[Case], None]] = {
    "accumulate": _accumulate,
    "backward": _backward,
    "no backward": _no_backward,
    "list": _list,
    "refused": _refused,
}


def _references(case: Case) -> dict[str, weakref.ref[object]]:
    references: dict[str, weakref.ref[object]] = {"model": weakref.ref(case.model)}
    references |= {f"{name} module": weakref.ref(module) for name, module in case.model.named_modules() if name}
    for name, parameter in case.model.named_parameters():
        references[name] = weakref.ref(parameter)
        if parameter.grad is not None:
            references[f"{name}.grad"] = weakref.ref(parameter.grad)
    for name, anchor in case.anchors.items():
        references[f"anchor of {name}"] = weakref.ref(anchor)
        references |= {f"{piece} of {name}": weakref.ref(tensor) for piece, tensor in anchor.pieces().items()}
    return references


@pytest.mark.parametrize("use", USES)
def test_objects_that_the_user_drops_are_freed(use: str, backend: str) -> None:
    case = Case.make()
    for _ in range(2):
        USES[use](case)
    references = _references(case)
    del case
    gc.collect()
    assert [name for name, reference in references.items() if reference() is not None] == []
    assert not plan._cache
    # The scratch memory of the Triton backend.
    assert len(scratch._scratches) == 0


def test_replaced_objects_are_freed_while_the_rest_is_used(backend: str) -> None:
    case = Case.make()
    for use in (_accumulate, _backward):
        use(case)
    first, gradient = weakref.ref(case.model.first.weight), weakref.ref(case.model.square.weight.grad)  # type: ignore[arg-type]
    anchor = weakref.ref(case.anchors["square.weight"])
    case.model.first = nn.Linear(24, 40, bias=False)
    case.anchors["square.weight"] = rk.Anchor.from_weight(torch.randn(32, 32), RANK)
    case.model.zero_grad()
    gc.collect()
    assert first() is None and gradient() is None and anchor() is None
    _accumulate(case)
    gradient = weakref.ref(case.model.square.weight.grad)  # type: ignore[arg-type]
    case.model.zero_grad()
    assert gradient() is None, "a gradient lives until the next call"


def test_weights_of_a_list_are_not_kept(backend: str) -> None:
    weights = [torch.randn(24, 40, requires_grad=True) for _ in range(3)]
    anchors = [rk.Anchor.from_weight(weight, RANK) for weight in weights]
    rk.accumulate_rotation_grad_(weights, anchors, COEFF)
    rk.rotation_penalty(weights, anchors).backward()  # type: ignore[no-untyped-call]
    references = [weakref.ref(weight) for weight in weights]
    del weights
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_a_graph_keeps_what_its_backward_pass_needs(backend: str) -> None:
    """The backward pass runs after model, anchors and plans are gone."""
    case = Case.make()
    _, _, expected = both_calls(case.model, case.anchors, case.parameters(), COEFF, True)
    parameters = case.parameters()
    penalty = rk.rotation_penalty(case.model, case.anchors)
    del case
    gc.collect()
    forget()
    assert all(map(same, torch.autograd.grad(penalty, parameters), expected))


def test_plans_do_not_pile_up(backend: str) -> None:
    """Neither anchors that come and go nor weights that change at every call leave plans behind."""
    weight = torch.randn(24, 40, requires_grad=True)
    for _ in range(5):
        rk.rotation_penalty(weight, rk.Anchor.from_weight(weight, RANK))
    gc.collect()
    assert not plan._cache
    anchor = rk.Anchor.from_weight(weight, RANK)
    for i in range(10):
        weight.requires_grad_(i % 2 == 0)
        weight.data = weight.data.to((torch.float32, torch.bfloat16)[i // 2 % 2])
        rk.rotation_penalty(weight, anchor)
    (cached,) = plan._cache.values()
    assert len(cached) <= plan._MOST_PLANS_PER_KEY


# -- threads ------------------------------------------------------------------------------------------------


def _in_threads(*works: Callable[[], None]) -> None:
    """Run each function in a thread, all from the same moment; raises the first error of any."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            barrier.wait()
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _repeats(backend: str) -> int:
    return 3 if backend == "triton" else 20


def test_two_threads_with_different_models(backend: str) -> None:
    cases = [Case.make(), Case.make()]
    for i, case in enumerate(cases):
        case.coeff += i
        with torch.no_grad():
            case.model.first.weight.mul_(1 + i)  # type: ignore[operator, union-attr]
    expected = [both_calls(c.model, c.anchors, c.parameters(), c.coeff, True) for c in cases]

    def work(i: int) -> Callable[[], None]:
        case = cases[i]

        def run() -> None:
            with rk.use_backend(backend):
                for _ in range(_repeats(backend)):
                    case.model.zero_grad()
                    results = both_calls(case.model, case.anchors, case.parameters(), case.coeff, False)
                    assert same(results[0], expected[i][0])
                    assert all(map(same, results[1], expected[i][1])) and all(map(same, results[2], expected[i][2]))

        return run

    _in_threads(work(0), work(1))


def test_two_threads_with_one_model(backend: str) -> None:
    """One thread adds to the gradients, two take those of backward passes with another factor."""
    case = Case.make()
    penalty, added, pulled = both_calls(case.model, case.anchors, case.parameters(), COEFF, True)
    doubled = [2 * grad for grad in pulled if grad is not None]

    def accumulate() -> None:
        with rk.use_backend(backend):
            for _ in range(_repeats(backend)):
                case.model.zero_grad()
                assert rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF).equal(penalty)
                assert all(same(p.grad, grad) for p, grad in zip(case.parameters(), added, strict=True))

    def penalise() -> None:
        with rk.use_backend(backend):
            for _ in range(_repeats(backend)):
                again = rk.rotation_penalty(case.model, case.anchors)
                assert again.detach().equal(penalty)
                gradients = torch.autograd.grad(2 * again, case.parameters())
                assert all(map(torch.allclose, gradients, doubled))

    forget()
    _in_threads(accumulate, penalise, penalise)


def test_threads_that_share_anchors_and_have_their_own_backends() -> None:
    """Threads share the list of anchors; each has weights of its own and nests its choices of the backend."""
    case = Case.make()
    anchors = list(case.anchors.values())
    names = [name for name in BACKENDS if name != "triton" or os.environ.get("TRITON_INTERPRET") == "1"]
    weights = {n: [nn.Parameter(p.detach() * (1 + i)) for p in case.parameters()] for i, n in enumerate(names)}
    expected: dict[tuple[str, str], Tensor] = {}
    for owner in names:
        for name in names:
            with rk.use_backend(name):
                expected[owner, name] = rk.rotation_penalty(weights[owner], anchors).detach()
    forget()

    def work(owner: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(3):
                with rk.use_backend(owner):
                    for name in names:
                        with rk.use_backend(name):
                            penalty = rk.rotation_penalty(weights[owner], anchors)
                            assert penalty.detach().equal(expected[owner, name])
                    assert rk.rotation_penalty(weights[owner], anchors).detach().equal(expected[owner, owner])

        return run

    _in_threads(*map(work, names))
    forget()
