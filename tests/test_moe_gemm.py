"""moe_gemm against float64: every format, variant and dtype, and every odd list of ids."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_moe
from jax_moe import MoEVariant

IMPLEMENTATIONS = (None, "reference")
DTYPES = ("float32", "float16", "bfloat16")
INT32 = np.iinfo(np.int32)

# Experts, rows, least width, tokens, slots: nothing is a multiple of a tile.
SHAPES = ((5, 19, 512, 7, 2), (3, 33, 96, 40, 1))


def problem(format_name, shape, seed=0):
    experts, n, k, tokens, top_k = shape
    weight, exact = oracle.packed(format_name, experts, n, oracle.width(format_name, k))
    rng = np.random.default_rng(seed)
    routing = oracle.random_routing(rng, tokens, experts, top_k)
    dispatch = jax_moe.sort_by_expert(routing.expert_ids, experts)
    x = rng.standard_normal((tokens, exact.shape[2]))
    return x, weight, exact, dispatch, routing, top_k


@pytest.mark.parametrize("format_name", oracle.all_formats())
@pytest.mark.parametrize("dtype", DTYPES)
def test_default_variant(format_name, dtype):
    for shape in SHAPES:
        x, weight, exact, dispatch, routing, top_k = problem(format_name, shape)
        x = jnp.asarray(x, dtype)
        for implementation in IMPLEMENTATIONS:
            y = jax_moe.moe_gemm(
                x,
                weight,
                dispatch.sorted_token_ids,
                dispatch.flat_expert_ids,
                top_k=top_k,
                topk_weights=routing.weights,
                implementation=implementation,
            )
            assert y.dtype == jnp.float32
            expected = oracle.gemm(
                x,
                exact,
                dispatch.sorted_token_ids,
                dispatch.flat_expert_ids,
                top_k,
                routing.weights,
            )
            error = oracle.relative_error(y, expected)
            print(f"{format_name} {dtype} {implementation}: {error:.1e}")
            assert error <= oracle.ERROR_BOUNDS["float32"]


@pytest.mark.parametrize("format_name", oracle.all_formats())
def test_scalar_gguf(format_name):
    x, weight, exact, dispatch, _, top_k = problem(format_name, SHAPES[0])
    x = jnp.asarray(x, jnp.float32)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    ours, reference = (
        jax_moe.moe_gemm(
            x,
            weight,
            *ids,
            top_k=top_k,
            variant=MoEVariant.SCALAR_GGUF,
            implementation=implementation,
        )
        for implementation in IMPLEMENTATIONS
    )
    # The same rounding, not only the same bound.
    assert oracle.relative_error(ours, reference) <= 1e-5
    error = oracle.relative_error(ours, oracle.gemm(x, exact, *ids, top_k))
    assert 1e-4 < error <= oracle.Q8_1_BOUND


@pytest.mark.parametrize("format_name", oracle.all_formats())
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_wmma_gguf(format_name, dtype):
    x, weight, exact, dispatch, _, top_k = problem(format_name, SHAPES[1])
    x = jnp.asarray(x, dtype)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    y = jax_moe.moe_gemm(x, weight, *ids, top_k=top_k, variant=MoEVariant.WMMA_GGUF)
    assert y.dtype == jnp.float32
    expected = oracle.gemm(x, exact, *ids, top_k)
    assert oracle.relative_error(y, expected) <= oracle.ERROR_BOUNDS[dtype]


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dense(x_dtype, w_dtype, implementation):
    rng = np.random.default_rng(1)
    weight = oracle.normal(rng, (4, 13, 50), w_dtype)
    routing = oracle.random_routing(rng, 9, 4, 3)
    dispatch = jax_moe.sort_by_expert(routing.expert_ids, 4)
    x = oracle.normal(rng, (9, 50), x_dtype)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    variants = [None] + [MoEVariant.WMMA] * (x_dtype == w_dtype != "float32")
    for variant in variants:
        y = jax_moe.moe_gemm(
            x, weight, *ids, top_k=3, variant=variant, implementation=implementation
        )
        assert y.dtype == x.dtype
        expected = oracle.gemm(x, np.asarray(weight, np.float64), *ids, 3)
        assert oracle.relative_error(y, expected) <= oracle.bound(x_dtype, y.dtype)


@pytest.mark.parametrize("y_dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_preferred_element_type(y_dtype, implementation):
    x, weight, exact, dispatch, _, top_k = problem("Q5_K", SHAPES[0])
    x = jnp.asarray(x, jnp.float32)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    y = jax_moe.moe_gemm(
        x,
        weight,
        *ids,
        top_k=top_k,
        preferred_element_type=y_dtype,
        implementation=implementation,
    )
    assert y.dtype == y_dtype
    expected = oracle.gemm(x, exact, *ids, top_k)
    assert oracle.relative_error(y, expected) <= oracle.ERROR_BOUNDS[y_dtype]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_for_every_pair(implementation):
    _, weight, exact, dispatch, routing, top_k = problem("Q4_0", SHAPES[0])
    x = oracle.normal(np.random.default_rng(3), (7 * top_k, exact.shape[2]))
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    y = jax_moe.moe_gemm(
        x,
        weight,
        *ids,
        top_k=top_k,
        topk_weights=routing.weights.reshape(-1),
        implementation=implementation,
    )
    expected = oracle.gemm(x, exact, *ids, top_k, routing.weights)
    assert oracle.relative_error(y, expected) <= 1e-5


some_ids = st.one_of(
    st.integers(-2, 13), st.sampled_from([-1, INT32.min, INT32.max, INT32.max - 1])
)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3]), st.sampled_from([None, MoEVariant.SCALAR_GGUF]))
def test_any_ids(data, top_k, variant):
    """Unsorted, repeated, unlisted and invalid ids are defined, in every implementation alike."""
    weight, exact = oracle.packed("Q8_0", 4, 6, 64)
    pairs = top_k * data.draw(st.integers(0, 4))
    pair_ids = np.array(data.draw(st.lists(some_ids, min_size=pairs, max_size=pairs)), np.int32)
    expert_ids = np.array(data.draw(st.lists(some_ids, min_size=pairs, max_size=pairs)), np.int32)
    x = oracle.normal(np.random.default_rng(pairs), (pairs // top_k, 64))
    expected = oracle.gemm(x, exact, pair_ids, expert_ids, top_k)
    for implementation in IMPLEMENTATIONS:
        y = jax_moe.moe_gemm(
            x,
            weight,
            jnp.asarray(pair_ids),
            jnp.asarray(expert_ids),
            top_k=top_k,
            variant=variant,
            implementation=implementation,
        )
        tolerance = 1e-5 if variant is None else Q8_1_LOOSE
        assert oracle.relative_error(y, expected) <= tolerance
        zero = ~expected.any(axis=1)
        assert not np.asarray(y)[zero].any()


# A single row of K = 64 may exceed the bound, which is one on norms over many.
Q8_1_LOOSE = 3e-2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("variant", [None, MoEVariant.SCALAR_GGUF, MoEVariant.WMMA_GGUF])
@pytest.mark.parametrize("tokens", [3, 40])
def test_nan_and_inf_stay_in_their_row(bad, variant, tokens):
    weight, _ = oracle.packed("Q4_K", 2, 21, 512)
    rng = np.random.default_rng(0)
    dtype = jnp.float16 if variant is MoEVariant.WMMA_GGUF else jnp.float32
    x = np.array(rng.standard_normal((tokens, 512)))
    x[1, 100] = bad
    ids = jnp.arange(tokens, dtype=jnp.int32), jnp.zeros(tokens, jnp.int32)
    y = np.asarray(jax_moe.moe_gemm(jnp.asarray(x, dtype), weight, *ids, top_k=1, variant=variant))
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()


@pytest.mark.parametrize("magnitude", [1e38, 3e30, 1e-30, 1e-36, 1e-40])
@pytest.mark.parametrize("tokens", [1, 40])
def test_any_finite_magnitude(magnitude, tokens):
    """|y - y*| <= 1e-5 (|W| |x|) in norm, also where q * x alone would overflow or vanish."""
    weight, exact = oracle.packed("Q6_K", 2, 16, 256)
    x = np.random.default_rng(2).uniform(-1, 1, (tokens, 256)) * magnitude
    x = jnp.asarray(x, jnp.float32)
    ids = jnp.arange(tokens, dtype=jnp.int32), jnp.ones(tokens, jnp.int32)
    y = np.asarray(jax_moe.moe_gemm(x, weight, *ids, top_k=1), np.float64)
    rows = np.asarray(x, np.float64)
    error = np.linalg.norm(y - rows @ exact[1].T)
    allowed = 1e-5 * np.linalg.norm(np.abs(rows) @ np.abs(exact[1]).T)
    # XLA flushes what is subnormal in the result itself.
    assert error <= allowed + y.size * 2.0**-126


def test_zero_tokens():
    weight, _ = oracle.packed("Q4_K", 2, 8, 256)
    none = jnp.zeros(0, jnp.int32)
    for implementation in IMPLEMENTATIONS:
        y = jax_moe.moe_gemm(
            jnp.zeros((0, 256)), weight, none, none, top_k=2, implementation=implementation
        )
        assert y.shape == (0, 8)


def test_same_bits_twice():
    x, weight, _, dispatch, _, top_k = problem("Q3_K", (5, 64, 1024, 60, 2))
    run = jax.jit(lambda x: jax_moe.moe_gemm(x, weight, *dispatch[:2], top_k=top_k))
    x = jnp.asarray(x, jnp.float32)
    first = np.asarray(run(x))
    for _ in range(5):
        np.testing.assert_array_equal(first, np.asarray(run(x)))
