"""The MoE layers that the benchmark times, and how tokens are routed to their experts."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Model:
    """One MoE layer's sizes."""

    experts: int
    top_k: int
    d_model: int
    d_expert: int

    def flop(self, tokens: int) -> int:
        """Operations of gate, up and down for `tokens` tokens."""
        return 6 * tokens * self.top_k * self.d_model * self.d_expert


MODELS = {
    "qwen3-30b-a3b": Model(128, 8, 2048, 768),
    "mixtral-8x7b": Model(8, 2, 4096, 14336),
    "deepseek-v3": Model(256, 8, 7168, 2048),
    "gpt-oss-120b": Model(128, 4, 2880, 2880),
}
TINY = Model(8, 2, 256, 256)  # "tiny": not in "all", for trying the benchmark out on a CPU


def model_of(name: str) -> Model:
    return TINY if name == "tiny" else MODELS[name]


def draw_ids(rng: np.random.Generator, model: Model, tokens: int, routing: str) -> np.ndarray:
    """int32 [tokens, top_k], distinct in a row; "zipf" makes expert e likely as 1 / (e + 1)."""
    arrivals = rng.standard_exponential((tokens, model.experts), np.float32)
    if routing == "zipf":
        arrivals *= 1 + rng.permutation(model.experts).astype(np.float32)
    return np.argpartition(arrivals, model.top_k - 1, axis=1)[:, : model.top_k].astype(np.int32)


def group_sizes(ids: np.ndarray, model: Model) -> np.ndarray:
    """int32 [experts]: the pairs of each expert."""
    return np.bincount(ids.ravel(), minlength=model.experts).astype(np.int32)
