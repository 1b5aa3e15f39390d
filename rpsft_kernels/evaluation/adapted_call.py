"""One call's work on adapted weights: images of the factors, one sum over ranks, R, and the factors' gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..distributed import GroupCall, LocalWeight, PendingSum, ReplicatedWeight
from ..low_rank import Batch, LayerImages, add_products_, project_factors
from .adapted import AdaptedPlan, AdaptedWeights
from .agreement import MASK, content_of
from .gradient_memory import GradientMemory
from .pairing import AnchoredWeight


class _Sum:
    """The images of one process group's factors, summed over its ranks in one go.

    Attributes:
        flat: all images, one after the other; behind them one number of each rank, finite if its factors are.
    """

    def __init__(self, group_call: GroupCall, images: Sequence[Tensor]) -> None:
        self._group_call, self._sizes = group_call, [image.shape for image in images]
        own = torch.cat([image.reshape(-1) for image in images])
        health = own.new_zeros(group_call.size)
        health[group_call.rank] = own.sum()
        self.flat = torch.cat([own, health]).to(group_call.device)
        self._pending: PendingSum = group_call.start(self.flat)

    def finish(self) -> list[Tensor]:
        """Wait for the sum, and return the images."""
        flat = self._group_call.finish(self._pending)
        parts = torch.split(flat, [*(shape.numel() for shape in self._sizes), self._group_call.size])
        return [part.view(shape) for part, shape in zip(parts, self._sizes, strict=False)]

    def check_health(self) -> None:
        self._group_call.check_health(self.flat[-self._group_call.size :].tolist())


class AdaptedCall:
    """The adapted weights of one call. Nothing is computed before :meth:`project`.

    Args:
        adapted: the weights.
        coeff: the factor of R in the objective whose gradients are added; None where none are.
    """

    def __init__(self, adapted: AdaptedWeights, coeff: float | None) -> None:
        self._plan, self._coeff = adapted.plan, coeff
        self.factors = adapted.factors
        self._lies = _Layout([factor.weight for factor in adapted.factors])
        # A factor has the members of a weight with its anchor that this needs.
        self._memory = GradientMemory(cast(Sequence[AnchoredWeight], self.factors))
        self._made: list[int] = []
        self._targets: dict[int, tuple[Tensor, bool]] = {}
        self._values: list[Tensor] = []
        self._images: list[LayerImages] = []
        self._sums: dict[str, _Sum] = {}

    @property
    def device(self) -> torch.device:
        return self._plan.layers[0].spec.device

    @property
    def summed(self) -> bool:
        """Whether images are sums over ranks."""
        return any(self._lies.groups)

    # -- before ranks agree -----------------------------------------------------------------------------------

    def stage(self) -> None:
        """Take the factors' values and gradients; gradients that do not exist are made, unset.

        Raises:
            ValueError: a gradient cannot be added to.
        """
        self._values = [factor.weight.values() for factor in self.factors]
        if self._coeff is None:
            return
        existing: dict[torch.device, list[int]] = {}
        grads: dict[int, Tensor] = {}
        written: set[int] = set()
        for i, factor in enumerate(self.factors):
            weight = factor.weight
            if not weight.requires_grad:
                continue
            ops.check_gradient_dtype("torch", weight.gradient_dtype, weight.dtype, f"{factor.name}.grad")
            if weight.parameter.grad is None:
                self._made.append(i)
            elif weight.identity not in written:
                existing.setdefault(weight.device, []).append(i)
            # A factor of several layers has one gradient, which is written once and then added to.
            accumulate = weight.must_accumulate or weight.identity in written
            written.add(weight.identity)
            grads[i] = weight.gradient()
            self._targets[i] = grads[i], accumulate
        for members in existing.values():
            sharded = any(self.factors[i].weight.group is not None for i in members)
            for i, grad in zip(members, self._memory.add(members, [grads[i] for i in members], sharded), strict=True):
                self._targets[i] = grad, True
        self._memory.check(self._plan)

    def digest(self, group_name: str) -> int:
        """Return a number, in [0, 2^62), that is equal on the ranks of a group which mean the same call."""
        facts = [self._plan.summary]
        if self._coeff is not None:
            weights = [factor.weight for factor in self.factors]
            facts.append(repr([weight.gradient_dtype if weight.requires_grad else None for weight in weights]))
        if group_name:
            facts += [str(content_of(layer.anchor)) for layer in self._plan.layers if layer.anchor.part is None]
        hasher = hashlib.blake2b("\n".join(facts).encode(), digest_size=8)
        return int.from_bytes(hasher.digest(), "little") & MASK

    def close(self) -> None:
        """Remove gradients that the call has made and not computed."""
        for i in self._made:
            self.factors[i].weight.drop_gradient()
        self._memory.restore()
        self._made, self._targets, self._values, self._images = [], {}, [], []

    # -- the computation ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, group_calls: Mapping[str, GroupCall]) -> None:
        """Compute the images of all factors, and start their sums over ranks."""
        self._images = project_layers(self._plan, self._lies, [value.detach() for value in self._values])
        shared: dict[str, list[Tensor]] = {}
        for i, image in _by_factor(self._plan, self._images):
            if self._lies.groups[i]:
                shared.setdefault(self._lies.groups[i], []).append(image)
        self._sums = {name: _Sum(group_calls[name], images) for name, images in shared.items()}

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the sums."""
        arrived = {name: iter(images.finish()) for name, images in self._sums.items()}
        if arrived:
            found = [
                next(arrived[self._lies.groups[i]]).to(image.device) if self._lies.groups[i] else image
                for i, image in _by_factor(self._plan, self._images)
            ]
            self._images = _by_layer(self._plan, found)

    def check_health(self) -> None:
        """Raise a ValueError unless every rank's factors are finite."""
        for images in self._sums.values():
            images.check_health()

    def penalties(self) -> Tensor:
        """Return R of each layer; autograd connects it to the factors if gradients are on."""
        penalties, _ = _penalties(self._plan, self._images)
        if torch.is_grad_enabled() and any(value.requires_grad for value in self._values):
            penalties = _Penalties.apply(self._plan, self._lies, self._images, penalties, *self._values)  # type: ignore[no-untyped-call, unused-ignore]
        return penalties

    @torch.no_grad()
    def add_gradients_(self) -> Tensor:
        """Add to the factors' gradients, and return R of each layer."""
        assert self._coeff is not None
        penalties, batches = _penalties(self._plan, self._images)
        _add_gradients_(self._plan, self._lies, batches, self._coeff, self._targets)
        for i, (grad, _) in self._targets.items():
            self.factors[i].weight.write_back(grad)
        self._made = []
        self._memory.keep(None)
        return penalties


