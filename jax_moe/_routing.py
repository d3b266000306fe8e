"""Routing: from router logits to experts and weights, and from there to pairs grouped by expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_moe import _check as check
from jax_moe import _ffi
from jax_moe._operands import float_operand
from jax_moe._routing_reference import gates as gates
from jax_moe._routing_reference import route_reference, sort_reference
from jax_moe._routing_reference import weigh as weigh

# In the order of `Gating` in ffi/targets.h.
GATINGS = ("softmax", "sigmoid", "softmax_after_topk", "sqrt_softplus")


class Routing(NamedTuple):
    """Which experts a token goes to, and with which weights.

    Attributes:
      expert_ids: int32 `[T, k]`. Within a token, best first. An id outside `[0, E)`, usually -1, is
        padding: it adds nothing to the token's result.
      weights: float32 `[T, k]`, the factor of each expert's output.
    """

    expert_ids: Array
    weights: Array


class Dispatch(NamedTuple):
    """The P = T * k (token, slot) pairs of a routing, grouped by expert.

    Attributes:
      sorted_token_ids: int32 `[P]`, pair ids (`token * k + slot`) by ascending expert id, in input
        order within an expert; pairs whose id is outside `[0, E)` come last, in input order.
      flat_expert_ids: int32 `[P]`, the expert id, as given, of each entry of `sorted_token_ids`.
      expert_offsets: int32 `[E + 1]`. The pairs of expert e are entries `expert_offsets[e]` to
        `expert_offsets[e + 1] - 1`; `expert_offsets[E]` is the number of pairs with a valid id.
    """

    sorted_token_ids: Array
    flat_expert_ids: Array
    expert_offsets: Array


class _Rule(NamedTuple):
    """The static half of `route`, validated. Hashable."""

    top_k: int
    gating: str
    normalize: bool
    scale: float
    num_groups: int
    num_groups_used: int


def route(
    logits: ArrayLike,
    top_k: int,
    *,
    gating: str = "softmax",
    selection_bias: ArrayLike | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    num_groups_used: int = 1,
    implementation: str | None = None,
) -> Routing:
    """Chooses `top_k` experts for every token, and their weights, as llama.cpp's MoE graph does.

    1. `gates` = softmax, sigmoid or sqrt(softplus) of the logits over the experts; the logits
       themselves with "softmax_after_topk".
    2. The selection score is `gates + selection_bias`. Without bias and groups it is the logits,
       which have the same order and no ties by saturation.
    3. With `num_groups` > 1, experts form groups of E / num_groups neighbours. A group's score is
       the sum of its two best selection scores, or the only one. The scores of all but the best
       `num_groups_used` groups become -inf.
    4. The `top_k` best scores win, ties going to the lower expert index.
    5. The weights are the winners' `gates`, without bias; with "softmax_after_topk", their softmax.
    6. `normalize` divides them by max(their sum, 2**-14).
    7. `scale` multiplies them, unless it is 0, which is how a GGUF file says that there is none.

    A NaN logit counts as -inf; a token with nothing but NaN gets experts 0 to `top_k` - 1 with NaN
    weights. A NaN score counts as -inf. Infinite logits follow IEEE arithmetic: a softmax over one
    +inf or over nothing but -inf is NaN. All arithmetic is float32.

    Args:
      logits: `[T, E]`, float32, float16 or bfloat16. The reference also takes float64, and then
        computes and returns float64 weights. On a GPU E is at most 4096.
      top_k: experts a token, 1 to E / num_groups * num_groups_used.
      gating: "softmax", "sigmoid", "softmax_after_topk" or "sqrt_softplus".
      selection_bias: `[E]`, floating, or None.
      normalize: whether a token's weights are made to sum to 1.
      scale: factor of the weights.
      num_groups: must divide E.
      num_groups_used: 1 to num_groups.
      implementation: None for the kernel of the platform, "reference" for pure JAX, which is
        differentiable with respect to `logits`.

    Raises:
      ValueError, TypeError: an argument is out of its range or of the wrong shape or dtype.
      ImportError: the platform's kernels cannot be used with the installed jaxlib.
    """
    check.implementation(implementation)
    logits = _as_array("logits", logits, implementation)
    _check_floating("logits", logits, 2, implementation)
    experts = logits.shape[1]
    rule = routing_rule(
        experts,
        top_k,
        gating=gating,
        normalize=normalize,
        scale=scale,
        num_groups=num_groups,
        num_groups_used=num_groups_used,
    )
    if selection_bias is not None:
        selection_bias = _as_array("selection_bias", selection_bias, implementation)
        _check_floating("selection_bias", selection_bias, 1, implementation)
        check.shape("selection_bias", selection_bias, (experts,), "[E]")
    if implementation == "reference":
        return Routing(*route_reference(logits, selection_bias, **rule._asdict()))
    return _route(rule, logits, selection_bias)


def sort_by_expert(
    expert_ids: ArrayLike, num_experts: int, *, implementation: str | None = None
) -> Dispatch:
    """Groups (token, slot) pairs by expert with a stable sort.

    Args:
      expert_ids: `[T, k]` or `[P]`, int32 or a narrower integer. Any value is allowed; pairs with
        an id outside `[0, num_experts)` are listed last, in input order.
      num_experts: E, at least 1; on a GPU at most 8192, with at most 2^30 pairs.
      implementation: None for the kernel of the platform, "reference" for pure JAX.

    Raises:
      ValueError, TypeError: an argument is out of its range or of the wrong shape or dtype.
      ImportError: the platform's kernels cannot be used with the installed jaxlib.
    """
    check.implementation(implementation)
    expert_ids = _as_array("expert_ids", expert_ids, implementation)
    if not jnp.issubdtype(expert_ids.dtype, jnp.integer) or not np.can_cast(
        expert_ids.dtype, np.int32
    ):
        raise TypeError(
            f"expert_ids has dtype int32 or a narrower integer, not {expert_ids.dtype}."
        )
    if expert_ids.ndim not in (1, 2):
        raise ValueError(f"expert_ids has shape [T, k] or [P], not {expert_ids.shape}.")
    experts = check.positive("num_experts", num_experts)
    if experts >= check.INT32_MAX:
        raise ValueError(f"num_experts is less than {check.INT32_MAX}, not {experts}.")
    if implementation == "reference":
        return Dispatch(*sort_reference(expert_ids.astype(jnp.int32).reshape(-1), experts))
    return _sort_by_expert(experts, expert_ids)


# --- Validation --------------------------------------------------------------------------------


def _check_floating(name: str, x: Array, rank: int, implementation: str | None) -> None:
    wider = (jnp.float64,) if implementation == "reference" else ()
    check.array(name, x, rank=rank, dtypes=(*check.DENSE_DTYPES, *wider))


def _as_array(name: str, x: ArrayLike, implementation: str | None) -> Array:
    """x as an array; of Python's numbers, which have no width, one of 32 bits under x64 too."""
    result = jnp.asarray(x)
    if hasattr(x, "dtype"):
        return result
    if result.dtype == jnp.float64 and implementation is None:
        return result.astype(jnp.float32)
    if result.dtype == jnp.int64:
        try:
            return jnp.asarray(x, jnp.int32)
        except OverflowError:
            raise ValueError(f"{name} has a number that int32 cannot hold.") from None
    return result


