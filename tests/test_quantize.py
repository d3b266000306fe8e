"""quantize packs the bytes of ggml's quantiser, and says what it cannot do."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import _libggml, _quantize
from jax_moe._formats import FORMATS

E, N, K = 3, 5, 512

by_format = pytest.mark.parametrize("name", list(FORMATS))
without_ggml = pytest.mark.parametrize("name", sorted(_quantize._IN_GGUF))

# Relative L2 error of normal weights, a little above what ggml's quantiser reaches.
ERROR = {
    "Q4_0": 0.09, "Q4_1": 0.08, "Q5_0": 0.05, "Q5_1": 0.04, "Q8_0": 0.006,
    "Q2_K": 0.30, "Q3_K": 0.16, "Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.02,
    "IQ1_S": 0.55, "IQ1_M": 0.60, "IQ2_XXS": 0.38, "IQ2_XS": 0.33, "IQ2_S": 0.28,
    "IQ3_XXS": 0.23, "IQ3_S": 0.18, "IQ4_NL": 0.08, "IQ4_XS": 0.08,
    "TQ1_0": 0.85, "TQ2_0": 0.85, "MXFP4": 0.13, "NVFP4": 0.11, "Q1_0": 0.65, "Q2_0": 0.75,
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ggml_bytes(name: str, weights: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """[..., N, K] by ggml, one matrix at a time; importance [..., K]."""
    format = FORMATS[name]
    *leading, n, k = weights.shape
    packed = [
        _libggml.quantize_chunk(
            format.ggml_type,
            matrix,
            format.row_bytes(k),
            None if importance is None else np.broadcast_to(importance, (*leading, k))[index],
        )
        for index, matrix in ((i, weights[i]) for i in np.ndindex(*leading))
    ]
    return np.stack(packed).reshape(*leading, n, -1)


@by_format
def test_bytes_are_ggmls(name):
    weights = normal(E, N, K)
    importance = np.ones(K, np.float32) if name in _quantize._NEEDS_IMPORTANCE else None
    packed = jax_moe.quantize(weights, name, importance)
    assert isinstance(packed.data, jax.Array)
    assert packed.data.dtype == np.uint8
    assert packed.shape == weights.shape
    assert packed.format is FORMATS[name]
    np.testing.assert_array_equal(packed.data, ggml_bytes(name, weights, importance))
    error = np.asarray(packed.dequantize()) - weights
    assert np.linalg.norm(error) < ERROR[name] * np.linalg.norm(weights)


@by_format
def test_importance_of_every_expert(name):
    weights = normal(2, E, N, K)
    importance = normal(2, E, K, seed=1) ** 2
    packed = jax_moe.quantize(weights, name, importance)
    np.testing.assert_array_equal(packed.data, ggml_bytes(name, weights, importance))


def test_importance_of_columns_changes_the_bytes():
    weights, importance = normal(E, N, K), normal(K, seed=1) ** 4
    packed = jax_moe.quantize(weights, "Q4_K", importance)
    np.testing.assert_array_equal(packed.data, ggml_bytes("Q4_K", weights, importance))
    assert (packed.data != jax_moe.quantize(weights, "Q4_K").data).any()


def edge_cases() -> dict[str, np.ndarray]:
    """Weights at which two quantisers could part: ties, powers of two, f16's and float32's ends."""
    shape = (1, 64, 2048)
    rng = np.random.default_rng(2)
    gaps = rng.standard_normal((1, 64, 64, 32)) * (rng.random((1, 64, 64, 1)) < 0.7)
    decades = np.exp(rng.uniform(-60, 15, (1, 64, 64, 1)))
    # The 16 floats on either side of powers of two, where an exponent is easily off by one.
    near = (np.arange(-16, 16) + np.float32(1).view(np.int32)).astype(np.int32).view(np.float32)
    scale = np.exp2(rng.integers(-30, 30, (1, 64, 64, 1)))
    return {
        "zeros": np.zeros(shape),
        "signed zeros": rng.choice([0.0, -0.0], shape),
        "signed zeros and positive": rng.choice([0.0, -0.0, 0.5, 1.0], shape),
        "signed zeros and negative": rng.choice([0.0, -0.0, -0.5, -1.0], shape),
        "blocks of zeros": gaps.reshape(shape),
        "decades": (rng.standard_normal((1, 64, 64, 32)) * decades).reshape(shape),
        "subnormal": rng.standard_normal(shape) * 1e-40,
        "integers": rng.integers(-8, 9, shape),
        "halves": rng.integers(-16, 17, shape) / 16,
        "powers of two": np.exp2(rng.integers(-9, 9, shape)) * rng.choice([-1, 1], shape),
        "near powers of two": (rng.choice(near, (1, 64, 64, 32)) * scale).reshape(shape),
        "positive": rng.uniform(0.5, 1, shape),
        "ternary": rng.integers(-1, 2, shape) * 0.37,
    }


@without_ggml
@pytest.mark.parametrize("case", list(edge_cases()))
def test_ggufs_quantiser_is_ggmls(name, case):
    weights = edge_cases()[case].astype(np.float32)
    packed = jax_moe.quantize(weights, name)
    np.testing.assert_array_equal(packed.data, ggml_bytes(name, weights, None))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_are_read_as_float32(dtype):
    weights = normal(E, N, K).astype(jnp.dtype(dtype))
    expected = jax_moe.quantize(weights.astype(np.float32), "Q4_0").data
    np.testing.assert_array_equal(jax_moe.quantize(weights, "Q4_0").data, expected)
    if dtype != "float64":
        packed = jax_moe.quantize(jnp.asarray(weights), "Q4_0")
        np.testing.assert_array_equal(packed.data, expected)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_no_experts_or_rows(name):
    for shape in ((0, N, K), (E, 0, K)):
        assert jax_moe.quantize(np.zeros(shape, np.float32), name).shape == shape


@pytest.fixture
def no_libggml(monkeypatch):
    """As if libggml-python were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libggml" else find_spec(name)
    )
    _libggml.load.cache_clear()
    yield
    _libggml.load.cache_clear()


