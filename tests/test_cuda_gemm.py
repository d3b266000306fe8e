"""moe_gemm on an NVIDIA GPU against float64, for every format, variant, dtype and kernel."""

import cuda_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_moe
from jax_moe import MoEVariant

pytestmark = pytest.mark.gpu

INT32 = np.iinfo(np.int32)


def check(x, weight, exact, sorted_ids, flat_ids, bound, **options):
    """Runs moe_gemm twice on poisoned memory; returns its error after comparing bits."""
    call = jax.jit(lambda *args: jax_moe.moe_gemm(*args, **options))
    first = call(x, weight, sorted_ids, flat_ids)
    cases.poison(first)
    second = call(x, weight, sorted_ids, flat_ids)
    assert cases.same_bits(first, second)
    expected = oracle.gemm(
        x, exact, sorted_ids, flat_ids, options["top_k"], options.get("topk_weights")
    )
    error = oracle.relative_error(second, expected)
    assert error <= bound, f"relative error {error:.2e} > {bound}"
    return second


@pytest.mark.parametrize("format_name", oracle.all_formats())
@pytest.mark.parametrize("kernel", cases.SHAPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_default(format_name, kernel, dtype):
    shape = cases.SHAPES[kernel]
    x, weight, exact, dispatch, routing = cases.gemm_problem(format_name, shape)
    x = jnp.asarray(x, dtype)
    check(
        x,
        weight,
        exact,
        dispatch.sorted_token_ids,
        dispatch.flat_expert_ids,
        cases.bound(dtype),
        top_k=shape[4],
        topk_weights=routing.weights,
    )


@pytest.mark.parametrize("format_name", oracle.all_formats())
@pytest.mark.parametrize("kernel", ("narrow", "wide"))
def test_scalar_gguf(format_name, kernel):
    shape = cases.SHAPES[kernel]
    x, weight, exact, dispatch, _ = cases.gemm_problem(format_name, shape)
    x = jnp.asarray(x, jnp.float32)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    options = {"top_k": shape[4], "variant": MoEVariant.SCALAR_GGUF}
    y = check(x, weight, exact, *ids, oracle.Q8_1_BOUND, **options)
    reference = jax_moe.moe_gemm(x, weight, *ids, implementation="reference", **options)
    # The same rounding, not only the same bound.
    assert oracle.relative_error(y, reference) <= 1e-5


@pytest.mark.parametrize("format_name", oracle.all_formats())
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_wmma_gguf(format_name, dtype):
    shape = cases.SHAPES["medium"]
    x, weight, exact, dispatch, _ = cases.gemm_problem(format_name, shape)
    x = jnp.asarray(x, dtype)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    y = check(x, weight, exact, *ids, cases.bound(dtype), top_k=1, variant=MoEVariant.WMMA_GGUF)
    assert y.dtype == jnp.float32


@pytest.mark.parametrize("x_dtype", cases.DTYPES)
@pytest.mark.parametrize("w_dtype", cases.DTYPES)
@pytest.mark.parametrize("k", (50, 136))
@pytest.mark.parametrize("tokens", (9, 150))
def test_dense(x_dtype, w_dtype, k, tokens):
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.standard_normal((4, 37, k)), w_dtype)
    routing = oracle.random_routing(rng, tokens, 4, 3)
    dispatch = jax_moe.sort_by_expert(routing.expert_ids, 4)
    x = jnp.asarray(rng.standard_normal((tokens, k)), x_dtype)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    exact = np.asarray(weight, np.float64)
    for variant in [None] + [MoEVariant.WMMA] * (x_dtype == w_dtype != "float32"):
        y = check(x, weight, exact, *ids, cases.bound(x_dtype), top_k=3, variant=variant)
        assert y.dtype == x.dtype


