"""moe_ffn on an NVIDIA GPU against float64: formats, activations, options, shapes, ids."""

import dataclasses

import cuda_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_moe
from jax_moe import Experts, MoEVariant, Routing

pytestmark = pytest.mark.gpu

# Tokens, experts, slots, d_model and d_expert at least.
SHAPES = {
    "vector": (4, 7, 2, 300, 200),
    "narrow": (6, 5, 2, 300, 200),
    "medium": (40, 6, 3, 96, 160),
    "wide": (150, 3, 2, 280, 90),
}
LIMIT = {"swiglu_clamp": 0.7, "swiglu_clamp_after": 0.7, "swiglu_oai": 7.0}


def problem(formats, shape, seed=0, gated=True, merged=False):
    """x [T, H] in float64, Routing, Experts and their float64 matrices for the oracle."""
    tokens, experts, top_k, d_model, d_expert = shape
    gate_format, up_format, down_format = formats
    d_model = oracle.width(gate_format, oracle.width(up_format, d_model))
    d_expert = oracle.width(down_format, d_expert)
    rng = np.random.default_rng(seed)
    matrices, exact = {}, {"gate": None}
    if merged:
        both, both_exact = oracle.packed(gate_format, experts, 2 * d_expert, d_model, seed)
        matrices["gate_up"] = both
        exact["gate"], exact["up"] = both_exact[:, :d_expert], both_exact[:, d_expert:]
    else:
        matrices["up"], exact["up"] = oracle.packed(up_format, experts, d_expert, d_model, seed)
        if gated:
            matrices["gate"], exact["gate"] = oracle.packed(
                gate_format, experts, d_expert, d_model, seed + 1
            )
    matrices["down"], exact["down"] = oracle.packed(down_format, experts, d_model, d_expert, seed)
    routing = oracle.random_routing(rng, tokens, experts, top_k)
    return rng.standard_normal((tokens, d_model)), routing, Experts(**matrices), exact


def check(x, routing, experts, exact, bound, oracle_options=None, **options):
    call = jax.jit(lambda *args: jax_moe.moe_ffn(*args, **options))
    first = call(x, routing, experts)
    cases.poison(first)
    second = call(x, routing, experts)
    assert first.dtype == x.dtype
    assert cases.same_bits(first, second)
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
    error = oracle.relative_error(second, expected)
    assert error <= bound, f"relative error {error:.2e} > {bound}"
    return second


@pytest.mark.parametrize("format_name", oracle.all_formats())
@pytest.mark.parametrize("kernel", SHAPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_formats(format_name, kernel, dtype):
    x, *rest = problem((format_name,) * 3, SHAPES[kernel])
    check(jnp.asarray(x, dtype), *rest, cases.bound(dtype))


@pytest.mark.parametrize("format_name", oracle.all_formats())
def test_scalar_gguf(format_name):
    x, *rest = problem((format_name,) * 3, SHAPES["narrow"])
    x = jnp.asarray(x, jnp.float32)
    check(x, *rest, 2 * oracle.Q8_1_BOUND, variant=MoEVariant.SCALAR_GGUF)


@pytest.mark.parametrize("kernel", SHAPES)
@pytest.mark.parametrize(
    "formats", (("Q4_K", "Q4_K", "Q6_K"), ("Q4_0", "Q8_0", "MXFP4"), ("Q5_K", "IQ2_S", "NVFP4"))
)
def test_three_formats(kernel, formats):
    x, *rest = problem(formats, SHAPES[kernel])
    check(jnp.asarray(x, jnp.float16), *rest, cases.bound("float16"))


def with_biases_and_scales(experts, exact, *, gate_up_biased=True):
    """The experts with random ones, and these for the oracle."""
    num_experts, d_expert, d_model = exact["up"].shape
    rng = np.random.default_rng(4)
    bias = [rng.standard_normal((num_experts, n)) for n in (d_expert, d_expert, d_model)]
    scale = [rng.uniform(0.5, 2, num_experts) for _ in range(3)]
    extra = {"down_bias": bias[2], "down_scale": scale[2]}
    if experts.gate_up is not None:
        scale[1] = scale[0]
        extra |= {"gate_up_bias": np.concatenate(bias[:2], axis=1), "gate_up_scale": scale[0]}
    else:
        extra |= {"gate_bias": bias[0], "gate_scale": scale[0]}
        extra |= {"up_bias": bias[1], "up_scale": scale[1]}
    if not gate_up_biased:
        bias[:2] = None, None
        extra = {name: v for name, v in extra.items() if name == "down_bias" or "scale" in name}
    extra = {name: jnp.asarray(value, jnp.float32) for name, value in extra.items()}
    return dataclasses.replace(experts, **extra), {"bias": bias, "scale": scale}


@pytest.mark.parametrize("merged", (False, True))
@pytest.mark.parametrize("activation", ("swiglu", "geglu", "reglu", "situ", *LIMIT))
def test_gated_activations_with_biases_and_scales(activation, merged):
    x, routing, experts, exact = problem(("Q4_K", "Q4_K", "Q6_K"), SHAPES["narrow"], merged=merged)
    experts, oracle_options = with_biases_and_scales(experts, exact)
    check(
        jnp.asarray(x, jnp.float32),
        routing,
        experts,
        exact,
        cases.bound("float32"),
        oracle_options,
        activation=activation,
        activation_limit=LIMIT.get(activation),
        activation_betas=(1.5, 2.5) if activation == "situ" else None,
    )


@pytest.mark.parametrize("activation", ("silu", "gelu", "relu2"))
@pytest.mark.parametrize("kernel", SHAPES)
def test_activations_without_a_gate(activation, kernel):
    x, *rest = problem(("Q8_0",) * 3, SHAPES[kernel], gated=False)
    check(jnp.asarray(x, jnp.float32), *rest, cases.bound("float32"), activation=activation)


@pytest.mark.parametrize("kernel", SHAPES)
@pytest.mark.parametrize("merged", (False, True))
def test_weights_before(kernel, merged):
    x, *rest = problem(("Q4_K", "Q4_K", "Q6_K"), SHAPES[kernel], merged=merged)
    check(jnp.asarray(x, jnp.float32), *rest, cases.bound("float32"), weights_before=True)


@pytest.mark.parametrize("x_dtype", cases.DTYPES)
@pytest.mark.parametrize("w_dtype", cases.DTYPES)
@pytest.mark.parametrize("tokens", (5, 130))
def test_dense(x_dtype, w_dtype, tokens):
    rng = np.random.default_rng(6)
    shapes = {"gate": (4, 44, 70), "up": (4, 44, 70), "down": (4, 70, 44)}
    dense = {
        name: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[2]), w_dtype)
        for name, s in shapes.items()
    }
    exact = {name: np.asarray(w, np.float64) for name, w in dense.items()}
    routing = oracle.random_routing(rng, tokens, 4, 2)
    x = jnp.asarray(rng.standard_normal((tokens, 70)), x_dtype)
    check(x, routing, Experts(**dense), exact, cases.bound(x_dtype))


