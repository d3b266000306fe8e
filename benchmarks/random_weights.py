"""Random experts made on the device: uniform bytes, with scales that keep values sane.

Every byte is a hash of its place, in one kernel that writes the result and nothing else, so that
weights of many GB take milliseconds and no memory besides.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from shapes import Model

import jax_moe

# Where a block's scales lie: (byte offset, kind). "f16" is one half, "e8m0" and "ue4m3" bytes.
_HALF = [(0, "f16")]
_TWO_HALVES = [(0, "f16"), (2, "f16")]
_SCALES = {
    "Q4_0": _HALF,
    "Q4_1": _TWO_HALVES,
    "Q5_0": _HALF,
    "Q5_1": _TWO_HALVES,
    "Q8_0": _HALF,
    "Q2_K": [(80, "f16"), (82, "f16")],
    "Q3_K": [(108, "f16")],
    "Q4_K": _TWO_HALVES,
    "Q5_K": _TWO_HALVES,
    "Q6_K": [(208, "f16")],
    "IQ2_XXS": _HALF,
    "IQ2_XS": _HALF,
    "IQ2_S": _HALF,
    "IQ3_XXS": _HALF,
    "IQ3_S": _HALF,
    "IQ1_S": _HALF,
    "IQ1_M": [(48, "f16 in nibbles")],
    "IQ4_NL": _HALF,
    "IQ4_XS": _HALF,
    "TQ1_0": [(52, "f16")],
    "TQ2_0": [(64, "f16")],
    "MXFP4": [(0, "e8m0")],
    "NVFP4": [(i, "ue4m3") for i in range(4)],
    "Q1_0": _HALF,
    "Q2_0": _HALF,
}
DENSE = {"BF16": jnp.bfloat16, "F16": jnp.float16, "F32": jnp.float32}


def experts(seed: int, formats: tuple[str, str], model: Model) -> jax_moe.Experts:
    """A layer with gate and up in formats[0] and down in formats[1]."""
    hidden = (model.experts, model.d_expert, model.d_model)
    out = (model.experts, model.d_model, model.d_expert)
    return jax_moe.Experts(
        gate=weight(3 * seed, formats[0], *hidden),
        up=weight(3 * seed + 1, formats[0], *hidden),
        down=weight(3 * seed + 2, formats[1], *out),
    )


def fits(format_name: str, model: Model) -> bool:
    """Whether the model's rows are whole blocks."""
    return all(
        name in DENSE or k % jax_moe._formats.as_format(name).block_size == 0
        for name in format_name.split("/")
        for k in (model.d_model, model.d_expert)
    )


def weight(seed: int, name: str, num_experts: int, n: int, k: int):
    """[num_experts, n, k] in a block format, every scale near 2^-10, or in a type of DENSE."""
    key = np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    if name in DENSE:
        return dense(key, num_experts, n, k, DENSE[name])
    block = jax_moe._formats.as_format(name)
    return jax_moe.PackedExperts(_blocks(key, name, num_experts, n, block.row_bytes(k)), block)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def dense(key, num_experts: int, n: int, k: int, dtype):
    """Uniform, of a variance of 1 / k."""
    bits = _hash(key, (num_experts, n, k)).astype(jnp.int32)
    return (bits.astype(jnp.float32) * np.float32((3 / k) ** 0.5 / 2**31)).astype(dtype)


def activations(shape: tuple[int, int], dtype) -> jax.Array:
    """Uniform, of a variance of one."""
    return (dense(np.uint32(1), 1, *shape, jnp.float32)[0] * shape[1] ** 0.5).astype(dtype)


def _hash(key, shape):
    """uint32 of a shape: a place's number, mixed."""
    axis = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, shape)
    x = (axis(0) * np.uint32(shape[1]) + axis(1)) * np.uint32(shape[2]) + axis(2) + key
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _blocks(key, name: str, num_experts: int, n: int, row_bytes: int):
    shape = (num_experts, n, row_bytes)
    data = (_hash(key, shape) >> 8).astype(jnp.uint8)
    place = jax.lax.broadcasted_iota(jnp.uint32, shape, 2)
    place = place % np.uint32(jax_moe._formats.as_format(name).block_bytes)
    for at, keep, value in _fixed_bits(name):
        data = jnp.where(place == at, (data & np.uint8(keep)) | np.uint8(value), data)
    return data


def _fixed_bits(name: str):
    """(byte of a block, its bits that stay random, the others' value), for each byte of a scale."""
    for at, kind in _SCALES[name]:
        if kind == "f16":  # near 2^-10, with random low mantissa bits in the first byte
            yield at + 1, 0x00, 0x14
        elif kind == "f16 in nibbles":  # the high ones of four 16-bit words
            for i, nibble in enumerate((0x0, 0x0, 0x4, 0x1)):
                yield at + 1 + 2 * i, 0x0F, nibble << 4
        elif kind == "e8m0":
            yield at, 0x00, 127 - 10
        else:
            yield at, 0x00, 0x10
