"""`route` and `sort_by_expert` against NumPy float64 and against each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_moe import _ffi
from jax_moe._routing import GATINGS, Dispatch, Routing, route, sort_by_expert

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [None, "reference"])

INT32 = np.iinfo(np.int32)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def expected_route(
    logits, k, gating="softmax", bias=None, normalize=True, scale=1.0, groups=1, groups_used=1
):
    """Token by token, expert by expert, in float64."""
    ids, weights = [], []
    for row in np.asarray(logits, np.float64):
        experts = len(row)
        if gating == "softmax":
            probs = softmax(row)
        elif gating == "sigmoid":
            probs = 1 / (1 + np.exp(-row))
        elif gating == "sqrt_softplus":
            probs = np.sqrt(np.log1p(np.exp(row)))
        else:
            probs = row
        if bias is None and groups == 1:
            scores = list(row)
        else:
            scores = list(probs if bias is None else probs + np.asarray(bias, np.float64))
        if groups > 1:
            size = experts // groups
            sums = [sum(sorted(scores[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
            best = sorted(range(groups), key=lambda g: (-sums[g], g))[:groups_used]
            scores = [s if e // size in best else -np.inf for e, s in enumerate(scores)]
        chosen = sorted(range(experts), key=lambda e: (-scores[e], e))[:k]
        w = probs[chosen]
        if gating == "softmax_after_topk":
            w = softmax(w)
        if normalize:
            w = w / max(w.sum(), 6.103515625e-5)
        ids.append(chosen)
        weights.append(w * scale)
    return np.array(ids).reshape(-1, k), np.array(weights).reshape(-1, k)


def expected_sort(ids, experts):
    """NumPy's stable argsort, with the invalid ids last."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    keys = np.where((ids >= 0) & (ids < experts), ids, experts)
    order = np.argsort(keys, kind="stable")
    return order, ids[order], [np.sum(keys < e) for e in range(experts + 1)]


def assert_routing(actual, ids, weights, rtol=2e-6):
    assert isinstance(actual, Routing)
    assert actual.expert_ids.dtype == jnp.int32
    assert actual.weights.dtype == jnp.float32
    np.testing.assert_array_equal(actual.expert_ids, ids)
    np.testing.assert_allclose(actual.weights, weights, rtol=rtol, atol=1e-7)


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


# --- route: values -----------------------------------------------------------------------------


@IMPLEMENTATIONS
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize(("biased", "groups", "groups_used"), [
    (False, 1, 1), (True, 1, 1), (False, 4, 2), (True, 4, 3), (True, 8, 8), (False, 24, 7),
])  # fmt: skip
def test_matches_numpy(implementation, gating, biased, groups, groups_used):
    logits = normal(33, 24, scale=2.0)
    bias = normal(24, seed=1, scale=0.1) if biased else None
    for normalize, scale in itertools.product((True, False), (1.0, 2.5)):
        actual = route(
            logits, 6, gating=gating, selection_bias=bias, normalize=normalize, scale=scale,
            num_groups=groups, num_groups_used=groups_used, implementation=implementation,
        )  # fmt: skip
        expected = expected_route(logits, 6, gating, bias, normalize, scale, groups, groups_used)
        assert_routing(actual, *expected)


@IMPLEMENTATIONS
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (2, 2), (17, 17), (1024, 16), (2051, 2051)])
def test_expert_counts(implementation, gating, experts, k):
    logits = normal(3, experts)
    actual = route(logits, k, gating=gating, implementation=implementation)
    assert_routing(actual, *expected_route(logits, k, gating))


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_logits_compute_in_float32(implementation, dtype):
    logits = jnp.asarray(normal(9, 16), dtype)
    bias = jnp.asarray(normal(16, seed=1), dtype)
    for b in (None, bias):
        actual = route(logits, 4, selection_bias=b, implementation=implementation)
        wide = None if b is None else np.asarray(b, np.float64)
        assert_routing(actual, *expected_route(np.asarray(logits, np.float64), 4, bias=wide))