def routing_rule(
    experts: int,
    top_k: int,
    *,
    gating: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    num_groups_used: int,
    prefix: str = "",
) -> _Rule:
    """Checks the numbers of `route` for logits of `experts`; `prefix` goes before their names."""
    check.choice(f"{prefix}gating", gating, GATINGS)
    rule = _Rule(
        top_k=check.positive(f"{prefix}top_k", top_k),
        gating=gating,
        normalize=bool(normalize),
        scale=check.number(f"{prefix}scale", scale),
        num_groups=check.positive(f"{prefix}num_groups", num_groups),
        num_groups_used=check.positive(f"{prefix}num_groups_used", num_groups_used),
    )
    if experts % rule.num_groups:
        raise ValueError(
            f"{prefix}num_groups divides {experts} experts, and {rule.num_groups} does not."
        )
    if rule.num_groups_used > rule.num_groups:
        raise ValueError(
            f"{prefix}num_groups_used is at most {prefix}num_groups = {rule.num_groups}, "
            f"not {rule.num_groups_used}."
        )
    eligible = experts // rule.num_groups * rule.num_groups_used
    if rule.top_k > eligible:
        raise ValueError(
            f"{prefix}top_k is at most {eligible}, the number of eligible experts "
            f"({rule.num_groups_used} of {rule.num_groups} groups of {experts} experts), "
            f"not {rule.top_k}."
        )
    return rule


# --- Kernels -----------------------------------------------------------------------------------


@_ffi.cached
def _route(rule: _Rule, logits: Array, selection_bias: Array | None) -> Routing:
    bias = float_operand(selection_bias)
    return Routing(*_route_op(rule, logits.astype(jnp.float32), bias))


@_ffi.cached
def _sort_by_expert(experts: int, expert_ids: Array) -> Dispatch:
    results = _sort_op(experts, expert_ids.astype(jnp.int32).reshape(1, -1))
    return Dispatch(*(result[0] for result in results))


def _run_route(rule: _Rule, logits: Array, bias: Array) -> list[Array]:
    shape = (logits.shape[0], rule.top_k)
    return _ffi.call(
        "jax_moe_route",
        [jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)],
        logits,
        bias,
        gating=GATINGS.index(rule.gating),
        normalize=rule.normalize,
        scale=rule.scale,
        num_groups=rule.num_groups,
        num_groups_used=rule.num_groups_used,
    )


def _fold_route(op, rule: _Rule, size: int, batched, logits: Array, bias: Array):
    """The batch joins the tokens; only a batched bias, which differs by element, takes a loop."""
    if batched[1]:
        logits = _ffi.broadcast_batch(logits, batched[0], size)
        return jax.lax.map(lambda operands: op(rule, *operands), (logits, bias))
    tokens, experts = logits.shape[1:]
    results = op(rule, logits.reshape(size * tokens, experts), bias)
    return tuple(result.reshape(size, tokens, rule.top_k) for result in results)


def _run_sort(experts: int, expert_ids: Array) -> list[Array]:
    batch, pairs = expert_ids.shape
    return _ffi.call(
        "jax_moe_sort",
        [
            jax.ShapeDtypeStruct((batch, pairs), jnp.int32),
            jax.ShapeDtypeStruct((batch, pairs), jnp.int32),
            jax.ShapeDtypeStruct((batch, experts + 1), jnp.int32),
        ],
        expert_ids,
    )


def _fold_sort(op, experts: int, size: int, batched, expert_ids: Array):
    """Rows are sorted on their own, so the batch joins the rows."""
    rows, pairs = expert_ids.shape[1:]
    results = op(experts, expert_ids.reshape(size * rows, pairs))
    return tuple(result.reshape(size, rows, result.shape[-1]) for result in results)


_route_op = _ffi.op(_run_route, _fold_route)
_sort_op = _ffi.op(_run_sort, _fold_sort)
