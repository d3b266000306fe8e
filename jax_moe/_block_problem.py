"""What moe_block demands of its arguments, checked when it is traced."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe import _check as check
from jax_moe import _ffi
from jax_moe._activations import check_activation
from jax_moe._block_types import ROUTER_READS, MoEConfig, MoEParams
from jax_moe._ffn import ExpertsProblem, experts_problem
from jax_moe._routing import routing_rule
from jax_moe._variants import MoEVariant, as_variant, check_variant

AxisName = str | tuple[str, ...]


@dataclass(frozen=True)
class BlockProblem:
    """A moe_block whose arguments have been checked."""

    num_tokens: int
    d_model: int
    local_experts: int  # on this device of `expert_axis`


def block_problem(
    params: MoEParams,
    x: Any,
    config: MoEConfig,
    *,
    router_input: Any,
    token_ids: Any,
    expert_axis: AxisName | None,
    variant: MoEVariant | None,
    implementation: str | None,
) -> BlockProblem:
    """Checks the arguments of `moe_block` and every field of `params` and `config` that it uses."""
    check.implementation(implementation)
    variant = as_variant(variant)
    dtypes = check.float_dtypes(implementation)
    if not isinstance(params, MoEParams):
        raise TypeError(f"params is jax_moe.MoEParams, not {type(params).__name__}.")
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config is jax_moe.MoEConfig, not {type(config).__name__}.")
    check.array("x", x, rank=None, dtypes=dtypes)
    if not x.shape:
        raise ValueError("x has at least one axis, [..., H].")
    *leading, d_model = x.shape
    _check_router_input(router_input, x, config, dtypes)
    _check_token_ids(token_ids, params, tuple(leading))
    for name in ("norm_eps", "sum_scale", "chunk_scale"):
        check.number(f"config.{name}", getattr(config, name))

    width = _latent_width(params, d_model)
    reads = "x" if width is None else "params.latent_down's result"
    width = d_model if width is None else width
    experts = experts_problem("params.experts", params.experts, reads, width, dtypes)
    weights = {f"params.experts.{name}": w for name, w in params.experts.weights.items()}
    check_variant(variant, x.dtype, weights)
    _check_activation(config, experts)
    num_experts = experts.num_experts
    if expert_axis is not None:
        num_experts *= _axis_size(expert_axis, x, x if router_input is None else router_input)

    _check_router(params, num_experts, d_model, dtypes, expert_axis, experts.num_experts)
    routing_rule(
        num_experts,
        config.top_k,
        gating=config.gating,
        normalize=config.normalize,
        scale=config.scale,
        num_groups=config.num_groups,
        num_groups_used=config.num_groups_used,
        prefix="config.",
    )
    _check_table(params, config)
    _check_vectors(params, num_experts, d_model, width, dtypes)
    _check_shared(params, config, d_model, dtypes)
    if params.chunk_experts is not None:
        reads = "the routed experts' result"
        chunks = experts_problem("params.chunk_experts", params.chunk_experts, reads, width, dtypes)
        group = check.positive("config.experts_per_group", config.experts_per_group)
        if chunks.num_experts * group != num_experts:
            raise ValueError(
                f"params.chunk_experts has {chunks.num_experts} experts, not one for each {group} "
                f"(config.experts_per_group) of {num_experts} experts."
            )
        _check_activation(config, chunks)
    return BlockProblem(math.prod(leading), d_model, experts.num_experts)


def axis_is_bound(axis: AxisName) -> bool:
    """Whether an enclosing `jax.shard_map` has this axis."""
    try:
        jax.lax.axis_size(axis)
    except NameError:
        return False
    return True


def _axis_size(axis: AxisName, x: Any, router_input: Any) -> int:
    """The devices of `expert_axis`, over which neither may be sharded."""
    if not axis_is_bound(axis):
        raise ValueError(
            f"expert_axis is an axis of an enclosing jax.shard_map, and {axis!r} is none."
        )
    names = {axis} if isinstance(axis, str) else set(axis)
    if sharded := names & (_ffi.varying_axes(x) | _ffi.varying_axes(router_input)):
        raise ValueError(
            f"x, or router_input, differs between the devices of {', '.join(sorted(sharded))}, "
            "which each run their experts for all tokens; all_gather the tokens before, and take "
            "the device's own from the result."
        )
    return jax.lax.axis_size(axis)


def _check_router_input(router_input: Any, x: Any, config: MoEConfig, dtypes: tuple) -> None:
    check.choice("config.router_reads", config.router_reads, tuple(ROUTER_READS))
    if router_input is None:
        if config.router_reads != "x":
            raise ValueError(
                "router_input is needed: this block's router reads "
                f"{ROUTER_READS[config.router_reads]}."
            )
        return
    check.array("router_input", router_input, rank=None, dtypes=dtypes)
    if router_input.shape != x.shape:
        raise ValueError(f"router_input has x's shape {x.shape}, not {router_input.shape}.")


def _check_token_ids(token_ids: Any, params: MoEParams, leading: tuple[int, ...]) -> None:
    if token_ids is None:
        if params.token_to_experts is not None:
            raise ValueError("token_ids is needed by a block with params.token_to_experts.")
        return
    if not hasattr(token_ids, "shape") or not hasattr(token_ids, "dtype"):
        raise TypeError(f"token_ids is an array, not {type(token_ids).__name__}.")
    if not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise TypeError(f"token_ids holds integers, not {token_ids.dtype}.")
    if token_ids.shape != leading:
        raise ValueError(
            f"token_ids has the shape of x without its last axis, {leading}, not {token_ids.shape}."
        )


def _latent_width(params: MoEParams, d_model: int) -> int | None:
    """The width of the routed experts between latent projections; None where there are none."""
    if (params.latent_down is None) != (params.latent_up is None):
        given, missing = "latent_down", "latent_up"
        if params.latent_down is None:
            given, missing = missing, given
        raise ValueError(f"params.{given} is given without params.{missing}.")
    if params.latent_down is None:
        return None
    down = check.weight("params.latent_down", params.latent_down)
    expected = (1, down[1], d_model)
    if down != expected:
        raise ValueError(f"params.latent_down has shape [1, latent, H] = {expected}, not {down}.")
    up = check.weight("params.latent_up", params.latent_up)
    expected = (1, d_model, down[1])
    if up != expected:
        raise ValueError(f"params.latent_up has shape [1, H, latent] = {expected}, not {up}.")
    return down[1]


def _check_activation(config: MoEConfig, experts: ExpertsProblem) -> None:
    check_activation(
        config.activation,
        config.activation_limit,
        config.activation_betas,
        experts.gated,
        ("config.activation", "config.activation_limit", "config.activation_betas"),
    )


def _check_router(
    params: MoEParams,
    num_experts: int,
    d_model: int,
    dtypes: tuple,
    expert_axis: AxisName | None,
    local_experts: int,
) -> None:
    check.array("params.router", params.router, rank=2, dtypes=dtypes)
    given = f"params.router has shape [E, H] = {params.router.shape}, but"
    if params.router.shape[1] != d_model:
        raise ValueError(f"{given} x has H = {d_model}.")
    if params.router.shape[0] != num_experts:
        where = (
            "" if expert_axis is None else f", {local_experts} on each device of {expert_axis!r}"
        )
        raise ValueError(f"{given} params.experts has {num_experts} experts{where}.")


def _check_table(params: MoEParams, config: MoEConfig) -> None:
    table = params.token_to_experts
    if table is None:
        return
    check.array("params.token_to_experts", table, rank=2, dtypes=(jnp.int32,))
    if table.shape[0] < 1 or table.shape[1] != config.top_k:
        raise ValueError(
            "params.token_to_experts has shape [vocabulary, k] with k = config.top_k = "
            f"{config.top_k} and a row at least, not {table.shape}."
        )


def _check_vectors(
    params: MoEParams, num_experts: int, d_model: int, width: int, dtypes: tuple
) -> None:
    """Checks the fields with one axis: float, of the right length, beside what they belong to."""
    for name, length, meaning, needs in (
        ("router_bias", num_experts, "[E]", "router"),
        ("selection_bias", num_experts, "[E]", "router"),
        ("router_scale", d_model, "[H]", "router"),
        ("shared_gate", d_model, "[H]", "shared"),
        ("shared_pre_norm", d_model, "[H]", "shared"),
        ("shared_post_norm", d_model, "[H]", "shared"),
        ("routed_post_norm", d_model, "[H]", "experts"),
        ("latent_norm", width, "[latent]", "latent_up"),
    ):
        vector = getattr(params, name)
        if vector is None:
            continue
        if getattr(params, needs) is None:
            raise ValueError(f"params.{name} is given without params.{needs}.")
        check.array(f"params.{name}", vector, rank=1, dtypes=dtypes)
        check.shape(f"params.{name}", vector, (length,), meaning)


def _check_shared(params: MoEParams, config: MoEConfig, d_model: int, dtypes: tuple) -> None:
    if params.shared is None:
        return
    reads = "x" if params.shared_pre_norm is None else "router_input"
    shared = experts_problem("params.shared", params.shared, reads, d_model, dtypes)
    if shared.num_experts != 1:
        raise ValueError(
            f"params.shared is one network, E = 1, but has {shared.num_experts} experts."
        )
    check_activation(
        config.shared_activation,
        config.shared_activation_limit,
        config.activation_betas if config.shared_activation == "situ" else None,
        shared.gated,
        ("config.shared_activation", "config.shared_activation_limit", "config.activation_betas"),
    )
