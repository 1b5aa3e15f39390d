"""Changes that a training script may make to a model, its gradients and its anchors between two steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from plans import RANK, Case, Mutation
from support import Layout, laid_out

NOISE = 0.03


def _moved(tensor: Tensor) -> Tensor:
    return tensor.detach() + NOISE * torch.randn(tensor.shape).to(tensor.dtype)


def _data(case: Case, name: str, data: Tensor) -> None:
    parameter = case.model.get_parameter(name)
    case.kept.append(parameter.data)
    parameter.data = data
    # Autograd has no more use for these values.
    if parameter.grad is not None and parameter.grad.dtype != data.dtype:
        parameter.grad = None


def _other_address(case: Case) -> None:
    for name in case.anchors:
        _data(case, name, _moved(case.model.get_parameter(name)))


def _other_values(case: Case) -> None:
    with torch.no_grad():
        for parameter in case.parameters():
            parameter.copy_(_moved(parameter))


def _laid(layout: Layout) -> Mutation:
    def mutate(case: Case) -> None:
        for name in ("square.weight", "first.weight", "full.weight"):
            _data(case, name, laid_out(_moved(case.model.get_parameter(name)), layout))

    return mutate


def _misaligned(case: Case) -> None:
    for name in case.anchors:
        moved = _moved(case.model.get_parameter(name))
        frame = moved.new_empty(moved.numel() + 1)
        _data(case, name, frame[1:].view(moved.shape).copy_(moved))


def _other_dtype(case: Case) -> None:
    for name in ("first.weight", "full.weight"):
        _data(case, name, _moved(case.model.get_parameter(name)).to(torch.bfloat16))


def _to_bfloat16(case: Case) -> None:
    case.model.to(torch.bfloat16)


def _swapped_by_torch(case: Case) -> None:
    """Swap the content of two objects, as ``to`` does with DTensors."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        case.model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _loaded(assign: bool) -> Mutation:
    def mutate(case: Case) -> None:
        state = {name: _moved(tensor) for name, tensor in case.model.state_dict().items()}
        case.kept.append(list(case.model.parameters()))
        case.model.load_state_dict(state, assign=assign)

    return mutate


def _from_meta(case: Case) -> None:
    state = {name: _moved(tensor) for name, tensor in case.model.state_dict().items()}
    case.model.zero_grad()
    case.model.to("meta")
    case.model.to_empty(device="cpu")
    case.model.load_state_dict(state)


def _new_parameter(case: Case) -> None:
    case.kept.append(case.model.first.weight)
    case.model.first.weight = nn.Parameter(_moved(case.model.first.weight))  # type: ignore[union-attr, arg-type]


def _new_parameter_at_the_address_of_one_that_is_gone(case: Case) -> None:
    weight = case.model.first
    moved = _moved(weight.weight)  # type: ignore[arg-type]
    # CPython gives what it freed last to the next object of the size.
    weight.weight = None
    weight.weight = nn.Parameter(moved)


def _two_parameters_swapped(case: Case) -> None:
    square, twin = case.model.square, case.model.twin
    square.weight, twin.weight = twin.weight, square.weight


def _new_module(case: Case) -> None:
    case.kept.append(case.model.first)
    moved = _moved(case.model.first.weight)  # type: ignore[union-attr, arg-type]
    case.model.first = nn.Linear(24, 40, bias=False)
    case.model.first.weight.data = moved


def _new_submodule(case: Case) -> None:
    case.kept.append(case.model.block[0])  # type: ignore[index]
    case.model.block[0] = nn.Linear(40, 24, bias=False)  # type: ignore[index, operator]


def _frozen(case: Case) -> None:
    for parameter in (case.model.first.weight, case.model.full.weight):  # type: ignore[union-attr]
        parameter.requires_grad_(not parameter.requires_grad)  # type: ignore[operator]


def _tied(case: Case) -> None:
    case.kept.append(case.model.twin.weight)
    case.model.twin.weight = case.model.square.weight  # type: ignore[union-attr]


def _untied(case: Case) -> None:
    case.model.twin.weight = nn.Parameter(_moved(case.model.square.weight))  # type: ignore[union-attr, arg-type]


def _no_gradients(case: Case) -> None:
    case.model.zero_grad()


