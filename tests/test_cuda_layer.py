"""moe_ffn of few tokens with tiled weights on an NVIDIA GPU: one launch where that is possible."""

import cuda_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_cuda_ffn as cuda_ffn
import test_cuda_tiled as cuda_tiled
import tiled_oracle

import jax_moe
from jax_moe import Routing

pytestmark = pytest.mark.gpu

# Tokens, experts, slots, d_model and d_expert at least: up to 32 pairs.
SHAPES = (
    (1, 9, 8, 700, 300),
    (2, 9, 8, 96, 500),
    (3, 5, 5, 1100, 90),
    (4, 17, 8, 300, 200),
    (5, 35, 6, 520, 60),
    (8, 32, 4, 260, 130),
)
MIXED = (("Q2_K", "Q3_K"), ("Q3_K", "Q4_K"), ("Q3_K", "Q5_K"), ("Q4_K", "Q6_K"), ("Q5_K", "Q6_K"))


def problem(formats, shape, dtype="float32", **options):
    x, routing, experts, exact = cuda_ffn.problem(formats, shape, **options)
    return jnp.asarray(x, dtype), routing, experts.prepack(), exact


@cuda_tiled.by_format
@pytest.mark.parametrize("shape", SHAPES)
def test_formats(name, shape):
    dtype = cases.DTYPES[(shape[0] + tiled_oracle.FORMATS.index(name)) % 3]
    problems = [problem((name,) * 3, shape, dtype)]
    cuda_tiled.check_ffn(problems, cuda_tiled.ffn_bound(dtype))


@pytest.mark.parametrize("up, down", MIXED)
def test_down_of_another_format(up, down):
    problems = [problem((up, up, down), shape) for shape in SHAPES]
    cuda_tiled.check_ffn(problems, cases.bound("float32"))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("formats", (("Q8_0",) * 3, ("Q4_0", "Q4_0", "Q4_0")))
def test_several_items_a_block(formats, dtype):
    """Rows of x of several passes, and more bands of gate and of down than multiprocessors."""
    for shape in ((1, 2, 2, 9216, 1088), (3, 2, 2, 4640, 720), (4, 3, 2, 7200, 64)):
        cuda_tiled.check_ffn([problem(formats, shape, dtype)], cuda_tiled.ffn_bound(dtype))


@pytest.mark.parametrize("tokens", (1, 2, 3, 4))
def test_bands_that_blocks_share(tokens):
    """More bands of down than multiprocessors, and no multiple of them; with biases."""
    options = {"activation": "swiglu_oai", "activation_limit": cuda_ffn.LIMIT["swiglu_oai"]}
    for shape in ((tokens, 6, 5, 4256, 96), (tokens, 3, 3, 4640, 32), (tokens, 9, 8, 4256, 32)):
        x, routing, experts, exact = problem(("MXFP4",) * 3, shape)
        ids = np.array(routing.expert_ids)
        ids[0, 1] = -1
        routing = Routing(jnp.asarray(ids), jnp.asarray(routing.weights))
        experts, oracle_options = cuda_ffn.with_biases_and_scales(experts, exact)
        cuda_tiled.check_ffn(
            [(x, routing, experts, exact)], cases.bound("float32"), oracle_options, **options
        )
        # Blocks that wait for a value tell what is not a number from what is not there.
        y = jax_moe.moe_ffn(x.at[tokens - 1, 7].set(jnp.nan), routing, experts, **options)
        assert not np.isfinite(np.asarray(y[tokens - 1])).any()


@pytest.mark.parametrize("tokens", (1, 2, 3, 4))
def test_ids_of_every_kind(tokens):
    """An expert several times in a token, in every token; ids that are no expert's; none at all."""
    x, _, experts, exact = problem(("Q4_K",) * 3, (tokens, 6, 8, 256, 256))
    rng = np.random.default_rng(tokens)
    ids = rng.integers(-3, 9, (4, tokens, 8)).astype(np.int32)
    ids[1] = 5
    ids[2, :, ::2] = cuda_tiled.INT32.min
    ids[2, :, 1::2] = cuda_tiled.INT32.max
    ids[3] = 2
    ids[3, 0] = -1
    weights = rng.standard_normal((4, tokens, 8)).astype(np.float32)
    problems = [
        (x, Routing(jnp.asarray(i), jnp.asarray(w)), experts, exact)
        for i, w in zip(ids, weights, strict=True)
    ]
    cuda_tiled.check_ffn(problems[:2] + problems[3:], cases.bound("float32"))
    y = np.asarray(jax_moe.moe_ffn(*problems[2][:3]))
    assert not y.any()


@pytest.mark.parametrize("merged", (False, True))
@pytest.mark.parametrize("activation", ("swiglu_oai", "swiglu_clamp", "geglu"))
def test_biases_and_scales(activation, merged):
    for shape in SHAPES:
        x, routing, experts, exact = problem(("MXFP4",) * 3, shape, merged=merged)
        # Nothing but the limit bounds h.
        experts, oracle_options = cuda_ffn.with_biases_and_scales(
            experts, exact, gate_up_biased=activation == "swiglu_oai"
        )
        cuda_tiled.check_ffn(
            [(x, routing, experts, exact)],
            cases.bound("float32"),
            oracle_options,
            activation=activation,
            activation_limit=cuda_ffn.LIMIT.get(activation),
        )


@pytest.mark.parametrize("activation", ("silu", "gelu", "relu2"))
def test_without_a_gate(activation):
    problems = [problem(("Q5_1",) * 3, shape, gated=False) for shape in SHAPES]
    cuda_tiled.check_ffn(problems, cases.bound("float32"), activation=activation)


def test_weights_before():
    problems = [problem(("Q6_K",) * 3, shape) for shape in SHAPES]
    cuda_tiled.check_ffn(problems, cases.bound("float32"), weights_before=True)


@pytest.mark.parametrize("tokens", (1, 2, 3, 4))
def test_rows_that_are_not_finite_stay_alone(tokens):
    """Also where all tokens have the same experts, and share tiles."""
    x, _, experts, exact = problem(("Q4_K", "Q4_K", "Q6_K"), (tokens, 3, 2, 512, 256))
    ids = jnp.tile(jnp.asarray([[2, 0]], jnp.int32), (tokens, 1))
    routing = Routing(ids, jnp.ones((tokens, 2), jnp.float32))
    for bad in (np.nan, np.inf):
        for token in range(tokens):
            y = np.asarray(jax_moe.moe_ffn(x.at[token, 7].set(bad), routing, experts))
            assert not np.isfinite(y[token]).any()
            rest = np.arange(tokens) != token
            expected = oracle.ffn(x, routing.expert_ids, routing.weights, **exact)
            if tokens > 1:
                cuda_tiled.assert_close(y[rest], expected[rest], cases.bound("float32"))


def test_many_layers_at_once():
    """Independent layers in one program, which may run on several streams at once."""
    count = 24
    problems = [problem(("Q4_K",) * 3, (1 + i % 4, 6, 2, 512, 512), seed=i) for i in range(count)]
    arguments = [p[:3] for p in problems]
    together = jax.jit(lambda all_arguments: [jax_moe.moe_ffn(*a) for a in all_arguments])
    alone = [np.asarray(jax.jit(jax_moe.moe_ffn)(*a)) for a in arguments]
    for _ in range(5):
        for y, expected in zip(together(arguments), alone, strict=True):
            np.testing.assert_array_equal(np.asarray(y), expected)
