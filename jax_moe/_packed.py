"""Expert weights as a GGUF file packs them."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_moe._dequantize import dequantize
from jax_moe._formats import BlockFormat, as_format


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedExperts:
    """Matrices of experts in a GGUF block format: a pytree with one leaf, the bytes.

    E, N and K always follow from `data`, so stacked layers, slices and shards are PackedExperts
    too. The constructor checks nothing but the format, since transforms build pytrees of
    placeholders; the ops check shapes and dtypes when they are traced.

    Attributes:
      data: uint8 `[..., E, N, row_bytes]`. Row n of expert e multiplies an input to give output n;
        it is packed along K exactly as in a GGUF file. Leading axes are stacked layers.
      format: a `BlockFormat`; its name ("Q4_K") or a `gguf.GGMLQuantizationType` may be given.
        Static.
    """

    data: Array
    format: BlockFormat = field(metadata={"static": True})

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", as_format(self.format))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `(..., E, N, K)` of the weights."""
        *leading, row_bytes = self.data.shape
        return (*leading, row_bytes // self.format.block_bytes * self.format.block_size)

    @property
    def ndim(self) -> int:
        """The number of axes of the weights, 3 for one layer's experts."""
        return len(self.shape)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The weights `[..., E, N, K]` as an array of `dtype`, rounded once from exact float32.

        Works inside and outside `jax.jit`, on any platform. Values whose magnitude is below 1e-36
        may come out as zero, because XLA flushes subnormal numbers on the CPU.
        """
        return dequantize(self.data, self.format).astype(dtype)
