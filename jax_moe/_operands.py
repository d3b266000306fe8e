"""How weights travel to an FFI target: an array, its aux, and the type of what it holds."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_moe._formats import DENSE_TYPES, format_of_type
from jax_moe._packed import TILED, PackedExperts
from jax_moe._repack import unpack

ABSENT_FORMAT = -1

TILED_FORMAT = 0x10000
"""Added to the ggml type of a tiled weight; kTiledFormat of ffi/targets.h."""


class WeightOperand(NamedTuple):
    """`data` and `aux` have no elements where they are absent."""

    data: Array
    aux: Array
    format: int


def weight_format(weight: PackedExperts | Array | None) -> int:
    """The number that a target takes for what `weight`, perhaps a ShapeDtypeStruct, is made of."""
    if weight is None:
        return ABSENT_FORMAT
    if not isinstance(weight, PackedExperts):
        return DENSE_TYPES[weight.dtype.name]
    return weight.format.ggml_type | (TILED_FORMAT if weight.layout == TILED else 0)


def weight_operand(weight: PackedExperts | Array | None) -> WeightOperand:
    """What stands for `weight`, which may be absent."""
    format, no_aux = weight_format(weight), float_operand(None)
    if weight is None:
        return WeightOperand(jnp.zeros((0,), jnp.uint8), no_aux, format)
    if not isinstance(weight, PackedExperts):
        return WeightOperand(weight, no_aux, format)
    return WeightOperand(weight.data, no_aux if weight.aux is None else weight.aux, format)


def gguf_layout(weight: Any) -> Any:
    """`weight`, in GGUF's layout where it is packed: what the reference takes."""
    return weight.unpack() if isinstance(weight, PackedExperts) else weight


def float_operand(x: Array | None) -> Array:
    """x in float32; an empty array where there is none."""
    return jnp.zeros((0,), jnp.float32) if x is None else x.astype(jnp.float32)


def gguf_format(format: int) -> int:
    """`format` of the same weight in GGUF's layout."""
    return format & ~TILED_FORMAT if format >= 0 else format


def for_each_platform(
    run: Callable[..., Any], weights: Sequence[WeightOperand], operands: Sequence[Array]
) -> Any:
    """`run(weights, operands)`, in which only CUDA is given tiled weights.

    One traced program serves all platforms, so the choice is made when it is lowered.
    """
    formats = [weight.format for weight in weights]
    if formats == [gguf_format(format) for format in formats]:
        return run(weights, operands)

    def cuda(arrays: list, operands: Sequence[Array]) -> Any:
        operand = zip(arrays, formats, strict=True)
        return run([WeightOperand(data, aux, f) for (data, aux), f in operand], operands)

    def elsewhere(arrays: list, operands: Sequence[Array]) -> Any:
        unpacked = []
        for (data, aux), tiled in zip(arrays, formats, strict=True):
            format = gguf_format(tiled)
            if format != tiled:
                block_format = format_of_type(format)
                assert block_format is not None
                data, aux = unpack(data, block_format), float_operand(None)
            unpacked.append(WeightOperand(data, aux, format))
        return run(unpacked, operands)

    arrays = [(weight.data, weight.aux) for weight in weights]
    return jax.lax.platform_dependent(arrays, operands, cuda=cuda, default=elsewhere)
