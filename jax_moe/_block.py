"""moe_block: a whole Mixture-of-Experts block of a model, from its input to the residual sum."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_moe import _check as check
from jax_moe._ffn import Experts, Weight, moe_ffn
from jax_moe._gemm import moe_gemm
from jax_moe._packed import PackedExperts
from jax_moe._routing import Routing, gates, route, weigh
from jax_moe._variants import MoEVariant


@jax.tree_util.register_static
@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """What the metadata of a model says of its MoE blocks: hashable, a static pytree.

    Attributes:
      top_k: experts a token.
      gating, normalize, scale, num_groups, num_groups_used: as in `route`.
      activation, activation_limit, activation_betas, weights_before: as in `moe_ffn`.
      shared_activation, shared_activation_limit: of the shared experts, which share
        `activation_betas`.
      shared_average: the result is the mean of routed and shared experts instead of their sum.
      experts_per_group: routed experts for one chunk expert (GroveMoE's second pass).
      chunk_scale: factor of that pass's result.
      norm_eps: epsilon of the RMS norms inside the block.
    """

    top_k: int
    gating: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    num_groups_used: int = 1
    activation: str = "swiglu"
    activation_limit: float | None = None
    activation_betas: tuple[float, float] | None = None
    weights_before: bool = False
    shared_activation: str = "swiglu"
    shared_activation_limit: float | None = None
    shared_average: bool = False
    experts_per_group: int = 1
    chunk_scale: float = 1.0
    norm_eps: float = 1e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MoEParams:
    """The tensors of one MoE block: a pytree. E experts, d_model H.

    A 2-D weight of the file is an `Experts` or `PackedExperts` of one expert (E = 1), so that it
    stays packed too.

    Attributes:
      experts: the routed experts; H is the latent width where the block has one.
      router: float `[E, H]`.
      router_bias: float `[E]`, added to the logits.
      selection_bias: float `[E]`, added to the scores that select experts, not to their weights.
      router_scale: float `[H]`; the router then reads its RMS-normalised input times
        `router_scale / sqrt(H)`.
      shared: the shared experts as one network of E = 1.
      shared_gate: float `[H]`; the shared result is multiplied by sigmoid(x . shared_gate).
      latent_down, latent_up: `[1, latent, H]` and `[1, H, latent]`, to and from the routed experts'
        width.
      latent_norm: float `[latent]`, weight of an RMS norm before `latent_up`.
      chunk_experts: `[E / experts_per_group, ...]`, the experts of a second pass over the result.
      token_to_experts: int32 `[vocabulary, k]`, the experts of each token id where they are not
        chosen by score.
    """

    experts: Experts
    router: Array
    router_bias: Array | None = None
    selection_bias: Array | None = None
    router_scale: Array | None = None
    shared: Experts | None = None
    shared_gate: Array | None = None
    latent_down: Weight | None = None
    latent_up: Weight | None = None
    latent_norm: Array | None = None
    chunk_experts: Experts | None = None
    token_to_experts: Array | None = None


def moe_block(
    params: MoEParams,
    x: Array,
    config: MoEConfig,
    *,
    router_input: Array | None = None,
    token_ids: Array | None = None,
    variant: MoEVariant | None = None,
    implementation: str | None = None,
) -> Array:
    """Routes every token, runs its experts, and adds the shared ones.

    Args:
      params: the block's tensors.
      x: float32, float16 or bfloat16 `[..., H]`, the experts' input after the block's pre-norm.
      config: the block's metadata.
      router_input: `[..., H]` where the router reads something else than x.
      token_ids: int32 `[...]`, for `token_to_experts`.
      variant, implementation: as in `moe_ffn`.

    Returns:
      x's shape and dtype: what the residual connection adds.

    The router's product runs at the highest precision in float32, whatever x's dtype.

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
    if router_input is None:
        router_input = x
    elif router_input.shape != shape:
        raise ValueError(f"router_input has x's shape {shape}, not {router_input.shape}.")
    options: dict[str, Any] = {"variant": variant, "implementation": implementation}
    logits = _router_logits(params, router_input.reshape(num_tokens, d_model), config)
    num_experts = check.weight("params.experts.down", params.experts.down)[0]
    if logits.shape[1] != num_experts:
        raise ValueError(
            f"params.router has shape [E, H] = {params.router.shape}, but params.experts has "
            f"{num_experts} experts."
        )
    routing = _route(params, logits, config, token_ids, implementation)

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
    if params.chunk_experts is not None:
        y = y + _second_pass(params.chunk_experts, y, logits, config, options)
    if params.latent_norm is not None:
        y = _rms_norm(y, config.norm_eps) * params.latent_norm.astype(y.dtype)
    if params.latent_up is not None:
        y = _project("latent_up", y, params.latent_up, options)
    if params.shared is not None:
        y = y + _shared(params, tokens, config, options)
        if config.shared_average:
            y = y * jnp.asarray(0.5, y.dtype)
    return y.reshape(shape)


def _router_logits(params: MoEParams, router_input: Array, config: MoEConfig) -> Array:
    check.array("params.router", params.router, rank=2, dtypes=check.DENSE_DTYPES)
    if params.router.shape[1] != router_input.shape[1]:
        raise ValueError(
            f"params.router has shape [E, H] = {params.router.shape}, but x has H = "
            f"{router_input.shape[1]}."
        )
    rows = router_input.astype(jnp.float32)
    if params.router_scale is not None:
        rows = _rms_norm(rows, config.norm_eps) * params.router_scale * rows.shape[1] ** -0.5
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
    experts = params.token_to_experts[token_ids.reshape(-1)]
    scores = gates(logits, config.gating)
    return Routing(experts, weigh(scores, experts, config.gating, config.normalize, config.scale))


def _second_pass(
    chunks: Experts, y: Array, logits: Array, config: MoEConfig, options: dict[str, Any]
) -> Array:
    """GroveMoE's chunk experts on the first pass's result.

    The chosen experts' ids are divided by `experts_per_group`, and the weights are those of the
    experts with the divided ids, as in llama.cpp; two slots may name the same chunk.
    """
    num_chunks = chunks.down.shape[-3]
    chosen = route(
        logits, min(config.top_k, num_chunks), implementation=options["implementation"]
    ).expert_ids
    ids = chosen // config.experts_per_group
    weights = weigh(gates(logits, "softmax"), ids, "softmax", True, 1.0)
    result = moe_ffn(y, Routing(ids, weights), chunks, activation=config.activation, **options)
    return result * jnp.asarray(config.chunk_scale, result.dtype)


def _shared(params: MoEParams, x: Array, config: MoEConfig, options: dict[str, Any]) -> Array:
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
    return moe_ffn(
        x,
        Routing(jnp.zeros((x.shape[0], 1), jnp.int32), weights),
        params.shared,
        activation=config.shared_activation,
        activation_limit=config.shared_activation_limit,
        activation_betas=config.activation_betas if config.shared_activation == "situ" else None,
        **options,
    )


def _project(name: str, x: Array, weight: Weight, options: dict[str, Any]) -> Array:
    """x `[T, K]` times a weight of one expert, in x's dtype."""
    if check.weight(f"params.{name}", weight)[0] != 1:
        raise ValueError(f"params.{name} has shape [1, N, K], not {weight.shape}.")
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)
    if not isinstance(weight, PackedExperts):
        options = {**options, "variant": None}
    y = moe_gemm(x, weight, rows, jnp.zeros_like(rows), top_k=1, **options)
    return y.astype(x.dtype)


def _rms_norm(x: Array, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)).astype(
        x.dtype
    )
