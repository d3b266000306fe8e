"""MoE: moe_block as a Flax Linen module. Needs Flax: `pip install 'jax_moe[flax]'`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_moe._block import AxisName, MoEConfig, MoEParams, axis_is_bound, moe_block
from jax_moe._gguf import GGUFFile
from jax_moe._tree import expert_axes, from_tree, is_trainable, quantize_params, to_tree
from jax_moe._variants import MoEVariant

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError("jax_moe.linen needs Flax: pip install 'jax_moe[flax]'") from error

__all__ = ["MoE"]


class MoE(nn.Module):
    """A Mixture-of-Experts block.

    Float arrays are in the collection "params" and integers in "packed": the blocks of packed
    weights, and the table of a block that chooses experts by token id. The names are those of the
    fields of `params`; a packed weight is a dict of one entry under the name of its format, as in
    `variables["packed"]["experts"]["gate"]["Q4_K"]`. So a checkpoint names the format of each
    weight, and nothing but `config` must be kept beside it. Nothing may cast "packed".

    Attributes:
      params: the block's tensors, which `init` returns as they are. Of abstract ones
        (`jax.ShapeDtypeStruct`) it makes zeros, for a checkpoint's values to take their place.
        `apply` looks at the shapes only.
      config: the block's metadata.
      expert_axis: a mesh axis, or logical axis: `init` boxes the variables of the routed experts in
        `nn.Partitioned` with it. Inside a `jax.shard_map` over it, calls take the experts for the
        device's share.
    """

    params: MoEParams
    config: MoEConfig
    expert_axis: str | None = None

    @classmethod
    def from_gguf(
        cls,
        file: GGUFFile | str | os.PathLike[str],
        layer: int,
        device_or_sharding: jax.Device | jax.sharding.Sharding | None = None,
        *,
        prepack: bool = False,
        **attributes: Any,
    ) -> MoE:
        """One MoE layer of a GGUF file; arguments and errors as in `GGUFFile.load`.

        To make several layers pass the same `GGUFFile`: its header is then read once.
        """
        if not isinstance(file, GGUFFile):
            file = GGUFFile(file)
        return cls(*file.load(layer, device_or_sharding, prepack=prepack), **attributes)

    @classmethod
    def from_floats(
        cls,
        params: MoEParams,
        config: MoEConfig,
        format: Any,
        *,
        prepack: bool = False,
        **attributes: Any,
    ) -> MoE:
        """Packs the weights of a float checkpoint; runs on the host, outside `jax.jit`.

        Args:
          params: weights are float arrays `[E, N, K]`, outputs before inputs.
          format: a block format for all expert weights and latent projections, or a mapping from
            names like "experts.down" to formats; weights it does not name stay floats.
          prepack: whether packed weights go into the layout that GPUs read fastest, as
            `MoEParams.prepack` does.
          config, attributes: as in `MoE`.

        Raises: as `jax_moe.quantize`.
        """
        return cls(quantize_params(params, format, prepack), config, **attributes)

    @classmethod
    def from_variables(
        cls, variables: Mapping[str, Any], config: MoEConfig, **attributes: Any
    ) -> MoE:
        """The module, with abstract `params`, whose variables these are.

        Raises: ValueError for a name that does not belong to a MoE block, or a missing one.
        """
        variables = nn.unbox(variables)
        tree = _merge(variables.get("params", {}), variables.get("packed", {}))
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        return cls(from_tree(shapes), config, **attributes)

    @nn.compact
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
        tree = to_tree(self.params)
        floats = {
            name: self.param(name, lambda _, name=name, node=node: self._initial((name,), node))
            for name, node in _select(tree, trainable=True).items()
        }
        integers = {
            name: self.variable("packed", name, self._initial, (name,), node).value
            for name, node in _select(tree, trainable=False).items()
        }
        return moe_block(
            from_tree(_merge(floats, integers)),
            x,
            self.config,
            router_input=router_input,
            token_ids=token_ids,
            expert_axis=expert_axis,
            variant=variant,
            implementation=implementation,
        )

    def _initial(self, path: tuple[str, ...], node: Any) -> Any:
        if isinstance(node, dict):
            return {name: self._initial((*path, name), child) for name, child in node.items()}
        abstract = isinstance(node, jax.ShapeDtypeStruct)
        value = jnp.zeros(node.shape, node.dtype) if abstract else node
        axis = self.expert_axis
        axes = None if axis is None else expert_axes(path, len(node.shape), axis)
        if axis is None or axes is None:
            return value
        if axis_is_bound(axis):  # `params` is the whole block, the variables are a device's share
            position = axes.index(axis)
            count = value.shape[position] // jax.lax.axis_size(axis)
            first = jax.lax.axis_index(axis) * count
            value = jax.lax.dynamic_slice_in_dim(value, first, count, position)
        return nn.Partitioned(value, axes)


def _select(tree: Mapping[str, Any], trainable: bool) -> dict[str, Any]:
    """The part of a tree with the leaves that are, or are not, floats."""
    selected: dict[str, Any] = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            if children := _select(node, trainable):
                selected[name] = children
        elif bool(is_trainable(node)) is trainable:
            selected[name] = node
    return selected


def _merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees in one: a name in both is a dict in both."""
    shared = {name: _merge(a[name], b[name]) for name in a.keys() & b.keys()}
    return {**a, **b, **shared}
