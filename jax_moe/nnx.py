"""MoE: moe_block as a Flax NNX module. Needs Flax: `pip install 'jax_moe[flax]'`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from jax_moe._block import AxisName, MoEConfig, MoEParams, axis_is_bound, moe_block
from jax_moe._gguf import GGUFFile
from jax_moe._tree import expert_axes, from_tree, is_trainable, quantize_params, to_tree
from jax_moe._variants import MoEVariant

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("jax_moe.nnx needs Flax: pip install 'jax_moe[flax]'") from error

__all__ = ["MoE", "PackedParam"]


class PackedParam(nnx.Variable):
    """Integers that are part of a model and not trained.

    The uint8 blocks of a packed weight, or the table of a block that chooses experts by token id.
    It is not an `nnx.Param`, so optimizers and gradients with respect to `nnx.Param` leave it
    alone. Nothing may cast it to another dtype.
    """


class MoE(nnx.Module):
    """A Mixture-of-Experts block.

    Its attributes are `config`, `expert_axis` and the fields of `params` that are present, under
    the same names. Float arrays are `nnx.Param`; a packed weight is an `nnx.Dict` of one
    `PackedParam` under the name of its format, as in `moe.experts["gate"]["Q4_K"]`. So a state or
    checkpoint names the format of each weight, and nothing but `config` must be kept beside it.

    Args:
      params: the block's tensors; of abstract ones (`jax.ShapeDtypeStruct`) results an abstract
        module.
      config: the block's metadata.
      expert_axis: a mesh axis, or logical axis: the variables of the routed experts are annotated
        with it (`out_sharding`, for `nnx.get_partition_spec` and the like). The arrays stay where
        they are, and no mesh need be set. Inside a `jax.shard_map` over it, calls take the experts
        for the device's share.
    """

    def __init__(self, params: MoEParams, config: MoEConfig, *, expert_axis: str | None = None):
        self.config = config
        self.expert_axis = expert_axis
        for name, node in to_tree(params).items():
            setattr(self, name, _variables((name,), node, expert_axis))

    @classmethod
    def from_gguf(
        cls,
        file: GGUFFile | str | os.PathLike[str],
        layer: int,
        device_or_sharding: jax.Device | jax.sharding.Sharding | None = None,
        *,
        prepack: bool = False,
        expert_axis: str | None = None,
    ) -> MoE:
        """One MoE layer of a GGUF file; arguments and errors as in `GGUFFile.load` and `MoE`.

        To make several layers pass the same `GGUFFile`: its header is then read once.
        """
        if not isinstance(file, GGUFFile):
            file = GGUFFile(file)
        return cls(*file.load(layer, device_or_sharding, prepack=prepack), expert_axis=expert_axis)

    @classmethod
    def from_floats(
        cls,
        params: MoEParams,
        config: MoEConfig,
        format: Any,
        *,
        prepack: bool = False,
        expert_axis: str | None = None,
    ) -> MoE:
        """Packs the weights of a float checkpoint; runs on the host, outside `jax.jit`.

        Args:
          params: weights are float arrays `[E, N, K]`, outputs before inputs.
          format: a block format for all expert weights and latent projections, or a mapping from
            names like "experts.down" to formats; weights it does not name stay floats.
          prepack: whether packed weights go into the layout that GPUs read fastest, as
            `MoEParams.prepack` does.
          config, expert_axis: as in `MoE`.

        Raises: as `jax_moe.quantize`.
        """
        return cls(quantize_params(params, format, prepack), config, expert_axis=expert_axis)

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], config: MoEConfig, *, expert_axis: str | None = None
    ) -> MoE:
        """The module of a state: an `nnx.State`, or the nested dicts that a checkpoint restores to.

        Raises: ValueError for a name that does not belong to a MoE block, or a missing one.
        """
        return cls(from_tree(_without_variables(state)), config, expert_axis=expert_axis)

    @property
    def params(self) -> MoEParams:
        """The tensors as `moe_block` takes them."""
        names = [field.name for field in dataclasses.fields(MoEParams) if hasattr(self, field.name)]
        return from_tree({name: _without_variables(getattr(self, name)) for name in names})

    def __call__(
        self,
        x: Array,
        *,
        router_input: Array | None = None,
        token_ids: Array | None = None,
        expert_axis: AxisName | None = None,
        variant: MoEVariant | None = None,
        implementation: str | None = None,
    ) -> Array:
        """`moe_block` of x `[..., H]`; gradients need `implementation="reference"`.

        `expert_axis` is as there; if None, the module's own where an enclosing `jax.shard_map` has
        that axis. So the same model runs sharded within one and whole outside.
        """
        if expert_axis is None and self.expert_axis and axis_is_bound(self.expert_axis):
            expert_axis = self.expert_axis
        return moe_block(
            self.params,
            x,
            self.config,
            router_input=router_input,
            token_ids=token_ids,
            expert_axis=expert_axis,
            variant=variant,
            implementation=implementation,
        )


def _variables(path: tuple[str, ...], node: Any, expert_axis: str | None) -> Any:
    if isinstance(node, dict):
        return nnx.Dict({k: _variables((*path, k), v, expert_axis) for k, v in node.items()})
    metadata: dict[str, Any] = {}
    if expert_axis is not None and (axes := expert_axes(path, len(node.shape), expert_axis)):
        metadata |= {"out_sharding": axes, "eager_sharding": False}
    return (nnx.Param if is_trainable(node) else PackedParam)(node, **metadata)


def _without_variables(node: Any) -> Any:
    """Plain nested dicts of arrays, whichever way a state or a checkpoint holds the variables."""
    if isinstance(node, nnx.Variable):
        return node.get_value()
    if not isinstance(node, Mapping):
        return node
    if node.keys() == {"value"}:  # Orbax writes a Variable as a node with one child
        return node["value"]
    return {name: _without_variables(child) for name, child in node.items()}
