"""Dequantisation in pure JAX: what each block format means.

The reference of this package, written for reading and independent of the C++ decoders. A function
takes the bytes of blocks, uint8 [..., block_bytes], and gives their weights, float32
[..., block_size]. Fields lie in a block in the order in which the functions take them from it.
"""

import functools
from collections.abc import Callable

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_moe._formats import BlockFormat, as_format


def dequantize(data: Array, format: object) -> Array:
    """The weights that packed rows stand for, with the bits of ggml's own dequantiser.

    Works inside and outside `jax.jit`, on any platform. XLA flushes subnormal numbers on the CPU:
    there, values whose magnitude is below 1e-36 may come out as zero.

    Args:
      data: uint8 [..., row_bytes], rows as a GGUF file packs them.
      format: a BlockFormat, its name or a gguf.GGMLQuantizationType.

    Returns:
      float32 [..., K], K = row_bytes / block_bytes * block_size.

    Raises:
      TypeError: data is not uint8, or format is none of the three.
      ValueError: format is unknown, or row_bytes is not a multiple of its block_bytes.
    """
    format = as_format(format)
    if data.dtype != np.uint8:
        raise TypeError(f"data must be uint8, got {data.dtype}")
    if data.ndim == 0 or data.shape[-1] % format.block_bytes:
        raise ValueError(
            f"data of shape {data.shape} does not hold whole {format.name} blocks: its last "
            f"dimension must be a multiple of {format.block_bytes}"
        )
    return _dequantize(data, format)


@functools.partial(jax.jit, static_argnames="format")
def _dequantize(data: Array, format: BlockFormat) -> Array:
    *leading, row_bytes = data.shape
    blocks = row_bytes // format.block_bytes
    shape = (*leading, blocks * format.block_size)
    if 0 in shape:
        return jnp.zeros(shape, jnp.float32)
    weights = _DECODERS[format.name](data.reshape(*leading, blocks, format.block_bytes))
    return weights.reshape(shape)


# --- Reading fields ---


def _split(block: Array, *sizes: int) -> list[Array]:
    """The consecutive fields of a block, by their sizes in bytes."""
    assert sum(sizes) == block.shape[-1]
    return jnp.split(block, np.cumsum(sizes)[:-1].tolist(), axis=-1)


def _f16(field: Array) -> Array:
    """Two bytes as a binary16: float32 [..., 1]."""
    return lax.bitcast_convert_type(field, jnp.float16).astype(jnp.float32)[..., None]


def _integers(field: Array, size: int) -> Array:
    """Little-endian unsigned integers of `size` bytes, as uint32."""
    parts = field.reshape(*field.shape[:-1], -1, size).astype(jnp.uint32)
    return functools.reduce(lambda a, b: a | b, (parts[..., i] << (8 * i) for i in range(size)))


def _bits(x: Array, width: int, count: int) -> Array:
    """Splits integers into `count` fields of `width` bits, lowest first: int32 [..., n, count]."""
    shifts = lax.broadcasted_iota(jnp.uint32, (1,) * x.ndim + (count,), x.ndim) * width
    return ((x.astype(jnp.uint32)[..., None] >> shifts) & (2**width - 1)).astype(jnp.int32)


def _planes(x: Array, width: int, count: int) -> Array:
    """As _bits, all lowest fields first: int32 [..., count, n]."""
    return jnp.swapaxes(_bits(x, width, count), -1, -2)


def _flat(x: Array, axes: int = 2) -> Array:
    """Joins the last axes."""
    return x.reshape(*x.shape[:-axes], -1)


def _groups(x: Array, size: int) -> Array:
    """Splits the last axis into groups: [..., n / size, size]."""
    return x.reshape(*x.shape[:-1], -1, size)


def _scaled(scale: Array, q: Array, minimum: Array | None = None) -> Array:
    """scale * q - minimum, with one scale for each of equal groups of q."""
    groups = q.reshape(*q.shape[:-1], scale.shape[-1], -1).astype(jnp.float32)
    weights = scale[..., None] * groups
    return _flat(weights if minimum is None else weights - minimum[..., None])