@pytest.mark.parametrize("x_dtype", cases.DTYPES)
@pytest.mark.parametrize("w_dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize(
    ("experts", "n", "k", "tokens", "top_k"),
    [
        (5, 37, 8, 20, 2),  # few tokens, less than a chunk of columns
        (3, 300, 200, 40, 3),  # rows and columns past the last whole tile
        (2, 257, 64, 300, 2),  # every tile has nearly all of its tokens
        (2, 515, 136, 290, 1),  # an odd pitch
        (140, 128, 320, 130, 8),  # more items than multiprocessors
        (1, 1024, 72, 1000, 1),
    ],
)
@pytest.mark.parametrize("rows_are_pairs", (False, True))
def test_dense_with_many_tokens(x_dtype, w_dtype, experts, n, k, tokens, top_k, rows_are_pairs):
    rng = np.random.default_rng(2)
    weight = jnp.asarray(rng.standard_normal((experts, n, k)), w_dtype)
    routing = oracle.random_routing(rng, tokens, experts, top_k)
    pairs = tokens * top_k
    flat_ids = np.array(routing.expert_ids).reshape(-1)
    flat_ids[rng.permutation(pairs)[:3]] = [-1, experts, INT32.max]
    x = jnp.asarray(rng.standard_normal((pairs if rows_are_pairs else tokens, k)), x_dtype)
    check(
        x,
        weight,
        np.asarray(weight, np.float64),
        jnp.arange(pairs, dtype=jnp.int32),
        jnp.asarray(flat_ids),
        cases.bound(x_dtype),
        top_k=top_k,
        topk_weights=routing.weights,
    )


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("tokens", (*range(1, 300, 13), 19 * 144))
def test_dense_tiles_of_every_size(dtype, tokens):
    """One expert takes all tokens, another one none; in the end the last of 20 tiles is empty."""
    rng = np.random.default_rng(tokens)
    experts = 1 if tokens <= 12 else 2
    weight = jnp.asarray(rng.standard_normal((experts, 136, 96)), dtype)
    x = jnp.asarray(rng.standard_normal((tokens, 96)), dtype)
    ids = jnp.arange(tokens, dtype=jnp.int32), jnp.full(tokens, experts - 1, jnp.int32)
    check(x, weight, np.asarray(weight, np.float64), *ids, cases.bound(dtype), top_k=1)