@IMPLEMENTATIONS
def test_many_tokens(implementation):
    logits = normal(5000, 8)
    assert_routing(route(logits, 2, implementation=implementation), *expected_route(logits, 2))


@IMPLEMENTATIONS
@pytest.mark.parametrize("experts", [1, 8])
def test_no_tokens(implementation, experts):
    routing = route(np.zeros((0, experts), np.float32), 1, implementation=implementation)
    assert routing.expert_ids.shape == routing.weights.shape == (0, 1)


@IMPLEMENTATIONS
def test_selection_without_bias_sees_logits_that_saturate(implementation):
    logits = np.array([[30.0, 50.0, 40.0, 60.0]], np.float32)  # sigmoid is 1 for all of them
    routing = route(logits, 3, gating="sigmoid", normalize=False, implementation=implementation)
    assert_routing(routing, [[3, 1, 2]], [[1, 1, 1]])


@IMPLEMENTATIONS
def test_bias_selects_and_does_not_weigh(implementation):
    logits = np.zeros((1, 4), np.float32)
    bias = np.array([0, 0, 5, 0], np.float32)
    routing = route(logits, 1, selection_bias=bias, normalize=False, implementation=implementation)
    assert_routing(routing, [[2]], [[0.25]])


@IMPLEMENTATIONS
def test_group_score_is_the_sum_of_the_two_best(implementation):
    # Group 0 has the best expert and the best sum of three, group 1 the best sum of two.
    logits = np.array([[4.0, 1.0, 0.9, 3.0, 2.9, -2.0]], np.float32)
    routing = route(
        logits, 2, gating="softmax_after_topk", num_groups=2, implementation=implementation
    )
    np.testing.assert_array_equal(routing.expert_ids, [[3, 4]])


@IMPLEMENTATIONS
def test_sum_is_clamped(implementation):
    logits = np.full((1, 4), -20.0, np.float32)
    routing = route(logits, 2, gating="sigmoid", implementation=implementation)
    expected = np.exp(-20.0) / 6.103515625e-5
    np.testing.assert_allclose(routing.weights, [[expected, expected]], rtol=2e-6)


@IMPLEMENTATIONS
def test_scale_zero_means_none(implementation):
    logits = normal(3, 8)
    routing = route(logits, 2, scale=0.0, implementation=implementation)
    assert_routing(routing, *expected_route(logits, 2))


# --- route: ties and values that are not finite ------------------------------------------------


@IMPLEMENTATIONS
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_ties_go_to_the_lower_index(implementation, gating, biased, groups):
    logits = np.random.default_rng(3).integers(-1, 2, (64, 16)).astype(np.float32)
    logits[logits == 0] *= np.where(np.arange(np.sum(logits == 0)) % 2, 1, -1)  # 0 and -0
    bias = np.zeros(16, np.float32) if biased else None
    actual = route(
        logits, 6, gating=gating, selection_bias=bias, num_groups=groups,
        num_groups_used=min(groups, 2), implementation=implementation,
    )  # fmt: skip
    ids, weights = expected_route(
        logits, 6, gating, bias, groups=groups, groups_used=min(groups, 2)
    )
    assert_routing(actual, ids, weights)


