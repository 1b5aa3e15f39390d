"""The first steps of a real fine-tuning run, on which the rotation penalty is measured."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rpsft_kernels.demo.model import load_smollm2

# The projections of one layer: square, wide and tall.
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_TOKENS = 32
_TEXTS = (
    "The lighthouse keeper wrote down the weather every evening: the direction of the wind, the height of the "
    "waves, and the number of ships that had passed since the morning. Nobody ever asked to see his book.",
    "To make a good broth, roast the bones until they are brown, cover them with cold water, and let them simmer for "
    "six hours with an onion, two carrots and a little salt. Skim it often, and never let it boil.",
    "A prime number has exactly two divisors, one and itself. Euclid showed that there are infinitely many of "
    "them: multiply any finite list of primes together, add one, and look at the factors of the result.",
    "In the second year of the drought the river fell so low that the piers of the old Roman bridge could be seen "
    "again, and with them the names that the masons had cut into the stone eighteen centuries before.",
)


def weight_name(layer: int, projection: str) -> str:
    """Return the parameter's name in the model."""
    return f"model.layers.{layer}.{projection}.weight"


def fine_tuned_weights(
    layers: Iterable[int], steps: Iterable[int], device: torch.device
) -> dict[int, dict[str, Tensor]]:
    """Return weights of SmolLM2-135M-Instruct, fine-tuned with AdamW at the published settings (arXiv 2605.10973).

    Every parameter is trained in float32, by next-token prediction on one batch of 4 x 32 tokens, with a constant
    learning rate of 1e-6, betas (0.9, 0.98) and no weight decay.

    Args:
        layers: Layers whose seven projections are kept.
        steps: Numbers of optimizer steps after which they are kept; step 0, the pretrained weights, always is.
        device: Device of the training and of the copies.

    Returns:
        Step -> parameter name -> float32 copy (m, n).
    """
    model, tokenizer = load_smollm2(torch.float32)
    model.to(device)
    ids = torch.tensor([tokenizer(text)["input_ids"][:_TOKENS] for text in _TEXTS], device=device)
    names = [weight_name(layer, projection) for layer in layers for projection in PROJECTIONS]
    kept = {0, *steps}

    def copies() -> dict[str, Tensor]:
        return {name: model.get_parameter(name).detach().clone() for name in names}

    snapshots = {0: copies()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step in range(1, max(kept) + 1):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        if step in kept:
            snapshots[step] = copies()
    return snapshots
