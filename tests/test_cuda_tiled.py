"""The tiled layout on an NVIDIA GPU: repacking as on the CPU, and the ops against float64."""

import dataclasses

import cuda_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_cuda_ffn as cuda_ffn
import tiled_oracle

import jax_moe
from jax_moe import Experts, MoEVariant, PackedExperts, Routing, _ffi
from jax_moe._formats import FORMATS

pytestmark = pytest.mark.gpu

INT32 = np.iinfo(np.int32)
# Tokens, experts, slots, rows: by the mean number of pairs an expert, and by blocks enough for
# tiles of 64, 96 and 128 tokens, they reach every kernel. Up to two pairs an expert are multiplied
# as they are, and up to 32 are not sorted.
SHAPES = ((1, 5, 2, 48), (3, 7, 2, 16), (17, 4, 2, 208))
SHAPES += ((640, 40, 2, 208), (1400, 20, 2, 272), (1280, 40, 2, 272), (5, 4, 3, 112))
TOKENS = tuple(shape[0] for shape in SHAPES)
WIDTHS_OF_256 = (256, 768, 2048)
WIDTHS_OF_32 = (96, 704, 256, 768, 2048)
VARIANTS = (
    *((dtype, None) for dtype in cases.DTYPES),
    ("float32", MoEVariant.SCALAR_GGUF),
    ("float16", MoEVariant.WMMA_GGUF),
    ("bfloat16", MoEVariant.WMMA_GGUF),
)
# Where the f16 scales and minima of a block are.
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}
HALVES |= dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))

by_format = pytest.mark.parametrize("name", tiled_oracle.FORMATS)


def random_weights(name, experts, n, k, seed=0):
    """Packed experts of random bytes, but for the scales, which are near 2^-10; float64 values."""
    format = FORMATS[name]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts * n * k // format.block_size, format.block_bytes))
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(116, 122, len(blocks))
    elif name == "NVFP4":
        blocks[:, :4] = rng.integers(8, 40, (len(blocks), 4))
    elif name == "IQ1_M":  # four nibbles of d
        blocks[:, 53] = blocks[:, 53] & 15 | 0x40
        blocks[:, 55] = blocks[:, 55] & 15 | 0x10
    else:
        for at in HALVES.get(name, (0,)):
            blocks[:, at + 1] = rng.choice([0x13, 0x14, 0x95], len(blocks))
    rows = blocks.astype(np.uint8).reshape(experts * n, -1)
    exact = _ffi.native().dequantize(format.ggml_type, rows).astype(np.float64)
    data = jnp.asarray(rows.reshape(experts, n, -1))
    return PackedExperts(data, format), exact.reshape(experts, n, k)


