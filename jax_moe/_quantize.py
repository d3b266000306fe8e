"""quantize: packs float weights on the host, with the bytes of ggml's own quantiser."""

import concurrent.futures
import math
import os
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import _libggml
from jax_moe._formats import BlockFormat, as_format
from jax_moe._packed import PackedExperts

# What the gguf package quantises to ggml's bytes; all else needs ggml's libraries.
_IN_GGUF = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"))

# ggml refuses to quantise to these without an importance: nearly all of a weight's bits are shared
# with its neighbours, and which of them to sacrifice is what the importance says.
_NEEDS_IMPORTANCE = frozenset(("IQ1_S", "IQ2_XXS", "IQ2_XS"))

# Above 65504 (the largest f16 scale) times any format's largest integer and sub-scale.
_LARGEST_WEIGHT = 1e9
# Far from where sums over a block overflow float32.
_LARGEST_ERROR = 1e30


def quantize(weights: Any, format: object, importance: Any = None) -> PackedExperts:
    """Packs weights into a GGUF block format, byte for byte as ggml's quantiser does.

    Runs on the host, outside `jax.jit`. Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0 and MXFP4
    without an importance need nothing else; everything else needs the libraries of libggml-python
    (`pip install 'jax_moe[ggml]'`).
    For IQ1 and IQ2 formats ggml first builds tables, once in a process: 1 to 10 seconds.

    **Arguments:**

    - `weights`: float `[..., E, N, K]`, finite, rounded to float32 first. K is a multiple of the
      format's block size.
    - `format`: a `BlockFormat`, its name ("Q4_K") or a `gguf.GGMLQuantizationType`.
    - `importance`: float `[K]` or `[..., E, K]`, finite and not negative, or None: how much an
      error in a column of the weights matters, as an importance matrix of llama.cpp says it (the
      mean square of the inputs that an expert sees). IQ1_S, IQ2_XXS and IQ2_XS need one, as in
      ggml's tools, since without they lose too much to be of use; `numpy.ones(K)` states that all
      columns matter alike. Some formats, such as Q8_0, make no use of it.

    **Returns:**

    `PackedExperts` whose `data` is uint8 `[..., E, N, row_bytes]`, on JAX's default device.

    **Raises:**

    - `TypeError`: `weights` or `importance` is not an array of floats, or is traced; `format` is
      none of the three.
    - `ValueError`: `format` is unknown, a shape does not fit, a value is not finite, or a needed
      importance is missing.
    - `ImportError`: ggml's libraries are needed and not installed.
    """
    format = as_format(format)
    weights = _floats("weights", weights)
    if weights.ndim < 3:
        raise ValueError(f"weights has the axes [..., E, N, K], but its shape is {weights.shape}.")
    *leading, n, k = weights.shape
    if k == 0 or k % format.block_size:
        raise ValueError(
            f"weights has rows of K = {k}, which is not a positive multiple of the "
            f"{format.block_size} weights of a {format.name} block."
        )
    matrices = weights.reshape(math.prod(leading), n, k)
    if importance is None:
        if format.name in _NEEDS_IMPORTANCE:
            raise ValueError(
                f"importance is None, but {format.name} needs one, float [K] or [..., E, K]; "
                "numpy.ones(K) makes all columns matter alike."
            )
        columns = [None] * len(matrices)
    else:
        importance = _floats("importance", importance)
        allowed = ((k,), (*leading, k))
        if importance.shape not in allowed:
            raise ValueError(
                f"importance has shape [K] = {allowed[0]} or [..., E, K] = {allowed[1]}, not "
                f"{importance.shape}."
            )
        if (importance < 0).any():
            raise ValueError("importance has no negative values.")
        columns = list(np.broadcast_to(importance, allowed[1]).reshape(len(matrices), k))

    if not (importance is None and format.name in _IN_GGUF):
        _libggml.load()  # so that a missing library is reported from here, not from a thread
        _check_range(weights, importance)
    packed = np.empty((len(matrices), n, format.row_bytes(k)), np.uint8)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, rows in enumerate(
            pool.map(_quantize_rows, matrices, columns, [format] * len(columns))
        ):
            packed[i] = rows
    return PackedExperts(jnp.asarray(packed.reshape(*leading, *packed.shape[1:])), format)


def _floats(name: str, x: Any) -> np.ndarray:
    """An argument as a finite float32 array on the host."""
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced, but quantize runs on the host: call it outside jax.jit."
        )
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} is an array of floats, not {type(x).__name__}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} is an array of floats, not of {x.dtype}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is reported below
        floats = np.asarray(x).astype(np.float32)
    if not np.isfinite(floats).all():
        raise ValueError(f"{name} has values that are not finite in float32.")
    return floats


def _check_range(weights: np.ndarray, importance: np.ndarray | None) -> None:
    """Refuses what overflows in ggml's error sums, where it ends the process."""
    largest = float(np.abs(weights).max(initial=0))
    if largest > _LARGEST_WEIGHT:
        raise ValueError(
            f"weights has magnitudes up to {largest:g}; this format holds less than "
            f"{_LARGEST_WEIGHT:g}."
        )
    if importance is not None:
        error = float(importance.max(initial=0)) * largest**2
        if error > _LARGEST_ERROR:
            raise ValueError(
                f"importance times the square of weights reaches {error:g}; {_LARGEST_ERROR:g} is "
                "allowed. Only the ratios of importances matter: scale them down."
            )


def _quantize_rows(
    rows: np.ndarray, importance: np.ndarray | None, format: BlockFormat
) -> np.ndarray:
    """Packs float32 [N, K] into uint8 [N, row_bytes]."""
    if len(rows) == 0:
        return np.empty((0, format.row_bytes(rows.shape[1])), np.uint8)
    if importance is None and format.name in _IN_GGUF:
        return _quantize_with_gguf(rows, format)
    return _libggml.quantize_chunk(
        format.ggml_type, rows, format.row_bytes(rows.shape[1]), importance
    )


def _quantize_with_gguf(rows: np.ndarray, format: BlockFormat) -> np.ndarray:
    """gguf's quantiser, and ggml's signs of zeros: in ggml the first of equal values counts."""
    # A block beyond f16's range gets an infinite scale, without a word, as in ggml.
    with np.errstate(all="ignore"):
        positive_zeros = rows + np.float32(0)
        packed = gguf.quants.quantize(positive_zeros, gguf.GGMLQuantizationType(format.ggml_type))
    if format.name in ("Q4_1", "Q5_1"):
        # The minimum, bytes 2 and 3: where it is zero, it has the sign of the first zero.
        blocks = rows.reshape(-1, format.block_size)
        first = np.take_along_axis(blocks, (blocks == 0).argmax(axis=1)[:, None], axis=1)[:, 0]
        negative = (blocks.min(axis=1) == 0) & np.signbit(first)
        packed.reshape(-1, format.block_bytes)[:, 3] |= negative.astype(np.uint8) << 7
    return packed