def _times(d: Array, q: Array) -> Array:
    """Integers times a scale."""
    return d * q.astype(jnp.float32)


def _ninth_bit_on(low: Array, high: Array) -> Array:
    """Integers of the bits from the ninth on, over bytes."""
    return low.astype(jnp.int32) + 256 * high


def _codebook(name: str) -> Array:
    """The code words of an IQ format, int8 [entries, 4 or 8], from the gguf package."""
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    return jnp.asarray(quant.grid.reshape(quant.grid_shape).astype(np.int8))


# --- Q4_0 .. Q8_0: 32 weights, an f16 scale, perhaps an f16 minimum ---


def _q4_0(block: Array) -> Array:
    d, nibbles = _split(block, 2, 16)
    return _scaled(_f16(d), _flat(_planes(nibbles, 4, 2)) - 8)


def _q4_1(block: Array) -> Array:
    d, minimum, nibbles = _split(block, 2, 2, 16)
    return _scaled(_f16(d), _flat(_planes(nibbles, 4, 2)), -_f16(minimum))


def _q5_0(block: Array) -> Array:
    d, fifth, nibbles = _split(block, 2, 4, 16)
    q = _flat(_planes(nibbles, 4, 2)) + 16 * _flat(_bits(fifth, 1, 8))
    return _scaled(_f16(d), q - 16)


def _q5_1(block: Array) -> Array:
    d, minimum, fifth, nibbles = _split(block, 2, 2, 4, 16)
    q = _flat(_planes(nibbles, 4, 2)) + 16 * _flat(_bits(fifth, 1, 8))
    return _scaled(_f16(d), q, -_f16(minimum))


def _q8_0(block: Array) -> Array:
    d, q = _split(block, 2, 32)
    return _scaled(_f16(d), lax.bitcast_convert_type(q, jnp.int8))


# --- K-quants: 256 weights in groups of 16 or 32 with scales of their own ---


def _six_bit(scales: Array) -> tuple[Array, Array]:
    """The eight scales and eight minima of 6 bits in the 12 bytes of Q4_K and Q5_K."""
    first, second, third = (_groups(scales, 4)[..., i, :].astype(jnp.int32) for i in range(3))
    scale = jnp.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    minimum = jnp.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
    return scale, minimum


def _q2_k(block: Array) -> Array:
    scales, pairs, d, dmin = _split(block, 16, 64, 2, 2)
    q = _flat(_planes(_groups(pairs, 32), 2, 4), 3)
    return _scaled(_times(_f16(d), scales & 15), q, _times(_f16(dmin), scales >> 4))


def _q3_k(block: Array) -> Array:
    third, pairs, scales, d = _split(block, 32, 64, 12, 2)
    q = _flat(_planes(_groups(pairs, 32), 2, 4), 3) + 4 * _flat(_planes(third, 1, 8))
    low, high = _planes(scales[..., :8], 4, 2), _planes(scales[..., 8:], 2, 4)
    return _scaled(_times(_f16(d), _flat(low) + 16 * _flat(high) - 32), q - 4)


def _q4_k(block: Array) -> Array:
    d, dmin, scales, nibbles = _split(block, 2, 2, 12, 128)
    scale, minimum = _six_bit(scales)
    q = _flat(_planes(_groups(nibbles, 32), 4, 2), 3)
    return _scaled(_times(_f16(d), scale), q, _times(_f16(dmin), minimum))


def _q5_k(block: Array) -> Array:
    d, dmin, scales, fifth, nibbles = _split(block, 2, 2, 12, 32, 128)
    scale, minimum = _six_bit(scales)
    q = _flat(_planes(_groups(nibbles, 32), 4, 2), 3) + 16 * _flat(_planes(fifth, 1, 8))
    return _scaled(_times(_f16(d), scale), q, _times(_f16(dmin), minimum))


