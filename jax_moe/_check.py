"""Checks of arguments at trace time: messages name the argument, what is allowed and was given."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe._packed import PackedExperts, check_layout

DENSE_DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)

INT32_MAX = 2**31 - 1


def x64_enabled() -> bool:
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]


def float_dtypes(implementation: str | None) -> tuple:
    """The dtypes of activations: only the reference computes in float64, and only under x64."""
    wide = implementation == "reference" and x64_enabled()
    return (*DENSE_DTYPES, jnp.float64) if wide else DENSE_DTYPES


def names(dtypes: tuple) -> str:
    """The dtypes as an English list."""
    return " or ".join(np.dtype(dtype).name for dtype in dtypes)


def array(name: str, x: Any, *, rank: int | None, dtypes: tuple) -> None:
    """Checks that x has shape and dtype, `rank` axes, any if None, and one of `dtypes`."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} is an array, not {type(x).__name__}.")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {names(dtypes)}, not {x.dtype}.")
    if rank is not None and len(x.shape) != rank:
        raise ValueError(f"{name} has {rank} axes, but its shape is {tuple(x.shape)}.")


def shape(name: str, x: Any, expected: tuple[int, ...], meaning: str) -> None:
    """Checks x's shape; `meaning` says what the expected shape stands for, like "[E, N]"."""
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} has shape {meaning} = {expected}, not {tuple(x.shape)}.")


def positive(name: str, value: Any) -> int:
    """`value` as an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is an int, not {value!r}.")
    if value < 1:
        raise ValueError(f"{name} is at least 1, not {value}.")
    return int(value)


def number(name: str, value: Any) -> float:
    """`value`, Python's, numpy's or an array without axes, as a float."""
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) != ():
        raise TypeError(f"{name} is a number, not {value!r}.")
    return float(value)


def choice(name: str, value: Any, allowed: tuple) -> None:
    """Checks that `value` is one of strings, or None where that is allowed."""
    if not isinstance(value, str | None) or value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}.")


def pair_count(pairs: Any) -> None:
    """Checks that pair ids fit into int32; a symbolic number is taken to."""
    if isinstance(pairs, int) and pairs > INT32_MAX:
        raise ValueError(f"x and its batch axes give {pairs} (token, slot) pairs, above 2^31 - 1.")


def implementation(value: Any) -> None:
    choice("implementation", value, (None, "reference"))


def weight(name: str, w: Any) -> tuple[int, int, int]:
    """Checks a weight, packed or dense, and gives its shape (E, N, K)."""
    if isinstance(w, PackedExperts):
        array(f"{name}.data", w.data, rank=3, dtypes=(jnp.uint8,))
        check_layout(name, w)
        result = w.shape
    else:
        array(name, w, rank=3, dtypes=DENSE_DTYPES)
        result = tuple(w.shape)
    if 0 in result:
        raise ValueError(f"{name} has shape [E, N, K] without a zero, not {result}.")
    return result  # type: ignore[return-value]
