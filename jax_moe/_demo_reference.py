"""A MoE block in float64 NumPy, written from its definition: what the demo compares with.

It shares no arithmetic with the package: weights are dequantised by gguf-py, exactly, one expert at
a time, and every product is a NumPy product.
"""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np

from jax_moe._gguf.entries import Entry
from jax_moe._gguf.layers import GGUFLayer
from jax_moe._gguf.types import BLOCK_FORMATS, DENSE_DTYPES


def block(layer: GGUFLayer, x: np.ndarray) -> np.ndarray:
    """The result of a layer's MoE block for x float64 `[T, H]`."""
    entries, config = layer.entries, layer.config
    assert config is not None
    expert_ids, weights = _route(layer, x)
    inner = x @ _matrix(entries["latent_down"]).T if "latent_down" in entries else x
    y = np.zeros_like(inner)
    betas = config.activation_betas
    for expert in np.unique(expert_ids):
        token, slot = np.nonzero(expert_ids == expert)
        w = weights[token, slot][:, None]
        rows = inner[token] * w if config.weights_before else inner[token]
        h = _ffn(
            entries, "experts", expert, rows, config.activation, config.activation_limit, betas
        )
        y[token] += h if config.weights_before else w * h
    if "latent_norm" in entries:
        y = y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + config.norm_eps)
        y = y * _vector(entries["latent_norm"])
    if "latent_up" in entries:
        y = y @ _matrix(entries["latent_up"]).T
    if "shared.down" in entries:
        limit = config.shared_activation_limit
        shared = _ffn(entries, "shared", 0, x, config.shared_activation, limit, betas)
        if "shared_gate" in entries:
            shared *= _sigmoid(x @ _vector(entries["shared_gate"]))[:, None]
        y = (y + shared) / 2 if config.shared_average else y + shared
    return y


def _route(layer: GGUFLayer, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    entries, config = layer.entries, layer.config
    assert config is not None
    logits = x @ _vector(entries["router"]).T
    if "router_bias" in entries:
        logits = logits + _vector(entries["router_bias"])
    match config.gating:
        case "softmax":
            scores = _softmax(logits)
        case "sigmoid":
            scores = _sigmoid(logits)
        case "sqrt_softplus":
            scores = np.sqrt(np.logaddexp(0, logits))
        case _:
            scores = logits
    # Without a bias the order of the logits, in which nothing saturates.
    selection = logits
    if "selection_bias" in entries or config.num_groups > 1:
        selection = scores.copy()
    if "selection_bias" in entries:
        selection += _vector(entries["selection_bias"])
    if config.num_groups > 1:
        groups = selection.reshape(len(x), config.num_groups, -1)
        group_scores = np.sort(groups, axis=2)[:, :, -2:].sum(axis=2)
        dropped = np.argsort(-group_scores, axis=1, kind="stable")[:, config.num_groups_used :]
        np.put_along_axis(groups, dropped[:, :, None], -np.inf, axis=1)
        selection = groups.reshape(len(x), -1)
    expert_ids = np.argsort(-selection, axis=1, kind="stable")[:, : config.top_k]
    weights = np.take_along_axis(scores, expert_ids, axis=1)
    if config.gating == "softmax_after_topk":
        weights = _softmax(weights)
    if config.normalize:
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 2.0**-14)
    return expert_ids, weights * config.scale


def _ffn(
    entries: Mapping[str, Entry],
    group: str,
    expert: int,
    x: np.ndarray,
    activation: str,
    limit: float | None,
    betas: tuple[float, float] | None,
) -> np.ndarray:
    def project(projection: str, x: np.ndarray) -> np.ndarray:
        y = x @ _matrix(entries[f"{group}.{projection}"], expert).T
        if (scale := f"{group}.{projection}_scale") in entries:
            y = y * _vector(entries[scale])[expert]
        if (bias := f"{group}.{projection}_bias") in entries:
            y = y + _vector(entries[bias])[expert]
        return y

    if f"{group}.gate_up" in entries:
        gate, up = np.split(project("gate_up", x), 2, axis=1)
    else:
        up = project("up", x)
        gate = project("gate", x) if f"{group}.gate" in entries else up
    return project("down", _activate(activation, gate, up, limit, betas))


def _activate(
    name: str, g: np.ndarray, u: np.ndarray, limit: float | None, betas: tuple[float, float] | None
) -> np.ndarray:
    bound = np.inf if limit is None else limit
    match name:
        case "swiglu" | "swiglu_clamp":
            g = np.minimum(g, bound)
            return g * _sigmoid(g) * np.clip(u, -bound, bound)
        case "swiglu_clamp_after":
            return np.minimum(g * _sigmoid(g), bound) * np.clip(u, -bound, bound)
        case "swiglu_oai":
            g = np.minimum(g, bound)
            return g * _sigmoid(1.702 * g) * (np.clip(u, -bound, bound) + 1)
        case "situ":
            assert betas is not None
            beta, linear_beta = betas
            bounded = linear_beta * np.tanh(u / linear_beta) if linear_beta > 0 else u
            return beta * np.tanh(g / beta) * _sigmoid(g) * bounded
        case "geglu":
            return _gelu(g) * u
        case "reglu":
            return np.maximum(g, 0) * u
        case "silu":
            return u * _sigmoid(u)
        case "gelu":
            return _gelu(u)
        case "relu2":
            return np.maximum(u, 0) ** 2
    raise NotImplementedError(f"activation {name!r}")


def _matrix(entry: Entry, expert: int = 0) -> np.ndarray:
    """One expert's weights in float64."""
    tensor, experts = entry.tensor, entry.shape[0]
    data = tensor.bytes().reshape(experts, entry.shape[1], -1)[expert]
    if tensor.ggml_type in BLOCK_FORMATS:
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType(tensor.ggml_type)).astype(
            np.float64
        )
    return data.view(DENSE_DTYPES[tensor.ggml_type]).astype(np.float64)


def _vector(entry: Entry) -> np.ndarray:
    """A router, bias or scale in float64, with its whole shape."""
    values = entry.tensor.bytes().view(DENSE_DTYPES[entry.tensor.ggml_type])
    return values.astype(np.float64).reshape(entry.shape)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
