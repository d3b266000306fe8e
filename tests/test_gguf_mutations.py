"""Damaged GGUF files: each is read correctly or refused by name, in bounded time and memory."""

import functools
import re
import struct
import time
import tracemalloc

import numpy as np
import pytest
from make_gguf import write_qwen3moe

from jax_moe import GGUFFile
from jax_moe._gguf import GGUFError

MUTATIONS = 200  # of each kind
KINDS = ("truncate", "flip", "overwrite", "count", "offset", "rename", "insert", "remove")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "original.gguf"
    keys = {"x:tokenizer.ggml.tokens": ["a", "bc"] * 50, "x:tokenizer.ggml.scores": [0.5] * 100}
    return write_qwen3moe(path, keys=keys).read_bytes()


@functools.cache
def header_size(data):
    """Where the tensor table ends, near enough: mutations past it change weights alone."""
    return data.index(b"blk.1.ffn_down_exps.weight") + 26 + 4 + 24 + 4 + 8


def names(data):
    """Positions of the lengths of all strings of the header that look like names."""
    found = []
    for match in re.finditer(rb"[a-z][a-z0-9_.]{3,}", data[: header_size(data)]):
        at = match.start() - 8
        if struct.unpack_from("<Q", data, at)[0] == len(match[0]):
            found.append((at, match[0]))
    return found


HUGE = (0, 1, 2, 5, 255, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1)


def mutate(kind, data, rng):
    """One damaged version of a file."""
    size, changed = header_size(data), bytearray(data)
    at = int(rng.integers(size))
    if kind == "truncate":
        return data[: int(rng.integers(len(data)))]
    if kind == "flip":
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(size))] ^= 1 << int(rng.integers(8))
    elif kind == "overwrite":
        length = int(rng.integers(1, 16))
        changed[at : at + length] = rng.bytes(length)
    elif kind == "count":  # the counts of the preamble, or any string's length
        at = int(rng.choice([8, 16] + [at for at, _ in names(data)]))
        struct.pack_into("<Q", changed, at, int(rng.choice(np.array(HUGE, np.uint64))))
    elif kind == "offset":  # dims, type or offset of a tensor
        tensors = [(at, name) for at, name in names(data) if name.endswith(b"weight")]
        at, name = tensors[int(rng.integers(len(tensors)))]
        at += 8 + len(name) + int(rng.choice([0, 4, 12, 20, 28, 32]))
        struct.pack_into("<Q", changed, at, int(rng.choice(np.array(HUGE, np.uint64))))
    elif kind == "rename":  # a missing key or tensor, or, if the name is another's, a duplicate
        known = names(data)
        at, name = known[int(rng.integers(len(known)))]
        same_length = [other for _, other in known if len(other) == len(name)]
        changed[at + 8 : at + 8 + len(name)] = same_length[int(rng.integers(len(same_length)))]
        if changed == data:
            changed[at + 8] = ord("X")
    elif kind == "insert":
        changed[at:at] = rng.bytes(int(rng.integers(1, 64)))
    elif kind == "remove":
        del changed[at : at + int(rng.integers(1, 64))]
    return bytes(changed)


def read_everything(path):
    """Does what a user may do with a file; returns the bytes of the leaves by layer."""
    file = GGUFFile(path)
    for key in file.metadata:
        file.metadata[key]
    for layer in file.layers:
        if layer.problem is None:
            params, config = file.load(layer.index)
            assert 1 <= config.top_k <= params.router.shape[0]
    return {
        layer.index: {
            leaf: (entry.tensor.name, entry.shape, entry.tensor.bytes().tobytes())
            for leaf, entry in layer.entries.items()
        }
        for layer in file.layers
        if layer.problem is None
    }


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, original, tmp_path):
    rng = np.random.default_rng(KINDS.index(kind))
    path = tmp_path / "damaged.gguf"
    refused = 0
    tracemalloc.start()
    for _ in range(MUTATIONS):
        data = mutate(kind, original, rng)
        path.write_bytes(data)
        tracemalloc.reset_peak()
        before, start = tracemalloc.get_traced_memory()[0], time.process_time()
        try:
            layers = read_everything(path)
        except GGUFError as error:
            refused += 1
            assert str(path) in str(error)
            assert len(str(error)) < 2000
        else:
            for leaves in layers.values():
                for name, _, content in leaves.values():
                    assert name.encode() in data
                    assert content in data
        assert time.process_time() - start < 1
        assert tracemalloc.get_traced_memory()[1] - before < 2_000_000
    tracemalloc.stop()
    assert refused > MUTATIONS // 10


@pytest.mark.parametrize("position", [0, 5, 20, 40])
def test_every_truncation_of_the_header_is_refused(position, original, tmp_path):
    path = tmp_path / "short.gguf"
    for length in range(position, header_size(original), 60):
        path.write_bytes(original[:length])
        with pytest.raises(GGUFError):
            GGUFFile(path)


def test_truncated_weights_are_refused_before_they_are_read(original, tmp_path):
    path = tmp_path / "short.gguf"
    path.write_bytes(original[:-1])
    with pytest.raises(GGUFError, match=r"blk\.1\.ffn_down_exps\.weight.*past the end"):
        GGUFFile(path)


def test_a_file_that_shrinks_while_open_is_refused(original, tmp_path):
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(original)
    file = GGUFFile(path)
    with path.open("r+b") as stream:
        stream.truncate(8192)
    with pytest.raises(GGUFError, match="shorter"):
        file.load(1)


@pytest.mark.parametrize("tensor", ["gate_inp", "gate_exps", "up_exps", "down_exps"])
def test_a_missing_tensor_is_named(tensor, original, tmp_path):
    path = tmp_path / "missing.gguf"
    name = f"blk.1.ffn_{tensor}.weight".encode()
    path.write_bytes(original.replace(name, b"X" + name[1:]))
    file = GGUFFile(path)
    assert file.layers[0].problem is None
    with pytest.raises(GGUFError, match=rf"'{name.decode()}' is missing"):
        file.load(1)