def dense_problem(shape, dtypes, seed=8, gated=True, merged=False):
    """As problem, of dense matrices of the dtypes of gate, up and down."""
    tokens, experts, top_k, d_model, d_expert = shape
    rng = np.random.default_rng(seed)
    sizes = {"gate": (d_expert, d_model), "up": (d_expert, d_model), "down": (d_model, d_expert)}
    dense = {
        name: jnp.asarray(rng.standard_normal((experts, *size)) / np.sqrt(size[1]), dtype)
        for (name, size), dtype in zip(sizes.items(), dtypes, strict=True)
    }
    if not gated:
        del dense["gate"]
    exact = {"gate": None} | {name: np.asarray(w, np.float64) for name, w in dense.items()}
    if merged:
        gate, up = dense.pop("gate"), dense.pop("up")
        dense["gate_up"] = jnp.concatenate([gate, up], axis=1)
    routing = oracle.random_routing(rng, tokens, experts, top_k)
    return rng.standard_normal((tokens, d_model)), routing, Experts(**dense), exact


# Tokens, experts, slots, d_model and d_expert, which reach Hopper's kernel for dense weights: less
# than a tile of rows, tails of every dimension, several tiles an expert, more items than
# multiprocessors, and a down projection alone or gate and up alone.
DENSE_SHAPES = (
    (20, 4, 2, 64, 40),
    (130, 3, 2, 136, 200),
    (700, 4, 2, 264, 152),
    (160, 140, 8, 384, 320),
    (130, 3, 2, 135, 200),
    (130, 3, 2, 136, 201),
)


def dense_bound(x_dtype, down_dtype) -> float:
    """Between bf16 and a bf16 down projection h is rounded to bf16, too."""
    both = x_dtype == down_dtype == "bfloat16"
    return (2 if both else 1) * cases.bound(x_dtype)


