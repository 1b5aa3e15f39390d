"""The ranks' part in the tests of tensor parallel models, alone and under FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import rpsft_kernels as rk
import small_models
from llama import COEFF, RANK, batch, drift, errors, expected, llama, task_loss
from small_models import found_at_anchor, linear_layers, mean_square, vectors

_COLUMNWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_ROWWISE = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Setting:
    """A model, how it is wrapped, its loss on a batch, and the inputs, of which data parallel ranks get a share."""

    size: int
    rank: int
    model: Callable[[], Any]
    wrap: Callable[[Any, DeviceMesh], nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    inputs: Callable[[], Tensor]
    mesh_shape: tuple[int, ...]

    def mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", self.mesh_shape, mesh_dim_names=("dp", "tp")[-len(self.mesh_shape) :])

    def own_inputs(self, mesh: DeviceMesh) -> Tensor:
        """The ranks of one tensor parallel group see the same."""
        if mesh.ndim == 1:
            return self.inputs()
        return self.inputs().chunk(mesh["dp"].size())[mesh.get_local_rank("dp")]


def _llama_tensor_parallel(model: Any, mesh: DeviceMesh) -> nn.Module:
    for layer in model.model.layers:
        styles = {name: ColwiseParallel() for name in _COLUMNWISE} | {name: RowwiseParallel() for name in _ROWWISE}
        parallelize_module(layer, mesh["tp"], styles)
    return model  # type: ignore[no-any-return]


def _llama_on_both(model: Any, mesh: DeviceMesh) -> nn.Module:
    _llama_tensor_parallel(model, mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def _layers() -> nn.Module:
    """Sizes that 3 divides nowhere; of a weight of 4 rows or columns, the third rank has none."""
    return linear_layers((20, 50, 31, 4, 25, 7))


def _layers_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    # Between the two, activations stay DTensors: only those know that they are uneven. The last layer is plain.
    columnwise, rowwise = ColwiseParallel(use_local_output=False), RowwiseParallel()
    return parallelize_module(model, mesh["tp"], {"0": columnwise, "2": rowwise, "4": columnwise, "6": rowwise})


def _vectors() -> Tensor:
    return vectors(20)


def _even() -> Any:
    # 22 rows each on 4 ranks.
    return llama(intermediate_size=88)


def _uneven() -> Any:
    # 43 rows on each of two ranks: 22 and 21 where they are sharded again.
    return llama(intermediate_size=86)


SETTINGS = {
    "llama": Setting(2, RANK, _uneven, _llama_tensor_parallel, task_loss, batch, (2,)),
    "uneven layers": Setting(3, 3, _layers, _layers_tensor_parallel, mean_square, _vectors, (3,)),
    "llama under FSDP2": Setting(4, RANK, _even, _llama_on_both, task_loss, batch, (2, 2)),
    "uneven llama under FSDP2": Setting(4, RANK, _uneven, _llama_on_both, task_loss, batch, (2, 2)),
}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@dataclass(frozen=True)
class Moved:
    """A pretrained model and a drifted one, both wrapped, with what the calls must give for the latter."""

    pretrained: nn.Module
    model: nn.Module
    loss: Callable[[], Tensor]
    whole_anchors: dict[str, rk.Anchors]
    penalty: float
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, setting: Setting, mesh: DeviceMesh, kinds: dict[str, dict[str, Any]]) -> Moved:
        pretrained, moved = setting.model(), setting.model()
        drift(moved)
        anchors = {kind: rk.Anchors.from_model(pretrained, setting.rank, **options) for kind, options in kinds.items()}
        reference = rk.Anchors.from_model(pretrained, setting.rank, basis_dtype=torch.float32, progress=False)
        penalty, gradients = expected(moved, reference)
        wanted = {name: COEFF * gradient for name, gradient in gradients.items()}
        pretrained, model = setting.wrap(pretrained, mesh), setting.wrap(moved, mesh)
        inputs = setting.own_inputs(mesh)
        return cls(pretrained, model, lambda: setting.loss(model, inputs), anchors, penalty, wanted)

    def compared(self, anchors: rk.Anchors) -> dict[str, Any]:
        """Compare both calls with float64; returns the facts that tests check."""
        result = found_at_anchor(self.pretrained, anchors, COEFF, _gradients)
        result["empty"] = any(anchor.part is not None and not anchor.part.numel for anchor in anchors.values())
        self.model.zero_grad()
        penalties = [rk.rotation_penalty(self.model, anchors)]
        # The task's gradient is nought, but comes the way it always does: through hooks, with placements of its own.
        (0 * self.loss() + COEFF * penalties[0]).backward()
        result["autograd"] = errors(_gradients(self.model), self.gradients)
        penalties.append(rk.accumulate_rotation_grad_(self.model, anchors, COEFF))
        result["added"] = errors(_gradients(self.model), {name: 2 * g for name, g in self.gradients.items()})
        self.model.zero_grad()
        penalties.append(rk.accumulate_rotation_grad_(self.model, anchors, COEFF))
        gradients = _gradients(self.model)
        assert set(gradients) == set(anchors)
        result["accumulated"] = errors(gradients, self.gradients)
        result["penalty"] = max(abs(p.item() / self.penalty - 1) for p in penalties)
        result["bits"] = [p.item() for p in penalties] + [float(g.sum()) for g in gradients.values()]
        return result


def compare(case: str, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return results by kind of anchor: made before the model was wrapped (but for the block form), and after."""
    setting = SETTINGS[case]
    mesh = setting.mesh()
    kinds = {kind: {"basis_dtype": torch.float32, "progress": False, **options} for kind, options in kinds.items()}
    moved = Moved.of(setting, mesh, kinds)
    results = {}
    for kind, options in kinds.items():
        anchors = rk.Anchors.from_model(moved.pretrained, setting.rank, **options)
        anchors.verify(moved.pretrained)
        results[f"{kind}, anchored wrapped"] = moved.compared(anchors)
        if options.get("keep_base", True):
            results[f"{kind}, anchored whole"] = moved.compared(moved.whole_anchors[kind])
    return {"results": results, "cuts": _cuts(moved.model)}