@without_ggml
def test_no_libraries_needed(name, no_libggml):
    assert jax_moe.quantize(normal(E, N, K), name).shape == (E, N, K)


def test_missing_libraries_are_named(no_libggml):
    with pytest.raises(ImportError, match=r"pip install 'jax_moe\[ggml\]'"):
        jax_moe.quantize(normal(E, N, K), "Q4_K")
    with pytest.raises(ImportError, match=r"pip install 'jax_moe\[ggml\]'"):
        jax_moe.quantize(normal(E, N, K), "Q4_0", np.ones(K, np.float32))


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS"])
def test_missing_importance(name):
    assert _libggml.requires_importance(FORMATS[name].ggml_type)
    with pytest.raises(ValueError, match=f"importance.*{name}"):
        jax_moe.quantize(normal(E, N, K), name)
    with pytest.raises(ValueError, match="importance"):
        _libggml.quantize_chunk(FORMATS[name].ggml_type, normal(N, K), 1)


def test_formats_that_need_importance():
    needs = {n for n, f in FORMATS.items() if _libggml.requires_importance(f.ggml_type)}
    assert needs == _quantize._NEEDS_IMPORTANCE


BAD = {
    "rank": (ValueError, "weights.*axes", normal(N, K), "Q4_K", None),
    "block size": (ValueError, "K = 300.*256", normal(E, N, 300), "Q4_K", None),
    "no weights": (ValueError, "K = 0", normal(E, N, 0), "Q4_K", None),
    "format": (ValueError, "format.*Q4_0", normal(E, N, K), "Q4_X", None),
    "format type": (TypeError, "format", normal(E, N, K), 12, None),
    "integers": (TypeError, "weights.*int32", np.ones((E, N, K), np.int32), "Q4_K", None),
    "list": (TypeError, "weights.*list", [[[1.0] * K]], "Q4_K", None),
    "infinite": (ValueError, "weights.*finite", np.full((1, 1, K), np.inf), "Q4_K", None),
    "nan": (ValueError, "weights.*finite", np.full((1, 1, K), np.nan), "Q8_0", None),
    "beyond float32": (ValueError, "weights.*finite", np.full((1, 1, K), 1e39), "Q8_0", None),
    "beyond f16 scales": (ValueError, "weights.*1e\\+09", normal(1, 1, K) * 1e30, "IQ3_S", None),
    "importance shape": (ValueError, "importance", normal(E, N, K), "Q4_K", np.ones(K - 1)),
    "importance axes": (ValueError, "importance", normal(E, N, K), "Q4_K", np.ones((2, K))),
    "importance dtype": (TypeError, "importance", normal(E, N, K), "Q4_K", np.ones(K, int)),
    "negative importance": (ValueError, "importance", normal(E, N, K), "Q4_K", -np.ones(K)),
    "nan importance": (ValueError, "importance", normal(E, N, K), "Q4_K", np.full(K, np.nan)),
    "huge importance": (ValueError, "importance", normal(E, N, K), "Q4_K", np.full(K, 1e35)),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_arguments(case):
    error, message, weights, format, importance = BAD[case]
    with pytest.raises(error, match=message):
        jax_moe.quantize(weights, format, importance)


def test_traced_weights():
    with pytest.raises(TypeError, match=r"weights is traced.*outside jax\.jit"):
        jax.jit(lambda w: jax_moe.quantize(w, "Q8_0").data)(jnp.zeros((E, N, K)))
