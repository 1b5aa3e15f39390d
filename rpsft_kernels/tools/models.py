"""Shapes of the 2-D weights of the models that the paper and the benchmarks name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like decoder: layers, hidden and intermediate size, rows of the k and v projections, vocabulary."""

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int
    tied: bool

    def layer(self) -> list[tuple[int, int]]:
        """Return (m, n) of q, k, v, o, gate, up and down."""
        h, i, kv = self.hidden, self.intermediate, self.key_value
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]

    def weights(self) -> list[tuple[int, int]]:
        """Return (m, n) of every 2-D parameter, the embedding first and the untied output head last."""
        ends = [(self.vocabulary, self.hidden)]
        return ends + self.layer() * self.layers + ([] if self.tied else ends)


MODELS = {
    "llama-3.1-8b": ModelShape(32, 4096, 14336, 1024, 128256, tied=False),
    "llama-3.2-1b": ModelShape(16, 2048, 8192, 512, 128256, tied=True),
    "qwen2.5-7b": ModelShape(28, 3584, 18944, 512, 152064, tied=False),
    "qwen2.5-3b": ModelShape(36, 2048, 11008, 256, 151936, tied=True),
    "qwen2.5-0.5b": ModelShape(24, 896, 4864, 128, 151936, tied=True),
    "smollm2-135m": ModelShape(30, 576, 1536, 192, 49152, tied=True),
}