@IMPLEMENTATIONS
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize(("biased", "groups"), [(False, 1), (True, 1), (True, 4)])
def test_nan_logits_count_as_minus_inf(implementation, gating, biased, groups):
    logits = normal(8, 16)
    logits[2, [1, 5, 6]] = np.nan
    logits[5] = np.nan
    masked = np.where(np.isnan(logits), -np.inf, logits)
    options = {
        "gating": gating,
        "selection_bias": normal(16, seed=1, scale=0.1) if biased else None,
        "num_groups": groups,
        "num_groups_used": min(groups, 3),
        "implementation": implementation,
    }
    actual, expected = route(logits, 4, **options), route(masked, 4, **options)
    rows = np.arange(8) != 5
    np.testing.assert_array_equal(actual.expert_ids[rows], expected.expert_ids[rows])
    np.testing.assert_array_equal(actual.weights[rows], expected.weights[rows])
    assert np.isfinite(actual.weights[rows]).all()
    assert not set(np.asarray(actual.expert_ids[2])) & {1, 5, 6} or biased
    np.testing.assert_array_equal(actual.expert_ids[5], [0, 1, 2, 3])
    assert np.isnan(actual.weights[5]).all()


@IMPLEMENTATIONS
def test_infinite_logits(implementation):
    inf = np.inf
    logits = np.array([[0, inf, 1, inf], [0, -inf, 1, -inf], [-inf] * 4], np.float32)
    soft = route(logits, 3, implementation=implementation)
    np.testing.assert_array_equal(soft.expert_ids, [[1, 3, 2], [2, 0, 1], [0, 1, 2]])
    e = np.e
    np.testing.assert_allclose(
        soft.weights, [[np.nan] * 3, [e / (1 + e), 1 / (1 + e), 0], [np.nan] * 3], rtol=1e-6
    )
    hard = route(logits, 3, gating="sigmoid", normalize=False, implementation=implementation)
    np.testing.assert_array_equal(hard.expert_ids, soft.expert_ids)
    one = 1 / (1 + 1 / e)
    np.testing.assert_allclose(hard.weights, [[1, 1, one], [one, 0.5, 0], [0, 0, 0]], rtol=1e-6)


@IMPLEMENTATIONS
def test_minus_inf_bias_masks_an_expert(implementation):
    bias = np.array([0, -np.inf, 0, np.nan], np.float32)
    logits = np.array([[0, 9, 1, 9]], np.float32)
    routing = route(logits, 2, gating="sigmoid", selection_bias=bias, implementation=implementation)
    np.testing.assert_array_equal(routing.expert_ids, [[2, 0]])


