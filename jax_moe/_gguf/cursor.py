"""A position in a GGUF header that cannot leave the file."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

# Far above any real model; low enough that a hostile file is refused within seconds.
MAX_STRINGS = 1 << 24  # in all arrays of a header together

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """Reads forward through a memory map, checking first that the bytes are there.

    `what` names the thing that is being read, for the message: "key 'general.name'".

    Args:
      buffer: the whole file.
      error: makes the exception to raise from a message.
    """

    def __init__(self, buffer: mmap.mmap, error: Callable[[str], Exception]):
        self._buffer = buffer
        self._size = len(buffer)
        self._error = error
        self._strings_left = MAX_STRINGS
        self.position = 0

    def take(self, nbytes: int, what: str) -> int:
        """Advances by nbytes; returns the position before."""
        start = self.position
        if nbytes > self._size - start:
            raise self._error(
                f"{what} needs {nbytes} bytes at byte {start}, "
                f"past the end of the file ({self._size} bytes)"
            )
        self.position = start + nbytes
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self._buffer, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self._buffer, self.take(8, what))[0]

    def u64s(self, count: int, what: str) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}Q", self._buffer, self.take(8 * count, what))

    def name(self, what: str, limit: int) -> str:
        """A string of at most `limit` bytes."""
        length = self.u64(what)
        if length > limit:
            raise self._error(f"{what} claims a name of {length} bytes; the limit is {limit}")
        start = self.take(length, what)
        try:
            return self._buffer[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self._error(f"{what} has a name that is not UTF-8 ({error})") from None

    def skip_strings(self, count: int, what: str) -> None:
        """Steps over `count` strings."""
        if count > self._strings_left:
            raise self._error(
                f"{what} claims {count} strings; the limit is {MAX_STRINGS} in a file"
            )
        self._strings_left -= count
        if 8 * count > self._size - self.position:
            raise self._error(f"{what} claims {count} strings, more than the file has room for")
        # The one loop whose length grows with the vocabulary.
        buffer, position, last = self._buffer, self.position, self._size - 8
        length = _U64.unpack_from
        for i in range(count):
            if position > last:
                raise self._error(f"{what}: string {i} of {count} is past the end of the file")
            position += 8 + length(buffer, position)[0]
        if position > self._size:
            raise self._error(f"{what}: its last string reaches past the end of the file")
        self.position = position