@pytest.mark.parametrize("w_dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_dense_rows_that_are_not_finite_stay_alone(w_dtype, value):
    rng = np.random.default_rng(4)
    weight = jnp.asarray(rng.standard_normal((2, 70, 120)), w_dtype)
    x = rng.standard_normal((60, 120))
    bad = np.zeros(len(x), bool)
    bad[[0, 3, 59]] = True
    x[bad, 5] = value
    ids = jnp.arange(60, dtype=jnp.int32), jnp.asarray(rng.integers(0, 2, 60), jnp.int32)
    y = np.asarray(jax_moe.moe_gemm(jnp.asarray(x, jnp.float32), weight, *ids, top_k=1))
    assert (~np.isfinite(y[bad])).any(axis=1).all()
    x[bad] = 0
    expected = oracle.gemm(x, np.asarray(weight, np.float64), *ids, 1)[~bad]
    assert oracle.relative_error(y[~bad], expected) <= cases.bound("float32")


@pytest.mark.parametrize("x_dtype", cases.DTYPES)
@pytest.mark.parametrize("y_dtype", cases.DTYPES)
@pytest.mark.parametrize("n", (136, 515))
def test_preferred_element_type_of_dense_weights(x_dtype, y_dtype, n):
    rng = np.random.default_rng(12)
    weight = jnp.asarray(rng.standard_normal((2, n, 200)), "bfloat16")
    x = jnp.asarray(rng.standard_normal((90, 200)), x_dtype)
    ids = jnp.arange(90, dtype=jnp.int32), jnp.asarray(rng.integers(0, 2, 90), jnp.int32)
    y = check(
        x,
        weight,
        np.asarray(weight, np.float64),
        *ids,
        cases.bound(x_dtype, y_dtype),
        top_k=1,
        preferred_element_type=jnp.dtype(y_dtype),
    )
    assert y.dtype == jnp.dtype(y_dtype)


@pytest.mark.parametrize("y_dtype", cases.DTYPES)
def test_preferred_element_type(y_dtype):
    shape = cases.SHAPES["narrow"]
    x, weight, exact, dispatch, _ = cases.gemm_problem("Q5_K", shape)
    y = check(
        jnp.asarray(x, jnp.float32),
        weight,
        exact,
        dispatch.sorted_token_ids,
        dispatch.flat_expert_ids,
        cases.bound(y_dtype),
        top_k=2,
        preferred_element_type=jnp.dtype(y_dtype),
    )
    assert y.dtype == jnp.dtype(y_dtype)


@pytest.mark.parametrize("kernel", cases.SHAPES)
@pytest.mark.parametrize("rows_are_pairs", (False, True))
def test_any_list_of_ids(kernel, rows_are_pairs):
    """Unsorted entries, duplicates, unlisted pairs and ids at every limit."""
    experts, n, k, tokens, top_k = cases.SHAPES[kernel]
    weight, exact = oracle.packed("Q4_K", experts, n, oracle.width("Q4_K", k))
    rng = np.random.default_rng(3)
    pairs = tokens * top_k
    extremes = [-1, INT32.min, INT32.max]
    sorted_ids = rng.integers(0, pairs, pairs).astype(np.int32)
    sorted_ids[rng.permutation(pairs)[:5]] = [*extremes, pairs, 0]
    flat_ids = rng.integers(0, experts, pairs).astype(np.int32)
    flat_ids[rng.permutation(pairs)[:6]] = [*extremes, experts, experts + 1, 0]
    x = rng.standard_normal((pairs if rows_are_pairs else tokens, exact.shape[2]))
    check(
        jnp.asarray(x, jnp.float32),
        weight,
        exact,
        jnp.asarray(sorted_ids),
        jnp.asarray(flat_ids),
        cases.bound("float32"),
        top_k=top_k,
    )


@pytest.mark.parametrize("tokens", (3, 64, 700))
def test_one_expert_takes_every_pair(tokens):
    weight, exact = oracle.packed("Q6_K", 7, 40, 512)
    x = jnp.asarray(np.random.default_rng(5).standard_normal((tokens, 512)), jnp.float32)
    ids = jnp.arange(tokens, dtype=jnp.int32), jnp.full(tokens, 4, jnp.int32)
    check(x, weight, exact, *ids, cases.bound("float32"), top_k=1)


def test_no_valid_expert_gives_zeros():
    weight, _ = oracle.packed("Q4_K", 2, 24, 256)
    ids = jnp.arange(6, dtype=jnp.int32), jnp.full(6, 2, jnp.int32)
    x = jnp.full((6, 256), jnp.nan, jnp.float32)
    y = jax_moe.moe_gemm(x, weight, *ids, top_k=1)
    assert (np.asarray(y) == 0).all()


def test_no_tokens():
    weight, _ = oracle.packed("Q4_K", 2, 24, 256)
    ids = jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32)
    y = jax_moe.moe_gemm(jnp.zeros((0, 256)), weight, *ids, top_k=2)
    assert y.shape == (0, 24)


@pytest.mark.parametrize("kernel", cases.SHAPES)
@pytest.mark.parametrize("variant", (None, MoEVariant.SCALAR_GGUF))
@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_rows_that_are_not_finite_stay_alone(kernel, variant, value):
    shape = cases.SHAPES[kernel]
    top_k = shape[4]
    x, weight, exact, dispatch, _ = cases.gemm_problem("Q4_K", shape)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    bad = np.zeros(len(x), bool)
    bad[[0, 3, len(x) - 1]] = True
    x[bad, 5] = value
    y = np.asarray(
        jax_moe.moe_gemm(jnp.asarray(x, jnp.float32), weight, *ids, top_k=top_k, variant=variant)
    )
    bad_pairs = np.repeat(bad, top_k)
    assert (~np.isfinite(y[bad_pairs])).any(axis=1).all()
    x[bad] = 0
    expected = oracle.gemm(x, exact, *ids, top_k)[~bad_pairs]
    bound = oracle.Q8_1_BOUND if variant else cases.bound("float32")
    assert oracle.relative_error(y[~bad_pairs], expected) <= bound


