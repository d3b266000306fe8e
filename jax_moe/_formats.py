"""The GGUF block formats: names, ggml types and block sizes."""

import dataclasses
from types import MappingProxyType

import gguf


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """A quantised GGUF block format.

    A row of K weights is K / block_size consecutive blocks of block_bytes bytes each, exactly as a
    GGUF file stores it.

    Attributes:
      name: ggml's name, such as "Q4_K".
      ggml_type: the number that stands for the format in a GGUF file (enum ggml_type).
      block_size: weights a block.
      block_bytes: bytes a block.
      tiled_bytes: bytes a block in the tiled layout, which `PackedExperts.prepack` makes.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    tiled_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiled_bytes", self.tiled_bytes or self.block_bytes)

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights; k is a multiple of block_size."""
        return k // self.block_size * self.block_bytes


# name, ggml_type, block_size, block_bytes, and tiled_bytes if they differ. Sizes are stated here
# rather than asked of gguf because a gguf release knows only the formats of its day.
FORMATS: MappingProxyType[str, BlockFormat] = MappingProxyType(
    {
        row[0]: BlockFormat(*row)
        for row in (
            ("Q4_0", 2, 32, 18),
            ("Q4_1", 3, 32, 20),
            ("Q5_0", 6, 32, 22),
            ("Q5_1", 7, 32, 24),
            ("Q8_0", 8, 32, 34),
            ("Q2_K", 10, 256, 84),
            ("Q3_K", 11, 256, 110),
            ("Q4_K", 12, 256, 144),
            ("Q5_K", 13, 256, 176),
            ("Q6_K", 14, 256, 210),
            ("IQ2_XXS", 16, 256, 66, 102),
            ("IQ2_XS", 17, 256, 74, 106),
            ("IQ3_XXS", 18, 256, 98, 134),
            ("IQ1_S", 19, 256, 50, 70),
            ("IQ4_NL", 20, 32, 18),
            ("IQ3_S", 21, 256, 110, 134),
            ("IQ2_S", 22, 256, 82, 106),
            ("IQ4_XS", 23, 256, 136),
            ("IQ1_M", 29, 256, 56, 76),
            ("TQ1_0", 34, 256, 54, 74),
            ("TQ2_0", 35, 256, 66),
            ("MXFP4", 39, 32, 17),
            ("NVFP4", 40, 64, 36),
            ("Q1_0", 41, 128, 18),
            ("Q2_0", 42, 64, 18),
        )
    }
)

# ggml_type of the dense element types, by the name of the dtype.
DENSE_TYPES: MappingProxyType[str, int] = MappingProxyType(
    {"float32": 0, "float16": 1, "bfloat16": 30}
)

_BY_TYPE = {format.ggml_type: format for format in FORMATS.values()}


def format_of_type(ggml_type: int) -> BlockFormat | None:
    """The block format with this number in a GGUF file, None where it is none of FORMATS."""
    return _BY_TYPE.get(ggml_type)


def as_format(format: object) -> BlockFormat:
    """The block format that an argument `format` means.

    Args:
      format: a BlockFormat, its name in upper or lower case, or a gguf.GGMLQuantizationType.

    Raises:
      TypeError: it is something else, a bare int included.
      ValueError: there is no such block format.
    """
    found: BlockFormat | None
    if isinstance(format, BlockFormat):
        found = FORMATS.get(format.name)
        if found != format:
            found = None
    elif isinstance(format, str):
        found = FORMATS.get(format.upper())
    elif isinstance(format, gguf.GGMLQuantizationType):
        found = format_of_type(int(format))
    else:
        raise TypeError(
            "format must be a BlockFormat, its name or a gguf.GGMLQuantizationType, got "
            f"{format!r} of type {type(format).__name__}"
        )
    if found is None:
        raise ValueError(f"format {format!r} is not a block format; allowed: {', '.join(FORMATS)}")
    return found
