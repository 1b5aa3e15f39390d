"""Fused kernels for the rotation penalty of RPSFT (arXiv 2605.10973), ``R = sum ||U^T (W - W0) V||_F^2``.

The public names::

    Anchors.from_model(model, rank)                      anchors of a pretrained model, by parameter name
    Anchor.from_weight(weight, rank)                     the anchor of one weight
    accumulate_rotation_grad_(weights, anchors, coeff)   adds coeff * dR/dW to every .grad; returns R
    rotation_penalty(weights, anchors)                   R as a differentiable scalar, for the loss
    project(weight, left, right, base)                   one weight's drift U^T (W - W0) V
    use_backend(name)                                    "torch", "triton" or "native", in a with block
    RotationPenalty(rank, coeff)                         all of it over a training run: anchors, strength, metrics
    attach(optimizer, penalty, model)                    the modes that act after the optimizer's step, as its hook

``weights`` is a module, a list of tensors or one tensor, sharded or not::

    import rpsft_kernels as rk

    anchors = rk.Anchors.from_model(model, rank=64)  # once, before training
    ...
    loss.backward()
    penalty = rk.accumulate_rotation_grad_(model, anchors, coeff=1.0)  # once per optimizer step, before clipping
    optimizer.step()

``python -m rpsft_kernels --help`` lists the commands.
"""

from .anchors.anchor import Anchor
from .anchors.collection import Anchors
from .ops import use_backend
from .penalty import accumulate_rotation_grad_, project, rotation_penalty
from .training import RotationPenalty, attach
from .version import __version__ as __version__

__all__ = [
    "Anchor",
    "Anchors",
    "RotationPenalty",
    "accumulate_rotation_grad_",
    "attach",
    "project",
    "rotation_penalty",
    "use_backend",
]


def __dir__() -> list[str]:
    """List the public names alone. Submodules are found by importing them; pydoc lists them under PACKAGE CONTENTS."""
    return list(__all__)