def width(name, shape_index):
    """Widths take turns with the formats, so that every shape sees several."""
    index = shape_index + tiled_oracle.FORMATS.index(name)
    if FORMATS[name].block_size == 256:
        return WIDTHS_OF_256[index % 3]
    k, block = WIDTHS_OF_32[index % 5], FORMATS[name].block_size
    return -(-k // block) * block


def expected_gemm(x, exact, sorted_ids, flat_ids, top_k, weights=None):
    """oracle.gemm of entries without duplicates, expert by expert."""
    sorted_ids, flat_ids = np.asarray(sorted_ids), np.asarray(flat_ids)
    y = np.zeros((len(sorted_ids), exact.shape[1]))
    for e in range(len(exact)):
        pairs = sorted_ids[flat_ids == e]
        y[pairs] = np.asarray(x, np.float64)[pairs // top_k] @ exact[e].T
    return y if weights is None else y * np.asarray(weights, np.float64).reshape(-1, 1)


def with_invalid_ids(rng, routing, experts):
    ids = np.array(routing.expert_ids)
    where = rng.random(ids.shape) < 0.1
    ids[where] = rng.choice([-1, experts, INT32.min, INT32.max], where.sum())
    return Routing(jnp.asarray(ids), routing.weights)


def gemm_problem(name, index, dtype):
    """The arguments of moe_gemm for a shape, its top_k, and what it gives in float64."""
    tokens, experts, top_k, n = SHAPES[index]
    k = width(name, index)
    weight, exact = random_weights(name, experts, n, k, seed=index)
    rng = np.random.default_rng(index)
    routing = oracle.random_routing(rng, tokens, experts, top_k)
    if tokens > 1:
        routing = with_invalid_ids(rng, routing, experts)
    dispatch = jax_moe.sort_by_expert(routing.expert_ids, experts)
    x = oracle.normal(rng, (tokens, k), dtype)
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    expected = expected_gemm(x, exact, *ids, top_k, routing.weights)
    return (x, weight.prepack(), *ids, routing.weights), top_k, expected


def run_twice(call, *arguments):
    """call's results, computed on poisoned memory and found to be the same bits again."""
    call = jax.jit(call)
    first = call(*arguments)
    cases.poison(*jax.tree.leaves(first))
    second = call(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_(cases.same_bits(a, b)), first, second)
    return second


def assert_close(y, expected, bound, what=""):
    error = oracle.relative_error(y, expected)
    assert error <= bound, f"{what}: relative error {error:.2e} > {bound}"


def ffn_bound(dtype):
    """Scales rounded to f16 add up over moe_ffn's two products: twice moe_gemm's bound there."""
    return 2 * cases.bound(dtype) if dtype == "float16" else cases.bound(dtype)


def bound_of(dtype, variant):
    return oracle.Q8_1_BOUND if variant is MoEVariant.SCALAR_GGUF else cases.bound(dtype)


def gemm(x, weight, sorted_ids, flat_ids, weights=None, **options):
    return jax_moe.moe_gemm(x, weight, sorted_ids, flat_ids, topk_weights=weights, **options)


# --- Repacking ---


@by_format
def test_repacking_is_that_of_the_cpu(name):
    cpu = jax.devices("cpu")[0]
    format = FORMATS[name]
    for k in {width(name, index) for index in range(5)}:
        ordinary = np.asarray(random_weights(name, 2, 48, k)[0].data)
        for packed in (cases.random_blocks(name, (2, 3, 48, k)), PackedExperts(ordinary, format)):
            data = np.asarray(packed.data)
            ours = PackedExperts(jnp.asarray(data), format).prepack()
            theirs = PackedExperts(jax.device_put(data, cpu), format).prepack()
            assert theirs.data.device == cpu and ours.data.device != cpu
            np.testing.assert_array_equal(ours.data, theirs.data)
            np.testing.assert_array_equal(ours.aux[..., 0], theirs.aux[..., 0])
            np.testing.assert_allclose(ours.aux[..., 1], theirs.aux[..., 1], rtol=1e-6)
            np.testing.assert_array_equal(ours.unpack().data, data)


def test_repacking_under_jit_with_donation():
    packed, exact = random_weights("Q4_K", 3, 32, 512)
    data = np.asarray(packed.data)
    tiled = jax.jit(lambda w: w.prepack())(packed)
    np.testing.assert_array_equal(tiled.dequantize(), exact.astype(np.float32))
    again = packed.prepack(donate=True)
    assert packed.data.is_deleted()
    assert cases.same_bits(again.data, tiled.data) and cases.same_bits(again.aux, tiled.aux)
    np.testing.assert_array_equal(again.unpack(donate=True).data, data)


# --- moe_gemm ---


@by_format
@pytest.mark.parametrize("dtype, variant", VARIANTS)
def test_gemm(name, dtype, variant):
    problems = [gemm_problem(name, index, dtype) for index in range(len(SHAPES))]
    results = run_twice(
        lambda *all_arguments: [
            gemm(*arguments, top_k=top_k, variant=variant)
            for arguments, (_, top_k, _) in zip(all_arguments, problems, strict=True)
        ],
        *(arguments for arguments, _, _ in problems),
    )
    for y, (_, _, expected), shape in zip(results, problems, SHAPES, strict=True):
        assert y.dtype == jnp.float32
        assert_close(y, expected, bound_of(dtype, variant), shape)


@pytest.mark.parametrize(
    "name", [name for name in tiled_oracle.FORMATS if not name.startswith(("IQ1", "IQ2"))]
)
def test_gemm_of_normal_weights(name):
    """The weights that the accuracy is promised for; random bytes need not be the worst ones.

    With them a K-quant's offset takes away the middle of its codes, and rounding it to f16 takes
    more than from other offsets. ggml's quantisers of IQ1 and IQ2 take too long.
    """
    for index, (tokens, experts, top_k, n) in enumerate(SHAPES):
        weight, exact = oracle.packed(name, experts, n, width(name, index))
        rng = np.random.default_rng(index)
        routing = oracle.random_routing(rng, tokens, experts, top_k)
        ids = jax_moe.sort_by_expert(routing.expert_ids, experts)[:2]
        x = oracle.normal(rng, (tokens, exact.shape[2]), "float16")
        y = gemm(x, weight.prepack(), *ids, top_k=top_k, preferred_element_type=jnp.float16)
        expected = expected_gemm(x, exact, *ids, top_k)
        assert_close(y, expected, cases.bound("float16"), SHAPES[index])


@by_format
def test_gemm_agrees_with_ggufs_layout(name):
    for index in (0, 2, 4):
        arguments, top_k, _ = gemm_problem(name, index, "float32")
        x, tiled, *rest = arguments
        y = gemm(x, tiled, *rest, top_k=top_k)
        assert_close(y, gemm(x, tiled.unpack(), *rest, top_k=top_k), 2 * cases.bound("float32"))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ("Q4_K", "Q5_0"))
def test_one_expert_takes_every_pair(name, tokens):
    weight, exact = random_weights(name, 6, 48, 768)
    x = oracle.normal(np.random.default_rng(1), (tokens, 768))
    ids = jnp.arange(tokens, dtype=jnp.int32), jnp.full(tokens, 4, jnp.int32)
    (y,) = run_twice(lambda *a: [gemm(*a, top_k=1)], x, weight.prepack(), *ids)
    assert_close(y, expected_gemm(x, exact, *ids, 1), cases.bound("float32"))


@pytest.mark.parametrize("rows_are_pairs", (False, True))
@pytest.mark.parametrize("name", ("Q4_K", "Q2_K", "Q6_K", "MXFP4"))
def test_few_tokens_of_an_only_expert(name, rows_are_pairs):
    """As attention's matrices have them, and with pairs that are named twice, never or wrongly."""
    weight, exact = random_weights(name, 1, 208, 2304)
    rng = np.random.default_rng(8)
    lists = [(range(pairs), [0] * pairs) for pairs in (1, 2, 3, 4)]
    lists += [((1, 0), (0, -1)), ((0, 0, 2), (0, 1, 0)), ((3, 9, 1, 3), (0, 0, INT32.min, -1))]
    for sorted_ids, flat_ids in lists:
        top_k = 2 if len(sorted_ids) == 4 else 1
        x = oracle.normal(rng, (len(sorted_ids) // (1 if rows_are_pairs else top_k), 2304))
        ids = jnp.asarray(sorted_ids, jnp.int32), jnp.asarray(flat_ids, jnp.int32)
        (y,) = run_twice(lambda *a, k=top_k: [gemm(*a, top_k=k)], x, weight.prepack(), *ids)
        expected = oracle.gemm(x, exact, *ids, top_k)
        assert_close(y, expected, cases.bound("float32"), (sorted_ids, flat_ids))


@pytest.mark.parametrize("index", range(len(SHAPES)))
@pytest.mark.parametrize("rows_are_pairs", (False, True))
def test_any_list_of_ids(index, rows_are_pairs):
    """Unsorted entries, duplicates, unlisted pairs and ids at every limit."""
    tokens, experts, top_k, n = SHAPES[index]
    weight, exact = random_weights("Q6_K", experts, n, 256)
    rng = np.random.default_rng(3)
    pairs = tokens * top_k
    sorted_ids = rng.integers(0, pairs, pairs).astype(np.int32)
    flat_ids = rng.integers(0, experts, pairs).astype(np.int32)
    if tokens > 1:
        sorted_ids[rng.permutation(pairs)[:4]] = [-1, INT32.min, INT32.max, pairs]
        flat_ids[rng.permutation(pairs)[:4]] = [-1, INT32.min, INT32.max, experts]
    x = oracle.normal(rng, (pairs if rows_are_pairs else tokens, 256))
    ids = jnp.asarray(sorted_ids), jnp.asarray(flat_ids)
    (y,) = run_twice(lambda *a: [gemm(*a, top_k=top_k)], x, weight.prepack(), *ids)
    assert_close(y, oracle.gemm(x, exact, *ids, top_k), cases.bound("float32"))


def test_entries_of_pairs_that_do_not_exist():
    weight = random_weights("Q4_K", 7, 128, 256)[0].prepack()
    x = oracle.normal(np.random.default_rng(6), (3, 256))
    ids = jnp.asarray([6, 7, 8, 15, 30, 31], jnp.int32), jnp.arange(6, dtype=jnp.int32)
    (y,) = run_twice(lambda *a: [gemm(*a, top_k=2)], x, weight, *ids)
    assert not np.asarray(y).any()


def test_thousands_of_experts():
    weight, exact = random_weights("Q8_0", 2047, 16, 32)
    rng = np.random.default_rng(7)
    x = oracle.normal(rng, (40, 32))
    ids = jnp.arange(40, dtype=jnp.int32), jnp.asarray(rng.integers(0, 2047, 40), jnp.int32)
    for packed in (weight, weight.prepack()):
        (y,) = run_twice(lambda *a: [gemm(*a, top_k=1)], x, packed, *ids)
        assert_close(y, oracle.gemm(x, exact, *ids, 1), cases.bound("float32"))


@pytest.mark.parametrize("index", range(1, len(SHAPES)))
@pytest.mark.parametrize("variant", (None, MoEVariant.SCALAR_GGUF))
def test_rows_that_are_not_finite_stay_alone(index, variant):
    (x, weight, *ids, _), top_k, _ = gemm_problem("Q4_K", index, "float32")
    exact = np.asarray(weight.dequantize(), np.float64)
    x = np.array(x)
    bad = np.zeros(len(x), bool)
    for token, value in zip((0, len(x) - 1), (np.nan, -np.inf), strict=True):
        bad[token] = True
        x[token, 5] = value
    y = np.asarray(gemm(jnp.asarray(x), weight, *ids, top_k=top_k, variant=variant))
    bad_pairs = np.repeat(bad, top_k)
    listed = np.zeros(len(y), bool)
    valid = (np.asarray(ids[1]) >= 0) & (np.asarray(ids[1]) < len(exact))
    listed[np.asarray(ids[0])[valid]] = True
    assert (~np.isfinite(y[bad_pairs & listed])).any(axis=1).all()
    assert (y[~listed] == 0).all()
    x[bad] = 0
    expected = expected_gemm(x, exact, *ids, top_k)
    assert_close(y[~bad_pairs], expected[~bad_pairs], bound_of("float32", variant))


def test_weights_that_are_not_finite_stay_alone():
    """An output row whose scales are NaN or Inf is that, and no other."""
    packed, exact = random_weights("Q4_K", 2, 32, 512)
    data = np.array(packed.data)
    data[1, 5, :2] = [0x00, 0x7E]
    data[0, 17, 144:146] = [0x00, 0x7C]
    weight = PackedExperts(jnp.asarray(data), "Q4_K").prepack()
    for tokens in (1, 17, 700):
        x = oracle.normal(np.random.default_rng(2), (tokens, 512))
        for expert, row in ((1, 5), (0, 17)):
            ids = jnp.arange(tokens, dtype=jnp.int32), jnp.full(tokens, expert, jnp.int32)
            y = np.asarray(gemm(x, weight, *ids, top_k=1))
            assert not np.isfinite(y[:, row]).any()
            rest = np.arange(32) != row
            expected = expected_gemm(x, exact, *ids, 1)
            assert_close(y[:, rest], expected[:, rest], cases.bound("float32"))


@pytest.mark.parametrize("name", ("Q4_K", "Q8_0", "MXFP4"))
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_range_of_activations(name, index):
    """Rows of every magnitude that float32 has, in one call: |y - y*| against |W| |x|."""
    (x, weight, *ids, _), top_k, _ = gemm_problem(name, index, "float32")
    exact = np.asarray(weight.dequantize(), np.float64)
    exponent = np.resize([126, -126, 0, -60, 60, 100, -100], len(x))
    x = np.asarray(x, np.float64) / np.abs(np.asarray(x)).max(axis=1, keepdims=True)
    x = jnp.asarray(np.ldexp(x, exponent[:, None] - (exponent > 120)[:, None] * 4), jnp.float32)
    y = np.asarray(gemm(x, weight, *ids, top_k=top_k), np.float64)
    expected = expected_gemm(x, exact, *ids, top_k)
    norms = np.stack(
        [
            np.linalg.norm(expected_gemm(np.abs(x), np.abs(exact), *ids, top_k), axis=1),
            np.full(len(y), 1e-40),  # results that are subnormal
        ]
    ).max(axis=0)
    error = np.linalg.norm(y - expected, axis=1) / norms
    assert np.isfinite(y).all() and error.max() <= cases.bound("float32"), error.max()


@pytest.mark.parametrize("scale_bytes", ((0x00, 0x78), (0x01, 0x00)))
@pytest.mark.parametrize("name", ("Q4_0", "Q6_K", "Q4_K", "IQ1_S", "IQ2_XXS", "IQ3_S", "Q1_0"))
def test_range_of_scales(name, scale_bytes):
    """Weights of the largest and smallest scales that a block can have, beside ordinary ones."""
    packed, _ = random_weights(name, 2, 32, 512)
    format = packed.format
    blocks = np.array(packed.data).reshape(2, 32, -1, format.block_bytes)
    for at in HALVES.get(name, (0,)):
        blocks[:, ::3, :, at : at + 2] = scale_bytes
        blocks[:, 1::3, ::2, at : at + 2] = scale_bytes
    rows = blocks.reshape(64, -1)
    exact = _ffi.native().dequantize(format.ggml_type, rows).astype(np.float64).reshape(2, 32, 512)
    weight = PackedExperts(jnp.asarray(rows.reshape(2, 32, -1)), format).prepack()
    for tokens in (1, 17, 300):
        x = oracle.normal(np.random.default_rng(2), (tokens, 512))
        ids = jnp.arange(tokens, dtype=jnp.int32), jnp.arange(tokens, dtype=jnp.int32) % 2
        y = np.asarray(gemm(x, weight, *ids, top_k=1))
        expected = expected_gemm(x, exact, *ids, 1)
        magnitude = expected_gemm(np.abs(x), np.abs(exact), *ids, 1)
        for row in range(32):  # each has its own magnitude
            error = np.linalg.norm(y[:, row] - expected[:, row])
            assert error <= cases.bound("float32") * np.linalg.norm(magnitude[:, row]), row


@pytest.mark.parametrize("y_dtype", cases.DTYPES)
def test_preferred_element_type(y_dtype):
    for index in (0, 2, 4):
        arguments, top_k, expected = gemm_problem("Q5_K", index, "float32")
        y = gemm(*arguments, top_k=top_k, preferred_element_type=jnp.dtype(y_dtype))
        assert y.dtype == jnp.dtype(y_dtype)
        assert_close(y, expected, cases.bound(y_dtype))


# Tiles of 96 tokens; tiles of 64, with blocks that go through several panels of weight rows and
# through their rings more than once.
@pytest.mark.parametrize("shape", ((1280, 40, 2, 272, 768), (2048, 128, 2, 1152, 512)))
@pytest.mark.parametrize("name", ("Q4_K", "Q6_K", "MXFP4"))
@pytest.mark.parametrize("y_dtype", ("float32", "bfloat16"))
def test_panels(name, y_dtype, shape):
    check_gemm_of_many_tokens(name, y_dtype, shape)


def check_gemm_of_many_tokens(name, y_dtype, shape):
    tokens, experts, top_k, n, k = shape
    weight, exact = random_weights(name, experts, n, k)
    rng = np.random.default_rng(5)
    routing = oracle.random_routing(rng, tokens, experts, top_k)
    x = oracle.normal(rng, (tokens, k))
    ids = jax_moe.sort_by_expert(routing.expert_ids, experts)[:2]
    options = {"top_k": top_k, "preferred_element_type": jnp.dtype(y_dtype)}
    (y,) = run_twice(lambda *a: [gemm(*a, **options)], x, weight.prepack(), *ids)
    assert_close(y, expected_gemm(x, exact, *ids, top_k), cases.bound(y_dtype))


# So few blocks that clusters of them share the columns, of 12 and 16 steps; one tile and several.
@pytest.mark.parametrize("shape", ((20, 1, 1, 208, 3072), (150, 3, 1, 384, 4096)))
@pytest.mark.parametrize("name", ("Q4_K", "Q6_K", "MXFP4", "Q4_0"))
@pytest.mark.parametrize("y_dtype", ("float32", "bfloat16"))
def test_columns_of_several_blocks(name, y_dtype, shape):
    check_gemm_of_many_tokens(name, y_dtype, shape)


# A last step that is not whole; tiles of 64 tokens.
@pytest.mark.parametrize(
    "name, shape", (("MXFP4", (40, 2, 1, 160, 2880)), ("Q4_K", (800, 20, 1, 512, 4096)))
)
def test_other_columns_of_several_blocks(name, shape):
    check_gemm_of_many_tokens(name, "float32", shape)


def test_no_tokens():
    weight = random_weights("Q4_K", 2, 32, 256)[0].prepack()
    none = jnp.zeros(0, jnp.int32)
    assert gemm(jnp.zeros((0, 256)), weight, none, none, top_k=2).shape == (0, 32)


# --- moe_ffn ---

# Tokens, experts, slots, d_model and d_expert at least: all of them multiples of 16.
FFN_SHAPES = ((1, 7, 2, 300, 200), (3, 5, 2, 96, 160), (17, 4, 2, 700, 90))
FFN_SHAPES += ((430, 40, 3, 256, 160), (2600, 40, 2, 96, 200))
THREE_FORMATS = (("Q4_K", "Q4_K", "Q6_K"), ("Q4_0", "Q8_0", "MXFP4"), ("Q5_K", "Q3_K", "NVFP4"))


def ffn_problem(formats, shape, dtype, **options):
    x, routing, experts, exact = cuda_ffn.problem(formats, shape, **options)
    if shape[0] > 1:
        routing = with_invalid_ids(np.random.default_rng(shape[0]), routing, shape[1])
    return jnp.asarray(x, dtype), routing, experts, exact


def check_ffn(problems, bound, oracle_options=None, **options):
    results = run_twice(
        lambda *all_arguments: [jax_moe.moe_ffn(*a, **options) for a in all_arguments],
        *(tuple(problem[:3]) for problem in problems),
    )
    for y, (x, routing, _, exact) in zip(results, problems, strict=True):
        assert y.dtype == x.dtype
        expected = oracle.ffn(
            x,
            routing.expert_ids,
            routing.weights,
            **exact,
            act=options.get("activation", "swiglu"),
            limit=options.get("activation_limit"),
            betas=options.get("activation_betas"),
            weights_before=options.get("weights_before", False),
            **(oracle_options or {}),
        )
        assert_close(y, expected, bound, x.shape)


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("tiled", (False, True))
@pytest.mark.parametrize("tokens", (1, 24, 64))
def test_memory_is_what_select_kernel_predicts(tokens, tiled, biased):
    """XLA's temporaries are the workspace: no other layout or dequantised copy of a weight."""
    num_experts, top_k, d_model, d_expert = 64, 8, 512, 512
    experts = Experts(
        gate=random_weights("Q4_K", num_experts, d_expert, d_model, seed=1)[0],
        up=random_weights("Q4_K", num_experts, d_expert, d_model, seed=2)[0],
        down=random_weights("Q6_K", num_experts, d_model, d_expert, seed=3)[0],
        up_bias=jnp.ones((num_experts, d_expert)) if biased else None,
    )
    rng = np.random.default_rng(0)
    arguments = (
        oracle.normal(rng, (tokens, d_model), "bfloat16"),
        oracle.random_routing(rng, tokens, num_experts, top_k),
        experts.prepack() if tiled else experts,
    )
    predicted = jax_moe.select_kernel("moe_ffn", *arguments).workspace_bytes
    assert predicted < experts.up.data.nbytes
    compiled = jax.jit(jax_moe.moe_ffn).lower(*arguments).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert predicted <= temporaries <= predicted + 16 * 256  # operands that are absent, alignment
    assert np.isfinite(np.asarray(compiled(*arguments), np.float32)).all()


def tiled(problems, names=("gate", "up", "gate_up", "down")):
    """The problems with these weights tiled."""
    result = []
    for x, routing, experts, exact in problems:
        weights = {name: getattr(experts, name) for name in names}
        changes = {name: weight.prepack() for name, weight in weights.items() if weight is not None}
        assert all(weight.layout == "tiled" for weight in changes.values())
        result.append((x, routing, dataclasses.replace(experts, **changes), exact))
    return result


@by_format
@pytest.mark.parametrize("dtype, variant", VARIANTS[:4])
def test_ffn(name, dtype, variant):
    # Each format sees three of the shapes, and each shape every format.
    first = tiled_oracle.FORMATS.index(name) + VARIANTS.index((dtype, variant))
    shapes = [FFN_SHAPES[(first + 2 * i) % 5] for i in range(3)]
    problems = [ffn_problem((name,) * 3, shape, dtype) for shape in shapes]
    bound = 2 * oracle.Q8_1_BOUND if variant else ffn_bound(dtype)
    check_ffn(tiled(problems), bound, variant=variant)


@pytest.mark.parametrize(
    "name, shape", (("Q4_K", (1280, 40, 2, 256, 256)), ("MXFP4", (2048, 128, 2, 384, 640)))
)
def test_ffn_in_panels(name, shape):
    """As test_panels, with an activation."""
    check_ffn(tiled([ffn_problem((name,) * 3, shape, "float16")]), ffn_bound("float16"))


@pytest.mark.parametrize("name", ("Q4_K", "Q6_K", "MXFP4", "Q4_0"))
def test_ffn_with_columns_of_several_blocks(name):
    """As test_columns_of_several_blocks, with an activation."""
    shape = (40, 4, 2, 2048, 1024)
    check_ffn(tiled([ffn_problem((name,) * 3, shape, "float16")]), ffn_bound("float16"))


@pytest.mark.parametrize("names", (("gate",), ("up", "down"), ("down",), ("gate", "up", "down")))
@pytest.mark.parametrize("formats", THREE_FORMATS)
def test_ffn_of_three_formats_some_of_them_tiled(names, formats):
    problems = [ffn_problem(formats, shape, "float16") for shape in FFN_SHAPES[::2]]
    check_ffn(tiled(problems, names), ffn_bound("float16"))


@pytest.mark.parametrize("variant", (MoEVariant.SCALAR_GGUF, MoEVariant.WMMA_GGUF))
def test_ffn_variants_of_mixed_layouts(variant):
    scalar = variant is MoEVariant.SCALAR_GGUF
    dtype, bound = ("float32", 2 * oracle.Q8_1_BOUND) if scalar else ("bfloat16", 2e-3)
    problems = [ffn_problem(THREE_FORMATS[0], shape, dtype) for shape in FFN_SHAPES[::2]]
    check_ffn(tiled(problems, ("gate", "down")), bound, variant=variant)


@pytest.mark.parametrize("merged", (False, True))
@pytest.mark.parametrize("activation", ("swiglu", "geglu", "reglu", "situ", *cuda_ffn.LIMIT))
def test_gated_activations_with_biases_and_scales(activation, merged):
    for shape in (FFN_SHAPES[2], FFN_SHAPES[3]):
        x, routing, experts, exact = ffn_problem(THREE_FORMATS[0], shape, "float32", merged=merged)
        experts, oracle_options = cuda_ffn.with_biases_and_scales(experts, exact)
        check_ffn(
            tiled([(x, routing, experts, exact)]),
            cases.bound("float32"),
            oracle_options,
            activation=activation,
            activation_limit=cuda_ffn.LIMIT.get(activation),
            activation_betas=(1.5, 2.5) if activation == "situ" else None,
        )


@pytest.mark.parametrize("activation", ("silu", "gelu", "relu2"))
def test_activations_without_a_gate(activation):
    problems = [ffn_problem(("Q8_0",) * 3, shape, "float32", gated=False) for shape in FFN_SHAPES]
    check_ffn(tiled(problems), cases.bound("float32"), activation=activation)


@pytest.mark.parametrize("merged", (False, True))
def test_weights_before(merged):
    problems = [ffn_problem(THREE_FORMATS[0], s, "float32", merged=merged) for s in FFN_SHAPES]
    check_ffn(tiled(problems), cases.bound("float32"), weights_before=True)


def test_merged_rows_that_are_no_whole_bands():
    """gate_up has a multiple of 16 rows, and gate and up each half a band more."""
    experts, d_expert, d_model = 3, 40, 96
    both, both_exact = random_weights("Q4_1", experts, 2 * d_expert, d_model)
    down = jnp.asarray(np.random.default_rng(0).standard_normal((experts, d_model, d_expert)))
    exact = {"gate": both_exact[:, :d_expert], "up": both_exact[:, d_expert:]}
    exact["down"] = np.asarray(down.astype(jnp.float32), np.float64)
    problems = []
    for tokens in TOKENS:
        rng = np.random.default_rng(tokens)
        routing = oracle.random_routing(rng, tokens, experts, 2)
        x = oracle.normal(rng, (tokens, d_model))
        weights = Experts(gate_up=both.prepack(), down=down.astype(jnp.float32))
        problems.append((x, routing, weights, exact))
    check_ffn(problems, cases.bound("float32"))


@pytest.mark.parametrize("index", range(1, len(FFN_SHAPES)))
def test_ffn_rows_that_are_not_finite_stay_alone(index):
    shape = FFN_SHAPES[index]
    x, routing, experts, exact = cuda_ffn.problem(THREE_FORMATS[0], shape)
    last = len(x) - 1
    x[0, 7], x[last, 0] = np.nan, np.inf
    y = np.asarray(jax_moe.moe_ffn(jnp.asarray(x, jnp.float32), routing, experts.prepack()))
    finite = np.isfinite(y).all(axis=1)
    assert set(np.flatnonzero(~finite)) == {0, last}
    x[[0, last]] = 0
    expected = oracle.ffn(x, routing.expert_ids, routing.weights, **exact)
    assert_close(y[finite], expected[finite], cases.bound("float32"))


@pytest.mark.parametrize("index", range(len(FFN_SHAPES)))
def test_ffn_range_of_activations(index):
    """Tokens from 1e-30 to 1e30, linear experts: every token within the bound of its own size."""
    x, routing, experts, exact = cuda_ffn.problem(THREE_FORMATS[0], FFN_SHAPES[index], gated=False)
    x = np.ldexp(x, np.resize([100, -100, 0, -20, 20], len(x))[:, None])
    x = jnp.asarray(x, jnp.float32)
    y = jax_moe.moe_ffn(x, routing, experts.prepack(), activation="silu")
    with np.errstate(over="ignore"):  # of exp in silu
        expected = oracle.ffn(x, routing.expert_ids, routing.weights, **exact, act="silu")
    for token, (row, exact_row) in enumerate(zip(np.asarray(y), expected, strict=True)):
        assert_close(row, exact_row, 5 * cases.bound("float32"), token)


@pytest.mark.parametrize("limit, scale", ((7.0, 1e-8), (1e6, 1.0), (np.inf, 1.0)))
@pytest.mark.parametrize("index", range(len(FFN_SHAPES)))
def test_a_limit_far_from_h(index, limit, scale):
    """Without biases it is x that bounds h, if its limit is far off."""
    x, routing, experts, exact = ffn_problem(THREE_FORMATS[0], FFN_SHAPES[index], "float32")
    problems = tiled([(x * scale, routing, experts, exact)])
    options = {"activation": "swiglu_oai", "activation_limit": limit}
    check_ffn(problems, cases.bound("float32"), **options)


def test_ffn_without_any_valid_expert():
    for shape in FFN_SHAPES[::2]:
        x, routing, experts, _ = cuda_ffn.problem(THREE_FORMATS[0], shape)
        ids = jnp.full_like(routing.expert_ids, -1)
        y = jax_moe.moe_ffn(jnp.full(x.shape, jnp.nan), Routing(ids, routing.weights), experts)
        assert (np.asarray(y) == 0).all()


# --- Under transforms ---


def test_scan_and_vmap():
    """Stacked tiled layers, and a batch of experts."""
    layers = [ffn_problem(("Q8_0",) * 3, FFN_SHAPES[1], "float32", seed=seed) for seed in range(3)]
    x, routing, *_ = layers[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer[2] for layer in layers))
    prepacked = stacked.prepack()

    def run(weights):
        return jax.lax.scan(lambda x, w: (x + jax_moe.moe_ffn(x, routing, w), None), x, weights)[0]

    close = {"rtol": 2e-3, "atol": 2e-3}
    np.testing.assert_allclose(jax.jit(run)(prepacked), jax.jit(run)(stacked), **close)
    batched = jax.jit(jax.vmap(lambda w: jax_moe.moe_ffn(x, routing, w)))
    np.testing.assert_allclose(batched(prepacked), batched(stacked), **close)
