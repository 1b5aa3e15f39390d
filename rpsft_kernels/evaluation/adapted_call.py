"""One call's work on adapted weights: images of the factors, one sum over ranks, R, and the factors' gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import ops
from ..distributed import GroupCall, LocalWeight, PendingSum, ReplicatedWeight
from ..low_rank import Batch, LayerImages
from ..low_rank.dora import ScaledImages, ScaledWeight, differentiate_scaled, project_scaled
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
        self._found: list[Tensor] = []
        self._scaled: dict[int, ScaledImages] = {}
        self._bases = adapted.bases
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
        self._made, self._targets, self._values = [], {}, []
        self._found, self._images, self._scaled, self._bases = [], [], {}, []

    # -- the computation ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, group_calls: Mapping[str, GroupCall]) -> None:
        """Compute the images of all factors, and start their sums over ranks."""
        values = [value.detach() for value in self._values]
        self._found = project_layers(self._plan, self._lies, values)
        self._scaled = _project_scaled(self._plan, self._base_values(), values)
        shared: dict[str, list[Tensor]] = {}
        for i, image in zip(_places(self._plan), self._found, strict=True):
            if self._lies.groups[i]:
                shared.setdefault(self._lies.groups[i], []).append(image)
        self._sums = {name: _Sum(group_calls[name], images) for name, images in shared.items()}

    def _base_values(self) -> dict[int, Tensor]:
        """Return the bases of DoRA's layers (out, in)."""
        bases = {i: self._bases[i].values().detach() for i, layer in enumerate(self._plan.layers) if layer.scaled}
        return {i: base.T if self._plan.layers[i].transposed else base for i, base in bases.items()}

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the sums."""
        arrived = {name: iter(images.finish()) for name, images in self._sums.items()}
        found = [
            next(arrived[self._lies.groups[i]]).to(image.device) if self._lies.groups[i] else image
            for i, image in zip(_places(self._plan), self._found, strict=True)
        ]
        self._found, self._images = [], _by_layer(self._plan, found)

    def check_health(self) -> None:
        """Raise a ValueError unless every rank's factors are finite."""
        for images in self._sums.values():
            images.check_health()

    def penalties(self) -> Tensor:
        """Return R of each layer; autograd connects it to the factors if gradients are on."""
        penalties, _ = _penalties(self._plan, self._images, self._scaled)
        if torch.is_grad_enabled() and any(value.requires_grad for value in self._values):
            state = _State(self._plan, self._lies, self._images, self._scaled, self._base_values())
            penalties = _Penalties.apply(state, penalties, *self._values)  # type: ignore[no-untyped-call, unused-ignore]
        return penalties

    @torch.no_grad()
    def add_gradients_(self) -> Tensor:
        """Add to the factors' gradients, and return R of each layer."""
        assert self._coeff is not None
        penalties, batches = _penalties(self._plan, self._images, self._scaled)
        _add_gradients_(self._plan, self._lies, batches, self._scaled, self._coeff, self._targets)
        if self._targets:
            # Kernels write to memory that autograd may have saved.
            torch.autograd.graph.increment_version([grad for grad, _ in self._targets.values()])
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


def project_layers(plan: AdaptedPlan, lies: _Layout, values: Sequence[Tensor]) -> list[Tensor]:
    """Compute the images of what lies here of all factors, in the order of :func:`_places`: what other ranks have of
    them is 0 in these.
    """
    factors: dict[torch.dtype, tuple[list[int], list[Tensor], list[Tensor]]] = {}
    images: dict[int, Tensor] = {}
    for layer in plan.layers:
        if layer.scaled:
            continue
        dtype = layer.spec.dtype
        places, projected, bases = factors.setdefault(dtype, ([], [], []))
        for adapter in layer.adapters:
            up, down = values[adapter.up], values[adapter.down]
            start = adapter.start
            if start is not None and start.up is not None and start.down is not None:
                up = up.to(dtype) - start.up[slice(*lies.rows[adapter.up])].to(dtype)
                down = down.to(dtype) - start.down[slice(*lies.rows[adapter.down])].to(dtype)
            for i, value, basis in ((adapter.up, up.T, layer.up_basis), (adapter.down, down, layer.down_basis)):
                if basis is None:
                    images[i] = value.to(dtype)
                else:
                    places.append(i)
                    projected.append(value)
                    bases.append(basis)
    for dtype, (places, projected, bases) in factors.items():
        images.update(zip(places, plan.products.project(projected, bases, dtype), strict=True))
    found = []
    for layer in plan.layers:
        if layer.scaled:
            continue
        for adapter, rank in zip(layer.adapters, layer.spec.ranks, strict=True):
            up, down = images[adapter.up], images[adapter.down]
            # Without a basis the image of B is B^T itself, of which the columns lie here.
            found.append(_place(up, (rank, layer.spec.left_columns), 1, lies.rows[adapter.up]))
            found.append(_place(down, (rank, layer.spec.right_columns), 0, lies.rows[adapter.down]))
    return found


