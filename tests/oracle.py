"""What the ops mean, in numpy float64, written from the design and not from the library's code."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import jax_moe
from jax_moe._formats import FORMATS, as_format

ERROR_BOUNDS = {"float32": 1e-5, "float16": 5e-4, "bfloat16": 2e-3}
Q8_1_BOUND = 1.2e-2
QUANTIZED_ROWS = 256


def relative_error(y, expected) -> float:
    """‖y - expected‖ / ‖expected‖ in float64; infinite where y is not finite."""
    y, expected = np.asarray(y, np.float64), np.asarray(expected, np.float64)
    assert y.shape == expected.shape
    if not np.isfinite(y).all():
        return float("inf")
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(y - expected) / norm) if norm else float(np.linalg.norm(y))


def bound(x_dtype, y_dtype) -> float:
    return max(ERROR_BOUNDS[np.dtype(d).name] for d in (x_dtype, y_dtype))


@functools.cache
def packed(format_name: str, experts: int, n: int, k: int, seed: int = 0):
    """PackedExperts of normal weights through ggml's quantiser, and their exact float64 values.

    At most `QUANTIZED_ROWS` rows are different: ggml takes up to 50 us a weight.
    """
    rng = np.random.default_rng([seed, zlib.crc32(format_name.encode()), experts, n, k])
    rows = min(experts * n, QUANTIZED_ROWS)
    weights = rng.standard_normal((1, rows, k)).astype(np.float32) / np.sqrt(k)
    importance = rng.uniform(0.5, 1.5, k).astype(np.float32)
    # Under a trace, too, which may be the first to ask for these.
    with jax.ensure_compile_time_eval():
        few = jax_moe.quantize(weights, format_name, importance=importance)
        values = np.asarray(few.dequantize(), np.float64)[0]
        picked = np.concatenate([rng.permutation(rows) for _ in range(-(-experts * n // rows))])
        picked = picked[: experts * n].reshape(experts, n)
        data = np.asarray(few.data)[0][picked]
        return dataclasses.replace(few, data=jnp.asarray(data)), values[picked]


def all_formats() -> list[str]:
    return list(FORMATS)


def width(format_name: str, at_least: int) -> int:
    """The smallest K that is a multiple of the format's block and at least `at_least`."""
    block = as_format(format_name).block_size
    return -(-at_least // block) * block


def gemm(x, weights, sorted_token_ids, flat_expert_ids, top_k, topk_weights=None):
    """moe_gemm, entry by entry."""
    x = np.asarray(x, np.float64)
    pairs = len(sorted_token_ids)
    y = np.zeros((pairs, weights.shape[1]))
    for p, e in zip(np.asarray(sorted_token_ids), np.asarray(flat_expert_ids), strict=True):
        if not 0 <= p < pairs:
            continue
        if not 0 <= e < weights.shape[0]:
            y[p] = 0
            continue
        row = x[p] if x.shape[0] == pairs else x[p // top_k]
        y[p] = weights[e] @ row
        if topk_weights is not None:
            y[p] *= np.asarray(topk_weights, np.float64).reshape(-1)[p]
    return y


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def activation(name, g, u, limit=None, betas=None):
    def clip(v):
        return np.clip(v, -limit, limit)

    def silu(v):
        return v * sigmoid(v)

    if name == "swiglu_oai" and limit is None:
        limit = 7.0
    match name:
        case "swiglu":
            return silu(g) * u
        case "swiglu_clamp":
            return silu(np.minimum(g, limit)) * clip(u)
        case "swiglu_clamp_after":
            return np.minimum(silu(g), limit) * clip(u)
        case "geglu":
            return gelu(g) * u
        case "reglu":
            return np.maximum(g, 0) * u
        case "swiglu_oai":
            a = np.minimum(g, limit)
            return a * sigmoid(1.702 * a) * (clip(u) + 1)
        case "situ":
            beta, linear = betas
            bounded = linear * np.tanh(u / linear) if linear > 0 else u
            return beta * np.tanh(g / beta) * sigmoid(g) * bounded
        case "silu":
            return silu(u)
        case "gelu":
            return gelu(u)
        case "relu2":
            return np.maximum(u, 0) ** 2


def ffn(
    x,
    expert_ids,
    weights,
    *,
    gate=None,
    up,
    down,
    act="swiglu",
    limit=None,
    betas=None,
    bias=(None, None, None),
    scale=(None, None, None),
    weights_before=False,
):
    """moe_ffn on float64 matrices [E, N, K], slot by slot; bias and scale of gate, up, down."""
    x = np.asarray(x, np.float64)
    weights = np.asarray(weights, np.float64)
    y = np.zeros((x.shape[0], down.shape[1]))

    def project(which, matrix, e, v):
        r = matrix[e] @ v
        if scale[which] is not None:
            r = r * np.float64(scale[which][e])
        if bias[which] is not None:
            r = r + np.asarray(bias[which][e], np.float64)
        return r

    for t in range(x.shape[0]):
        for s, e in enumerate(np.asarray(expert_ids)[t]):
            if not 0 <= e < down.shape[0]:
                continue
            v = x[t] * weights[t, s] if weights_before else x[t]
            g = None if gate is None else project(0, gate, e, v)
            h = activation(act, g, project(1, up, e, v), limit, betas)
            r = project(2, down, e, h)
            y[t] += r if weights_before else r * weights[t, s]
    return y


def random_routing(rng, tokens: int, experts: int, top_k: int):
    """Distinct random experts and positive weights that sum to 1, as `Routing`."""
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    weights = rng.random((tokens, top_k)).astype(np.float32) + 0.1
    weights /= weights.sum(axis=1, keepdims=True)
    return jax_moe.Routing(jnp.asarray(ids), jnp.asarray(weights))


def normal(rng, shape, dtype="float32"):
    return jnp.asarray(rng.standard_normal(shape), dtype)
