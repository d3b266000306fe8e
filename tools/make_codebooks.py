"""Writes ffi/blocks/codebooks.h, the code tables of the IQ formats, from the gguf package's tables.

Usage: python tools/make_codebooks.py > ffi/blocks/codebooks.h

An IQ format stores indices into a table of 4 or 8 small integers. The header holds them as they
are used: one byte a value, the first in the lowest byte. IQ1's table has only the values -1, 0 and
1 and is kept as nibbles 0, 1, 2, of which a decoder makes 8 * value +- 1 (see ffi/blocks/iq1.h).
"""

import sys

import numpy as np
from gguf import quants

HEADER = """\
// Code tables of the IQ formats. Written by tools/make_codebooks.py: do not edit.
//
// A table is a constant inside the function that reads it, so that host and device code share it
// and a kernel carries only the tables that it reads.
#pragma once

#include <cstdint>

#include "ffi/blocks/decoder.h"

namespace jax_moe {
"""

FOOTER = """
}  // namespace jax_moe
"""


def grid(quant: type) -> np.ndarray:
    """The values of a table, int8 [entries, 4 or 8]."""
    quant.init_grid()
    return quant.grid.reshape(quant.grid_shape).astype(np.int8)


def bytes_to_words(values: np.ndarray) -> np.ndarray:
    """Packs each row into one little-endian word, a value a byte."""
    return values.view(f"<u{values.shape[1]}").reshape(-1)


def nibbles_to_words(values: np.ndarray) -> np.ndarray:
    """Packs 8 values of 0..15 into 32 bits: 0..3 in low nibbles of the bytes, 4..7 in high ones."""
    values = values.astype(np.uint8)
    return bytes_to_words(values[:, :4] | values[:, 4:] << 4)


def table(comment: str, name: str, words: np.ndarray) -> str:
    """A C++ function that reads one word of a table."""
    bits = 8 * words.dtype.itemsize
    suffix = "ull" if bits == 64 else "u"
    entries = [f"0x{word:0{bits // 4}x}{suffix}" for word in words.tolist()]
    per_line = 4 if bits == 64 else 7
    lines = [
        "      " + ", ".join(entries[i : i + per_line]) + ","
        for i in range(0, len(entries), per_line)
    ]
    return "\n".join(
        [
            "",
            f"// {comment}",
            f"JM_HD uint{bits}_t {name}(uint32_t index) {{",
            f"  static constexpr uint{bits}_t kTable[{len(entries)}] = {{",
            *lines,
            "  };",
            "  return kTable[index];",
            "}",
        ]
    )


def header() -> str:
    """The text of ffi/blocks/codebooks.h."""
    eight = "8 magnitudes, a byte each."
    four = "4 magnitudes, a byte each."
    tables = [
        table(
            "IQ1_S and IQ1_M: 8 values plus one; 0..3 in the low nibbles, 4..7 in the high ones.",
            "Iq1Codeword",
            nibbles_to_words(grid(quants.IQ1_S) + 1),
        ),
        table(f"IQ2_XXS: {eight}", "Iq2XxsCodeword", bytes_to_words(grid(quants.IQ2_XXS))),
        table(f"IQ2_XS: {eight}", "Iq2XsCodeword", bytes_to_words(grid(quants.IQ2_XS))),
        table(f"IQ2_S: {eight}", "Iq2SCodeword", bytes_to_words(grid(quants.IQ2_S))),
        table(f"IQ3_XXS: {four}", "Iq3XxsCodeword", bytes_to_words(grid(quants.IQ3_XXS))),
        table(f"IQ3_S: {four}", "Iq3SCodeword", bytes_to_words(grid(quants.IQ3_S))),
    ]
    return HEADER + "\n".join(tables) + "\n" + FOOTER


if __name__ == "__main__":
    sys.stdout.write(header())
