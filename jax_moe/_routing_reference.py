"""`route` and `sort_by_expert` in pure JAX. Arguments are validated by jax_moe/_routing.py."""

import jax
import jax.numpy as jnp
from jax import Array

# The smallest normal float16: a token's weights are divided by their sum, clamped to at least this.
MIN_WEIGHT_SUM = 6.103515625e-5


def route_reference(
    logits: Array,
    bias: Array | None,
    *,
    top_k: int,
    gating: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    num_groups_used: int,
) -> tuple[Array, Array]:
    """Expert ids int32 `[T, k]` and weights `[T, k]`, differentiable with respect to the logits.

    Computes in float64 if the logits are float64, else in float32.
    """
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    all_nan = jnp.isnan(logits).all(axis=-1, keepdims=True)
    probs = gates(logits, gating)
    if bias is not None:
        scores = probs + bias.astype(probs.dtype)[None]
    elif num_groups > 1:
        scores = probs
    else:
        scores = logits
    scores = jnp.where(all_nan, 0, _nan_to_minus_inf(jax.lax.stop_gradient(scores)))
    if num_groups > 1:
        scores = _limit_groups(scores, num_groups, num_groups_used)
    expert_ids = _best(scores, top_k)
    weights = weigh(probs, expert_ids, gating, normalize, scale)
    return expert_ids, jnp.where(all_nan, jnp.nan, weights)


def gates(logits: Array, gating: str) -> Array:
    """The gate values `[T, E]` of logits `[T, E]`, of which NaN counts as -inf."""
    logits = _nan_to_minus_inf(logits)
    if gating == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if gating == "sigmoid":
        return jax.nn.sigmoid(logits)
    if gating == "sqrt_softplus":
        squares = jax.nn.softplus(logits)
        # Where softplus underflows to 0, the root's infinite slope must not make gradients NaN.
        positive = squares > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
    return logits  # softmax_after_topk


def weigh(probs: Array, expert_ids: Array, gating: str, normalize: bool, scale: float) -> Array:
    """The weights `[T, k]` of experts `[T, k]`, every id in `[0, E)`, from gate values `[T, E]`."""
    weights = jnp.take_along_axis(probs, expert_ids, axis=-1)
    if gating == "softmax_after_topk":
        weights = jax.nn.softmax(weights, axis=-1)
    if normalize:
        weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), MIN_WEIGHT_SUM)
    return weights if scale == 0 else weights * scale


def _nan_to_minus_inf(x: Array) -> Array:
    return jnp.where(jnp.isnan(x), -jnp.inf, x)


def _best(scores: Array, count: int) -> Array:
    """Indices of the `count` highest scores, best first, ties to the lower index."""
    order = jnp.argsort(scores, axis=-1, descending=True, stable=True)
    return order[..., :count].astype(jnp.int32)


def _limit_groups(scores: Array, num_groups: int, num_groups_used: int) -> Array:
    """Scores with -inf outside the groups whose two best scores have the highest sums."""
    tokens, experts = scores.shape
    size = experts // num_groups
    grouped = scores.reshape(tokens, num_groups, size)
    group_scores = jax.lax.top_k(grouped, min(2, size))[0].sum(axis=-1)
    used = _best(_nan_to_minus_inf(group_scores), num_groups_used)
    groups = jnp.arange(num_groups, dtype=jnp.int32)
    kept = (used[:, :, None] == groups[None, None]).any(axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(scores.shape)


def sort_reference(expert_ids: Array, num_experts: int) -> tuple[Array, Array, Array]:
    """The fields of `Dispatch` for int32 ids `[P]`."""
    valid = (expert_ids >= 0) & (expert_ids < num_experts)
    keys = jnp.where(valid, expert_ids, num_experts)
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    firsts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    offsets = jnp.searchsorted(keys[order], firsts).astype(jnp.int32)
    return order, expert_ids[order], offsets
