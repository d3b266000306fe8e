"""Writes small GGUF models with the gguf package, for the tests of the reader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Tensor = np.ndarray | tuple[np.ndarray, str]  # float32, or weights with the format to store them in


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    split_max_tensors: int = 0,
) -> Path:
    """Writes a GGUF file. Keys get the architecture's prefix unless they contain a colon, "x:key".

    With `split_max_tensors` a split model results; `path` is then its prefix with ".gguf".
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    for name, value in keys.items():
        if name == "x:general.alignment":
            writer.add_custom_alignment(value)
            continue
        _add(writer, name[2:] if name.startswith("x:") else f"{architecture}.{name}", value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            weights, form = tensor
            kind = gguf.GGMLQuantizationType[form]
            writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


class Weights:
    """Random float32 tensors, each scaled by its rows' length so that activations stay near 1."""

    def __init__(self, seed: int = 0):
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        return (self._rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)


def model_keys(
    *, layers: int = 2, experts: int = 4, top_k: int = 2, d_model: int = 64, d_expert: int = 32
):
    """The metadata keys that every MoE architecture has."""
    return {
        "block_count": layers,
        "embedding_length": d_model,
        "feed_forward_length": d_expert,
        "expert_feed_forward_length": d_expert,
        "expert_count": experts,
        "expert_used_count": top_k,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }


def expert_tensors(
    weights: Weights,
    layer: int,
    *,
    experts: int = 4,
    d_model: int = 64,
    d_expert: int = 32,
    formats: tuple[str, str, str] = ("Q8_0", "Q4_0", "Q5_1"),
) -> dict[str, Tensor]:
    """A router, and gate, up and down of routed experts in three formats."""
    prefix = f"blk.{layer}.ffn"
    return {
        f"{prefix}_gate_inp.weight": weights(experts, d_model),
        f"{prefix}_gate_exps.weight": (weights(experts, d_expert, d_model), formats[0]),
        f"{prefix}_up_exps.weight": (weights(experts, d_expert, d_model), formats[1]),
        f"{prefix}_down_exps.weight": (weights(experts, d_model, d_expert), formats[2]),
    }


def shared_tensors(
    weights: Weights, layer: int, *, d_model: int = 64, d_shared: int = 32, form: str = "Q8_0"
) -> dict[str, Tensor]:
    """A shared expert."""
    prefix = f"blk.{layer}.ffn"
    return {
        f"{prefix}_gate_shexp.weight": (weights(d_shared, d_model), form),
        f"{prefix}_up_shexp.weight": (weights(d_shared, d_model), form),
        f"{prefix}_down_shexp.weight": (weights(d_model, d_shared), form),
    }


def dense_tensors(
    weights: Weights, layer: int, *, d_model: int = 64, d_ff: int = 96
) -> dict[str, Tensor]:
    """A dense layer's network, as the leading layers of some models have."""
    prefix = f"blk.{layer}.ffn"
    return {
        f"{prefix}_gate.weight": weights(d_ff, d_model),
        f"{prefix}_up.weight": weights(d_ff, d_model),
        f"{prefix}_down.weight": weights(d_model, d_ff),
    }


def write_qwen3moe(
    path: Path, *, layers: int = 2, split_max_tensors: int = 0, keys: Mapping[str, Any] = {}
):
    """A model of the simplest kind."""
    weights = Weights()
    tensors: dict[str, Tensor] = {
        "token_embd.weight": weights(16, 64),
        "output_norm.weight": weights(64),
    }
    for layer in range(layers):
        tensors |= expert_tensors(weights, layer)
    return write_gguf(
        path,
        "qwen3moe",
        model_keys(layers=layers) | keys,
        tensors,
        split_max_tensors=split_max_tensors,
    )
