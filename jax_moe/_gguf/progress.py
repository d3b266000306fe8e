"""Reads tensors from disk into memory, with a progress bar where that takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jax_moe._gguf.header import TensorInfo

_CHUNK = 16 << 20
_AHEAD = 12  # chunks that the disk is asked for beyond the one that is looked at
_PAGE = 4096
PATIENCE = 1.0  # seconds until the bar appears


def read(
    tensors: Mapping[str, TensorInfo], label: str, progress: bool | None = None
) -> Iterator[str]:
    """Brings tensors into memory, one after another in the file's order.

    Yields the key of each when all its pages are there. Meanwhile the kernel reads the next ones,
    so that what the caller does with one costs the disk no time.

    Args:
      tensors: by any keys.
      label: what is being read, shown beside the bar.
      progress: show a bar on stderr once this has taken a second; None: if stderr is a terminal.
    """
    ordered = sorted(tensors.items(), key=lambda item: (str(item[1].path), item[1].offset))
    total = sum(tensor.nbytes or 0 for _, tensor in ordered)
    bar = _Bar(label, total, sys.stderr.isatty() if progress is None else progress)
    chunks = [
        (key, tensor, start, min(start + _CHUNK, tensor.nbytes or 0))
        for key, tensor in ordered
        for start in range(0, tensor.nbytes or 1, _CHUNK)
    ]
    asked = 0
    try:
        for i, (key, tensor, start, stop) in enumerate(chunks):
            for _, ahead, *part in chunks[asked : i + 1 + _AHEAD]:
                ahead.will_need(*part)
            asked = i + 1 + _AHEAD
            tensor.bytes()[start:stop:_PAGE].max(initial=0)
            bar.advance(stop - start)
            if stop == (tensor.nbytes or 0):
                yield key
    finally:
        bar.close()


class _Bar:
    """A progress bar by rich, if it is installed; nothing for the first second."""

    def __init__(self, label: str, total: int, wanted: bool):
        self._label = label
        self._total = total
        self._wanted = wanted
        self._done = 0
        self._start = time.monotonic()
        self._bar: Any = None

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._bar is None and self._wanted and time.monotonic() - self._start > PATIENCE:
            self._open()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def _open(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TransferSpeedColumn,
            )
        except ImportError:
            self._wanted = False
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(self._label, total=self._total, completed=self._done)
        self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
