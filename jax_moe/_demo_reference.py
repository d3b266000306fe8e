"""A MoE block in float64 NumPy, written from its definition: what the demo compares with.

It shares no arithmetic with the package: weights are dequantised by gguf-py, exactly, one expert at
a time, and every product is a NumPy product.
"""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np

from jax_moe._block_types import MoEConfig
from jax_moe._gguf.entries import Entry
from jax_moe._gguf.layers import GGUFLayer
from jax_moe._gguf.types import BLOCK_FORMATS, DENSE_DTYPES


def block(
    layer: GGUFLayer,
    x: np.ndarray,
    router_input: np.ndarray | None = None,
    token_ids: np.ndarray | None = None,
) -> np.ndarray:
    """The result of a layer's MoE block for x and router_input float64 `[T, H]`."""
    entries, config = layer.entries, layer.config
    assert config is not None
    read = x if router_input is None else router_input
    logits = _logits(layer, read)
    expert_ids, weights = _route(layer, logits, token_ids)
    y = x @ _matrix(entries["latent_down"]).T if "latent_down" in entries else x
    y = _experts(layer, "experts", y, expert_ids, weights)
    if "chunk_experts.down" in entries:
        chosen = expert_ids[:, : entries["chunk_experts.down"].shape[0]]
        ids = chosen // config.experts_per_group
        weights = _weigh(config, _scores("softmax", logits), ids)
        y = y + config.chunk_scale * _experts(layer, "chunk_experts", y, ids, weights)
    for norm in ("latent_norm", "routed_post_norm"):
        if norm in entries:
            y = _rms_norm(y, config) * _vector(entries[norm])
        if norm == "latent_norm" and "latent_up" in entries:
            y = y @ _matrix(entries["latent_up"]).T
    if "shared.down" in entries:
        y = (y + _shared(layer, x, read)) * config.sum_scale
    return y


def _experts(
    layer: GGUFLayer, group: str, x: np.ndarray, expert_ids: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The weighted sum of each token's experts."""
    config = layer.config
    assert config is not None
    y = np.zeros_like(x)
    for expert in np.unique(expert_ids):
        for slot in range(expert_ids.shape[1]):  # a token's experts are not always different
            token = np.nonzero(expert_ids[:, slot] == expert)[0]
            w = weights[token, slot][:, None]
            rows = x[token] * w if config.weights_before else x[token]
            limit, betas = config.activation_limit, config.activation_betas
            h = _ffn(layer.entries, group, expert, rows, config.activation, limit, betas)
            y[token] += h if config.weights_before else w * h
    return y


def _shared(layer: GGUFLayer, x: np.ndarray, router_input: np.ndarray) -> np.ndarray:
    entries, config = layer.entries, layer.config
    assert config is not None
    read = x
    if "shared_pre_norm" in entries:
        read = _rms_norm(router_input, config) * _vector(entries["shared_pre_norm"])
    limit, betas = config.shared_activation_limit, config.activation_betas
    y = _ffn(entries, "shared", 0, read, config.shared_activation, limit, betas)
    if "shared_gate" in entries:
        y *= _sigmoid(x @ _vector(entries["shared_gate"]))[:, None]
    if "shared_post_norm" in entries:
        y = _rms_norm(y, config) * _vector(entries["shared_post_norm"])
    return y


def _logits(layer: GGUFLayer, x: np.ndarray) -> np.ndarray:
    entries, config = layer.entries, layer.config
    assert config is not None
    if "router_scale" in entries:
        x = _rms_norm(x, config) * _vector(entries["router_scale"]) / np.sqrt(x.shape[1])
    logits = x @ _vector(entries["router"]).T
    return logits + _vector(entries["router_bias"]) if "router_bias" in entries else logits


def _scores(gating: str, logits: np.ndarray) -> np.ndarray:
    match gating:
        case "softmax":
            return _softmax(logits)
        case "sigmoid":
            return _sigmoid(logits)
        case "sqrt_softplus":
            return np.sqrt(np.logaddexp(0, logits))
    return logits


def _weigh(config: MoEConfig, scores: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
    weights = np.take_along_axis(scores, expert_ids, axis=1)
    if config.gating == "softmax_after_topk":
        weights = _softmax(weights)
    if config.normalize:
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 2.0**-14)
    return weights * config.scale


def _route(
    layer: GGUFLayer, logits: np.ndarray, token_ids: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    entries, config = layer.entries, layer.config
    assert config is not None
    scores = _scores(config.gating, logits)
    if "token_to_experts" in entries:
        assert token_ids is not None
        table = entries["token_to_experts"]
        expert_ids = table.tensor.bytes().view("<i4").reshape(table.shape)[token_ids]
        return expert_ids, _weigh(config, scores, expert_ids)
    # Without a bias the order of the logits, in which nothing saturates.
    selection = logits
    if "selection_bias" in entries or config.num_groups > 1:
        selection = scores.copy()
    if "selection_bias" in entries:
        selection += _vector(entries["selection_bias"])
    if config.num_groups > 1:
        groups = selection.reshape(len(logits), config.num_groups, -1)
        group_scores = np.sort(groups, axis=2)[:, :, -2:].sum(axis=2)
        dropped = np.argsort(-group_scores, axis=1, kind="stable")[:, config.num_groups_used :]
        np.put_along_axis(groups, dropped[:, :, None], -np.inf, axis=1)
        selection = groups.reshape(len(logits), -1)
    expert_ids = np.argsort(-selection, axis=1, kind="stable")[:, : config.top_k]
    return expert_ids, _weigh(config, scores, expert_ids)


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


def _rms_norm(x: np.ndarray, config: MoEConfig) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + config.norm_eps)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