FLOATS = st.floats(width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1.0, np.nan])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_logits_route_alike(data):
    """Any normal float: valid, distinct ids, the same from both implementations."""
    logits = np.array(data.draw(st.lists(FLOATS, min_size=48, max_size=48)), np.float32)
    logits = logits.reshape(4, 12)
    gating = data.draw(st.sampled_from(GATINGS))
    groups = data.draw(st.sampled_from([1, 4]))
    options = {"gating": gating, "num_groups": groups, "num_groups_used": min(groups, 2)}
    kernel = route(logits, 5, **options)
    reference = route(logits, 5, **options, implementation="reference")
    ids = np.asarray(kernel.expert_ids)
    assert ((ids >= 0) & (ids < 12)).all()
    assert all(len(set(row)) == 5 for row in ids)
    if groups == 1:  # scores that went through the gate may tie within a rounding error
        np.testing.assert_array_equal(ids, reference.expert_ids)
        np.testing.assert_allclose(kernel.weights, reference.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize(("biased", "groups"), [(False, 1), (True, 1), (True, 8)])
def test_kernel_equals_reference(gating, biased, groups):
    logits = normal(256, 128, seed=5, scale=3.0)
    bias = normal(128, seed=6, scale=0.1) if biased else None
    options = {"gating": gating, "selection_bias": bias, "num_groups": groups}
    options["num_groups_used"] = min(groups, 4)
    kernel = route(logits, 8, **options)
    reference = route(logits, 8, **options, implementation="reference")
    np.testing.assert_array_equal(kernel.expert_ids, reference.expert_ids)
    np.testing.assert_allclose(kernel.weights, reference.weights, rtol=0, atol=1e-6)


# --- route: transforms -------------------------------------------------------------------------


@IMPLEMENTATIONS
@pytest.mark.parametrize("bias_axis", [None, 0])
def test_vmap(implementation, bias_axis):
    logits, biases = normal(3, 2, 7, 8), normal(3, 8, seed=1)

    def one(logits, bias):
        return route(logits, 2, selection_bias=bias, implementation=implementation)

    bias = biases if bias_axis == 0 else biases[0]
    inner = jax.vmap(one, in_axes=(0, None))
    actual = jax.jit(jax.vmap(inner, in_axes=(0, bias_axis)))(logits, bias)
    assert actual.weights.shape == (3, 2, 7, 2)
    for i, j in itertools.product(range(3), range(2)):
        expected = one(logits[i, j], biases[i] if bias_axis == 0 else biases[0])
        np.testing.assert_array_equal(actual.expert_ids[i, j], expected.expert_ids)
        np.testing.assert_allclose(actual.weights[i, j], expected.weights, rtol=1e-6)


@IMPLEMENTATIONS
def test_vmap_over_bias_alone(implementation):
    logits, biases = normal(7, 8), normal(3, 8, seed=1)
    actual = jax.vmap(
        lambda bias: route(logits, 2, selection_bias=bias, implementation=implementation)
    )(biases)
    for i in range(3):
        assert_routing(
            Routing(actual.expert_ids[i], actual.weights[i]),
            *expected_route(logits, 2, bias=biases[i]),
        )


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("normalize", [False, True])
def test_reference_gradient(gating, normalize):
    """Against central differences of the NumPy version."""
    logits = normal(2, 6).astype(np.float64)
    cotangent = normal(2, 3, seed=1).astype(np.float64)

    def loss(logits):
        routing = route(logits, 3, gating=gating, normalize=normalize, implementation="reference")
        return (routing.weights * cotangent).sum()

    actual = np.asarray(jax.grad(loss)(jnp.asarray(logits, jnp.float32)))
    step = 1e-6
    for index in np.ndindex(logits.shape):
        values = []
        for sign in (1, -1):
            moved = logits.copy()
            moved[index] += sign * step
            values.append((expected_route(moved, 3, gating, None, normalize)[1] * cotangent).sum())
        assert actual[index] == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-5)


@pytest.mark.parametrize("gating", GATINGS)
def test_reference_gradient_stays_in_its_row(gating):
    logits = normal(3, 6)
    logits[0] = np.nan
    logits[1, 2] = np.nan
    logits[1, 3] = -500.0

    def loss(logits):
        return jnp.nansum(route(logits, 2, gating=gating, implementation="reference").weights ** 2)

    assert np.isfinite(jax.grad(loss)(jnp.asarray(logits))[1:]).all()


def test_reference_in_float64():
    logits = np.random.default_rng(0).standard_normal((9, 16))
    with jax.enable_x64(True):
        routing = route(jnp.asarray(logits), 4, implementation="reference")
        assert routing.weights.dtype == jnp.float64
        assert routing.expert_ids.dtype == jnp.int32
        ids, weights = expected_route(logits, 4)
        np.testing.assert_array_equal(routing.expert_ids, ids)
        np.testing.assert_allclose(routing.weights, weights, rtol=1e-14)
        with pytest.raises(TypeError, match=r"logits.*float64"):
            route(jnp.asarray(logits), 4)


def test_kernel_has_no_gradient():
    with pytest.raises(NotImplementedError, match='implementation="reference"'):
        jax.grad(lambda x: route(x, 2).weights.sum())(jnp.ones((2, 4)))


# --- route: bad input --------------------------------------------------------------------------