class _Layout:
    """Where the rows of factors lie.

    Attributes:
        rows: the rows of each factor that lie here.
        groups: the name of the process group over which they are spread; "" where all of them lie here.
    """

    def __init__(self, weights: Sequence[LocalWeight]) -> None:
        self.rows = [weight.shard.rows for weight in weights]
        self.groups = ["" if isinstance(weight, ReplicatedWeight) else weight.group_name for weight in weights]


# -- images ---------------------------------------------------------------------------------------------------


def project_layers(plan: AdaptedPlan, lies: _Layout, values: Sequence[Tensor]) -> list[LayerImages]:
    """Compute the images of what lies here of all factors: what other ranks have of them is 0 in these."""
    factors: dict[torch.dtype, tuple[list[int], list[Tensor], list[Tensor]]] = {}
    images: dict[int, Tensor] = {}
    for layer in plan.layers:
        dtype = layer.spec.dtype
        places, projected, bases = factors.setdefault(dtype, ([], [], []))
        for adapter in layer.adapters:
            for i, value, basis in (
                (adapter.up, values[adapter.up].T, layer.up_basis),
                (adapter.down, values[adapter.down], layer.down_basis),
            ):
                if basis is None:
                    images[i] = value.to(dtype)
                else:
                    places.append(i)
                    projected.append(value)
                    bases.append(basis)
    for dtype, (places, projected, bases) in factors.items():
        images.update(zip(places, project_factors(projected, bases, dtype), strict=True))
    found = []
    for layer in plan.layers:
        for adapter, rank in zip(layer.adapters, layer.spec.ranks, strict=True):
            up, down = images[adapter.up], images[adapter.down]
            # Without a basis the image of B is B^T itself, of which the columns lie here.
            found.append(_place(up, (rank, layer.spec.left_columns), 1, lies.rows[adapter.up]))
            found.append(_place(down, (rank, layer.spec.right_columns), 0, lies.rows[adapter.down]))
    return _by_layer(plan, found)


def _by_factor(plan: AdaptedPlan, images: Sequence[LayerImages]) -> Iterator[tuple[int, Tensor]]:
    """Yield each factor's place and image, in an order that all ranks share."""
    for layer, own in zip(plan.layers, images, strict=True):
        for adapter, up, down in zip(layer.adapters, own.ups, own.downs, strict=True):
            yield adapter.up, up
            yield adapter.down, down


def _by_layer(plan: AdaptedPlan, images: Sequence[Tensor]) -> list[LayerImages]:
    """Undo :func:`_by_factor`."""
    following = iter(images)
    layers = []
    for layer in plan.layers:
        pairs = [(next(following), next(following)) for _ in layer.adapters]
        none = [None] * len(pairs)
        layers.append(LayerImages([up for up, _ in pairs], [down for _, down in pairs], none, none))
    return layers


