"""The key-value pairs of a GGUF header, decoded on access."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jax_moe._gguf.cursor import Cursor

# Value types by their number in the file. Bool, string and array are apart.
_NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class Value(NamedTuple):
    """Where a value is: its (element) type, its length if it is an array, and its position."""

    type: int
    length: int | None
    position: int


def skip_value(cursor: Cursor, what: str, error: Callable[[str], Exception]) -> Value:
    """Steps over a value without decoding it."""
    kind, count = cursor.u32(what), None
    if kind == _ARRAY:
        kind, count = cursor.u32(what), cursor.u64(what)
    elements = 1 if count is None else count
    if kind == _STRING:
        start = cursor.position
        cursor.skip_strings(elements, what)
        return Value(kind, count, start)
    if kind in _NUMBERS or kind == _BOOL:
        width = 1 if kind == _BOOL else _NUMBERS[kind].itemsize
        return Value(kind, count, cursor.take(width * elements, what))
    if kind == _ARRAY:
        raise error(f"{what} holds an array of arrays, which GGUF readers do not support")
    raise error(f"{what} has unknown value type {kind}")


class Metadata(Mapping[str, Any]):
    """A GGUF file's key-value pairs.

    Numbers are int, float or bool; strings str; arrays of numbers read-only NumPy arrays; arrays of
    strings lists, built anew at each access.
    """

    def __init__(
        self, buffer: mmap.mmap, values: dict[str, Value], error: Callable[[str], Exception]
    ):
        self._buffer = buffer
        self._values = values
        self._error = error

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if value.type == _STRING:
            strings = self._strings(key, value)
            return next(strings) if value.length is None else list(strings)
        dtype = np.dtype(np.uint8) if value.type == _BOOL else _NUMBERS[value.type]
        count = 1 if value.length is None else value.length
        numbers = np.frombuffer(self._buffer, dtype, count, value.position)
        if value.type == _BOOL:
            if np.any(numbers > 1):
                raise self._error(f"key {key!r} holds a boolean that is neither 0 nor 1")
            numbers = numbers.astype(np.bool_)
        return numbers[0].item() if value.length is None else numbers

    def _strings(self, key: str, value: Value) -> Iterator[str]:
        position = value.position
        for _ in range(1 if value.length is None else value.length):
            (length,) = struct.unpack_from("<Q", self._buffer, position)
            try:
                yield self._buffer[position + 8 : position + 8 + length].decode()
            except UnicodeDecodeError as error:
                raise self._error(f"key {key!r} holds text that is not UTF-8 ({error})") from None
            position += 8 + length

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def array_length(self, key: str) -> int | None:
        """The number of elements where the value is an array, else None; decodes nothing."""
        return self._values[key].length
