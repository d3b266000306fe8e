"""moe_block: a whole Mixture-of-Experts block of a model, from its input to the residual sum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_moe._block_problem import AxisName as AxisName
from jax_moe._block_problem import axis_is_bound as axis_is_bound
from jax_moe._block_problem import block_problem
from jax_moe._block_types import MoEConfig as MoEConfig
from jax_moe._block_types import MoEParams as MoEParams
from jax_moe._ffn import Experts, Weight, moe_ffn
from jax_moe._gemm import moe_gemm
from jax_moe._reference import accumulator
from jax_moe._routing import Routing, gates, route, weigh
from jax_moe._variants import MoEVariant, variant_for


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
      variant, implementation: as in `moe_ffn`. The routed experts must be what the variant takes;
        of shared and chunk experts and latent projections, those that are not run without it.

    Returns:
      x's shape and dtype: what goes to the residual sum. A norm or a factor that a model applies to
      the result of any of its sublayers, MoE or not, is outside, as the pre-norm is.

    The router's product runs at the highest precision in float32, whatever x's dtype. With
    `expert_axis` every device routes alike, runs its own experts, and their results are summed in
    float32; shared and chunk experts run once on every device. Under x64 the reference has float64
    in place of float32.

    Raises: TypeError or ValueError when traced, naming the argument.
    """
    problem = block_problem(
        params,
        x,
        config,
        router_input=router_input,
        token_ids=token_ids,
        expert_axis=expert_axis,
        variant=variant,
        implementation=implementation,
    )
    rows = (problem.num_tokens, problem.d_model)
    tokens = x.reshape(rows)
    router_rows = tokens if router_input is None else router_input.reshape(rows)
    run = _Run(config, variant, implementation)
    logits = _router_logits(params, router_rows, run)
    ids = None if token_ids is None else token_ids.reshape(-1)
    routing = _route(params, logits, ids, run)
    if expert_axis is not None:  # the experts of other devices become ids that add nothing
        first = jax.lax.axis_index(expert_axis) * problem.local_experts
        routing = Routing(routing.expert_ids - first, routing.weights)

    y = tokens
    if params.latent_down is not None:
        y = _project(y, params.latent_down, run)
    y = _routed(params.experts, y, routing, run, config.weights_before)
    if expert_axis is not None:
        y = jax.lax.psum(y.astype(run.wide), expert_axis).astype(y.dtype)
    if params.chunk_experts is not None:
        y = y + _second_pass(params.chunk_experts, y, logits, run)
    if params.latent_norm is not None:
        y = _rms_norm(y, params.latent_norm, run)
    if params.latent_up is not None:
        y = _project(y, params.latent_up, run)
    if params.routed_post_norm is not None:
        y = _rms_norm(y, params.routed_post_norm, run)
    if params.shared is not None:
        read = tokens
        if params.shared_pre_norm is not None:
            read = _rms_norm(router_rows, params.shared_pre_norm, run).astype(x.dtype)
        y = y + _shared(params, read, run)
        if config.sum_scale != 1.0:
            y = y * jnp.asarray(config.sum_scale, y.dtype)
    return y.reshape(x.shape)


class _Run(NamedTuple):
    """How a block is computed."""

    config: MoEConfig
    variant: MoEVariant | None
    implementation: str | None

    @property
    def wide(self) -> Any:
        """The dtype of routing, norms and sums over devices."""
        return accumulator() if self.implementation == "reference" else jnp.dtype(jnp.float32)

    def options(self, x: Array, *weights: Weight) -> dict[str, Any]:
        """Options of an op on x; its weights may be of other kinds than the routed experts'."""
        variant = variant_for(self.variant, x.dtype, weights)
        return {"variant": variant, "implementation": self.implementation}


def _router_logits(params: MoEParams, router_input: Array, run: _Run) -> Array:
    rows = router_input.astype(run.wide)
    if params.router_scale is not None:
        rows = _rms_norm(rows, params.router_scale, run) * rows.shape[1] ** -0.5
    logits = jnp.einsum(
        "th,eh->te",
        rows,
        params.router.astype(run.wide),
        precision=jax.lax.Precision.HIGHEST,
    )
    if params.router_bias is not None:
        logits = logits + params.router_bias.astype(run.wide)[None]
    return logits


