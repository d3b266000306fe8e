"""Random packed experts made on the device: uniform bytes, with scales that keep values sane."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_moe

# Where a block's scales lie: (byte offset, kind). "f16" is one half, "e8m0" and "ue4m3" bytes.
_SCALES = {
    "Q4_0": [(0, "f16")],
    "Q4_1": [(0, "f16"), (2, "f16")],
    "Q5_0": [(0, "f16")],
    "Q5_1": [(0, "f16"), (2, "f16")],
    "Q8_0": [(0, "f16")],
    "Q2_K": [(80, "f16"), (82, "f16")],
    "Q3_K": [(108, "f16")],
    "Q4_K": [(0, "f16"), (2, "f16")],
    "Q5_K": [(0, "f16"), (2, "f16")],
    "Q6_K": [(208, "f16")],
    "IQ2_XXS": [(0, "f16")],
    "IQ2_XS": [(0, "f16")],
    "IQ2_S": [(0, "f16")],
    "IQ3_XXS": [(0, "f16")],
    "IQ3_S": [(0, "f16")],
    "IQ1_S": [(0, "f16")],
    "IQ4_NL": [(0, "f16")],
    "IQ4_XS": [(0, "f16")],
    "TQ1_0": [(52, "f16")],
    "TQ2_0": [(64, "f16")],
    "MXFP4": [(0, "e8m0")],
    "NVFP4": [(i, "ue4m3") for i in range(4)],
    "Q1_0": [(0, "f16")],
    "Q2_0": [(0, "f16")],
}


def packed(key: jax.Array, format_name: str, experts: int, n: int, k: int) -> jax_moe.PackedExperts:
    """PackedExperts [experts, n, k] of random blocks, every scale near 2^-10."""
    row_bytes = jax_moe._formats.as_format(format_name).row_bytes(k)
    return jax_moe.PackedExperts(_blocks(key, format_name, experts, n, row_bytes), format_name)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _blocks(key, format_name: str, experts: int, n: int, row_bytes: int):
    block_bytes = jax_moe._formats.as_format(format_name).block_bytes
    data = jax.random.bits(key, (experts, n, row_bytes // block_bytes, block_bytes), jnp.uint8)
    if format_name == "IQ1_M":
        # The half is spread over the high nibbles of four 16-bit words from byte 48 on.
        for i, nibble in enumerate((0x0, 0x0, 0x4, 0x1)):
            at = 49 + 2 * i
            data = data.at[..., at].set((data[..., at] & 0x0F) | np.uint8(nibble << 4))
    for at, kind in _SCALES.get(format_name, []):
        if kind == "f16":  # 2^-10, with random low mantissa bits in the first byte
            data = data.at[..., at + 1].set(np.uint8(0x14))
        elif kind == "e8m0":
            data = data.at[..., at].set(np.uint8(127 - 10))
        else:
            data = data.at[..., at].set(np.uint8(0x10))
    return data.reshape(experts, n, row_bytes)