def _places(plan: AdaptedPlan) -> Iterator[int]:
    """Yield the place of each factor that has an image, in an order that all ranks share."""
    for layer in plan.layers:
        if not layer.scaled:
            for adapter in layer.adapters:
                yield adapter.up
                yield adapter.down


def _by_layer(plan: AdaptedPlan, found: Sequence[Tensor]) -> list[LayerImages]:
    """Sort the images of all factors, in the order of :func:`_places`, by layer; DoRA's layers have none."""
    following = iter(found)
    layers = []
    for layer in plan.layers:
        ups: list[Tensor] = []
        downs: list[Tensor] = []
        turned: list[Tensor | None] = []
        for adapter in () if layer.scaled else layer.adapters:
            up, down = next(following), next(following)
            ups.append(up)
            # That of A is that of A0 and of A - A0 together.
            downs.append(down if adapter.start_down is None else down + adapter.start_down)
            turned.append(None if adapter.start_down is None else down)
        layers.append(LayerImages(ups, downs, [adapter.start_up for adapter in layer.adapters], turned))
    return layers


def _project_scaled(
    plan: AdaptedPlan, bases: Mapping[int, Tensor], values: Sequence[Tensor]
) -> dict[int, ScaledImages]:
    """Compute the products of DoRA's layers, by their places."""
    images = {}
    for i, layer in enumerate(plan.layers):
        if layer.squares is None or layer.base_image is None:
            continue
        (adapter,) = layer.adapters
        assert adapter.magnitude is not None
        weight = ScaledWeight(
            base=bases[i],
            up=values[adapter.up],
            down=values[adapter.down],
            magnitude=values[adapter.magnitude],
            scaling=adapter.scaling,
            start=adapter.start,
        )
        images[i] = project_scaled(weight, layer.squares, layer.base_image, layer.up_basis, layer.down_basis)
    return images


def _place(image: Tensor, shape: tuple[int, int], dim: int, span: tuple[int, int]) -> Tensor:
    """Return ``image`` as the rows or columns ``span`` of zeros of ``shape``."""
    if tuple(image.shape) == shape:
        return image
    whole = image.new_zeros(shape)
    if not image.numel():
        # An empty shard may have another shape.
        return whole
    whole.narrow(dim, span[0], span[1] - span[0]).copy_(image)
    return whole


_StackedByDevice = list[tuple[list[int], list[Batch]]]


def _penalties(
    plan: AdaptedPlan, images: Sequence[LayerImages], scaled: Mapping[int, ScaledImages]
) -> tuple[Tensor, _StackedByDevice]:
    """Return R of each layer, and the batches of each device, with the places of its layers."""
    stacked = [(members, made.stack([images[i] for i in members])) for members, made in plan.batches]
    parts = [made.penalties(own) for (_, made), (_, own) in zip(plan.batches, stacked, strict=True)]
    if len(parts) == 1 and not scaled:
        return parts[0], stacked
    device = plan.layers[0].spec.device
    by_place: dict[int, Tensor] = {}
    for (members, _), part in zip(plan.batches, parts, strict=True):
        by_place.update(zip(members, part.to(device), strict=True))
    by_place.update((i, own.drift.square().sum().to(device)) for i, own in scaled.items())
    dtype = max((value.dtype for value in by_place.values()), key=lambda dtype: dtype.itemsize)
    return torch.stack([by_place[i].to(dtype) for i in range(len(plan.layers))]), stacked


# -- gradients ------------------------------------------------------------------------------------------------


