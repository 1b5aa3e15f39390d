"""Autograd graphs, modes and tracers around a call, with and without a plan."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rpsft_kernels as rk
from plans import COEFF, RANK, Case, same
from rpsft_kernels.ops.triton import launch
from support import exact_penalty, relative_error

# -- graphs --------------------------------------------------------------------------------------------------


def _gradients(case: Case, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(rk.rotation_penalty(case.model, case.anchors), case.parameters(), **options)


def test_second_derivatives(backend: str) -> None:
    """R is of the second degree, so that there are no third derivatives."""
    case = Case.make()
    directions = [torch.randn_like(parameter) for parameter in case.parameters()]
    for _ in range(2):
        gradients = _gradients(case, create_graph=True)
        along = torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
        seconds = torch.autograd.grad(along, case.parameters())
        for parameter, anchor, direction, second in zip(
            case.parameters(), case.anchors.values(), directions, seconds, strict=True
        ):
            exact = torch.func.hessian(lambda w, a=anchor: exact_penalty(w, a))(parameter.detach().double())
            assert relative_error(second, torch.einsum("ijkl,ij->kl", exact, direction.double())) < 0.02


def test_two_forward_passes_before_a_backward_pass(backend: str) -> None:
    """The second pass reuses the memory of the first, but not the tensors that the graph of the first holds."""
    case = Case.make()
    expected = _gradients(case)
    values = [parameter.detach().clone() for parameter in case.parameters()]
    first = rk.rotation_penalty(case.model, case.anchors)
    other = nn.ParameterList([nn.Parameter(2 * value) for value in values])
    second = rk.rotation_penalty(list(other), list(case.anchors.values()))
    rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)
    third = rk.rotation_penalty(case.model, case.anchors)
    assert third.detach().equal(first.detach()) and not second.detach().equal(first.detach())
    for penalty in (third, first):
        assert all(map(same, torch.autograd.grad(penalty, case.parameters()), expected))


def test_a_graph_that_is_kept_gives_the_same_twice(backend: str) -> None:
    case = Case.make()
    penalty = rk.rotation_penalty(case.model, case.anchors)
    once = torch.autograd.grad(penalty, case.parameters(), retain_graph=True)
    assert all(map(same, torch.autograd.grad(penalty, case.parameters(), retain_graph=True), once))
    some = torch.autograd.grad(penalty, case.parameters()[1:3])
    assert all(map(same, some, once[1:3]))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(penalty, case.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool, backend: str) -> None:
    """The forward pass runs again inside the backward pass."""
    case = Case.make()
    expected = _gradients(case)
    leaf = torch.ones((), requires_grad=True)

    def run(factor: Tensor) -> Tensor:
        return factor * rk.rotation_penalty(case.model, case.anchors)

    checkpoint(run, leaf, use_reentrant=reentrant).backward()
    assert all(same(p.grad, grad) for p, grad in zip(case.parameters(), expected, strict=True))


# -- modes and tracers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["at first", "with a plan"])
def test_fake_tensors_take_the_operators(known: bool, backend: str) -> None:
    """No kernel reads the address of a fake model, or of a real one among fake tensors."""
    case = Case.make()
    if known:
        rk.rotation_penalty(case.model, case.anchors)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        penalty = rk.rotation_penalty(case.parameters(), list(case.anchors.values()))
    assert isinstance(penalty, torch._subclasses.FakeTensor) and penalty.shape == ()
    with mode:
        fake = [nn.Parameter(mode.from_tensor(parameter.detach())) for parameter in case.parameters()]
        penalty = rk.rotation_penalty(fake, list(case.anchors.values()))
        penalty.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in fake)
    # The next call without fake tensors is computed.
    case.check(lists=False)


@pytest.mark.parametrize("known", [False, True], ids=["at first", "with a plan"])
def test_recorded_graphs_compute_with_new_values(known: bool, backend: str) -> None:
    """make_fx with real tensors records operators, not the numbers that they have returned."""
    case = Case.make()
    weight, anchor = case.model.first.weight.detach(), case.anchors["first.weight"]  # type: ignore[union-attr, operator]
    if known:
        rk.rotation_penalty(weight, anchor)

    def gradient(values: Tensor) -> Tensor:
        values = values.detach().requires_grad_()
        return torch.autograd.grad(rk.rotation_penalty(values, anchor), values)[0]

    for function in (lambda values: rk.rotation_penalty(values, anchor), gradient):
        graph = make_fx(function)(weight)
        for values in (weight, 2 * weight):
            assert same(graph(values).detach(), function(values).detach())


def test_a_mode_of_the_user_changes_no_bits(backend: str) -> None:
    """It passes every operator on as it is."""

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    case = Case.make()
    expected = _gradients(case)
    for _ in range(2):
        with Counting():
            assert all(map(same, _gradients(case), expected))


def test_saved_tensors_may_be_packed(backend: str) -> None:
    """Hooks return saved tensors at other addresses."""
    case = Case.make()
    expected = _gradients(case)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.numpy().copy(), torch.from_numpy):
        penalty = rk.rotation_penalty(case.model, case.anchors)
    assert all(map(same, torch.autograd.grad(penalty, case.parameters()), expected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_served(backend: str) -> None:
    model = nn.Sequential(nn.Linear(24, 40))
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    with torch.no_grad():
        model[0].weight.add_(0.1)
    scripted = torch.jit.script(model)
    for _ in range(2):
        assert rk.rotation_penalty(scripted, anchors).detach().equal(rk.rotation_penalty(model, anchors).detach())


# -- allocations ---------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that an operator has made, by its name; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _real(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if _real(tensor) and tensor.numel() and tensor.untyped_storage().data_ptr() not in given:
                self.made[str(func.overloadpacket)] += tensor.nbytes
        return result


def _real(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


@pytest.fixture
def nothing_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter makes tensors of its own."""
    monkeypatch.setattr(launch, "find_start", lambda *_: lambda: None)


