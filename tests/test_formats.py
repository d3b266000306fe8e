"""Every block format decodes to the bits of ggml's own dequantiser, in C++ and in pure JAX."""

import importlib.util
import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import _libggml, _native
from jax_moe._dequantize import dequantize
from jax_moe._formats import FORMATS, BlockFormat, as_format, format_of_type

ROOT = pathlib.Path(__file__).parent.parent
K = 1024  # a multiple of every block size

by_format = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


def random_rows(format: BlockFormat, rows: int = 256, seed: int = 0) -> np.ndarray:
    """Rows of any bytes: every value of every field, Inf and NaN scales among them."""
    shape = (rows, format.row_bytes(K))
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def quantized_rows(format: BlockFormat) -> np.ndarray:
    """Rows from ggml's quantiser: normal weights, a row of zeros and a constant one."""
    weights = np.random.default_rng(1).standard_normal((16, K)).astype(np.float32) * 0.05
    weights[0], weights[1] = 0, 0.25
    importance = np.mean(weights**2, axis=0)
    return _libggml.quantize_chunk(format.ggml_type, weights, format.row_bytes(K), importance)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, flushes: bool = False) -> None:
    """Equal bits, NaN for NaN; `flushes` lets values below 1e-36 be zeros."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    same = actual.view(np.uint32) == expected.view(np.uint32)
    same |= np.isnan(actual) & np.isnan(expected)
    if flushes:
        same |= (actual == 0) & (np.abs(expected) < 1e-36)
    assert same.all(), f"{np.sum(~same)} differ, first at {np.argwhere(~same)[0]}"


@by_format
def test_cpp_decoder_on_random_bytes(format):
    rows = random_rows(format)
    expected = _libggml.dequantize(format.ggml_type, rows)
    assert_same_bits(_native.dequantize(format.ggml_type, rows), expected)


@by_format
def test_cpp_decoder_on_quantized_weights(format):
    rows = quantized_rows(format)
    expected = _libggml.dequantize(format.ggml_type, rows)
    assert np.abs(expected).max() > 0.05
    assert_same_bits(_native.dequantize(format.ggml_type, rows), expected)


@by_format
def test_jax_on_random_bytes(format):
    rows = random_rows(format, seed=2)
    expected = _libggml.dequantize(format.ggml_type, rows)
    assert_same_bits(np.asarray(dequantize(rows, format)), expected, flushes=True)


@by_format
def test_jax_on_quantized_weights(format):
    rows = quantized_rows(format)
    expected = _libggml.dequantize(format.ggml_type, rows)
    assert_same_bits(np.asarray(dequantize(rows, format)), expected, flushes=True)


@by_format
def test_jax_inside_jit_and_on_leading_axes(format):
    rows = random_rows(format, rows=6)
    expected = _libggml.dequantize(format.ggml_type, rows).reshape(2, 3, K)
    # A consumer in the same program must not change the bits by fusing with the decoder.
    weights, doubled = jax.jit(lambda data: ((w := dequantize(data, format)), 2 * w))(
        rows.reshape(2, 3, -1)
    )
    assert_same_bits(np.asarray(weights), expected, flushes=True)
    with np.errstate(over="ignore"):
        assert_same_bits(np.asarray(doubled), 2 * expected, flushes=True)


def test_jax_under_x64():
    with jax.enable_x64(True):
        for format in FORMATS.values():
            rows = random_rows(format, rows=2)
            expected = _libggml.dequantize(format.ggml_type, rows)
            assert_same_bits(np.asarray(dequantize(rows, format)), expected, flushes=True)


def both_decoders(format: BlockFormat, blocks: np.ndarray) -> None:
    expected = _libggml.dequantize(format.ggml_type, blocks)
    assert_same_bits(_native.dequantize(format.ggml_type, blocks), expected)
    assert_same_bits(np.asarray(dequantize(blocks, format)), expected, flushes=True)


@pytest.mark.parametrize("name, offset", [("Q8_0", 0), ("Q4_K", 0), ("Q4_K", 2), ("TQ1_0", 52)])
def test_every_f16_scale(name, offset):
    format = FORMATS[name]
    blocks = np.resize(random_rows(format, rows=1), (2**16, format.block_bytes))
    blocks[:, offset : offset + 2] = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    both_decoders(format, blocks)


@pytest.mark.parametrize("name, scales", [("MXFP4", 1), ("NVFP4", 4)])
def test_every_8_bit_scale(name, scales):
    format = FORMATS[name]
    blocks = np.resize(random_rows(format, rows=1), (256, format.block_bytes))
    for i in range(scales):
        blocks[:, i] = np.roll(np.arange(256), i)
    both_decoders(format, blocks)
    # Subnormal floats do exist in ggml's result, so that the C++ decoder has built them.
    if name == "MXFP4":
        values = np.abs(_native.dequantize(format.ggml_type, blocks))
        assert ((values > 0) & (values < np.finfo(np.float32).tiny)).any()


def test_every_6_bit_scale_and_minimum():
    format = FORMATS["Q4_K"]
    blocks = np.resize(random_rows(format, rows=1), (256, format.block_bytes))
    blocks[:, :4] = np.array([1.0, 1.0], np.float16).view(np.uint8)
    for i in range(12):
        blocks[:, 4 + i] = np.arange(256) * (2 * i + 1) % 256
    both_decoders(format, blocks)


def test_codebooks_header_is_what_its_generator_writes():
    path = ROOT / "tools" / "make_codebooks.py"
    spec = importlib.util.spec_from_file_location("make_codebooks", path)
    make_codebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_codebooks)
    assert (ROOT / "ffi" / "blocks" / "codebooks.h").read_text() == make_codebooks.header()


def test_table_agrees_with_gguf_and_ggml():
    assert len(FORMATS) == 25
    for name, format in FORMATS.items():
        assert format.name == name
        traits = _libggml.load().base.ggml_get_type_traits(format.ggml_type).contents
        assert (traits.blck_size, traits.type_size) == (format.block_size, format.block_bytes)
        assert traits.type_name.decode().upper() == name
        assert format_of_type(format.ggml_type) is format
        if name in gguf.GGMLQuantizationType.__members__:
            assert gguf.GGMLQuantizationType[name] == format.ggml_type
    assert format_of_type(0) is None


def test_as_format():
    q4_k = FORMATS["Q4_K"]
    assert as_format(q4_k) is q4_k
    assert as_format("Q4_K") is q4_k
    assert as_format("q4_k") is q4_k
    assert as_format(gguf.GGMLQuantizationType.Q4_K) is q4_k
    assert as_format(BlockFormat("Q4_K", 12, 256, 144)) is q4_k


@pytest.mark.parametrize("format", ["Q4_K_M", "", "F16", gguf.GGMLQuantizationType.F32])
def test_as_format_names_what_is_allowed(format):
    with pytest.raises(ValueError, match=r"format.*Q4_0.*IQ1_M.*Q2_0"):
        as_format(format)


def test_as_format_refuses_a_made_up_block_format():
    with pytest.raises(ValueError, match="allowed"):
        as_format(BlockFormat("Q4_K", 12, 256, 145))


@pytest.mark.parametrize("format", [12, None, 1.0, np.uint8, b"Q4_K"])
def test_as_format_refuses_other_types(format):
    with pytest.raises(TypeError, match="format"):
        as_format(format)


def test_dequantize_refuses_bad_data():
    with pytest.raises(ValueError, match="multiple of 144"):
        dequantize(jnp.zeros((2, 145), jnp.uint8), "Q4_K")
    with pytest.raises(ValueError, match="multiple of 144"):
        dequantize(jnp.zeros((), jnp.uint8), "Q4_K")
    with pytest.raises(TypeError, match="uint8"):
        dequantize(jnp.zeros((2, 144), jnp.int8), "Q4_K")
    assert dequantize(jnp.zeros((0, 144), jnp.uint8), "Q4_K").shape == (0, 256)


def test_cpp_decoder_refuses_an_unknown_type():
    with pytest.raises(ValueError):
        _native.dequantize(9, np.zeros((1, 36), np.uint8))
    with pytest.raises(ValueError):
        _native.dequantize(12, np.zeros((1, 145), np.uint8))
