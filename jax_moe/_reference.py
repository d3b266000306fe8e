"""The ops in pure JAX: what the kernels are measured against, and what can be differentiated.

Every function computes in float32, or in float64 where x64 is enabled, and goes through the experts
one by one, so that one expert's dequantised matrices are all the extra memory it takes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jax_moe import _check as check
from jax_moe import _ffi
from jax_moe._activations import activate
from jax_moe._packed import PackedExperts

Q8_1_BLOCK = 32


def accumulator() -> jnp.dtype:
    return jnp.dtype(jnp.float64 if check.x64_enabled() else jnp.float32)


def round_q8_1(x: Array) -> Array:
    """x with every 32 values along the last axis rounded to integers times one float32 scale.

    The scale is amax / 127 and halves round away from zero; the last block may be short.
    """
    width = x.shape[-1]
    padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -width % Q8_1_BLOCK)])
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // Q8_1_BLOCK, Q8_1_BLOCK)
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 127
    quotient = jnp.abs(blocks / jnp.where(scale == 0, 1, scale))
    whole = jnp.floor(quotient)
    rounded = jnp.sign(blocks) * (whole + (quotient - whole >= 0.5).astype(whole.dtype))
    return (rounded * scale).reshape(padded.shape)[..., :width].astype(x.dtype)


def gemm_reference(
    x: Array,
    weight: PackedExperts | Array,
    sorted_token_ids: Array,
    flat_expert_ids: Array,
    topk_weights: Array | None,
    *,
    rows_are_pairs: bool,
    top_k: int,
    round_activations: bool,
) -> Array:
    """y `[P, N]` of `moe_gemm` in the accumulator's dtype."""
    dtype = accumulator()
    pairs = sorted_token_ids.shape[0]
    entries = jnp.arange(pairs, dtype=jnp.int32)
    in_range = (sorted_token_ids >= 0) & (sorted_token_ids < pairs)
    target = jnp.where(in_range, sorted_token_ids, pairs)
    last = jnp.full((pairs,), -1, jnp.int32).at[target].max(entries, mode="drop")
    listed = last >= 0
    expert = jnp.where(listed, flat_expert_ids[jnp.maximum(last, 0)] if pairs else last, -1)

    rows = x.astype(dtype)
    if round_activations:
        rows = round_q8_1(rows)
    if not rows_are_pairs:
        rows = jnp.repeat(rows, top_k, axis=0)

    def apply(matrix: Array) -> Array:
        return matmul(rows, matrix)

    y = _by_expert([weight], expert, lambda _, w: apply(w), (pairs, matrix_shape(weight)[1]))
    if topk_weights is not None:
        weighted = y * topk_weights.astype(dtype)[:, None]
        y = jnp.where((expert >= 0)[:, None], weighted, 0)
    return y


def ffn_reference(
    x: Array,
    expert_ids: Array,
    weights: Array,
    gate: PackedExperts | Array | None,
    up: PackedExperts | Array | None,
    down: PackedExperts | Array,
    biases: tuple[Array | None, ...],
    scales: tuple[Array | None, ...],
    *,
    activation: str,
    numbers: tuple[float, float, float],
    weights_before: bool,
    round_activations: bool,
) -> Array:
    """y `[T, H]` of `moe_ffn` in the accumulator's dtype.

    A merged gate and up is `gate` with `up` None; an absent gate is `gate` None.
    """
    dtype = accumulator()
    tokens, top_k = expert_ids.shape
    num_experts = matrix_shape(down)[0]
    weights = weights.astype(dtype)
    valid = (expert_ids >= 0) & (expert_ids < num_experts)
    rows = jnp.repeat(x.astype(dtype), top_k, axis=0)
    if weights_before:
        # An invalid slot's weight may be anything and must not reach the valid ones.
        rows = rows * jnp.where(valid, weights, 0).reshape(-1, 1)
    if round_activations:
        rows = round_q8_1(rows)

    def project(name: int, e: Array, inputs: Array, matrix: Array) -> Array:
        y = matmul(inputs, matrix)
        if scales[name] is not None:
            y = y * scales[name][e].astype(dtype)  # type: ignore[index]
        if biases[name] is not None:
            y = y + biases[name][e].astype(dtype)[None]  # type: ignore[index]
        return y

    def expert(e: Array, *matrices: Array) -> Array:
        *inputs, down_matrix = matrices
        if gate is not None and up is None:
            both = project(0, e, rows, inputs[0])
            half = both.shape[-1] // 2
            g, u = both[:, :half], both[:, half:]
        elif gate is not None:
            g, u = project(0, e, rows, inputs[0]), project(1, e, rows, inputs[1])
        else:
            g, u = None, project(1, e, rows, inputs[0])
        h = activate(activation, g, u, numbers)
        return project(2, e, round_q8_1(h) if round_activations else h, down_matrix)

    matrices = [w for w in (gate, up, down) if w is not None]
    flat_ids = expert_ids.reshape(-1)
    y = _by_expert(matrices, flat_ids, expert, (tokens * top_k, matrix_shape(down)[1]))
    y = y.reshape(tokens, top_k, matrix_shape(down)[1])
    if not weights_before:
        y = y * weights[:, :, None]
    y = jnp.where(valid[:, :, None], y, 0)
    total = jnp.zeros((tokens, y.shape[-1]), dtype)
    for slot in range(top_k):
        total = total + y[:, slot]
    return total


def matmul(rows: Array, matrix: Array) -> Array:
    """rows `[M, K]` times the transpose of matrix `[N, K]`, at the highest precision."""
    return jnp.einsum("mk,nk->mn", rows, matrix, precision=jax.lax.Precision.HIGHEST)


def matrix_shape(weight: PackedExperts | Array) -> tuple[int, ...]:
    return tuple(weight.shape)


def _by_expert(
    weights: list, expert_of_row: Array, apply: Callable[..., Array], shape: tuple[int, int]
) -> Array:
    """Rows of `apply(e, *matrices of e)` where `expert_of_row` is e; zeros for no expert."""
    dtype = accumulator()
    num_experts = matrix_shape(weights[0])[0]

    def step(y: Array, e: Array) -> tuple[Array, None]:
        one = [jax.tree.map(lambda leaf: leaf[e], weight) for weight in weights]
        matrices = [
            w.dequantize(dtype) if isinstance(w, PackedExperts) else w.astype(dtype) for w in one
        ]
        return jnp.where((expert_of_row == e)[:, None], apply(e, *matrices), y), None

    y = jnp.zeros(shape, dtype)
    if jax.sharding.get_abstract_mesh().manual_axes:  # what is carried has one type all the way
        result, _ = jax.eval_shape(step, y, jnp.int32(0))
        y = _ffi.cast_varying(y, _ffi.varying_axes(result))
    return jax.lax.scan(step, y, jnp.arange(num_experts, dtype=jnp.int32))[0]
