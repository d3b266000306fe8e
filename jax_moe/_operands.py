"""How weights travel to an FFI target: an array and the ggml type of its elements or blocks."""

import jax.numpy as jnp
from jax import Array

from jax_moe._packed import PackedExperts

_DENSE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}

ABSENT_FORMAT = -1


def weight_operand(weight: PackedExperts | Array | None) -> tuple[Array, int]:
    """The operand for `weight` and its ggml type; an empty array and -1 where there is none."""
    if weight is None:
        return jnp.zeros((0,), jnp.uint8), ABSENT_FORMAT
    if isinstance(weight, PackedExperts):
        return weight.data, weight.format.ggml_type
    return weight, _DENSE_TYPES[weight.dtype.name]


def float_operand(x: Array | None) -> Array:
    """x in float32; an empty array where there is none."""
    return jnp.zeros((0,), jnp.float32) if x is None else x.astype(jnp.float32)
