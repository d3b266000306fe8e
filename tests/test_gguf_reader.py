"""The header reader, judged by gguf-py's, and its refusals."""

import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from make_gguf import Weights, dense_tensors, expert_tensors, model_keys, write_gguf, write_qwen3moe

from jax_moe import GGUFFile
from jax_moe._gguf import GGUFError
from jax_moe._gguf.header import Header
from jax_moe._gguf.split import Model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def header_bytes(*, tensors=(), keys=(), version=3, counts=None, tail=b""):
    """A header by hand. Tensors: (name, dims, type, offset); keys: (name, type and value)."""

    def string(text):
        data = text if isinstance(text, bytes) else text.encode()
        return struct.pack("<Q", len(data)) + data

    tensor_count, key_count = counts or (len(tensors), len(keys))
    parts = [struct.pack("<4sIQQ", b"GGUF", version, tensor_count, key_count)]
    parts += [string(name) + value for name, value in keys]
    for name, dims, kind, offset in tensors:
        parts.append(string(name) + struct.pack("<I", len(dims)))
        parts.append(struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset))
    data = b"".join(parts) + tail
    return data + bytes(-len(data) % 32)


def u32(value):
    return struct.pack("<II", 4, value)


def test_agrees_with_gguf_py(path):
    write_qwen3moe(
        path,
        keys={
            "x:test.bool": True,
            "x:test.string": "Grüße",
            "x:test.floats": [0.5, -1.25],
            "x:test.ints": [-3, 70000],
            "x:test.bools": [True, False, True],
            "x:test.strings": ["", "a", "ß" * 300],
            "x:general.alignment": 64,
        },
    )
    ours, judge = Header(path), gguf.GGUFReader(path)
    fields = {name for name in judge.fields if not name.startswith("GGUF.")}
    assert set(ours.metadata) == fields
    for name in fields:
        value, expected = ours.metadata[name], judge.fields[name].contents()
        assert np.array_equal(value, expected), name
    assert list(ours.tensors) == [tensor.name for tensor in judge.tensors]
    for tensor in judge.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.format == tensor.tensor_type.name
        assert mine.offset == tensor.data_offset
        np.testing.assert_array_equal(mine.bytes(), tensor.data.reshape(-1).view(np.uint8))


def test_values_have_python_types(path):
    write_qwen3moe(path, keys={"x:test.bool": True, "x:test.floats": [0.5]})
    metadata = GGUFFile(path).metadata
    assert metadata["test.bool"] is True
    assert type(metadata["qwen3moe.block_count"]) is int
    assert type(metadata["qwen3moe.attention.layer_norm_rms_epsilon"]) is float
    assert not metadata["test.floats"].flags.writeable
    with pytest.raises(KeyError):
        metadata["absent"]


def test_a_vocabulary_costs_neither_time_nor_objects(path):
    size = 152_000
    tokens = [f"token{i}ß" for i in range(size)]
    write_qwen3moe(
        path,
        keys={
            "x:tokenizer.ggml.tokens": tokens,
            "x:tokenizer.ggml.scores": [0.5] * size,
            "x:tokenizer.ggml.token_type": [1] * size,
            "x:tokenizer.ggml.merges": tokens,
        },
    )
    start = time.perf_counter()
    header = Header(path)
    assert time.perf_counter() - start < 2  # 0.02 s on an idle machine
    # tracemalloc slows the loop down, so memory is measured apart: an object a token takes 10 MB.
    tracemalloc.start()
    layers = GGUFFile(path).layers
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(layers) == 2
    assert peak < 1_000_000
    assert header.metadata.array_length("tokenizer.ggml.tokens") == size
    assert header.metadata["tokenizer.ggml.tokens"] == tokens
    np.testing.assert_array_equal(header.metadata["tokenizer.ggml.scores"], np.full(size, 0.5))


def test_version_2_is_read(path):
    path.write_bytes(header_bytes(version=2, keys=[("a", u32(7))]))
    header = Header(path)
    assert (header.version, dict(header.metadata), header.tensors) == (2, {"a": 7}, {})


def test_arrays_may_be_empty(path):
    empty = [(name, struct.pack("<IIQ", 9, kind, 0)) for name, kind in (("f", 6), ("s", 8))]
    path.write_bytes(header_bytes(keys=empty))
    metadata = Header(path).metadata
    assert len(metadata["f"]) == 0
    assert metadata["s"] == []