def _cuts(model: nn.Module) -> dict[str, int]:
    """Count the mesh dimensions over which each matrix is sharded."""
    return {
        name: sum(not placement.is_replicate() for placement in p.placements) if isinstance(p, DTensor) else 0
        for name, p in model.named_parameters()
        if p.ndim == 2
    }


def train(case: str, steps: int) -> dict[str, float]:
    """Return the distance of wrapped runs from the unwrapped one, relative to that one's own drift."""
    setting = SETTINGS[case]
    mesh = setting.mesh()
    return {
        call: _distance_of_run(setting, mesh, call, steps) for call in ("rotation_penalty", "accumulate_rotation_grad_")
    }


def _distance_of_run(setting: Setting, mesh: DeviceMesh, call: str, steps: int) -> float:
    alone, model = setting.model(), setting.wrap(setting.model(), mesh)
    inputs, own = setting.inputs(), setting.own_inputs(mesh)
    _steps(alone, setting.rank, lambda: setting.loss(alone, inputs), call, steps)
    _steps(model, setting.rank, lambda: setting.loss(model, own), call, steps)
    start = {name: p.detach() for name, p in setting.model().named_parameters()}
    found = {name: _whole(p.detach()) for name, p in model.named_parameters()}
    return max(
        float((found[name] - p.detach()).norm() / (p.detach() - start[name]).norm())
        for name, p in alone.named_parameters()
    )


def _steps(model: nn.Module, rank: int, loss: Callable[[], Tensor], call: str, steps: int) -> None:
    anchors = rk.Anchors.from_model(model, rank, basis_dtype=torch.float32, progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        if call == "rotation_penalty":
            (loss() + COEFF * rk.rotation_penalty(model, anchors)).backward()
        else:
            loss().backward()
            rk.accumulate_rotation_grad_(model, anchors, COEFF)
        optimizer.step()
        optimizer.zero_grad()


def refused(case: str, culprit: int) -> tuple[str, list[str]]:
    """Return this rank's error where ``culprit`` alone has a gradient that cannot be added to, and new gradients.

    That of the embeddings, whose group is not everyone's: who is not in it must hear of it all the same.
    """
    setting = SETTINGS[case]
    model = setting.wrap(setting.model(), setting.mesh())
    anchors = rk.Anchors.from_model(model, setting.rank, progress=False)
    parameter = next(p for name, p in model.named_parameters() if name in anchors)
    if dist.get_rank() == culprit:
        assert isinstance(parameter, DTensor)
        zeros = torch.zeros(parameter.shape)
        whole = [Replicate() for _ in parameter.placements]
        parameter.grad = DTensor.from_local(zeros, parameter.device_mesh, whole, run_check=False)
    message = small_models.refused(lambda: rk.accumulate_rotation_grad_(model, anchors, COEFF))
    return message, [name for name, p in model.named_parameters() if p.grad is not None and p is not parameter]