@IMPLEMENTATIONS
@pytest.mark.parametrize(("error", "message", "change"), [
    (ValueError, "logits", {"logits": np.zeros(8, np.float32)}),
    (ValueError, "logits", {"logits": np.zeros((2, 3, 8), np.float32)}),
    (TypeError, "logits.*int32", {"logits": np.zeros((2, 8), np.int32)}),
    (ValueError, "top_k.*at least 1", {"top_k": 0}),
    (ValueError, "top_k.*at most 8", {"top_k": 9}),
    (TypeError, "top_k", {"top_k": 2.0}),
    (ValueError, "top_k", {"logits": np.zeros((2, 0), np.float32), "top_k": 1}),
    (ValueError, "gating.*softmax_after_topk.*'tanh'", {"gating": "tanh"}),
    (ValueError, "selection_bias", {"selection_bias": np.zeros(7, np.float32)}),
    (ValueError, "selection_bias", {"selection_bias": np.zeros((1, 8), np.float32)}),
    (TypeError, "selection_bias", {"selection_bias": np.zeros(8, np.int32)}),
    (ValueError, "num_groups.*8.*3", {"num_groups": 3}),
    (ValueError, "num_groups", {"num_groups": 0}),
    (ValueError, "num_groups_used", {"num_groups_used": 0}),
    (ValueError, "num_groups_used.*4.*5", {"num_groups": 4, "num_groups_used": 5}),
    (ValueError, "top_k.*at most 2.*eligible", {"num_groups": 4, "top_k": 3}),
])  # fmt: skip
def test_bad_route_arguments(implementation, error, message, change):
    arguments = {"logits": np.zeros((2, 8), np.float32), "top_k": 2} | change
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: route(**arguments, implementation=implementation))


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(("message", "experts", "biases", "top_k", "change"), [
    ("logits", 0, 0, 1, {}),
    ("selection_bias", 8, 7, 2, {}),
    ("gating", 8, 0, 2, {"gating": 4}),
    ("num_groups", 8, 0, 2, {"num_groups": 3}),
    ("num_groups_used", 8, 0, 2, {"num_groups_used": 2}),
    ("top_k", 8, 0, 9, {}),
])  # fmt: skip
def test_route_handler_refuses(message, experts, biases, top_k, change):
    """The handler does not rely on the checks of the Python side."""
    attributes = {
        "gating": 0, "normalize": True, "scale": 1.0, "num_groups": 1, "num_groups_used": 1,
    } | change  # fmt: skip
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_moe_route: .*{message}"):
        jax.block_until_ready(
            _ffi.call(
                "jax_moe_route",
                [struct(3, top_k, dtype=jnp.int32), struct(3, top_k)],
                jnp.zeros((3, experts)),
                jnp.zeros(biases),
                **attributes,
            )
        )


@pytest.mark.parametrize(("message", "shapes"), [
    ("sorted_token_ids", [(2, 4), (2, 5), (2, 9)]),
    ("flat_expert_ids", [(2, 5), (1, 5), (2, 9)]),
    ("expert_offsets", [(2, 5), (2, 5), (3, 9)]),
    ("expert_offsets", [(2, 5), (2, 5), (2, 1)]),
])  # fmt: skip
def test_sort_handler_refuses(message, shapes):
    results = [struct(*shape, dtype=jnp.int32) for shape in shapes]
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_moe_sort: .*{message}"):
        jax.block_until_ready(_ffi.call("jax_moe_sort", results, jnp.zeros((2, 5), jnp.int32)))


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"implementation.*'numpy'"):
        route(np.zeros((2, 8), np.float32), 2, implementation="numpy")
    with pytest.raises(ValueError, match=r"implementation.*'numpy'"):
        sort_by_expert(np.zeros(2, np.int32), 2, implementation="numpy")


# --- sort_by_expert ----------------------------------------------------------------------------


def assert_dispatch(actual, ids, experts):
    assert isinstance(actual, Dispatch)
    for field, expected in zip(actual, expected_sort(ids, experts), strict=True):
        assert field.dtype == jnp.int32
        np.testing.assert_array_equal(field, expected)