def _route(params: MoEParams, logits: Array, token_ids: Array | None, run: _Run) -> Routing:
    config, table = run.config, params.token_to_experts
    if table is None:
        return route(
            logits,
            config.top_k,
            gating=config.gating,
            selection_bias=params.selection_bias,
            normalize=config.normalize,
            scale=config.scale,
            num_groups=config.num_groups,
            num_groups_used=config.num_groups_used,
            implementation=run.implementation,
        )
    assert token_ids is not None
    if token_ids.dtype.itemsize < 4:  # which the size of the vocabulary may not fit into
        token_ids = token_ids.astype(jnp.int32)
    experts = jnp.asarray(table).at[token_ids].get(mode="clip")
    scores = gates(logits, config.gating)
    weights = weigh(scores, experts, config.gating, config.normalize, config.scale)
    known = (token_ids >= 0) & (token_ids < table.shape[0])
    return Routing(jnp.where(known[:, None], experts, -1), weights)


def _routed(
    experts: Experts, x: Array, routing: Routing, run: _Run, weights_before: bool = False
) -> Array:
    """`moe_ffn` with the activation of the routed experts."""
    return moe_ffn(
        x,
        routing,
        experts,
        activation=run.config.activation,
        activation_limit=run.config.activation_limit,
        activation_betas=run.config.activation_betas,
        weights_before=weights_before,
        **run.options(x, *experts.weights.values()),
    )


def _second_pass(chunks: Experts, y: Array, logits: Array, run: _Run) -> Array:
    """GroveMoE's chunk experts on the first pass's result.

    The chosen experts' ids are divided by `experts_per_group`, and the weights are those of the
    experts with the divided ids, as in llama.cpp; two slots may name the same chunk.
    """
    config, num_chunks = run.config, chunks.down.shape[-3]
    top_k = min(config.top_k, num_chunks)
    chosen = route(logits, top_k, implementation=run.implementation).expert_ids
    ids = chosen // config.experts_per_group
    weights = weigh(gates(logits, "softmax"), ids, "softmax", True, 1.0)
    result = _routed(chunks, y, Routing(ids, weights), run)
    return result * jnp.asarray(config.chunk_scale, result.dtype)


def _shared(params: MoEParams, x: Array, run: _Run) -> Array:
    """The shared experts' result for what they read, x, as it goes into the sum."""
    config, experts = run.config, params.shared
    assert experts is not None
    weights = jnp.ones((x.shape[0], 1), run.wide)
    if params.shared_gate is not None:
        product = jnp.einsum(
            "th,h->t",
            x.astype(run.wide),
            params.shared_gate.astype(run.wide),
            precision=jax.lax.Precision.HIGHEST,
        )
        weights = jax.nn.sigmoid(product)[:, None]
    y = moe_ffn(
        x,
        Routing(jnp.zeros((x.shape[0], 1), jnp.int32), weights),
        experts,
        activation=config.shared_activation,
        activation_limit=config.shared_activation_limit,
        activation_betas=config.activation_betas if config.shared_activation == "situ" else None,
        **run.options(x, *experts.weights.values()),
    )
    if params.shared_post_norm is not None:
        y = _rms_norm(y, params.shared_post_norm, run)
    return y


def _project(x: Array, weight: Weight, run: _Run) -> Array:
    """x `[T, K]` times a weight of one expert, in x's dtype."""
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)
    y = moe_gemm(x, weight, rows, jnp.zeros_like(rows), top_k=1, **run.options(x, weight))
    return y.astype(x.dtype)


def _rms_norm(x: Array, weight: Array, run: _Run) -> Array:
    wide = x.astype(run.wide)
    square = jnp.mean(jnp.square(wide), -1, keepdims=True)
    scale = jax.lax.rsqrt(square + float(run.config.norm_eps))
    return (wide * scale * weight.astype(run.wide)[None]).astype(x.dtype)
