"""moe_ffn against float64: formats, structures, activations, options, ids."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_moe
from jax_moe import Experts, MoEVariant, Routing
from jax_moe._activations import ACTIVATIONS

IMPLEMENTATIONS = (None, "reference")
E, H, F = 4, 256, 512
OPTIONS = {
    "swiglu_clamp": {"limit": 0.7},
    "swiglu_clamp_after": {"limit": 0.7},
    "situ": {"betas": (1.5, 0.8)},
}


def keywords(options):
    return {f"activation_{name}": value for name, value in options.items()}


def matrices(format_gate, format_up, format_down, h=H, f=F):
    return [
        oracle.packed(format_gate, E, f, h, seed=1),
        oracle.packed(format_up, E, f, h, seed=2),
        oracle.packed(format_down, E, h, f, seed=3),
    ]


def inputs(tokens=6, top_k=2, seed=0, dtype="float32", h=H):
    rng = np.random.default_rng(seed)
    return oracle.normal(rng, (tokens, h), dtype), oracle.random_routing(rng, tokens, E, top_k)


@pytest.mark.parametrize("format_name", oracle.all_formats())
@pytest.mark.parametrize("variant", [None, MoEVariant.SCALAR_GGUF])
def test_formats(format_name, variant):
    (gate, g), (up, u), (down, d) = matrices(format_name, format_name, format_name)
    for tokens in (3, 40):
        x, routing = inputs(tokens)
        y = jax_moe.moe_ffn(x, routing, Experts(gate=gate, up=up, down=down), variant=variant)
        error = oracle.relative_error(y, oracle.ffn(x, *routing, gate=g, up=u, down=d))
        print(f"{format_name} T={tokens} {variant}: {error:.1e}")
        assert error <= (1e-5 if variant is None else 2 * oracle.Q8_1_BOUND)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", [None, MoEVariant.WMMA_GGUF])
def test_half_precision(dtype, variant):
    (gate, g), (up, u), (down, d) = matrices("Q4_K", "Q4_K", "Q6_K")
    x, routing = inputs(dtype=dtype)
    y = jax_moe.moe_ffn(x, routing, Experts(gate=gate, up=up, down=down), variant=variant)
    assert y.dtype == x.dtype
    error = oracle.relative_error(y, oracle.ffn(x, *routing, gate=g, up=u, down=d))
    assert error <= oracle.ERROR_BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dense(dtype, implementation):
    rng = np.random.default_rng(5)
    gate, up = (oracle.normal(rng, (E, 37, 50), dtype) / 7 for _ in range(2))
    down = oracle.normal(rng, (E, 50, 37), dtype) / 7
    x, routing = inputs(dtype=dtype, h=50)
    variants = [None] + [MoEVariant.WMMA] * (dtype != "float32")
    for variant in variants:
        y = jax_moe.moe_ffn(
            x,
            routing,
            Experts(gate=gate, up=up, down=down),
            variant=variant,
            implementation=implementation,
        )
        exact = {"gate": gate, "up": up, "down": down}
        exact = {name: np.asarray(w, np.float64) for name, w in exact.items()}
        error = oracle.relative_error(y, oracle.ffn(x, *routing, **exact))
        assert error <= oracle.ERROR_BOUNDS[dtype]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_three_formats_and_a_dense_one(implementation):
    (gate, g), (up, u), (down, d) = matrices("IQ3_S", "Q5_1", "Q2_K")
    x, routing = inputs(top_k=3)
    y = jax_moe.moe_ffn(
        x, routing, Experts(gate=gate, up=up, down=down), implementation=implementation
    )
    assert oracle.relative_error(y, oracle.ffn(x, *routing, gate=g, up=u, down=d)) <= 1e-5
    dense = jnp.asarray(u, jnp.float32)
    y = jax_moe.moe_ffn(
        x, routing, Experts(gate=gate, up=dense, down=down), implementation=implementation
    )
    assert oracle.relative_error(y, oracle.ffn(x, *routing, gate=g, up=u, down=d)) <= 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_activations(activation, implementation):
    (gate, g), (up, u), (down, d) = matrices("Q8_0", "Q8_0", "Q8_0")
    x, routing = inputs()
    x = x * 2
    options = OPTIONS.get(activation, {})
    gated = ACTIVATIONS[activation].gated
    y = jax_moe.moe_ffn(
        x,
        routing,
        Experts(gate=gate if gated else None, up=up, down=down),
        activation=activation,
        implementation=implementation,
        **keywords(options),
    )
    expected = oracle.ffn(
        x, *routing, gate=g if gated else None, up=u, down=d, act=activation, **options
    )
    assert oracle.relative_error(y, expected) <= 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_situ_without_linear_beta(implementation):
    (gate, g), (up, u), (down, d) = matrices("Q8_0", "Q8_0", "Q8_0")
    x, routing = inputs()
    y = jax_moe.moe_ffn(
        x,
        routing,
        Experts(gate=gate, up=up, down=down),
        activation="situ",
        activation_betas=(2.0, 0.0),
        implementation=implementation,
    )
    expected = oracle.ffn(x, *routing, gate=g, up=u, down=d, act="situ", betas=(2.0, 0.0))
    assert oracle.relative_error(y, expected) <= 1e-5


@pytest.mark.parametrize("structure", ["split", "merged", "ungated"])
@pytest.mark.parametrize("weights_before", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_structure_biases_and_scales(structure, weights_before, implementation):
    (gate, g), (up, u), (down, d) = matrices("Q4_K", "Q4_K", "Q5_K")
    rng = np.random.default_rng(7)
    bias = [oracle.normal(rng, (E, n)) for n in (F, F, H)]
    scale = [jnp.asarray(rng.uniform(0.5, 2, E), jnp.float32) for _ in range(3)]
    act = "swiglu_oai" if structure != "ungated" else "relu2"
    extra = {"down_bias": bias[2], "down_scale": scale[2]}
    if structure == "merged":
        merged = jax_moe.PackedExperts(jnp.concatenate([gate.data, up.data], axis=1), gate.format)
        scale[1] = scale[0]
        experts = Experts(
            gate_up=merged,
            down=down,
            gate_up_bias=jnp.concatenate(bias[:2], axis=1),
            gate_up_scale=scale[0],
            **extra,
        )
    else:
        extra |= {"up_bias": bias[1], "up_scale": scale[1]}
        if structure == "split":
            extra |= {"gate": gate, "gate_bias": bias[0], "gate_scale": scale[0]}
        experts = Experts(up=up, down=down, **extra)
    for tokens in (5, 40):
        x, routing = inputs(tokens)
        y = jax_moe.moe_ffn(
            x,
            routing,
            experts,
            activation=act,
            weights_before=weights_before,
            implementation=implementation,
        )
        expected = oracle.ffn(
            x,
            *routing,
            gate=None if structure == "ungated" else g,
            up=u,
            down=d,
            act=act,
            bias=bias,
            scale=scale,
            weights_before=weights_before,
        )
        assert oracle.relative_error(y, expected) <= 1e-5


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from([1, 3]))
def test_any_expert_ids(data, top_k):
    """Ids outside [0, E) add nothing, and an expert may come twice in one token."""
    ids = st.one_of(st.integers(-1, E), st.sampled_from([-(2**31), 2**31 - 1]))
    tokens = data.draw(st.integers(0, 4))
    flat = data.draw(st.lists(ids, min_size=tokens * top_k, max_size=tokens * top_k))
    (gate, g), (up, u), (down, d) = matrices("Q4_0", "Q4_0", "Q4_0", h=64, f=96)
    rng = np.random.default_rng(tokens)
    x = oracle.normal(rng, (tokens, 64))
    routing = Routing(
        jnp.asarray(np.array(flat, np.int32).reshape(tokens, top_k)),
        oracle.normal(rng, (tokens, top_k)),
    )
    expected = oracle.ffn(x, *routing, gate=g, up=u, down=d)
    for implementation in IMPLEMENTATIONS:
        y = jax_moe.moe_ffn(
            x, routing, Experts(gate=gate, up=up, down=down), implementation=implementation
        )
        assert oracle.relative_error(y, expected) <= 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("activation", ["swiglu_clamp", "reglu", "swiglu_oai"])
@pytest.mark.parametrize("variant", [None, MoEVariant.SCALAR_GGUF])
@pytest.mark.parametrize("tokens", [3, 40])
def test_nan_and_inf_stay_in_their_token(bad, activation, variant, tokens):
    (gate, _), (up, _), (down, _) = matrices("Q4_K", "Q4_K", "Q4_K")
    x, routing = inputs(tokens)
    x = x.at[1, 9].set(bad)
    y = jax_moe.moe_ffn(
        x,
        routing,
        Experts(gate=gate, up=up, down=down),
        activation=activation,
        variant=variant,
        **keywords(OPTIONS.get(activation, {})),
    )
    y = np.asarray(y)
    assert np.isnan(y[1]).any()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()


def test_invalid_slot_with_nan_weight_adds_nothing():
    (gate, g), (up, u), (down, d) = matrices("Q4_K", "Q4_K", "Q4_K")
    x, routing = inputs()
    experts = Experts(gate=gate, up=up, down=down)
    ids = routing.expert_ids.at[:, 1].set(-1)
    for weights_before in (False, True):
        for implementation in IMPLEMENTATIONS:
            y = jax_moe.moe_ffn(
                x,
                Routing(ids, routing.weights.at[:, 1].set(jnp.nan)),
                experts,
                weights_before=weights_before,
                implementation=implementation,
            )
            expected = oracle.ffn(
                x, ids, routing.weights, gate=g, up=u, down=d, weights_before=weights_before
            )
            assert oracle.relative_error(y, expected) <= 1e-5


def test_large_activations_do_not_overflow():
    (gate, g), (up, u), (down, d) = matrices("Q4_K", "Q4_K", "Q4_K")
    x, routing = inputs()
    # h is of the order of 1e36 and q * h would pass float32's range.
    x = x * 1e18
    expected = oracle.ffn(x, *routing, gate=g, up=u, down=d, act="reglu")
    y = jax_moe.moe_ffn(x, routing, Experts(gate=gate, up=up, down=down), activation="reglu")
    assert oracle.relative_error(y, expected) <= 1e-5


def test_same_bits_twice():
    (gate, _), (up, _), (down, _) = matrices("Q4_K", "Q4_K", "Q6_K")
    x, routing = inputs(60)
    experts = Experts(gate=gate, up=up, down=down)
    first = np.asarray(jax_moe.moe_ffn(x, routing, experts))
    for _ in range(5):
        np.testing.assert_array_equal(first, np.asarray(jax_moe.moe_ffn(x, routing, experts)))
