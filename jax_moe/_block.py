"""moe_block: a whole Mixture-of-Experts block of a model, from its input to the residual sum."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_moe import _check as check
from jax_moe import _ffi
from jax_moe._block_types import ROUTER_READS
from jax_moe._block_types import MoEConfig as MoEConfig
from jax_moe._block_types import MoEParams as MoEParams
from jax_moe._ffn import Experts, Weight, moe_ffn
from jax_moe._gemm import moe_gemm
from jax_moe._packed import PackedExperts
from jax_moe._routing import Routing, gates, route, weigh
from jax_moe._variants import MoEVariant

AxisName = str | tuple[str, ...]


def moe_block(
    params: MoEParams,
    x: Array,
    config: MoEConfig,
    *,
    router_input: Array | None = None,
    token_ids: Array | None = None,
    expert_axis: AxisName | None = None,
    variant: MoEVariant | None = None,
    implementation: str | None = None,
) -> Array:
    """Routes every token, runs its experts, and adds the shared ones.

    Args:
      params: the block's tensors.
      x: float32, float16 or bfloat16 `[..., H]`, the experts' input after the block's pre-norm.
      config: the block's metadata.
      router_input: `[..., H]`, what the router reads; x where it is None, unless
        `config.router_reads` asks for something else.
      token_ids: integers `[...]`, the ids of the tokens, for `token_to_experts`; an id outside the
        vocabulary goes to no routed expert.
      expert_axis: inside `jax.shard_map`, the mesh axis (or axes) over which `params.experts` is
        sharded, in the order of the experts. Everything else, x included, is whole on every device
        of that axis; so is the result. `MoEParams.partition_specs` gives the `in_specs`.
      variant, implementation: as in `moe_ffn`.

    Returns:
      x's shape and dtype: what goes to the residual sum. A norm or a factor that a model applies to
      the result of any of its sublayers, MoE or not, is outside, as the pre-norm is.

    The router's product runs at the highest precision in float32, whatever x's dtype. With
    `expert_axis` every device routes alike, runs its own experts, and their results are summed in
    float32; shared and chunk experts run once on every device.

    Raises: TypeError or ValueError when traced, naming the argument.
    """
    if not isinstance(params, MoEParams):
        raise TypeError(f"params is jax_moe.MoEParams, not {type(params).__name__}.")
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config is jax_moe.MoEConfig, not {type(config).__name__}.")
    if x.ndim < 1:
        raise ValueError("x has at least one axis, [..., H].")
    shape, d_model = x.shape, x.shape[-1]
    num_tokens = math.prod(shape[:-1])
    tokens = x.reshape(num_tokens, d_model)
    router_rows = _router_rows(router_input, x, config).reshape(num_tokens, d_model)
    options: dict[str, Any] = {"variant": variant, "implementation": implementation}
    logits = _router_logits(params, router_rows, config)
    local = check.weight("params.experts.down", params.experts.down)[0]
    num_experts = local
    if expert_axis is not None:
        num_experts *= _axis_size(expert_axis, tokens, router_rows)
    if logits.shape[1] != num_experts:
        where = "" if expert_axis is None else f", {local} on each device of {expert_axis!r}"
        raise ValueError(
            f"params.router has shape [E, H] = {params.router.shape}, but params.experts has "
            f"{num_experts} experts{where}."
        )
    routing = _route(params, logits, config, _flat_ids(token_ids, shape), implementation)
    if expert_axis is not None:  # the experts of other devices become ids that add nothing
        first = jax.lax.axis_index(expert_axis) * local
        routing = Routing(routing.expert_ids - first, routing.weights)

    y = tokens
    if params.latent_down is not None:
        y = _project("latent_down", tokens, params.latent_down, options)
    y = moe_ffn(
        y,
        routing,
        params.experts,
        activation=config.activation,
        activation_limit=config.activation_limit,
        activation_betas=config.activation_betas,
        weights_before=config.weights_before,
        **options,
    )
    if expert_axis is not None:
        y = jax.lax.psum(y.astype(jnp.float32), expert_axis).astype(y.dtype)
    if params.chunk_experts is not None:
        y = y + _second_pass(params.chunk_experts, y, logits, config, options)
    if params.latent_norm is not None:
        y = _rms_norm(y, params.latent_norm, config)
    if params.latent_up is not None:
        y = _project("latent_up", y, params.latent_up, options)
    if params.routed_post_norm is not None:
        y = _rms_norm(y, params.routed_post_norm, config)
    if params.shared is not None:
        read = tokens
        if params.shared_pre_norm is not None:
            read = _rms_norm(router_rows, params.shared_pre_norm, config).astype(x.dtype)
        y = y + _shared(params, read, config, options)
        if config.sum_scale != 1.0:
            y = y * jnp.asarray(config.sum_scale, y.dtype)
    return y.reshape(shape)


def axis_is_bound(axis: AxisName) -> bool:
    """Whether an enclosing `jax.shard_map` has this axis."""
    try:
        jax.lax.axis_size(axis)
    except NameError:
        return False
    return True


def _axis_size(axis: AxisName, x: Array, router_rows: Array) -> int:
    """The devices of `expert_axis`, over which neither may be sharded."""
    if not axis_is_bound(axis):
        raise ValueError(
            f"expert_axis is an axis of an enclosing jax.shard_map, and {axis!r} is none."
        )
    names = {axis} if isinstance(axis, str) else set(axis)
    if sharded := names & (_ffi.varying_axes(x) | _ffi.varying_axes(router_rows)):
        raise ValueError(
            f"x, or router_input, differs between the devices of {', '.join(sorted(sharded))}, "
            "which each run their experts for all tokens; all_gather the tokens before, and take "
            "the device's own from the result."
        )
    return jax.lax.axis_size(axis)


def _router_rows(router_input: Array | None, x: Array, config: MoEConfig) -> Array:
    check.choice("config.router_reads", config.router_reads, tuple(ROUTER_READS))
    if router_input is None:
        if config.router_reads != "x":
            raise ValueError(
                "router_input is needed: this block's router reads "
                f"{ROUTER_READS[config.router_reads]}."
            )
        return x
    if router_input.shape != x.shape:
        raise ValueError(f"router_input has x's shape {x.shape}, not {router_input.shape}.")
    return router_input


def _flat_ids(token_ids: Array | None, shape: tuple[int, ...]) -> Array | None:
    if token_ids is None:
        return None
    if not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise TypeError(f"token_ids holds integers, not {token_ids.dtype}.")
    if token_ids.shape != shape[:-1]:
        raise ValueError(
            f"token_ids has the shape of x without its last axis, {shape[:-1]}, not "
            f"{token_ids.shape}."
        )
    return token_ids.reshape(-1)


def _router_logits(params: MoEParams, router_input: Array, config: MoEConfig) -> Array:
    check.array("params.router", params.router, rank=2, dtypes=check.DENSE_DTYPES)
    if params.router.shape[1] != router_input.shape[1]:
        raise ValueError(
            f"params.router has shape [E, H] = {params.router.shape}, but x has H = "
            f"{router_input.shape[1]}."
        )
    rows = router_input.astype(jnp.float32)
    if params.router_scale is not None:
        rows = _rms_norm(rows, params.router_scale, config) * rows.shape[1] ** -0.5
    logits = jnp.einsum(
        "th,eh->te",
        rows,
        params.router.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return logits if params.router_bias is None else logits + params.router_bias


def _route(
    params: MoEParams,
    logits: Array,
    config: MoEConfig,
    token_ids: Array | None,
    implementation: str | None,
) -> Routing:
    if params.token_to_experts is None:
        return route(
            logits,
            config.top_k,
            gating=config.gating,
            selection_bias=params.selection_bias,
            normalize=config.normalize,
            scale=config.scale,
            num_groups=config.num_groups,
            num_groups_used=config.num_groups_used,
            implementation=implementation,
        )
    if token_ids is None:
        raise ValueError("token_ids is needed by a block with token_to_experts.")
    table = params.token_to_experts
    experts = table.at[token_ids].get(mode="clip")
    scores = gates(logits, config.gating)
    weights = weigh(scores, experts, config.gating, config.normalize, config.scale)
    known = (token_ids >= 0) & (token_ids < table.shape[0])
    return Routing(jnp.where(known[:, None], experts, -1), weights)


def _second_pass(
    chunks: Experts, y: Array, logits: Array, config: MoEConfig, options: dict[str, Any]
) -> Array:
    """GroveMoE's chunk experts on the first pass's result.

    The chosen experts' ids are divided by `experts_per_group`, and the weights are those of the
    experts with the divided ids, as in llama.cpp; two slots may name the same chunk.
    """
    num_chunks = chunks.down.shape[-3]
    if num_chunks * config.experts_per_group != logits.shape[1]:
        raise ValueError(
            f"params.chunk_experts has {num_chunks} experts, not one for each "
            f"{config.experts_per_group} (config.experts_per_group) of {logits.shape[1]} experts."
        )
    chosen = route(
        logits, min(config.top_k, num_chunks), implementation=options["implementation"]
    ).expert_ids
    ids = chosen // config.experts_per_group
    weights = weigh(gates(logits, "softmax"), ids, "softmax", True, 1.0)
    result = moe_ffn(y, Routing(ids, weights), chunks, activation=config.activation, **options)
    return result * jnp.asarray(config.chunk_scale, result.dtype)


def _shared(params: MoEParams, x: Array, config: MoEConfig, options: dict[str, Any]) -> Array:
    """The shared experts' result for what they read, x, as it goes into the sum."""
    assert params.shared is not None
    weights = jnp.ones((x.shape[0], 1), jnp.float32)
    if params.shared_gate is not None:
        product = jnp.einsum(
            "th,h->t",
            x.astype(jnp.float32),
            params.shared_gate.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        weights = jax.nn.sigmoid(product)[:, None]
    y = moe_ffn(
        x,
        Routing(jnp.zeros((x.shape[0], 1), jnp.int32), weights),
        params.shared,
        activation=config.shared_activation,
        activation_limit=config.shared_activation_limit,
        activation_betas=config.activation_betas if config.shared_activation == "situ" else None,
        **options,
    )
    if params.shared_post_norm is not None:
        y = _rms_norm(y, params.shared_post_norm, config)
    return y


def _project(name: str, x: Array, weight: Weight, options: dict[str, Any]) -> Array:
    """x `[T, K]` times a weight of one expert, in x's dtype."""
    if check.weight(f"params.{name}", weight)[0] != 1:
        raise ValueError(f"params.{name} has shape [1, N, K], not {weight.shape}.")
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)
    if not isinstance(weight, PackedExperts):
        options = {**options, "variant": None}
    y = moe_gemm(x, weight, rows, jnp.zeros_like(rows), top_k=1, **options)
    return y.astype(x.dtype)


def _rms_norm(x: Array, weight: Array, config: MoEConfig) -> Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + config.norm_eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)