def _add_gradients_(
    plan: AdaptedPlan,
    lies: _Layout,
    stacked: _StackedByDevice,
    scaled: Mapping[int, ScaledImages],
    factor: float | Tensor,
    targets: Mapping[int, tuple[Tensor, bool]],
) -> None:
    """Add to gradients of the factors' values, or write them.

    Args:
        plan: of the layers.
        lies: where the factors lie.
        stacked: the batches of each device, with the places of its layers.
        scaled: the products of DoRA's layers, by their places.
        factor: what R is multiplied by: a number, or one for each layer.
        targets: by the factors' places, the gradient and whether it is added to.
    """
    products: list[tuple[Tensor, Tensor, Tensor]] = []
    grads = {i: grad for i, (grad, _) in targets.items() if grad.numel()}
    # A factor of several layers has one gradient: only the first that is computed of it may be written over what was
    # there, and the products with bases come last.
    fresh = {grads[i].data_ptr() for i in grads if not targets[i][1]}

    def keeps(grad: Tensor) -> bool:
        if grad.data_ptr() not in fresh:
            return True
        fresh.remove(grad.data_ptr())
        return False

    for members, batches in stacked:
        for batch in batches:
            places = [members[member] for member in batch.members]
            scale = factor
            if isinstance(factor, Tensor):
                scale = torch.stack([factor[place] for place in places])[:, None, None].to(batch.lefts)
            for j, (ups, downs) in enumerate(batch.coefficients(scale)):
                for place, up, down in zip(places, ups.unbind(), downs.unbind(), strict=True):
                    layer, adapter = plan.layers[place], plan.layers[place].adapters[j]
                    if adapter.up in grads:
                        grad = grads[adapter.up]
                        if layer.up_basis is None:
                            _store(grad.T, up[:, slice(*lies.rows[adapter.up])], keeps(grad))
                        else:
                            products.append((grad.T, up, layer.up_basis))
                    if adapter.down in grads:
                        grad, own = grads[adapter.down], down[slice(*lies.rows[adapter.down])]
                        if layer.down_basis is None:
                            _store(grad, own, keeps(grad))
                        else:
                            products.append((grad, own, layer.down_basis))
    for place, images in scaled.items():
        layer = plan.layers[place]
        (adapter,) = layer.adapters
        scale = factor[place].to(images.drift) if isinstance(factor, Tensor) else factor
        gradients = differentiate_scaled(images, adapter.scaling, scale, layer.up_basis)
        for i, gradient in ((adapter.up, gradients.up), (adapter.magnitude, gradients.magnitude)):
            if i is not None and i in grads:
                _store(grads[i], gradient, keeps(grads[i]))
        if adapter.down in grads:
            grad = grads[adapter.down]
            if layer.down_basis is None:
                _store(grad, gradients.down, keeps(grad))
            else:
                products.append((grad, gradients.down, layer.down_basis))
    if products:
        summed, coefficients, bases = zip(*products, strict=True)
        plan.products.add_(summed, coefficients, bases, [keeps(grad) for grad in summed])


def _store(grad: Tensor, value: Tensor, accumulate: bool) -> None:
    """Write a gradient, or add to it, rounding once to its dtype."""
    grad.copy_(value + grad.to(value.dtype) if accumulate else value)


class _State(NamedTuple):
    """What a backward pass needs of a call."""

    plan: AdaptedPlan
    lies: _Layout
    images: list[LayerImages]
    scaled: dict[int, ScaledImages]
    bases: dict[int, Tensor]


class _Penalties(torch.autograd.Function):
    """Returns R of each layer, which is computed already, connected to the values of the factors."""

    @staticmethod
    def forward(ctx: Any, state: _State, penalties: Tensor, *values: Tensor) -> Tensor:
        ctx.state = state
        # Their own numbers are not read again, unless the gradient is to be differentiated itself.
        ctx.save_for_backward(*values)
        ctx.kinds = [(value.shape, value.dtype, value.device) for value in values]
        return penalties.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        # Images of full anchors are the factors themselves: autograd refuses those that were changed since.
        state, needed, values = ctx.state, ctx.needs_input_grad[2:], ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, *_differentiable_gradients(state, values, needed, grad)
        _, stacked = _penalties(state.plan, state.images, state.scaled)
        targets = {
            i: (torch.empty(shape, dtype=dtype, device=device), False)
            for i, ((shape, dtype, device), wanted) in enumerate(zip(ctx.kinds, needed, strict=True))
            if wanted
        }
        _add_gradients_(state.plan, state.lies, stacked, state.scaled, grad, targets)
        return None, None, *[targets[i][0] if i in targets else None for i in range(len(needed))]


def _differentiable_gradients(
    state: _State, values: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients as a part of the graph: by autograd, from images that it records."""
    images = _by_layer(state.plan, project_layers(state.plan, state.lies, values))
    penalties, _ = _penalties(state.plan, images, _project_scaled(state.plan, state.bases, values))
    wanted = [value for value, want in zip(values, needed, strict=True) if want]
    grads = iter(torch.autograd.grad(penalties, wanted, grad, create_graph=True))
    return [next(grads) if want else None for want in needed]
