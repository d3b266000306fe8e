"""Reads the header of one GGUF file: metadata and tensor table, bounded by the file's size.

The file is memory-mapped. Values are decoded when they are asked for; arrays of strings (a
tokenizer's vocabulary) are stepped over without making an object for any of them. Nothing that the
file claims is believed: every count, length and offset is compared with the bytes that are there
before it is used, so that a hostile file costs no more than a linear scan of its own header.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jax_moe._gguf.cursor import Cursor
from jax_moe._gguf.metadata import Metadata, Value, skip_value
from jax_moe._gguf.types import GGML_TYPES

# Far above any real model.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1  # by the specification
MAX_NAME_BYTES = 1 << 10
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20

_READ_AHEAD = 128 << 10
_MIN_BYTES = 24  # magic, version and two counts


class GGUFError(ValueError):
    """A GGUF file that cannot be read or run; the message names the file and the key or tensor."""

    @classmethod
    def at(cls, path: Path, message: str) -> GGUFError:
        """The error of a file. Hostile names may be long, so the message is cut."""
        return cls(f"{path}: {message if len(message) <= 500 else message[:500] + '...'}")


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor table.

    Attributes:
      name: the tensor's name in the file.
      shape: in C order, the contiguous axis last, counted in weights.
      ggml_type: the number in the file.
      nbytes: size of the data, or None for a type that this package does not know.
      offset: of the first byte of data, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    nbytes: int | None
    offset: int
    _header: Header = field(repr=False, compare=False)

    @property
    def format(self) -> str:
        """The name of the type, like "Q4_K"."""
        known = GGML_TYPES.get(self.ggml_type)
        return known.name if known else f"type {self.ggml_type}"

    @property
    def path(self) -> Path:
        """The file that holds the data."""
        return self._header.path

    def bytes(self) -> np.ndarray:
        """The data as it is in the file: a read-only uint8 [nbytes] view of the memory map."""
        if self.nbytes is None:
            raise self._header.error(f"tensor {self.name!r} has unknown type {self.ggml_type}")
        return np.frombuffer(self._header.buffer, np.uint8, self.nbytes, self.offset)

    def will_need(self, start: int, stop: int) -> None:
        """Tells the kernel to read these bytes of the data ahead."""
        # Linux reads no more at a time than the device's read-ahead, which is 128 KiB by default.
        for begin in range(start, stop, _READ_AHEAD):
            self._advise("MADV_WILLNEED", begin, min(begin + _READ_AHEAD, stop))

    def release(self) -> None:
        """Lets go of the memory that holds the data; `bytes` reads it again where it is used."""
        self._advise("MADV_DONTNEED", 0, self.nbytes or 0)

    def _advise(self, advice: str, start: int, stop: int) -> None:
        if hasattr(mmap, advice) and start < stop:
            first = self.offset + start
            first -= first % mmap.PAGESIZE
            self._header.buffer.madvise(getattr(mmap, advice), first, self.offset + stop - first)


class Header:
    """The parsed header of one GGUF file.

    Args:
      path: a GGUF file, version 2 or 3, little-endian.

    Attributes:
      path, size: the file and its length in bytes.
      buffer: the memory map of the whole file.
      version: of the GGUF format.
      metadata: key-value pairs.
      tensors: the tensor table by name, in the file's order.

    Raises:
      GGUFError: if the file is not such a file or contradicts itself.
      OSError: if it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        # Opening a pipe would block for ever, so look before opening.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise GGUFError(f"{self.path} is not a regular file")
        with open(self.path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < _MIN_BYTES:
                raise self.error(f"{self.size} bytes are too few for a GGUF file")
            self.buffer = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        cursor = Cursor(self.buffer, self.error)
        self.version = self._parse_version(cursor)
        tensor_count, key_count = self._parse_counts(cursor)
        self.metadata = self._parse_metadata(cursor, key_count)
        self.tensors = self._parse_tensors(cursor, tensor_count)
        self._check_extents()

    def error(self, message: str) -> GGUFError:
        return GGUFError.at(self.path, message)

    def close(self) -> None:
        """Unmaps the file, or leaves that to the last of the arrays that are views of it."""
        with contextlib.suppress(BufferError):
            self.buffer.close()

    def _parse_version(self, cursor: Cursor) -> int:
        magic = self.buffer[cursor.take(4, "the magic") : cursor.position]
        if magic != b"GGUF":
            raise self.error(f"not a GGUF file: it begins with {magic!r}")
        version = cursor.u32("the version")
        if version in (2, 3):
            return version
        if version and version & 0xFFFF == 0:
            raise self.error("a big-endian GGUF file; only little-endian ones can be read")
        raise self.error(f"GGUF version {version}; versions 2 and 3 can be read")

    def _parse_counts(self, cursor: Cursor) -> tuple[int, int]:
        tensors, keys = cursor.u64("the tensor count"), cursor.u64("the key count")
        if tensors > MAX_TENSORS:
            raise self.error(f"claims {tensors} tensors; the limit is {MAX_TENSORS}")
        if keys > MAX_KEYS:
            raise self.error(f"claims {keys} metadata keys; the limit is {MAX_KEYS}")
        return tensors, keys

    def _parse_metadata(self, cursor: Cursor, count: int) -> Metadata:
        values: dict[str, Value] = {}
        for i in range(count):
            key = cursor.name(f"metadata key {i} of {count}", MAX_KEY_BYTES)
            if key in values:
                raise self.error(f"key {key!r} occurs twice")
            values[key] = skip_value(cursor, f"key {key!r}", self.error)
        return Metadata(self.buffer, values, self.error)

    def _parse_tensors(self, cursor: Cursor, count: int) -> dict[str, TensorInfo]:
        entries = []
        for i in range(count):
            name = cursor.name(f"tensor {i} of {count}", MAX_NAME_BYTES)
            what = f"tensor {name!r}"
            rank = cursor.u32(what)
            if rank > MAX_DIMS:
                raise self.error(f"{what} has {rank} dimensions; the limit is {MAX_DIMS}")
            shape = tuple(reversed(cursor.u64s(rank, what)))
            entries.append((name, shape, cursor.u32(what), cursor.u64(what)))
        alignment = self._alignment()
        start = -(-cursor.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, ggml_type, offset in entries:
            if name in tensors:
                raise self.error(f"tensor {name!r} occurs twice")
            if offset % alignment:
                raise self.error(
                    f"tensor {name!r} has offset {offset}, no multiple of the alignment {alignment}"
                )
            nbytes = self._nbytes(name, shape, ggml_type)
            tensors[name] = TensorInfo(name, shape, ggml_type, nbytes, start + offset, self)
        return tensors

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        power_of_two = isinstance(alignment, int) and alignment & (alignment - 1) == 0
        if isinstance(alignment, bool) or not power_of_two or not 0 < alignment <= MAX_ALIGNMENT:
            raise self.error(
                f"key 'general.alignment' is no power of two from 1 to {MAX_ALIGNMENT}"
            )
        return alignment

    def _nbytes(self, name: str, shape: tuple[int, ...], ggml_type: int) -> int | None:
        known = GGML_TYPES.get(ggml_type)
        if known is None:
            return None
        row = shape[-1] if shape else 1
        if row % known.block_size:
            raise self.error(
                f"tensor {name!r} has rows of {row} weights, "
                f"no multiple of the {known.block_size} of a {known.name} block"
            )
        nbytes = known.row_bytes(row)
        for size in shape[:-1]:
            nbytes *= size
        return nbytes

    def _check_extents(self) -> None:
        """Every tensor lies inside the file, and no two of them share a byte."""
        end, previous = 0, ""
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset + (tensor.nbytes or 0) > self.size:
                raise self.error(
                    f"tensor {tensor.name!r} ({tensor.nbytes} bytes at byte {tensor.offset}) "
                    f"reaches past the end of the file ({self.size} bytes)"
                )
            if tensor.nbytes:
                if tensor.offset < end:
                    raise self.error(f"tensors {previous!r} and {tensor.name!r} overlap")
                end, previous = tensor.offset + tensor.nbytes, tensor.name