def _q6_k(block: Array) -> Array:
    nibbles, pairs, scales, d = _split(block, 128, 64, 16, 2)
    low = _flat(_planes(_groups(nibbles, 64), 4, 2), 3)
    high = _flat(_planes(_groups(pairs, 32), 2, 4), 3)
    scale = _times(_f16(d), lax.bitcast_convert_type(scales, jnp.int8))
    return _scaled(scale, low + 16 * high - 32)


# --- IQ1: code words of -1, 0 and 1, shifted by an eighth ---


def _iq1(d: Array, scale: Array, index: Array, minus: Array) -> Array:
    shift = jnp.where(minus != 0, -0.125, 0.125).astype(jnp.float32)
    values = _codebook("IQ1_S")[index].astype(jnp.float32) + shift[..., None]
    return _scaled(_times(d, 2 * scale + 1), _flat(values))


def _iq1_s(block: Array) -> Array:
    d, low, high = _split(block, 2, 32, 16)
    high = _integers(high, 2)  # one for 32 weights, that is for four indices
    index = _ninth_bit_on(low, _flat(_bits(high & 0xFFF, 3, 4)))
    minus = jnp.repeat(high >> 15, 4, axis=-1)
    return _iq1(_f16(d), ((high >> 12) & 7).astype(jnp.int32), index, minus)


def _iq1_m(block: Array) -> Array:
    low, high, scales = _split(block, 32, 16, 8)
    high = _flat(_bits(high, 4, 2))
    scales = _integers(scales, 2)
    top = scales >> 12  # the four nibbles of d
    d = top[..., 0] | top[..., 1] << 4 | top[..., 2] << 8 | top[..., 3] << 12
    d = lax.bitcast_convert_type(d.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
    index = _ninth_bit_on(low, high & 7)
    return _iq1(d[..., None], _flat(_bits(scales, 3, 4)), index, high >> 3)


# --- IQ2 and IQ3: code words of magnitudes, signs apart ---


def _signed(scale: Array, magnitudes: Array, signs: Array) -> Array:
    """scale * +-magnitude; signs are bytes, the lowest bit for the first of 8 weights."""
    negative = _flat(_bits(signs, 1, 8))
    return _scaled(scale, jnp.where(negative != 0, -1, 1) * _flat(magnitudes))


def _seven_signs(index: Array) -> Array:
    """Sign bytes with an even number of ones, from their low seven bits."""
    return jnp.asarray(np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8))[index]


def _half_steps(d: Array, scale: Array, step: float) -> Array:
    return d * (0.5 + scale.astype(jnp.float32)) * step


def _iq2_xxs(block: Array) -> Array:
    d, codes = _split(block, 2, 64)
    codes = _groups(codes, 8)
    index, words = _flat(codes[..., :4]), _flat(_integers(codes[..., 4:], 4))
    signs = _seven_signs(_flat(_bits(words, 7, 4)))
    return _signed(_half_steps(_f16(d), words >> 28, 0.25), _codebook("IQ2_XXS")[index], signs)


def _iq2_xs(block: Array) -> Array:
    d, codes, scales = _split(block, 2, 64, 8)
    codes = _integers(codes, 2)
    scale = _half_steps(_f16(d), _flat(_bits(scales, 4, 2)), 0.25)
    return _signed(scale, _codebook("IQ2_XS")[codes & 511], _seven_signs(codes >> 9))


def _iq2_s(block: Array) -> Array:
    d, low, signs, high, scales = _split(block, 2, 32, 32, 8, 8)
    index = _ninth_bit_on(low, _flat(_bits(high, 2, 4)))
    scale = _half_steps(_f16(d), _flat(_bits(scales, 4, 2)), 0.25)
    return _signed(scale, _codebook("IQ2_S")[index], signs)


def _iq3_xxs(block: Array) -> Array:
    d, index, words = _split(block, 2, 64, 32)
    words = _integers(words, 4)
    signs = _seven_signs(_flat(_bits(words, 7, 4)))
    return _signed(_half_steps(_f16(d), words >> 28, 0.5), _codebook("IQ3_XXS")[index], signs)