@pytest.mark.parametrize("exponent", (-100, -20, 20, 100))
def test_range_of_activations(exponent):
    """Rows far outside the range of float16, each with its own magnitude."""
    shape = cases.SHAPES["medium"]
    x, weight, exact, dispatch, _ = cases.gemm_problem("Q4_K", shape)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    x = jnp.asarray(np.ldexp(x, exponent + np.arange(len(x))[:, None] % 7), jnp.float32)
    y = np.asarray(jax_moe.moe_gemm(x, weight, *ids, top_k=1), np.float64)
    expected = oracle.gemm(x, exact, *ids, 1)
    for row, expected_row in zip(y, expected, strict=True):
        assert oracle.relative_error(row, expected_row) <= cases.bound("float32")


def test_more_pairs_than_a_grid_dimension():
    """T * k above 65,535, which the blocks of a cluster sort."""
    tokens, top_k, experts = 35_000, 2, 9
    weight, exact = oracle.packed("Q8_0", experts, 16, 64)
    rng = np.random.default_rng(8)
    routing = oracle.random_routing(rng, tokens, experts, top_k)
    dispatch = jax_moe.sort_by_expert(routing.expert_ids, experts)
    x = jnp.asarray(rng.standard_normal((tokens, 64)), jnp.float32)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    y = np.asarray(jax_moe.moe_gemm(x, weight, *ids, top_k=top_k))
    experts_of = np.asarray(routing.expert_ids).reshape(-1)
    rows = np.repeat(np.asarray(x, np.float64), top_k, axis=0)
    expected = np.einsum("pk,pnk->pn", rows[:4096], exact[experts_of[:4096]])
    assert oracle.relative_error(y[:4096], expected) <= cases.bound("float32")
    expected = np.einsum("pk,pnk->pn", rows[-4096:], exact[experts_of[-4096:]])
    assert oracle.relative_error(y[-4096:], expected) <= cases.bound("float32")


def test_many_experts():
    experts, tokens, top_k = 1024, 300, 8
    weight, exact = oracle.packed("Q4_0", experts, 16, 32)
    rng = np.random.default_rng(9)
    routing = oracle.random_routing(rng, tokens, experts, top_k)
    dispatch = jax_moe.sort_by_expert(routing.expert_ids, experts)
    x = jnp.asarray(rng.standard_normal((tokens, 32)), jnp.bfloat16)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    check(x, weight, exact, *ids, cases.bound("bfloat16"), top_k=top_k)


def test_random_configurations():
    """Shapes, formats and ids drawn anew in every run; the seed is printed."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for _ in range(100):
        format_name = str(rng.choice(oracle.all_formats()))
        experts = int(rng.integers(1, 20))
        top_k = int(rng.integers(1, min(experts, 6) + 1))
        tokens = int(rng.integers(1, 60))
        n = int(rng.integers(1, 80))
        k = oracle.width(format_name, int(rng.integers(1, 800)))
        dtype = str(rng.choice(cases.DTYPES))
        weight, exact = oracle.packed(format_name, experts, n, k, int(rng.integers(1 << 30)))
        pairs = tokens * top_k
        sorted_ids = jnp.asarray(rng.permutation(pairs).astype(np.int32))
        flat_ids = jnp.asarray(rng.integers(-1, experts + 1, pairs).astype(np.int32))
        x = jnp.asarray(rng.standard_normal((tokens, k)), dtype)
        y = jax_moe.moe_gemm(x, weight, sorted_ids, flat_ids, top_k=top_k)
        expected = oracle.gemm(x, exact, sorted_ids, flat_ids, top_k)
        error = oracle.relative_error(y, expected)
        assert error <= cases.bound(dtype), (seed, format_name, experts, n, k, tokens, top_k, dtype)
