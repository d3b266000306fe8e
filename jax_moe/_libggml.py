"""ggml's own quantiser and dequantiser, from the prebuilt libraries of libggml-python.

Optional: the libraries are loaded at the first use, and an ImportError says what to install.
"""

import ctypes
import functools
import importlib.util
import pathlib
from typing import NamedTuple

import numpy as np


class Libraries(NamedTuple):
    """ggml's shared libraries: types, quantisers and graphs; the CPU backend."""

    base: ctypes.CDLL
    cpu: ctypes.CDLL


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", ctypes.c_void_p),
    ]


def _library_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A library of libggml-python, which keeps them in lib or lib64."""
    for pattern in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll"):
        for path in sorted(folder.glob(f"*/{pattern}")):
            return path
    raise ImportError(f"libggml-python is installed in {folder}, but has no library {name!r}")


@functools.cache
def load() -> Libraries:
    """Loads ggml and initialises it.

    Raises:
      ImportError: libggml-python is not installed or lacks a library.
    """
    spec = importlib.util.find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "this needs ggml's libraries, which are not installed: pip install 'jax_moe[ggml]' "
            "(or pip install libggml-python)"
        )
    folder = pathlib.Path(spec.submodule_search_locations[0])
    # The CPU library looks up the base library's symbols, so that comes first and is global.
    base = ctypes.CDLL(str(_library_path(folder, "ggml-base")), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(_library_path(folder, "ggml-cpu")), mode=ctypes.RTLD_GLOBAL)

    base.ggml_init.argtypes = [_InitParams]
    base.ggml_init.restype = ctypes.c_void_p
    base.ggml_free.argtypes = [ctypes.c_void_p]
    base.ggml_free.restype = None
    base.ggml_get_type_traits.argtypes = [ctypes.c_int]
    base.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    base.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    base.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    base.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t

    # The first context fills the f16 tables that the quantisers read.
    base.ggml_free(base.ggml_init(_InitParams(1024, None, False)))
    return Libraries(base, cpu)


def requires_importance(ggml_type: int) -> bool:
    """Whether ggml refuses to quantise to this type without an importance matrix."""
    return bool(load().base.ggml_quantize_requires_imatrix(ggml_type))


def quantize_chunk(
    ggml_type: int, weights: np.ndarray, row_bytes: int, importance: np.ndarray | None = None
) -> np.ndarray:
    """Quantises rows with ggml_quantize_chunk.

    Args:
      ggml_type: a quantised type; IQ1_S, IQ2_XXS and IQ2_XS need an importance.
      weights: float32 [rows, K], finite; K is a multiple of the type's block size.
      row_bytes: bytes of a packed row.
      importance: float32 [K], or None.

    Returns:
      uint8 [rows, row_bytes].
    """
    base = load().base
    if importance is None and requires_importance(ggml_type):
        # ggml would abort the process.
        raise ValueError(f"ggml type {ggml_type} cannot be quantised without an importance")
    rows, k = weights.shape
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    packed = np.zeros((rows, row_bytes), np.uint8)
    pointer = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != (k,):
            raise ValueError(f"importance has shape {importance.shape}, expected ({k},)")
        pointer = importance.ctypes.data
    written = base.ggml_quantize_chunk(
        ggml_type, weights.ctypes.data, packed.ctypes.data, 0, rows, k, pointer
    )
    if written != packed.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of type {ggml_type}, not {packed.nbytes}")
    return packed


def dequantize(ggml_type: int, data: np.ndarray) -> np.ndarray:
    """Dequantises rows with ggml's to_float: uint8 [rows, row_bytes] to float32 [rows, K]."""
    traits = load().base.ggml_get_type_traits(ggml_type).contents
    rows, row_bytes = data.shape
    k = row_bytes // traits.type_size * traits.blck_size
    if row_bytes % traits.type_size:
        raise ValueError(f"rows of {row_bytes} bytes are not whole blocks of {traits.type_size}")
    data = np.ascontiguousarray(data, dtype=np.uint8)
    weights = np.empty((rows, k), np.float32)
    if weights.size:
        # Rows are whole blocks, so that all of them read as one.
        traits.to_float(data.ctypes.data, weights.ctypes.data, weights.size)
    return weights
