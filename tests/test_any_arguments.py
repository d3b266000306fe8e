"""Arguments drawn at random: an error that names one of them, or the right result."""

import re

import jax.numpy as jnp
import numpy as np
import oracle
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import jax_moe
from jax_moe import Experts, MoEVariant, PackedExperts, Routing

INT32 = np.iinfo(np.int32)
# Mostly what fits, so that a good part of the calls is right.
FLOATS = st.sampled_from(["float32"] * 40 + ["float16", "bfloat16", "int32", "uint8"])
INTEGERS = st.sampled_from(["int32"] * 40 + ["float32", "int8"])
IDS = st.one_of(st.integers(-2, 5), st.sampled_from([INT32.min, INT32.max]))
FORMATS = st.sampled_from(["Q8_0", "Q8_0", "Q4_0", "Q4_K", "MXFP4"])
VARIANTS = st.sampled_from([None] * 6 + list(MoEVariant))
relaxed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def dimension(draw, value: int) -> int:
    """Nearly always `value`."""
    return value if draw(st.integers(0, 49)) else draw(st.integers(0, 70))


def shape(draw, *sizes: int) -> tuple[int, ...]:
    drawn = tuple(dimension(draw, size) for size in sizes)
    if draw(st.integers(0, 29)) == 0:
        return draw(st.sampled_from([drawn[1:], (1, *drawn)]))
    return drawn


def floats(draw, *sizes: int, dtype=FLOATS):
    values = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape(draw, *sizes))
    return jnp.asarray(values, draw(dtype))


def integers(draw, *sizes: int):
    drawn = shape(draw, *sizes)
    count = int(np.prod(drawn))
    values = draw(st.lists(IDS, min_size=count, max_size=count))
    return jnp.asarray(np.array(values, np.int32).reshape(drawn), draw(INTEGERS))


def weight(draw, e: int, n: int, k: int):
    """Packed or dense experts, and their exact values; bytes may be cut or of a wrong dtype."""
    if draw(st.booleans()):
        dense = floats(draw, e, n, k)
        return dense, np.asarray(dense, np.float64)
    name = draw(FORMATS)
    packed, exact = oracle.packed(name, e, n, oracle.width(name, k))
    data = packed.data
    if draw(st.integers(0, 19)) == 0:
        data = data[..., : draw(st.integers(0, data.shape[-1]))]
    if draw(st.integers(0, 29)) == 0:
        data = data.astype(jnp.int8)
    return PackedExperts(data, name), exact


def outcome(call, names: tuple[str, ...]):
    """call()'s result, or None where it raised; the message must name an argument."""
    try:
        result = call()
    except (ValueError, TypeError) as error:
        assert any(re.search(rf"\b{name}\b", str(error)) for name in names), error
        event(type(error).__name__)
        return None
    event("result")
    return result


def bound(result, x, variant) -> float:
    return 3e-2 if variant is MoEVariant.SCALAR_GGUF else 2 * oracle.bound(x.dtype, result.dtype)


@relaxed
@given(st.data())
def test_moe_gemm(data):
    draw = data.draw
    tokens, top_k, experts, n = (draw(st.integers(a, 4)) for a in (0, 1, 1, 1))
    w, exact = weight(draw, experts, n, 32)
    rows = tokens * draw(st.sampled_from([1, top_k]))
    x = floats(draw, rows, exact.shape[-1] if exact.ndim else 1)
    ids = [integers(draw, tokens * top_k) for _ in range(2)]
    weights = floats(draw, tokens, top_k) if draw(st.booleans()) else None
    variant = draw(VARIANTS)
    given_k = dimension(draw, top_k)
    for implementation in (None, "reference"):
        y = outcome(
            lambda implementation=implementation: jax_moe.moe_gemm(
                x,
                w,
                *ids,
                top_k=given_k,
                topk_weights=weights,
                variant=variant,
                implementation=implementation,
            ),
            ("x", "weight", "sorted_token_ids", "flat_expert_ids", "top_k", "topk_weights"),
        )
        if y is not None:
            expected = oracle.gemm(x, exact, *ids, given_k, weights)
            # A few sums may cancel nearly altogether: then the error is one of their terms.
            weights_size = None if weights is None else np.abs(weights)
            terms = oracle.gemm(np.abs(x), np.abs(exact), *ids, given_k, weights_size)
            error = np.linalg.norm(np.asarray(y, np.float64) - expected)
            scale = max(np.linalg.norm(expected), 0.1 * np.linalg.norm(terms))
            assert y.shape == expected.shape
            assert error <= bound(y, x, variant) * scale


@relaxed
@given(st.data())
def test_moe_ffn(data):
    draw = data.draw
    tokens, top_k, experts = (draw(st.integers(a, 3)) for a in (0, 1, 1))
    (gate, g), (up, u), (down, d) = (weight(draw, experts, 256, 256) for _ in range(3))
    x = floats(draw, tokens, 256)
    routing = Routing(integers(draw, tokens, top_k), floats(draw, tokens, top_k))
    act = draw(st.sampled_from(["swiglu"] * 5 + ["reglu"] * 5 + ["silu", "none"]))
    variant = draw(VARIANTS)
    y = outcome(
        lambda: jax_moe.moe_ffn(
            x, routing, Experts(gate=gate, up=up, down=down), activation=act, variant=variant
        ),
        ("x", "routing", "experts", "activation", "variant"),
    )
    if y is not None:
        expected = oracle.ffn(x, *routing, gate=g, up=u, down=d, act=act)
        assert oracle.relative_error(y, expected) <= bound(y, x, variant)


@relaxed
@given(st.data())
def test_route(data):
    draw = data.draw
    tokens, experts = draw(st.integers(0, 4)), draw(st.sampled_from([0, 1, 4, 6, 8, 12, 12]))
    logits = floats(draw, tokens, experts)
    bias = floats(draw, experts) if draw(st.booleans()) else None
    options = {
        "top_k": draw(st.sampled_from([-1, 0, 1, 2, 2, 3, 4, 6])),
        "gating": draw(st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"] * 3 + ["tanh"])),
        "num_groups": draw(st.sampled_from([0, 1, 1, 2, 2, 3, 4])),
        "num_groups_used": draw(st.sampled_from([0, 1, 1, 1, 2, 2, 3])),
    }
    names = ("logits", "selection_bias", *options)
    ours, reference = (
        outcome(
            lambda implementation=implementation: jax_moe.route(
                logits, selection_bias=bias, implementation=implementation, **options
            ),
            names,
        )
        for implementation in (None, "reference")
    )
    assert (ours is None) == (reference is None)
    if ours is not None:
        shape_of_result = (logits.shape[0], options["top_k"])
        assert ours.expert_ids.shape == ours.weights.shape == shape_of_result
        np.testing.assert_array_equal(ours.expert_ids, reference.expert_ids)
        np.testing.assert_allclose(ours.weights, reference.weights, rtol=1e-5, atol=1e-6)
