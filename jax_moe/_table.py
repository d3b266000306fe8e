"""Plain text tables for the command line."""

import math
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; those whose entries begin with a digit are aligned to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [
        all(entry[:1].isdigit() or entry in "-?" for entry in column[1:]) for column in columns
    ]

    def line(entries: Sequence[str]) -> str:
        aligned = (
            entry.rjust(width) if to_right else entry.ljust(width)
            for entry, width, to_right in zip(entries, widths, right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, [header, *rows]))


def binary_size(nbytes: float) -> str:
    """A number of bytes as "1.5 MiB"."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    exponent = min(3, int(math.log2(nbytes)) // 10)
    return f"{nbytes / 1024**exponent:.1f} {('KiB', 'MiB', 'GiB')[exponent - 1]}"