def _iq3_s(block: Array) -> Array:
    d, low, high, signs, scales = _split(block, 2, 64, 8, 32, 4)
    index = _ninth_bit_on(low, _flat(_bits(high, 1, 8)))
    scale = _times(_f16(d), 1 + 2 * _flat(_bits(scales, 4, 2)))
    return _signed(scale, _codebook("IQ3_S")[index], signs)


# --- IQ4 and FP4: nibbles that index 16 values ---


def _iq4_values(index: Array) -> Array:
    return jnp.asarray(gguf.quants.IQ4_NL.kvalues, dtype=jnp.int8)[index]


def _iq4_nl(block: Array) -> Array:
    d, nibbles = _split(block, 2, 16)
    return _scaled(_f16(d), _iq4_values(_flat(_planes(nibbles, 4, 2))))


def _iq4_xs(block: Array) -> Array:
    d, high, low, nibbles = _split(block, 2, 2, 4, 128)
    scale = _flat(_bits(low, 4, 2)) + 16 * _flat(_bits(high, 2, 4)) - 32
    return _scaled(
        _times(_f16(d), scale), _iq4_values(_flat(_planes(_groups(nibbles, 16), 4, 2), 3))
    )


def _doubled_e2m1(code: Array) -> Array:
    """Twice the value of an E2M1 float."""
    return jnp.asarray([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])[code]


def _mxfp4(block: Array) -> Array:
    exponent, nibbles = _split(block, 1, 16)
    # 2^(e - 128), half of the E8M0 value; the first two are subnormal.
    e = exponent.astype(jnp.uint32)
    bits = jnp.where(e < 2, jnp.uint32(0x00200000) << e, (e - 1) << 23)
    scale = lax.bitcast_convert_type(bits, jnp.float32)
    return _scaled(scale, _doubled_e2m1(_flat(_planes(nibbles, 4, 2))))


def _nvfp4(block: Array) -> Array:
    codes, nibbles = _split(block, 4, 32)
    # E4M3 without its sign bit, halved. ggml reads the NaN code as zero, but not that with bit 7.
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(jnp.float32)
    normal = (1 + mantissa / 8) * jnp.asarray(2.0 ** (np.arange(16) - 8), jnp.float32)[exponent]
    scale = jnp.where(exponent == 0, mantissa * 2.0**-10, normal)
    scale = jnp.where(codes == 0x7F, 0.0, scale)
    return _scaled(scale, _doubled_e2m1(_flat(_planes(_groups(nibbles, 8), 4, 2), 3)))


# --- Ternary and Q1_0, Q2_0 ---


def _tq1_0(block: Array) -> Array:
    first, second, last, d = _split(block, 32, 16, 4, 2)

    def digits(field: Array, count: int) -> Array:
        """A byte is a fraction b / 256; its base-3 digits, the first one of all bytes first."""
        powers = 3 ** lax.broadcasted_iota(
            jnp.int32, (1,) * (field.ndim - 1) + (count, 1), field.ndim - 1
        )
        fractions = (field.astype(jnp.int32)[..., None, :] * powers) & 255
        return _flat((fractions * 3) >> 8)

    q = jnp.concatenate([digits(first, 5), digits(second, 5), digits(last, 4)], axis=-1)
    return _scaled(_f16(d), q - 1)


def _tq2_0(block: Array) -> Array:
    pairs, d = _split(block, 64, 2)
    return _scaled(_f16(d), _flat(_planes(_groups(pairs, 32), 2, 4), 3) - 1)


def _q1_0(block: Array) -> Array:
    d, bits = _split(block, 2, 16)
    return _scaled(_f16(d), 2 * _flat(_bits(bits, 1, 8)) - 1)


def _q2_0(block: Array) -> Array:
    d, pairs = _split(block, 2, 16)
    return _scaled(_f16(d), _flat(_bits(pairs, 2, 4)) - 1)


_DECODERS: dict[str, Callable[[Array], Array]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
}