def _place(image: Tensor, shape: tuple[int, int], dim: int, span: tuple[int, int]) -> Tensor:
    """Return ``image`` as the rows or columns ``span`` of zeros of ``shape``."""
    if tuple(image.shape) == shape:
        return image
    whole = image.new_zeros(shape)
    whole.narrow(dim, span[0], span[1] - span[0]).copy_(image)
    return whole


_StackedByDevice = list[tuple[list[int], list[Batch]]]


def _penalties(plan: AdaptedPlan, images: Sequence[LayerImages]) -> tuple[Tensor, _StackedByDevice]:
    """Return R of each layer, and the batches of each device, with the places of its layers."""
    stacked = [(members, made.stack([images[i] for i in members])) for members, made in plan.batches]
    parts = [made.penalties(own) for (_, made), (_, own) in zip(plan.batches, stacked, strict=True)]
    if len(parts) == 1:
        return parts[0], stacked
    device = plan.layers[0].spec.device
    by_place: dict[int, Tensor] = {}
    for (members, _), part in zip(plan.batches, parts, strict=True):
        by_place.update(zip(members, part.to(device), strict=True))
    return torch.stack([by_place[i] for i in range(len(by_place))]), stacked


# -- gradients ------------------------------------------------------------------------------------------------


def _add_gradients_(
    plan: AdaptedPlan,
    lies: _Layout,
    stacked: _StackedByDevice,
    factor: float | Tensor,
    targets: Mapping[int, tuple[Tensor, bool]],
) -> None:
    """Add to gradients of the factors' values, or write them.

    Args:
        plan: of the layers.
        lies: where the factors lie.
        stacked: the batches of each device, with the places of its layers.
        factor: what R is multiplied by: a number, or one for each layer.
        targets: by the factors' places, the gradient and whether it is added to.
    """
    products: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    for members, batches in stacked:
        for batch in batches:
            places = [members[member] for member in batch.members]
            scale = factor
            if isinstance(factor, Tensor):
                scale = torch.stack([factor[place] for place in places])[:, None, None].to(batch.lefts)
            for j, (ups, downs) in enumerate(batch.coefficients(scale)):
                for place, up, down in zip(places, ups.unbind(), downs.unbind(), strict=True):
                    layer, adapter = plan.layers[place], plan.layers[place].adapters[j]
                    if adapter.up in targets:
                        grad, keep = targets[adapter.up]
                        if layer.up_basis is None:
                            _store(grad.T, up[:, slice(*lies.rows[adapter.up])], keep)
                        else:
                            products.append((grad.T, up, layer.up_basis, keep))
                    if adapter.down in targets:
                        grad, keep = targets[adapter.down]
                        own = down[slice(*lies.rows[adapter.down])]
                        if layer.down_basis is None:
                            _store(grad, own, keep)
                        else:
                            products.append((grad, own, layer.down_basis, keep))
    if products:
        grads, coefficients, bases, accumulate = zip(*products, strict=True)
        add_products_(grads, coefficients, bases, accumulate)


def _store(grad: Tensor, value: Tensor, accumulate: bool) -> None:
    """Write a gradient, or add to it, rounding once to its dtype."""
    grad.copy_(value + grad.to(value.dtype) if accumulate else value)


class _Penalties(torch.autograd.Function):
    """Returns R of each layer, which is computed already, connected to the values of the factors."""

    @staticmethod
    def forward(
        ctx: Any, plan: AdaptedPlan, lies: _Layout, images: list[LayerImages], penalties: Tensor, *values: Tensor
    ) -> Tensor:
        ctx.plan, ctx.lies, ctx.images = plan, lies, images
        # Their own numbers are not read again, unless the gradient is to be differentiated itself.
        ctx.save_for_backward(*values)
        ctx.kinds = [(value.shape, value.dtype, value.device) for value in values]
        return penalties.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            grads = _differentiable_gradients(ctx.plan, ctx.lies, ctx.saved_tensors, needed, grad)
            return None, None, None, None, *grads
        _, stacked = _penalties(ctx.plan, ctx.images)
        targets = {
            i: (torch.empty(shape, dtype=dtype, device=device), False)
            for i, ((shape, dtype, device), wanted) in enumerate(zip(ctx.kinds, needed, strict=True))
            if wanted
        }
        _add_gradients_(ctx.plan, ctx.lies, stacked, grad, targets)
        return None, None, None, None, *[targets[i][0] if i in targets else None for i in range(len(needed))]


def _differentiable_gradients(
    plan: AdaptedPlan, lies: _Layout, values: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients as a part of the graph: by autograd, from images that it records."""
    penalties, _ = _penalties(plan, project_layers(plan, lies, values))
    wanted = [value for value, want in zip(values, needed, strict=True) if want]
    grads = iter(torch.autograd.grad(penalties, wanted, grad, create_graph=True))
    return [next(grads) if want else None for want in needed]
