"""moe_gemm: one projection of every (token, slot) pair by its expert's matrix."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_moe import _check as check
from jax_moe import _ffi
from jax_moe._operands import (
    WeightOperand,
    float_operand,
    for_each_platform,
    gguf_layout,
    weight_format,
    weight_operand,
)
from jax_moe._packed import PackedExperts
from jax_moe._reference import gemm_reference
from jax_moe._variants import MoEVariant, as_variant, check_variant


@dataclass(frozen=True)
class GemmProblem:
    """A moe_gemm whose arguments have been checked."""

    num_pairs: int
    top_k: int
    num_experts: int
    n: int
    k: int
    rows_are_pairs: bool
    x_dtype: np.dtype
    y_dtype: np.dtype
    format: int
    variant: MoEVariant | None


def moe_gemm(
    x: Array,
    weight: PackedExperts | Array,
    sorted_token_ids: Array,
    flat_expert_ids: Array,
    *,
    top_k: int,
    topk_weights: Array | None = None,
    variant: MoEVariant | None = None,
    implementation: str | None = None,
    preferred_element_type: Any = None,
) -> Array:
    """Multiplies every pair's row of x by its expert's matrix.

    T tokens, P = T * top_k pairs; pair `p = token * top_k + slot`. For every entry i, with
    `p = sorted_token_ids[i]` and `e = flat_expert_ids[i]`:

        y[p, :] = w[p] * sum_c x[row(p), c] * weight[e, :, c]

    A GPU takes up to 8192 experts, 2^30 pairs, 2^30 rows and 2^26 columns. `jax.vmap` multiplies
    the pairs by the batch, and the experts as well where `weight` is batched.

    Args:
      x: float32, float16 or bfloat16, `[T, K]` (row(p) = p // top_k) or `[P, K]` (row(p) = p).
      weight: `PackedExperts` or a dense float32, float16 or bfloat16 array, `[E, N, K]`.
      sorted_token_ids: int32 `[P]`, pair ids in any order; sorted by expert is the fast case
        (`sort_by_expert`). Ids outside [0, P) are ignored; of duplicates the last wins.
      flat_expert_ids: int32 `[P]`, the expert of each entry. A pair with an expert outside
        [0, E), or that no entry lists, gives a row of zeros.
      top_k: slots a token, an int.
      topk_weights: floating `[P]` or `[T, top_k]`, w; None is 1 everywhere.
      variant: a `MoEVariant`, or None for the fastest kernel that rounds no activations.
      implementation: None for the platform's kernel, "reference" for pure JAX, which is
        differentiable (float64 where x64 is enabled).
      preferred_element_type: y's dtype, with `variant=None` only.

    Returns:
      y `[P, N]`, accumulated in float32: float32 for packed weights and of x's dtype for dense
      ones. `MoEVariant` says what the variants give.

    Raises:
      TypeError, ValueError: when traced; the message names the argument.
      ImportError: the native library cannot work with the installed jaxlib.
    """
    problem = gemm_problem(
        x,
        weight,
        sorted_token_ids,
        flat_expert_ids,
        top_k=top_k,
        topk_weights=topk_weights,
        variant=variant,
        implementation=implementation,
        preferred_element_type=preferred_element_type,
    )
    if implementation == "reference":
        return gemm_reference(
            x,
            gguf_layout(weight),
            sorted_token_ids,
            flat_expert_ids,
            None if topk_weights is None else topk_weights.reshape(-1),
            rows_are_pairs=problem.rows_are_pairs,
            top_k=problem.top_k,
            round_activations=variant is MoEVariant.SCALAR_GGUF,
        ).astype(problem.y_dtype)
    static = _Static(
        problem.top_k,
        problem.format,
        0 if variant is None else variant.value,
        problem.n,
        problem.k,
        problem.rows_are_pairs,
        problem.y_dtype,
    )
    return _moe_gemm(static, x, weight, sorted_token_ids, flat_expert_ids, topk_weights)


def gemm_problem(
    x: Any,
    weight: Any,
    sorted_token_ids: Any,
    flat_expert_ids: Any,
    *,
    top_k: int,
    topk_weights: Any = None,
    variant: MoEVariant | None = None,
    implementation: str | None = None,
    preferred_element_type: Any = None,
) -> GemmProblem:
    """Checks the arguments of `moe_gemm`, arrays or ShapeDtypeStructs."""
    check.implementation(implementation)
    variant = as_variant(variant)
    x_dtypes = check.float_dtypes(implementation)
    check.array("x", x, rank=2, dtypes=x_dtypes)
    experts, n, k = check.weight("weight", weight)
    if x.shape[1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}, but weight has K = {k}.")
    check_variant(variant, x.dtype, {"weight": weight})

    top_k = check.positive("top_k", top_k)
    check.array("sorted_token_ids", sorted_token_ids, rank=1, dtypes=(jnp.int32,))
    check.array("flat_expert_ids", flat_expert_ids, rank=1, dtypes=(jnp.int32,))
    pairs = sorted_token_ids.shape[0]
    check.shape("flat_expert_ids", flat_expert_ids, (pairs,), "[P] of sorted_token_ids")
    if pairs % top_k:
        raise ValueError(
            f"sorted_token_ids has {pairs} entries, not a multiple of top_k = {top_k}."
        )
    check.pair_count(pairs)
    tokens = pairs // top_k
    if x.shape[0] not in (tokens, pairs):
        raise ValueError(
            f"x has {tokens} rows (one a token) or {pairs} (one a pair) for {pairs} "
            f"pairs and top_k = {top_k}, not {x.shape[0]}."
        )
    if topk_weights is not None:
        rank = 2 if len(getattr(topk_weights, "shape", ())) == 2 else 1
        check.array("topk_weights", topk_weights, rank=rank, dtypes=x_dtypes)
        expected = (tokens, top_k) if rank == 2 else (pairs,)
        check.shape("topk_weights", topk_weights, expected, "[P] or [T, top_k]")

    packed = isinstance(weight, PackedExperts)
    y_dtype = np.dtype(jnp.float32) if packed and x.dtype != jnp.float64 else x.dtype
    if preferred_element_type is not None:
        try:
            preferred = np.dtype(preferred_element_type)
        except TypeError:
            raise TypeError(
                f"preferred_element_type is {check.names(x_dtypes)}, not "
                f"{preferred_element_type!r}."
            ) from None
        if variant is not None and preferred != y_dtype:
            raise ValueError(
                f"preferred_element_type: {variant.name} gives y of {y_dtype}, not {preferred}; "
                "leave the variant out to choose y's dtype."
            )
        if preferred not in x_dtypes:
            raise TypeError(f"preferred_element_type is {check.names(x_dtypes)}, not {preferred}.")
        y_dtype = preferred
    return GemmProblem(
        num_pairs=pairs,
        top_k=top_k,
        num_experts=experts,
        n=n,
        k=k,
        rows_are_pairs=bool(x.shape[0] != tokens),
        x_dtype=x.dtype,
        y_dtype=np.dtype(y_dtype),
        format=weight_format(weight),
        variant=variant,
    )


class _Static(NamedTuple):
    top_k: int
    format: int
    variant: int
    n: int
    k: int
    rows_are_pairs: bool
    y_dtype: np.dtype


@_ffi.cached
def _moe_gemm(static: _Static, x, weight, sorted_token_ids, flat_expert_ids, topk_weights) -> Array:
    data, aux, _ = weight_operand(weight)
    topk_weights = float_operand(topk_weights).reshape(-1)
    (y,) = _gemm_op(static, x, data, aux, sorted_token_ids, flat_expert_ids, topk_weights)
    return y


def _run(static: _Static, x, data, aux, *ids_and_weights):
    pairs = ids_and_weights[0].shape[0]
    check.pair_count(pairs)

    def call(weights, operands):
        (weight,), (x, *rest) = weights, operands
        problem = _ffi.native().GemmProblem(
            top_k=static.top_k,
            experts=weight.data.shape[0],
            n=static.n,
            k=static.k,
            rows_are_pairs=static.rows_are_pairs,
            format=weight.format,
        )
        workspace = _ffi.workspace_bytes(problem, pairs // static.top_k)
        y, _ = _ffi.call(
            "jax_moe_gemm",
            (
                jax.ShapeDtypeStruct((pairs, static.n), static.y_dtype),
                jax.ShapeDtypeStruct((workspace,), jnp.uint8),
            ),
            x,
            weight.data,
            *rest,
            weight.aux,
            format=weight.format,
            top_k=static.top_k,
            variant=static.variant,
        )
        return y

    weight = WeightOperand(data, aux, static.format)
    return (for_each_platform(call, [weight], [x, *ids_and_weights]),)


def _fold(op, static: _Static, size, batched, x, data, aux, pairs, experts, topk_weights):
    """Folds a batch into the token axis; a batch of weights into the expert axis as well."""
    x, pairs, experts, topk_weights = (
        _ffi.broadcast_batch(operand, is_batched, size)
        for operand, is_batched in zip(
            (x, pairs, experts, topk_weights), (batched[0], *batched[3:]), strict=True
        )
    )
    num_pairs = pairs.shape[1]
    element = jnp.arange(size, dtype=jnp.int32)[:, None]
    if batched[1] or batched[2]:
        data = _ffi.broadcast_batch(data, batched[1], size)
        aux = _ffi.broadcast_batch(aux, batched[2], size)
        experts = fold_ids(experts, element, data.shape[1])
        data, aux = fold_experts(data), fold_experts(aux)
    (y,) = op(
        static,
        x.reshape(size * x.shape[1], x.shape[2]),
        data,
        aux,
        fold_ids(pairs, element, num_pairs).reshape(-1),
        experts.reshape(-1),
        topk_weights.reshape(-1),
    )
    return (y.reshape(size, num_pairs, static.n),)


def fold_experts(operand: Array) -> Array:
    """A batch of an expert operand as one of more experts; an absent one, [size, 0], as [0]."""
    size, experts, *rest = operand.shape
    return operand.reshape(size * experts, *rest)


def fold_ids(ids: Array, element: Array, count: int) -> Array:
    """Ids in [0, count) of batch element b, moved to [b * count, (b + 1) * count); others to -1."""
    valid = (ids >= 0) & (ids < count)
    return jnp.where(valid, ids + element * count, -1)


_gemm_op = _ffi.op(_run, _fold)