@pytest.mark.usefixtures("nothing_launched")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("exist", [True, False], ids=["gradients", "no gradients"])
def test_a_step_makes_nothing_but_gradients_and_r(exist: bool, backend: str) -> None:
    """From the second step on it allocates missing gradients, R, and 4 bytes a weight for the summands of R."""
    case = Case.make()
    for _ in range(2):
        rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)
        if not exist:
            case.model.zero_grad()
    with Allocations() as allocations:
        rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)
    gradients = 0 if exist else sum(parameter.nbytes for parameter in case.parameters())
    expected = {"aten.empty_like": gradients, "aten.cat": 4 * len(case.anchors), "aten.sum": 4}
    assert allocations.made == Counter({name: size for name, size in expected.items() if size})


@pytest.mark.usefixtures("nothing_launched")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_allocations_of_r_and_its_backward_pass(backend: str) -> None:
    """R takes the C of base and block forms, the norms twice and R; its backward pass gradients and factors."""
    case = Case.make()
    for _ in range(2):
        rk.rotation_penalty(case.model, case.anchors).backward()  # type: ignore[no-untyped-call]
        case.model.zero_grad()
    with Allocations() as forward:
        penalty = rk.rotation_penalty(case.model, case.anchors)
    drifts = sum(4 * RANK**2 for anchor in case.anchors.values() if anchor.form != "full")
    norms = 4 * len(case.anchors)
    assert forward.made == Counter({"aten.empty": drifts, "aten.clone": norms, "aten.cat": norms, "aten.sum": 4})
    with Allocations() as backward:
        penalty.backward()  # type: ignore[no-untyped-call]
    gradients = sum(parameter.nbytes for parameter in case.parameters())
    assert sum(backward.made.values()) - backward.made["aten.new_empty"] <= 8 * norms + 4
    assert backward.made["aten.new_empty"] == gradients
