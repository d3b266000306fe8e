"""The types that a GGUF tensor can have: the block formats, and what is stored without blocks."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jax_moe._formats import DENSE_TYPES, FORMATS, BlockFormat

# The ggml_type of tables of ids.
INT32 = 26

# Dense types that experts may have, by ggml_type.
DENSE_DTYPES = {
    number: np.dtype(getattr(ml_dtypes, name, name)) for name, number in DENSE_TYPES.items()
}

# Only sizes are needed of these: the tensors that hold them are checked, and never loaded.
_OTHERS = (
    BlockFormat("F32", 0, 1, 4),
    BlockFormat("F16", 1, 1, 2),
    BlockFormat("Q8_1", 9, 32, 36),
    BlockFormat("Q8_K", 15, 256, 292),
    BlockFormat("I8", 24, 1, 1),
    BlockFormat("I16", 25, 1, 2),
    BlockFormat("I32", INT32, 1, 4),
    BlockFormat("I64", 27, 1, 8),
    BlockFormat("F64", 28, 1, 8),
    BlockFormat("BF16", 30, 1, 2),
)

BLOCK_FORMATS = {form.ggml_type: form for form in FORMATS.values()}
GGML_TYPES = BLOCK_FORMATS | {form.ggml_type: form for form in _OTHERS}
