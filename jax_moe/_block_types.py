"""MoEConfig and MoEParams: what a model's metadata and tensors say of one MoE block."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

from jax_moe._ffn import Experts, Weight
from jax_moe._packed import EqualByLeaves, map_packed

# What a router reads, by MoEConfig.router_reads, in words.
ROUTER_READS = {
    "x": "x",
    "layer_input": "the layer's input, from before attention and any norm",
    "unnormed": "what x is the norm of, from before the norm",
}


@jax.tree_util.register_static
@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """What the metadata of a model says of its MoE blocks: hashable, a static pytree.

    Attributes:
      top_k: experts a token.
      gating, normalize, scale, num_groups, num_groups_used: as in `route`.
      router_reads: "x", or what `moe_block` must be given as `router_input`: "layer_input", the
        layer's input from before attention and any norm; "unnormed", what x is the norm of.
      activation, activation_limit, activation_betas, weights_before: as in `moe_ffn`.
      shared_activation, shared_activation_limit: of the shared experts, which share
        `activation_betas`.
      sum_scale: factor of the sum of routed and shared experts; where there are no shared experts
        it means nothing.
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
    router_reads: str = "x"
    activation: str = "swiglu"
    activation_limit: float | None = None
    activation_betas: tuple[float, float] | None = None
    weights_before: bool = False
    shared_activation: str = "swiglu"
    shared_activation_limit: float | None = None
    sum_scale: float = 1.0
    experts_per_group: int = 1
    chunk_scale: float = 1.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if isinstance(self.activation_betas, Iterable):  # from JSON it is a list, without a hash
            object.__setattr__(self, "activation_betas", tuple(self.activation_betas))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class MoEParams(EqualByLeaves):
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
      shared_pre_norm: float `[H]`, weight of an RMS norm of `router_input`, which the shared
        experts then read instead of x.
      routed_post_norm, shared_post_norm: float `[H]`, weights of RMS norms of the two results
        before their sum.
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
    shared_pre_norm: Array | None = None
    routed_post_norm: Array | None = None
    shared_post_norm: Array | None = None
    latent_down: Weight | None = None
    latent_up: Weight | None = None
    latent_norm: Array | None = None
    chunk_experts: Experts | None = None
    token_to_experts: Array | None = None

    def prepack(self, donate: bool = False) -> "MoEParams":
        """The same block with every packed weight as its `PackedExperts.prepack` gives it.

        Dense weights, and packed ones that have no tiled layout, stay as they are.
        """
        return map_packed(lambda weight: weight.prepack(donate), self)

    def unpack(self, donate: bool = False) -> "MoEParams":
        """The inverse of `prepack`: every packed weight in GGUF's layout."""
        return map_packed(lambda weight: weight.unpack(donate), self)

    def partition_specs(self, expert_axis: str | tuple[str, ...]) -> "MoEParams":
        """Where each leaf of one layer belongs when its experts are sharded over a mesh axis.

        The same pytree with a `PartitionSpec` for every leaf: the routed experts are split along E,
        all else is whole on every device. For `in_specs` of `jax.shard_map`, and, through
        `jax.tree.map`, for shardings.
        """
        whole: Any = jax.tree.map(lambda _: PartitionSpec(), self)
        split = jax.tree.map(lambda _: PartitionSpec(expert_axis), self.experts)
        return dataclasses.replace(whole, experts=split)