def _some_gradients(case: Case) -> None:
    for i, parameter in enumerate(case.parameters()):
        parameter.grad = torch.randn_like(parameter) if i % 2 else None


def _gradients_elsewhere(case: Case) -> None:
    for parameter in case.parameters():
        case.kept.append(parameter.grad)
        parameter.grad = torch.randn_like(parameter)


def _gradients_laid(layout: Layout) -> Mutation:
    def mutate(case: Case) -> None:
        for parameter in case.parameters():
            parameter.grad = laid_out(torch.randn(parameter.shape).to(parameter.dtype), layout)

    return mutate


def _gradients_of_another_dtype(case: Case) -> None:
    for parameter in case.parameters():
        other = torch.bfloat16 if parameter.dtype == torch.float32 else torch.float32
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.data = torch.randn_like(parameter, dtype=other)


def _gradients_in_one_buffer(case: Case) -> None:
    """Begin gradients one element after their memory's start, so that none is aligned to 16 bytes."""
    leaves = list({id(parameter): parameter for parameter in case.parameters()}.values())
    flat = {p.dtype: torch.randn(1 + sum(q.numel() for q in leaves), dtype=p.dtype) for p in leaves}
    at = 1
    for parameter in leaves:
        parameter.grad = flat[parameter.dtype][at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()


def _another_coeff(case: Case) -> None:
    case.coeff = 1.5 - case.coeff


def _another_anchor(case: Case) -> None:
    case.kept.append(case.anchors["first.weight"])
    case.anchors["first.weight"] = rk.Anchor.from_weight(torch.randn(40, 24), RANK)


def _another_form(case: Case) -> None:
    case.anchors["block.0.weight"] = rk.Anchor.from_weight(torch.randn(24, 40), RANK, keep_base=False)
    case.anchors["square.weight"] = rk.Anchor.from_weight(torch.randn(32, 32), 99)


def _another_rank(case: Case) -> None:
    case.anchors["first.weight"] = rk.Anchor.from_weight(torch.randn(40, 24), RANK - 3, basis_dtype=torch.float32)


def _an_anchor_less(case: Case) -> None:
    case.kept.append(case.anchors.pop("square.weight", None))


def _an_anchor_more(case: Case) -> None:
    if "square.weight" not in case.anchors:
        case.anchors["square.weight"] = rk.Anchor.from_weight(torch.randn(32, 32), RANK)


def _another_order(case: Case) -> None:
    for name in list(case.anchors)[:2]:
        case.anchors[name] = case.anchors.pop(name)


def _other_anchors_object(case: Case) -> None:
    case.kept.append(case.anchors)
    case.anchors = dict(rk.Anchors(case.anchors).to("cpu"))


MUTATIONS: dict[str, Mutation] = {
    "values": _other_values,
    "address": _other_address,
    "transposed": _laid("transposed"),
    "padded": _laid("padded"),
    "sliced": _laid("sliced"),
    "misaligned": _misaligned,
    "dtype of the data": _other_dtype,
    "to bfloat16": _to_bfloat16,
    "swapped by torch": _swapped_by_torch,
    "loaded": _loaded(False),
    "loaded, assigned": _loaded(True),
    "from meta": _from_meta,
    "new parameter": _new_parameter,
    "new parameter, old address": _new_parameter_at_the_address_of_one_that_is_gone,
    "two parameters swapped": _two_parameters_swapped,
    "new module": _new_module,
    "new submodule": _new_submodule,
    "frozen": _frozen,
    "tied": _tied,
    "untied": _untied,
    "no gradients": _no_gradients,
    "some gradients": _some_gradients,
    "gradients elsewhere": _gradients_elsewhere,
    "gradients transposed": _gradients_laid("transposed"),
    "gradients sliced": _gradients_laid("sliced"),
    "gradients of another dtype": _gradients_of_another_dtype,
    "gradients in one buffer": _gradients_in_one_buffer,
    "coeff": _another_coeff,
    "another anchor": _another_anchor,
    "another form": _another_form,
    "another rank": _another_rank,
    "an anchor less": _an_anchor_less,
    "an anchor more": _an_anchor_more,
    "another order": _another_order,
    "other anchors object": _other_anchors_object,
}