def test_unknown_types_are_an_error_only_where_used(path):
    write_qwen3moe(path)
    data = path.read_bytes()
    name = b"blk.0.ffn_up_exps.weight"
    at = data.index(name) + len(name) + 4 + 3 * 8
    path.write_bytes(data[:at] + struct.pack("<I", 137) + data[at + 4 :])
    file = GGUFFile(path)
    assert file.layers[1].problem is None
    assert file.layers[0].projections["up"].format == "type 137"
    with pytest.raises(GGUFError, match=r"blk\.0\.ffn_up_exps\.weight.*type 137"):
        file.load(0)
    with pytest.raises(GGUFError, match="137"):
        file.layers[0].projections["up"].bytes()


TENSOR = ("t", (4,), 0, 0)
DATA = bytes(64)

REFUSED = {
    "empty": (b"", "too few"),
    "magic": (b"GGML" + bytes(60), "not a GGUF file"),
    "version 1": (header_bytes(version=1), "version 1"),
    "version 9": (header_bytes(version=9), "version 9"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0) + bytes(8), "big-endian"),
    "tensor count": (header_bytes(counts=(1 << 62, 0)), "tensors"),
    "key count": (header_bytes(counts=(0, 1 << 62)), "keys"),
    "missing keys": (header_bytes(counts=(0, 9), tail=bytes([1])), "key 0 of 9"),
    "duplicate key": (header_bytes(keys=[("a", u32(1))] * 2), "'a' occurs twice"),
    "key of huge length": (
        struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 60) + bytes(32),
        "claims a name",
    ),
    "value type": (header_bytes(keys=[("a", struct.pack("<I", 99))]), "'a'.*value type 99"),
    "nested array": (header_bytes(keys=[("a", struct.pack("<IIQ", 9, 9, 1))]), "array of arrays"),
    "array length": (header_bytes(keys=[("a", struct.pack("<IIQ", 9, 6, 1 << 61))]), "'a' needs"),
    "string count": (header_bytes(keys=[("a", struct.pack("<IIQ", 9, 8, 1 << 61))]), "'a' claims"),
    "more strings than bytes": (
        header_bytes(keys=[("a", struct.pack("<IIQ", 9, 8, 1 << 20))]),
        "'a' claims 1048576 strings",
    ),
    "string length": (
        header_bytes(keys=[("a", struct.pack("<IQ", 8, 1 << 63))]) + DATA,
        "'a': its last string",
    ),
    "string of many": (
        header_bytes(keys=[("a", struct.pack("<IIQQ", 9, 8, 4, (1 << 64) - 1))]) + DATA,
        "'a': string 1 of 4",
    ),
    "alignment": (header_bytes(keys=[("general.alignment", u32(48))]), "general.alignment"),
    "no alignment": (header_bytes(keys=[("general.alignment", u32(0))]), "general.alignment"),
    "alignment's type": (
        header_bytes(keys=[("general.alignment", struct.pack("<If", 6, 32.0))]),
        "general.alignment",
    ),
    "key's encoding": (header_bytes(keys=[(b"\xff\xfe", u32(1))]), "key 0 of 1.*UTF-8"),
    "duplicate tensor": (header_bytes(tensors=[TENSOR, TENSOR]) + DATA, "'t' occurs twice"),
    "rank": (header_bytes(tensors=[("t", (1,) * 5, 0, 0)]) + DATA, "'t' has 5 dimensions"),
    "huge rank": (
        header_bytes(counts=(1, 0), tail=struct.pack("<Q1sI", 1, b"t", 1 << 31)),
        "'t' has 2147483648 dimensions",
    ),
    "overflow of dims": (
        header_bytes(tensors=[("t", (1 << 40, 1 << 40, 2), 0, 0)]) + DATA,
        "'t'.*past the end",
    ),
    "dims beyond int64": (
        header_bytes(tensors=[("t", ((1 << 64) - 1,), 0, 0)]) + DATA,
        "'t'.*past the end",
    ),
    "row no multiple of the block": (
        header_bytes(tensors=[("t", (100,), 12, 0)]) + DATA,
        "'t' has rows of 100.*Q4_K",
    ),
    "offset past the end": (header_bytes(tensors=[("t", (4,), 0, 96)]) + DATA, "'t'.*past the end"),
    "offset unaligned": (header_bytes(tensors=[("t", (4,), 0, 8)]) + DATA, "'t' has offset 8"),
    "huge offset": (
        header_bytes(tensors=[("t", (4,), 0, (1 << 64) - 32)]) + DATA,
        "'t'.*past the end",
    ),
    "overlap": (
        header_bytes(tensors=[("t", (16,), 0, 0), ("u", (4,), 0, 32)]) + DATA,
        "'t' and 'u' overlap",
    ),
    "unknown type past the end": (
        header_bytes(tensors=[("t", (4,), 137, 1 << 40)]) + DATA,
        "'t'.*past the end",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(path, case):
    data, message = REFUSED[case]
    path.write_bytes(data)
    with pytest.raises(GGUFError, match=message) as refusal:
        Header(path)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value)) < len(str(path)) + 250


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(GGUFError, match="regular file"):
        Header(tmp_path)
    with pytest.raises(FileNotFoundError):
        Header(tmp_path / "absent.gguf")


