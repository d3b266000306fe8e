"""The named kernel variants, the dtypes each takes, and what accuracy each promises."""

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


class MoEVariant(enum.Enum):
    """How a MoE product is computed. The value is the variant's number on the C++ side.

    - `SCALAR_GGUF`: x float32, packed weights, y float32. Every 32 activations are rounded to 8-bit
      integers with one float32 scale (q8_1), products are integer dot products.
    - `WMMA`: x float16 or bfloat16, dense weights of the same dtype, y of the same dtype.
    - `WMMA_GGUF`: x float16 or bfloat16, packed weights, y float32 (`moe_ffn`: x's dtype).
    """

    SCALAR_GGUF = 1
    WMMA = 2
    WMMA_GGUF = 3


def as_variant(variant: MoEVariant | None) -> MoEVariant | None:
    if variant is None or isinstance(variant, MoEVariant):
        return variant
    raise TypeError(f"variant is a jax_moe.MoEVariant or None, not {variant!r}.")


def check_variant(
    variant: MoEVariant | None, x_dtype: np.dtype, weights: Mapping[str, object]
) -> None:
    """Raises where `variant` does not take activations of `x_dtype` or one of the weights."""
    if variant is None:
        return
    half = (jnp.float16, jnp.bfloat16)
    allowed = (jnp.float32,) if variant is MoEVariant.SCALAR_GGUF else half
    if x_dtype not in allowed:
        raise TypeError(
            f"{variant.name} takes x of {' or '.join(np.dtype(d).name for d in allowed)}, "
            f"not {x_dtype}."
        )
    for name, weight in weights.items():
        if refusal := _refusal(variant, x_dtype, name, weight):
            raise TypeError(refusal)


def variant_for(
    variant: MoEVariant | None, x_dtype: np.dtype, weights: Sequence[object]
) -> MoEVariant | None:
    """`variant` where it takes all the weights, else None."""
    if variant is None or any(_refusal(variant, x_dtype, "", weight) for weight in weights):
        return None
    return variant


def _refusal(variant: MoEVariant, x_dtype: np.dtype, name: str, weight: Any) -> str | None:
    """Why `variant` does not take the weight `name`; None where it does."""
    from jax_moe._packed import PackedExperts

    packed = isinstance(weight, PackedExperts)
    if variant is MoEVariant.WMMA and packed:
        return f"WMMA takes dense weights, but {name} is PackedExperts."
    if variant is not MoEVariant.WMMA and not packed:
        return f"{variant.name} takes packed weights, but {name} is a dense array."
    if variant is MoEVariant.WMMA and weight.dtype != x_dtype:
        return f"WMMA takes weights of x's dtype {x_dtype}, but {name} is {weight.dtype}."
    return None
