"""route and sort_by_expert on an NVIDIA GPU, and dequantisation bit by bit."""

import cuda_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_moe
from jax_moe import _ffi

pytestmark = pytest.mark.gpu

INT32 = np.iinfo(np.int32)


@pytest.mark.parametrize("gating", ("softmax", "sigmoid", "softmax_after_topk", "sqrt_softplus"))
@pytest.mark.parametrize("experts, top_k", ((8, 2), (128, 8), (1000, 17), (33, 33)))
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("tokens", (1, 67))
def test_route(gating, experts, top_k, biased, tokens):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((tokens, experts)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(experts) * 0.1, jnp.float32) if biased else None
    options = {"gating": gating, "selection_bias": bias, "scale": 2.5}
    ours = jax_moe.route(logits, top_k, **options)
    reference = jax_moe.route(logits, top_k, implementation="reference", **options)
    np.testing.assert_array_equal(ours.expert_ids, reference.expert_ids)
    np.testing.assert_allclose(ours.weights, reference.weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("groups, used", ((8, 4), (8, 1), (2, 2), (64, 9)))
def test_route_in_groups(groups, used):
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((40, 256)), jnp.float32)
    options = {"gating": "sigmoid", "num_groups": groups, "num_groups_used": used}
    ours = jax_moe.route(logits, 4, **options)
    reference = jax_moe.route(logits, 4, implementation="reference", **options)
    np.testing.assert_array_equal(ours.expert_ids, reference.expert_ids)
    np.testing.assert_allclose(ours.weights, reference.weights, rtol=1e-5)


def test_route_ties_and_nan():
    logits = np.zeros((4, 48), np.float32)
    logits[1, 5] = np.nan
    logits[2] = np.nan
    logits[3, ::2] = -0.0
    ours = jax_moe.route(jnp.asarray(logits), 3)
    np.testing.assert_array_equal(ours.expert_ids, [[0, 1, 2]] * 4)
    assert np.isnan(ours.weights[2]).all()
    assert np.isfinite(np.asarray(ours.weights)[[0, 1, 3]]).all()


@pytest.mark.parametrize("tokens, top_k", ((0, 2), (1, 8), (100, 4), (5000, 3), (20_000, 8)))
@pytest.mark.parametrize("experts", (1, 8, 128, 1024))
def test_sort(tokens, top_k, experts):
    rng = np.random.default_rng(2)
    ids = rng.integers(-1, experts + 1, (tokens, top_k)).astype(np.int32)
    ids.reshape(-1)[:: max(1, ids.size // 7)] = INT32.max
    ids.reshape(-1)[1 :: max(1, ids.size // 5)] = INT32.min
    dispatch = jax_moe.sort_by_expert(jnp.asarray(ids), experts)
    flat = ids.reshape(-1)
    bucket = np.where((flat >= 0) & (flat < experts), flat, experts)
    order = np.argsort(bucket, kind="stable")
    np.testing.assert_array_equal(dispatch.sorted_token_ids, order)
    np.testing.assert_array_equal(dispatch.flat_expert_ids, flat[order])
    counts = np.bincount(bucket, minlength=experts + 1)[:experts]
    np.testing.assert_array_equal(dispatch.expert_offsets, np.concatenate([[0], np.cumsum(counts)]))


def test_sort_of_a_batch():
    ids = np.random.default_rng(3).integers(-1, 7, (3, 50, 2)).astype(np.int32)
    batched = jax.vmap(lambda i: jax_moe.sort_by_expert(i, 6))(jnp.asarray(ids))
    for row in range(3):
        single = jax_moe.sort_by_expert(jnp.asarray(ids[row]), 6)
        for name in ("sorted_token_ids", "flat_expert_ids", "expert_offsets"):
            np.testing.assert_array_equal(getattr(batched, name)[row], getattr(single, name))


@pytest.mark.parametrize("format_name", oracle.all_formats())
def test_dequantize_gives_the_bits_of_the_host(format_name):
    """Uniformly random bytes; NaN for NaN."""
    packed = cases.random_blocks(format_name, (1, 37, 768))
    format = packed.format
    (ours,) = _ffi.call(
        "jax_moe_dequantize",
        [jax.ShapeDtypeStruct((37, 768), jnp.float32)],
        packed.data[0],
        format=format.ggml_type,
    )
    host = _ffi.native().dequantize(format.ggml_type, np.asarray(packed.data[0]))
    ours, host = np.asarray(ours), np.asarray(host)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(host))
    same = np.isnan(ours) | (ours.view(np.uint32) == host.view(np.uint32))
    assert same.all()