@pytest.mark.parametrize("x_dtype", cases.DTYPES)
@pytest.mark.parametrize("w_dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("shape", DENSE_SHAPES)
@pytest.mark.parametrize("merged", (False, True))
def test_dense_with_many_tokens(x_dtype, w_dtype, shape, merged):
    x, *rest = dense_problem(shape, (w_dtype,) * 3, merged=merged)
    check(jnp.asarray(x, x_dtype), *rest, dense_bound(x_dtype, w_dtype))


@pytest.mark.parametrize(
    "dtypes",
    [
        ("bfloat16", "bfloat16", "float16"),
        ("float16", "float16", "bfloat16"),
        ("float16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float16"),
        ("bfloat16", "bfloat16", "float32"),
    ],
)
@pytest.mark.parametrize("x_dtype", cases.DTYPES)
def test_dense_of_several_types(dtypes, x_dtype):
    x, *rest = dense_problem((130, 3, 2, 136, 200), dtypes)
    check(jnp.asarray(x, x_dtype), *rest, dense_bound(x_dtype, dtypes[2]))


@pytest.mark.parametrize("w_dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("activation", ("swiglu", "geglu", "reglu", "situ", *LIMIT))
@pytest.mark.parametrize("weights_before", (False, True))
@pytest.mark.parametrize("x_dtype", ("float32", "bfloat16"))
def test_dense_gated_activations_with_biases_and_scales(
    x_dtype, w_dtype, activation, weights_before
):
    x, routing, experts, exact = dense_problem((130, 3, 2, 136, 200), (w_dtype,) * 3)
    experts, oracle_options = with_biases_and_scales(experts, exact)
    check(
        jnp.asarray(x, x_dtype),
        routing,
        experts,
        exact,
        dense_bound(x_dtype, w_dtype),
        oracle_options,
        activation=activation,
        activation_limit=LIMIT.get(activation),
        activation_betas=(1.5, 2.5) if activation == "situ" else None,
        weights_before=weights_before,
    )


@pytest.mark.parametrize("w_dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("activation", ("silu", "gelu", "relu2"))
@pytest.mark.parametrize("x_dtype", ("float32", "bfloat16"))
def test_dense_activations_without_a_gate(x_dtype, w_dtype, activation):
    x, *rest = dense_problem((130, 3, 2, 136, 200), (w_dtype,) * 3, gated=False)
    check(jnp.asarray(x, x_dtype), *rest, dense_bound(x_dtype, w_dtype), activation=activation)


@pytest.mark.parametrize("w_dtype", ("float16", "bfloat16"))
def test_dense_with_invalid_experts_and_magnitudes_of_every_kind(w_dtype):
    x, routing, experts, exact = dense_problem((400, 3, 2, 136, 200), (w_dtype,) * 3)
    ids = np.array(routing.expert_ids)
    limits = np.iinfo(np.int32)
    ids[0] = -1
    ids[1:, 0] = np.resize([-1, 3, limits.min, limits.max, 0, 0, 1], len(ids) - 1)
    routing = Routing(jnp.asarray(ids), routing.weights)
    # Each row at its own magnitude; the sums over slots of a token are all of that magnitude.
    x = np.ldexp(x, np.arange(len(x))[:, None] % 36 - 30)
    y = np.asarray(jax_moe.moe_ffn(jnp.asarray(x, jnp.float32), routing, experts))
    assert (y[0] == 0).all()
    expected = oracle.ffn(np.float32(x), routing.expert_ids, routing.weights, **exact)
    for row, expected_row in zip(y, expected, strict=True):
        assert oracle.relative_error(row, expected_row) <= 3 * cases.bound("float32")


@pytest.mark.parametrize("kernel", SHAPES)
def test_invalid_experts_add_nothing(kernel):
    x, routing, experts, exact = problem(("Q4_K", "Q4_K", "Q6_K"), SHAPES[kernel])
    ids = np.array(routing.expert_ids)
    limits = np.iinfo(np.int32)
    ids[0] = -1
    ids[1:, 0] = np.resize([-1, len(exact["down"]), limits.min, limits.max, 0], len(ids) - 1)
    routing = Routing(jnp.asarray(ids), routing.weights)
    x = jnp.asarray(x, jnp.float32)
    y = check(x, routing, experts, exact, cases.bound("float32"))
    assert (np.asarray(y[0]) == 0).all()


def test_rows_that_are_not_finite_stay_alone():
    x, routing, experts, exact = problem(("Q4_K", "Q4_K", "Q6_K"), SHAPES["medium"])
    x[3, 7], x[11, 0] = np.nan, np.inf
    y = np.asarray(jax_moe.moe_ffn(jnp.asarray(x, jnp.float32), routing, experts))
    finite = np.isfinite(y).all(axis=1)
    assert set(np.flatnonzero(~finite)) == {3, 11}
    x[[3, 11]] = 0
    expected = oracle.ffn(x, routing.expert_ids, routing.weights, **exact)
    assert oracle.relative_error(y[finite], expected[finite]) <= cases.bound("float32")


def test_no_tokens():
    x, routing, experts, _ = problem(("Q4_K", "Q4_K", "Q6_K"), SHAPES["narrow"])
    y = jax_moe.moe_ffn(
        jnp.asarray(x[:0], jnp.float32),
        Routing(routing.expert_ids[:0], routing.weights[:0]),
        experts,
    )
    assert y.shape == (0, x.shape[1])


@pytest.mark.parametrize("width", (704, 1408, 2880, 11_328, 14_336))
def test_real_widths(width):
    """Columns that are no multiple of a chunk, and long ones."""
    x, *rest = problem(("Q8_0",) * 3, (3, 2, 1, width, 64))
    check(jnp.asarray(x, jnp.bfloat16), *rest, cases.bound("bfloat16"))
