"""MoEParams as nested dicts of arrays: what the Flax modules and their checkpoints hold."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp

from jax_moe._block import MoEParams
from jax_moe._ffn import Experts
from jax_moe._formats import as_format
from jax_moe._packed import TILED, PackedExperts
from jax_moe._quantize import quantize


def _fields_that_hold(kind: type, cls: type) -> list[str]:
    """The names of a dataclass's fields whose type is `kind` or a union with it."""
    hints = get_type_hints(cls)
    return [name for name, hint in hints.items() if kind in (hint, *get_args(hint))]


_EXPERTS = _fields_that_hold(Experts, MoEParams)
_WEIGHTS = [name for cls in (MoEParams, Experts) for name in _fields_that_hold(PackedExperts, cls)]


def to_tree(params: MoEParams) -> dict[str, Any]:
    """A block's arrays as nested dicts under the names of the fields, absent ones left out.

    A packed weight is a dict of one entry, `{"Q4_K": data}`. That way its format is in the names of
    the tree, and survives whatever keeps names and arrays. In the tiled layout it is
    `{"Q4_K_tiled": data, "aux": bits}`, with the bits of `aux` as integers, since nothing may train
    or cast them.
    """
    return _node(params)


def from_tree(tree: Mapping[str, Any]) -> MoEParams:
    """The inverse of `to_tree`.

    Raises: ValueError for a name that is no field or format, or a missing one; it says where.
    """
    fields = {
        name: _fields(Experts, node, f"{name}.") if name in _EXPERTS else node
        for name, node in tree.items()
    }
    return _fields(MoEParams, fields, "")


def is_trainable(leaf: Any) -> bool:
    """Whether a leaf is of floats; the others are packed bytes and tables of expert ids."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def expert_axes(path: tuple[str, ...], ndim: int, axis: str) -> tuple[str | None, ...] | None:
    """The axis names of a leaf of `to_tree` whose experts are sharded over `axis`, None if it has
    no routed experts. Axes before that of the experts are stacked layers."""
    if path[0] != "experts":
        return None
    trailing = 0 if path[1].endswith("_scale") else 1 if path[1].endswith("_bias") else 2
    return (None,) * (ndim - 1 - trailing) + (axis,) + (None,) * trailing


def quantize_params(params: MoEParams, format: Any, prepack: bool = False) -> MoEParams:
    """The same block with expert weights packed by `quantize`.

    Args:
      params: a block whose weights are floats `[E, N, K]`; packed ones stay as they are.
      format: one for every expert weight and latent projection, or a mapping from their names, like
        "experts.down" or "latent_up", to formats; weights it does not name stay floats.
      prepack: whether to bring every packed weight into the tiled layout, one after another.

    Raises: as `quantize`, which see; ValueError if `format` names what is not a weight of `params`.
    """
    tree = to_tree(params)
    weights: dict[str, tuple[dict[str, Any], str]] = {}  # name -> the dict that holds it, its key
    for name, node in tree.items():
        if name in _EXPERTS:
            weights |= {f"{name}.{key}": (node, key) for key in node if key in _WEIGHTS}
        elif name in _WEIGHTS:
            weights[name] = (tree, name)
    formats = format if isinstance(format, Mapping) else dict.fromkeys(weights, format)
    for name, target in formats.items():
        if name not in weights:
            raise ValueError(f"format names {name!r}; the weights here are {', '.join(weights)}.")
        parent, key = weights[name]
        if isinstance(parent[key], dict):
            continue
        try:
            packed = quantize(parent[key], target)
        except (TypeError, ValueError) as error:
            raise type(error)(f"params.{name}: {error}") from error
        # Nobody else has what was just made; what came packed is the caller's and stays whole.
        parent[key] = _packed_node(packed.prepack(donate=True) if prepack else packed)
    result = from_tree(tree)
    return result.prepack() if prepack else result


def _node(value: Any) -> Any:
    if isinstance(value, PackedExperts):
        return _packed_node(value)
    if not isinstance(value, MoEParams | Experts):
        return value
    children = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: _node(child) for name, child in children.items() if child is not None}


def _fields(cls: type, nodes: Mapping[str, Any], path: str) -> Any:
    """A dataclass from the nodes of its fields."""
    fields = dataclasses.fields(cls)
    if unknown := nodes.keys() - {field.name for field in fields}:
        raise ValueError(f"{path}{min(unknown)} is not the name of a field of {cls.__name__}.")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in nodes:
            raise ValueError(f"{path}{field.name} is missing.")
    return cls(**{name: _weight(node, path + name) for name, node in nodes.items()})


def _weight(node: Any, path: str) -> Any:
    if not isinstance(node, Mapping):
        return node
    layout, aux = None, None
    if "aux" in node:
        node = dict(node)
        aux = _with_bits(node.pop("aux"), jnp.float32)
    if len(node) != 1:
        raise ValueError(f"{path} is an array or {{format: data}}, but has {sorted(node)}.")
    ((name, data),) = node.items()
    if name.endswith(_TILED_SUFFIX):
        name, layout = name.removesuffix(_TILED_SUFFIX), TILED
    if (layout is None) != (aux is None):
        raise ValueError(f"{path} has aux where, and only where, its data is tiled.")
    try:
        format = as_format(name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return PackedExperts(data, format, layout, aux)


_TILED_SUFFIX = f"_{TILED}"


def _packed_node(weight: PackedExperts) -> dict[str, Any]:
    if weight.layout is None:
        return {weight.format.name: weight.data}
    aux = _with_bits(weight.aux, jnp.uint32)
    return {weight.format.name + _TILED_SUFFIX: weight.data, "aux": aux}


def _with_bits(x: Any, dtype: Any) -> Any:
    """x of a 4-byte dtype as another one with the same bits."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return jax.lax.bitcast_convert_type(x, dtype)