def test_bad_text_is_refused_when_asked_for(path):
    value = struct.pack("<IQ", 8, 2) + b"\xff\xff"
    path.write_bytes(header_bytes(keys=[("good", u32(1)), ("bad", value)]))
    metadata = Header(path).metadata
    assert metadata["good"] == 1
    with pytest.raises(GGUFError, match="'bad'"):
        metadata["bad"]


def split_model(tmp_path, layers=3):
    write_qwen3moe(tmp_path / "model.gguf", layers=layers, split_max_tensors=5)
    return sorted(tmp_path.glob("*.gguf"))


def test_any_part_opens_a_split_model(tmp_path):
    parts = split_model(tmp_path)
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = write_qwen3moe(tmp_path / "whole.gguf", layers=3)
    expected = Model(whole)
    for part in parts:
        model = Model(part)
        assert set(model.tensors) == set(expected.tensors)
        for name, tensor in model.tensors.items():
            np.testing.assert_array_equal(tensor.bytes(), expected.tensors[name].bytes())
        assert [layer.problem for layer in GGUFFile(part).layers] == [None] * 3


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(tmp_path, missing):
    parts = split_model(tmp_path)
    parts[missing].unlink()
    with pytest.raises(
        GGUFError, match=rf"{parts[missing].name}: part {missing + 1} of 3.*missing"
    ):
        GGUFFile(parts[(missing + 1) % 3])


def test_parts_must_belong_together(tmp_path):
    parts = split_model(tmp_path)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(GGUFError, match=rf"{parts[1].name}.*part 2 of 3"):
        GGUFFile(parts[0])


def test_a_renamed_part_is_refused(tmp_path):
    part = split_model(tmp_path)[0].rename(tmp_path / "other.gguf")
    with pytest.raises(GGUFError, match="one of 3 parts"):
        GGUFFile(part)


def test_tensors_of_all_parts_are_counted(tmp_path):
    parts = split_model(tmp_path)
    data = parts[0].read_bytes()
    at = data.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    parts[0].write_bytes(data[:at] + struct.pack("<i", 99) + data[at + 4 :])
    with pytest.raises(GGUFError, match=r"split\.tensors\.count.*99.*14"):
        GGUFFile(parts[0])


def test_layers_of_an_unknown_architecture_are_shown(path):
    weights = Weights()
    tensors = dense_tensors(weights, 0) | expert_tensors(weights, 1)
    write_gguf(path, "newmoe", model_keys(), tensors)
    (layer,) = GGUFFile(path).layers
    assert layer.index == 1
    assert layer.projections["down"].format == "Q5_1"
    assert "architecture 'newmoe' is not known" in layer.problem


def test_a_file_without_an_architecture_is_refused(path):
    path.write_bytes(header_bytes(keys=[("a", u32(1))]))
    with pytest.raises(GGUFError, match=r"general\.architecture"):
        _ = GGUFFile(path).layers


def test_a_dense_model_has_no_moe_layers(path):
    keys = model_keys() | {"expert_count": 0}
    write_gguf(path, "llama", keys, dense_tensors(Weights(), 0) | dense_tensors(Weights(), 1))
    file = GGUFFile(path)
    assert file.layers == ()
    with pytest.raises(GGUFError, match="layer 0 is not a MoE layer; it has no MoE layers"):
        file.load(0)
