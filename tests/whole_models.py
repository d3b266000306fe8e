"""Small whole models in GGUF files, and what they compute, in float64 from the definition."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from make_gguf import Weights, write_gguf

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
D_MODEL, D_EXPERT, EXPERTS, TOP_K = 64, 32, 8, 3
VOCABULARY, LAYERS, WINDOW = 265, 3, 7
EPS = 1e-6
NO_VOCABULARY = {"tokenizer.ggml.model": "no_vocab"}


@dataclass(frozen=True)
class Model:
    """A model file, and the tensors in it as float64."""

    path: Path
    architecture: str
    tensors: dict[str, np.ndarray]


def write_model(
    path: Path, architecture: str, *, vocabulary: Mapping[str, Any] = NO_VOCABULARY
) -> Model:
    """Writes a qwen3moe or gpt-oss model with random float32 weights.

    `vocabulary` is the keys that describe a tokenizer of VOCABULARY tokens.
    """
    oss = architecture == "gpt-oss"
    weights = Weights(seed=7)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.3 * weights(size)).astype(np.float32)

    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = {
        "token_embd.weight": 8 * weights(VOCABULARY, D_MODEL),
        "output_norm.weight": norm(D_MODEL),
        "output.weight": weights(VOCABULARY, D_MODEL),
    }
    for layer in range(LAYERS):
        own = {
            "attn_norm.weight": norm(D_MODEL),
            "attn_q.weight": 2 * weights(q, D_MODEL),
            "attn_k.weight": 2 * weights(kv, D_MODEL),
            "attn_v.weight": weights(kv, D_MODEL),
            "attn_output.weight": weights(D_MODEL, q),
            "ffn_gate_inp.weight": weights(EXPERTS, D_MODEL),
            "ffn_gate_exps.weight": weights(EXPERTS, D_EXPERT, D_MODEL),
            "ffn_up_exps.weight": weights(EXPERTS, D_EXPERT, D_MODEL),
            "ffn_down_exps.weight": weights(EXPERTS, D_MODEL, D_EXPERT),
        }
        if oss:
            own |= {
                "post_attention_norm.weight": norm(D_MODEL),
                "attn_sinks.weight": HEADS**0.5 * weights(HEADS),
                "attn_q.bias": weights(q),
                "attn_k.bias": weights(kv),
                "attn_v.bias": weights(kv),
                "attn_output.bias": weights(D_MODEL),
                "ffn_gate_inp.bias": weights(EXPERTS),
                "ffn_gate_exps.bias": weights(EXPERTS, D_EXPERT),
                "ffn_up_exps.bias": weights(EXPERTS, D_EXPERT),
                "ffn_down_exps.bias": weights(EXPERTS, D_MODEL),
            }
        else:
            own |= {
                "ffn_norm.weight": norm(D_MODEL),
                "attn_q_norm.weight": norm(HEAD_DIM),
                "attn_k_norm.weight": norm(HEAD_DIM),
            }
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in own.items()}
    keys = {
        "context_length": 512,
        "vocab_size": VOCABULARY,
        "block_count": LAYERS,
        "embedding_length": D_MODEL,
        "feed_forward_length": D_EXPERT,
        "expert_feed_forward_length": D_EXPERT,
        "expert_count": EXPERTS,
        "expert_used_count": TOP_K,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": EPS,
        "rope.freq_base": 150000.0 if oss else 10000.0,
    } | {f"x:{key}": value for key, value in vocabulary.items()}
    if oss:
        keys |= {
            "attention.sliding_window": WINDOW,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        }
    write_gguf(path, architecture, keys, tensors)
    return Model(path, architecture, {name: t.astype(np.float64) for name, t in tensors.items()})


def logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Logits `[T, vocabulary]` after each of the tokens `[T]`, token by token and head by head."""
    x = model.tensors["token_embd.weight"][tokens]
    for layer in range(LAYERS):
        own = {
            name.removeprefix(f"blk.{layer}."): tensor
            for name, tensor in model.tensors.items()
            if name.startswith(f"blk.{layer}.")
        }
        oss = model.architecture == "gpt-oss"
        window = WINDOW if oss and layer % 2 == 0 else len(tokens)
        x = x + _attention(own, _rms_norm(x, own["attn_norm.weight"]), window, oss)
        moe_norm = own["post_attention_norm.weight" if oss else "ffn_norm.weight"]
        moe = _moe_oss if oss else _moe_qwen3
        x = x + np.stack([moe(own, row) for row in _rms_norm(x, moe_norm)])
    return _rms_norm(x, model.tensors["output_norm.weight"]) @ model.tensors["output.weight"].T