@IMPLEMENTATIONS
@pytest.mark.parametrize("experts", [1, 8, 1024])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (33, 4), (100,)])
def test_sort_matches_numpy(implementation, experts, shape):
    ids = np.random.default_rng(0).integers(0, experts, shape).astype(np.int32)
    assert_dispatch(sort_by_expert(ids, experts, implementation=implementation), ids, experts)


@IMPLEMENTATIONS
def test_sort_puts_invalid_ids_last_as_they_were(implementation):
    ids = np.array([[5, -1, 0], [INT32.max, 2, INT32.min], [3, 0, 4]], np.int32)
    dispatch = sort_by_expert(ids, 4, implementation=implementation)
    assert_dispatch(dispatch, ids, 4)
    np.testing.assert_array_equal(dispatch.sorted_token_ids, [2, 7, 4, 6, 0, 1, 3, 5, 8])
    np.testing.assert_array_equal(
        dispatch.flat_expert_ids, [0, 0, 2, 3, 5, -1, INT32.max, INT32.min, 4]
    )
    np.testing.assert_array_equal(dispatch.expert_offsets, [0, 2, 2, 3, 4])


IDS = (
    st.integers(-2, 9) | st.sampled_from([INT32.min, INT32.max]) | st.integers(INT32.min, INT32.max)
)


@IMPLEMENTATIONS
@settings(max_examples=60, deadline=None)
@given(ids=st.lists(IDS, min_size=24, max_size=24), experts=st.sampled_from([1, 3, 8]))
def test_sort_any_ids(implementation, ids, experts):
    ids = np.array(ids, np.int32)
    assert_dispatch(sort_by_expert(ids, experts, implementation=implementation), ids, experts)


@IMPLEMENTATIONS
def test_sort_vmap(implementation):
    ids = np.random.default_rng(0).integers(-1, 6, (2, 3, 10, 2)).astype(np.int32)

    def one(ids):
        return sort_by_expert(ids, 5, implementation=implementation)

    actual = jax.jit(jax.vmap(jax.vmap(one)))(ids)
    for i, j in itertools.product(range(2), range(3)):
        assert_dispatch(Dispatch(*(field[i, j] for field in actual)), ids[i, j], 5)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
def test_sort_narrow_ids(implementation, dtype):
    ids = np.array([3, 0, np.iinfo(dtype).max, np.iinfo(dtype).min, 1], dtype)
    assert_dispatch(sort_by_expert(ids, 4, implementation=implementation), ids, 4)


@IMPLEMENTATIONS
@pytest.mark.parametrize("x64", [False, True])
def test_numbers_of_python(implementation, x64):
    with jax.enable_x64(x64):
        dispatch = sort_by_expert([[1, 0], [5, 0]], 2, implementation=implementation)
        assert [ids.tolist() for ids in dispatch] == [[1, 3, 0, 2], [0, 0, 1, 5], [0, 2, 3]]
        with pytest.raises((ValueError, OverflowError)):
            sort_by_expert([2**40], 2, implementation=implementation)
        routing = route([[1.0, 3.0, 2.0]], 2, implementation=implementation)
        assert routing.expert_ids.tolist() == [[1, 2]]


@IMPLEMENTATIONS
def test_bad_sort_arguments(implementation):
    ids = np.zeros((2, 2), np.int32)
    for error, message, arguments in [
        (TypeError, "expert_ids.*float32", (ids.astype(np.float32), 4)),
        (TypeError, "expert_ids.*uint32", (ids.astype(np.uint32), 4)),
        (TypeError, "expert_ids.*bool", (ids.astype(bool), 4)),
        (ValueError, "expert_ids", (ids[None], 4)),
        (ValueError, "expert_ids", (ids[0, 0], 4)),
        (ValueError, "num_experts.*at least 1", (ids, 0)),
        (ValueError, "num_experts", (ids, 2**31 - 1)),
        (TypeError, "num_experts", (ids, 4.0)),
    ]:
        with pytest.raises(error, match=message):
            sort_by_expert(*arguments, implementation=implementation)
