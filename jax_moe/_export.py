"""What jax.export writes of this package's pytrees, so that exported functions may take them.

A node is written as JSON. Its children have the names of their fields there, so that a later
version may add fields, and reorder them.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from jax import export

from jax_moe._block import MoEConfig, MoEParams
from jax_moe._ffn import Experts
from jax_moe._formats import BlockFormat
from jax_moe._packed import PackedExperts
from jax_moe._routing import Dispatch, Routing


def _register(cls: type) -> None:
    """Registers a dataclass whose static fields, if any, JSON can hold."""
    fields = dataclasses.fields(cls)
    static = [field.name for field in fields if field.metadata.get("static")]
    names = [field.name for field in fields if field.name not in static]

    def write(values: Sequence[Any]) -> bytes:
        node = {"children": names, "static": dict(zip(static, values, strict=True))}
        return json.dumps(node, default=_format_name).encode()

    def make(aux_data: dict[str, Any], children: Sequence[Any]) -> Any:
        named = dict(zip(aux_data["children"], children, strict=True))
        return cls(**named, **aux_data["static"])

    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_moe.{cls.__name__}",
        serialize_auxdata=write,
        deserialize_auxdata=json.loads,
        from_children=make,
    )


def _format_name(format: BlockFormat) -> str:
    return format.name


_register(PackedExperts)
_register(Experts)
_register(MoEParams)
export.register_namedtuple_serialization(Routing, serialized_name="jax_moe.Routing")
export.register_namedtuple_serialization(Dispatch, serialized_name="jax_moe.Dispatch")
export.register_pytree_node_serialization(
    MoEConfig,
    serialized_name="jax_moe.MoEConfig",
    serialize_auxdata=lambda config: json.dumps(dataclasses.asdict(config)).encode(),
    deserialize_auxdata=json.loads,
    from_children=lambda config, _: MoEConfig(**config),
)