def _rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPS) * weight


def _attention(own: dict[str, np.ndarray], x: np.ndarray, window: int, oss: bool) -> np.ndarray:
    def heads(name: str, norm: bool) -> np.ndarray:
        y = x @ own[f"attn_{name}.weight"].T + own.get(f"attn_{name}.bias", 0.0)
        y = y.reshape(len(x), -1, HEAD_DIM)
        return _rms_norm(y, own[f"attn_{name}_norm.weight"]) if norm else y

    q, k = _rotated(heads("q", not oss), oss), _rotated(heads("k", not oss), oss)
    v = heads("v", False)
    mixed = np.zeros((len(x), HEADS, HEAD_DIM))
    for t in range(len(x)):
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            seen = range(max(0, t - window + 1), t + 1)
            weights = [math.exp(q[t, head] @ k[s, kv_head] / math.sqrt(HEAD_DIM)) for s in seen]
            total = sum(weights)
            if oss:
                total += math.exp(own["attn_sinks.weight"][head])
            for s, weight in zip(seen, weights, strict=True):
                mixed[t, head] += weight / total * v[s, kv_head]
    flat = mixed.reshape(len(x), -1)
    return flat @ own["attn_output.weight"].T + own.get("attn_output.bias", 0.0)


def _rotated(x: np.ndarray, oss: bool) -> np.ndarray:
    """Elements i and i + HEAD_DIM / 2 as a complex number, turned by the position."""
    half = HEAD_DIM // 2
    turned = np.empty_like(x)
    for i in range(half):
        frequency, scale = (_yarn if oss else _plain)(i)
        angle = np.exp(1j * frequency * np.arange(len(x)))[:, None]
        z = scale * angle * (x[..., i] + 1j * x[..., i + half])
        turned[..., i], turned[..., i + half] = z.real, z.imag
    return turned


def _plain(i: int) -> tuple[float, float]:
    return 10000.0 ** (-2 * i / HEAD_DIM), 1.0


def _yarn(i: int) -> tuple[float, float]:
    """The paper's ramp from 32 turns to 1 turn in 4096 positions, by the index of the pair."""
    base, factor, context = 150000.0, 32.0, 4096
    frequency = base ** (-2 * i / HEAD_DIM)
    first, last = (
        HEAD_DIM / 2 * math.log(context / (2 * math.pi * turns), base) for turns in (32, 1)
    )
    first, last = math.floor(first), math.ceil(last)
    stretched = min(1.0, max(0.0, (i - first) / (last - first)))
    frequency = frequency * (1 - stretched) + frequency / factor * stretched
    return frequency, 0.1 * math.log(factor) + 1


def _moe_qwen3(own: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    scores = np.exp(own["ffn_gate_inp.weight"] @ x)
    chosen = np.argsort(-scores)[:TOP_K]
    y = np.zeros_like(x)
    for e in chosen:
        gate, up = own["ffn_gate_exps.weight"][e] @ x, own["ffn_up_exps.weight"][e] @ x
        weight = scores[e] / scores[chosen].sum()
        y += weight * (own["ffn_down_exps.weight"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return y


def _moe_oss(own: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    scores = np.exp(own["ffn_gate_inp.weight"] @ x + own["ffn_gate_inp.bias"])
    chosen = np.argsort(-scores)[:TOP_K]

    def project(name: str, e: int, z: np.ndarray) -> np.ndarray:
        return own[f"ffn_{name}_exps.weight"][e] @ z + own[f"ffn_{name}_exps.bias"][e]

    y = np.zeros_like(x)
    for e in chosen:
        gate = np.minimum(project("gate", e, x), 7)
        up = np.clip(project("up", e, x), -7, 7)
        hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        y += scores[e] / scores[chosen].sum() * project("down", e, hidden)
    return y
