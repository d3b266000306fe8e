"""Measures GGUFFile.load over all MoE layers of a file against a plain read of the same bytes.

    python benchmarks/load_gguf.py MODEL.gguf [--rounds 3] [--cold] [--prepack] [--keep]

The plain side reads each tensor of a layer with `np.fromfile` and puts the bytes on the device. The
sides take turns, and before each the file is brought into the same state: read once from end to
end, so that as much of it as fits is in the page cache, or with --cold dropped from the cache.
Both sides wait for every layer. Each layer is freed when it is there, as if its user passed it on,
or with --keep held, as far as the device has memory for the whole model.

Memory is the process's own, by /proc/self/status, sampled by a thread: anonymous pages, and pages
of mapped files, above what there was before. On a CPU, where the device's memory is the host's,
what the layers hold there is not counted: neither copies nor, where the file's alignment allows
them, views of the file, which then costs nothing to load. The rest is to be no more than one layer.
"""

import argparse
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

import jax_moe

INTERVAL = 0.001  # seconds between samples of the memory in use


class Memory:
    """The most memory in use, in bytes above that at the start, while a thread watches."""

    def __init__(self) -> None:
        self.anonymous = self.mapped = self.total = 0
        self._first = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            anonymous, mapped = (
                now - then for now, then in zip(resident(), self._first, strict=True)
            )
            self.anonymous = max(self.anonymous, anonymous)
            self.mapped = max(self.mapped, mapped)
            self.total = max(self.total, anonymous + mapped)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def resident() -> tuple[int, int]:
    """Bytes of anonymous and of file-backed pages of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, mapped = (1024 * int(fields[key].split()[0]) for key in ("RssAnon", "RssFile"))
    return anonymous, mapped


def plain(file: jax_moe.GGUFFile, device: jax.Device) -> Iterator[object]:
    """The bytes of each layer on the device."""
    for layer in file.layers:
        placed = []
        for entry in layer.entries.values():
            tensor = entry.tensor
            raw = np.fromfile(tensor.path, np.uint8, tensor.nbytes or 0, offset=tensor.offset)
            placed.append(jax.device_put(raw, device))
        yield jax.block_until_ready(placed)


def ours(file: jax_moe.GGUFFile, device: jax.Device, prepack: bool) -> Iterator[object]:
    for layer in file.layers:
        params, _ = file.load(layer.index, device, prepack=prepack, progress=False)
        yield jax.block_until_ready(params)
        del params  # before the next layer comes


def view_bytes(file: jax_moe.GGUFFile, device: jax.Device) -> int:
    """How much of the layers `load` does not copy."""
    if device.platform != "cpu":
        return 0
    total = 0
    for layer in file.layers:
        leaves = jax.tree.leaves(file.load(layer.index, device, progress=False)[0])
        pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
        tensors = [entry.tensor for entry in layer.entries.values()]
        total += sum(t.nbytes or 0 for t in tensors if t.bytes().ctypes.data in pointers)
    return total


def consume(layers: Iterator[object], keep: bool) -> None:
    kept = []
    for layer in layers:
        if keep:
            kept.append(layer)
        del layer


def settle(paths: set[Path], cold: bool) -> None:
    """Brings the files into the page cache, or out of it."""
    for path in sorted(paths):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if cold:
                os.fsync(descriptor)  # a page that is not on the disk yet cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                buffer = bytearray(32 << 20)
                with open(descriptor, "rb", buffering=0, closefd=False) as opened:
                    while opened.readinto(buffer):
                        pass
        finally:
            os.close(descriptor)


@contextmanager
def stopwatch(seconds: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each side")
    parser.add_argument("--prepack", action="store_true", help="of GGUFFile.load")
    parser.add_argument("--keep", action="store_true", help="hold all layers at once")
    options = parser.parse_args(arguments)

    device = jax.devices()[0]
    file = jax_moe.GGUFFile(options.file)
    tensors = [entry.tensor for layer in file.layers for entry in layer.entries.values()]
    total = sum(tensor.nbytes or 0 for tensor in tensors)
    largest = max(layer.nbytes for layer in file.layers)
    held = total if options.keep else largest
    print(
        f"{device.device_kind}: {len(file.layers)} layers, {total / 1e9:.2f} GB, at most "
        f"{largest / 1e6:.0f} MB a layer; page cache {'cold' if options.cold else 'warm'}"
    )
    sides: dict[str, Callable[[], Iterator[object]]] = {
        "plain read + device_put": lambda: plain(file, device),
        "GGUFFile.load": lambda: ours(file, device, options.prepack),
    }
    views = 0 if options.prepack else view_bytes(file, device)
    if views:
        print(f"{views / 1e9:.2f} GB are views of the file on the CPU, and are not copied")
    for make in sides.values():  # one layer each: what is compiled or allocated once is not counted
        next(make())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, Memory] = {}
    for _ in range(options.rounds):
        for name, make in sides.items():
            settle({tensor.path for tensor in tensors}, options.cold)
            gc.collect()
            with Memory() as watched, stopwatch(seconds[name]):
                consume(make(), options.keep)
            if name not in memory or watched.total > memory[name].total:
                memory[name] = watched
    for name, times in seconds.items():
        rates = ", ".join(f"{total / second / 1e9:.2f}" for second in times)
        peak = memory[name]
        beyond = peak.total
        if device.platform == "cpu":
            seen = min(peak.mapped, views)
            beyond -= seen + (held if seen == 0 else max(0, held - views))
        print(
            f"{name:24} {statistics.median(times):6.2f} s, "
            f"{total / statistics.median(times) / 1e9:5.2f} GB/s ({rates}); memory "
            f"{peak.total / 1e6:.0f} MB (anonymous {peak.anonymous / 1e6:.0f}, mapped "
            f"{peak.mapped / 1e6:.0f}), beyond the device's {beyond / 1e6:.0f} MB = "
            f"{beyond / largest:.2f} layers"
        )
    ratio = statistics.median(
        p / o for p, o in zip(*(seconds[name] for name in sides), strict=True)
    )
    print(f"GGUFFile.load is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
