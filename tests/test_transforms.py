"""The ops under JAX's transforms: each result equals that of the plain calls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import jax_moe
from jax_moe import Experts, MoEConfig, MoEParams, MoEVariant, PackedExperts, Routing, _ffi
from jax_moe._formats import FORMATS

E, H, F, T, K = 4, 64, 96, 5, 2


def experts(seed=0):
    make = functools.partial(oracle.packed, seed=seed)
    return Experts(
        gate=make("Q4_0", E, F, H)[0], up=make("Q4_0", E, F, H)[0], down=make("Q8_0", E, H, F)[0]
    )


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return oracle.normal(rng, (T, H)), oracle.random_routing(rng, T, E, K)


def stack(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


def gemm(x, weight, routing):
    dispatch = jax_moe.sort_by_expert(routing.expert_ids, weight.shape[0])
    return jax_moe.moe_gemm(
        x,
        weight,
        dispatch.sorted_token_ids,
        dispatch.flat_expert_ids,
        top_k=K,
        topk_weights=routing.weights,
    )


OPS = {
    "gemm": lambda x, routing, w: gemm(x, w.up, routing),
    "ffn": lambda x, routing, w: jax_moe.moe_ffn(x, routing, w),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def with_padding(routing):
    """Some slots without an expert."""
    return Routing(routing.expert_ids.at[0, 1].set(-1).at[2].set(E), routing.weights)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_vmap(op, axes):
    xs, routings, weights = (
        [inputs(s)[0] for s in range(3)],
        [with_padding(inputs(s)[1]) for s in range(3)],
        [experts(s) for s in range(3)],
    )
    batched = [
        stack(*v) if a == 0 else v[0] for v, a in zip((xs, routings, weights), axes, strict=True)
    ]
    y = jax.jit(jax.vmap(op, in_axes=axes))(*batched)
    for b in range(3):
        one = [v[b] if a == 0 else v[0] for v, a in zip((xs, routings, weights), axes, strict=True)]
        close(y[b], op(*one))


@pytest.mark.parametrize("prepack", [False, True])
def test_vmap_over_no_experts(op, prepack):
    """A batch of size 0 of experts is not an absent operand."""
    x, routing = inputs()
    w = experts().prepack() if prepack else experts()
    none = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), w)
    one = op(x, routing, w)
    assert jax.vmap(op, in_axes=(None, None, 0))(x, routing, none).shape == (0, *one.shape)
    xs = jnp.zeros((0, *x.shape))
    assert jax.vmap(op, in_axes=(0, None, 0))(xs, routing, none).shape == (0, *one.shape)


def test_nested_vmap(op):
    x = jnp.stack([inputs(s)[0] for s in range(6)]).reshape(3, 2, T, H)
    weights = stack(experts(0), experts(1))
    routing = inputs(0)[1]
    inner = jax.vmap(op, in_axes=(0, None, 0))
    y = jax.vmap(inner, in_axes=(0, None, None))(x, routing, weights)
    for a in range(3):
        for b in range(2):
            close(y[a, b], op(x[a, b], routing, experts(b)))


def test_vmap_of_route():
    logits = oracle.normal(np.random.default_rng(0), (3, T, 8))
    bias = oracle.normal(np.random.default_rng(1), (3, 8))

    def f(logits, bias):
        return jax_moe.route(logits, 2, gating="sigmoid", selection_bias=bias)

    for axes in ((0, None), (0, 0), (None, 0)):
        args = [v if a == 0 else v[0] for v, a in zip((logits, bias), axes, strict=True)]
        batched = jax.vmap(f, in_axes=axes)(*args)
        for i in range(3):
            one = f(*(v[i] if a == 0 else v[0] for v, a in zip((logits, bias), axes, strict=True)))
            np.testing.assert_array_equal(batched.expert_ids[i], one.expert_ids)
            close(batched.weights[i], one.weights)


def test_vmap_of_sort():
    ids = jnp.asarray(np.random.default_rng(0).integers(-1, E + 1, (2, 3, T, K)), jnp.int32)
    f = functools.partial(jax_moe.sort_by_expert, num_experts=E)
    batched = jax.vmap(jax.vmap(f))(ids)
    for i in range(2):
        for j in range(3):
            jax.tree.map(
                lambda b, one, i=i, j=j: np.testing.assert_array_equal(b[i, j], one),
                batched,
                f(ids[i, j]),
            )


def test_scan_over_stacked_layers():
    layers = [experts(s) for s in range(3)]
    x, routing = inputs()

    @jax.jit
    def model(x, stacked):
        return jax.lax.scan(
            lambda x, layer: (x + jax_moe.moe_ffn(x, routing, layer), None), x, stacked
        )[0]

    expected = x
    for layer in layers:
        expected = expected + jax_moe.moe_ffn(expected, routing, layer)
    close(model(x, stack(*layers)), expected)


def test_layers_of_equal_types_are_traced_once(monkeypatch):
    traced, call = [], _ffi.call
    monkeypatch.setattr(
        _ffi, "call", lambda name, *a, **k: traced.append(name) or call(name, *a, **k)
    )
    layers = [experts(seed) for seed in range(4)]
    rng = np.random.default_rng(0)
    x, logits = oracle.normal(rng, (11, H)), oracle.normal(rng, (11, E))  # as no other test has

    def model(x, layers):
        for layer in layers:
            routing = jax_moe.route(logits, K)
            x = jax_moe.moe_ffn(x, routing, layer) + gemm(x, layer.up, routing)[::K, :H]
        return x

    close(jax.jit(model)(x, layers), model(x, layers))
    assert sorted(traced) == [f"jax_moe_{name}" for name in ("ffn", "gemm", "route", "sort")]


def test_stacked_layers_have_shapes():
    stacked = stack(experts(0), experts(1))
    assert stacked.up.shape == (2, E, F, H)
    assert stacked.up.dequantize().shape == (2, E, F, H)


def test_remat(op):
    x, routing = inputs()
    close(jax.jit(jax.checkpoint(op))(x, routing, experts()), op(x, routing, experts()))


def test_eval_shape(op):
    x, routing = inputs()
    shapes = jax.eval_shape(op, x, routing, experts())
    y = op(x, routing, experts())
    assert (shapes.shape, shapes.dtype) == (y.shape, y.dtype)


def test_donation():
    """The result may take the place of a donated x; without donation x stays as it was."""
    x, routing = inputs()
    kept = np.asarray(x)
    expected = np.asarray(jax_moe.moe_ffn(x, routing, experts()))
    np.testing.assert_array_equal(kept, x)
    donated = jnp.copy(x)
    y = jax.jit(jax_moe.moe_ffn, donate_argnums=0)(donated, routing, experts())
    assert donated.is_deleted()
    close(y, expected)


def test_grad_names_the_reference(op):
    x, routing = inputs()
    with pytest.raises(NotImplementedError, match='implementation="reference"'):
        jax.grad(lambda x: op(x, routing, experts()).sum())(x)


def test_grad_of_route_names_the_reference():
    with pytest.raises(NotImplementedError, match='implementation="reference"'):
        jax.grad(lambda logits: jax_moe.route(logits, 2).weights[0, 0])(jnp.ones((2, 4)))


def test_reference_has_the_gradient_of_the_dense_computation():
    x, routing = inputs()
    w = experts()
    exact = [m.dequantize() for m in (w.gate, w.up, w.down)]

    def dense(x, weights):
        y = 0
        for s in range(K):
            gate, up, down = (m[routing.expert_ids[:, s]] for m in exact)
            h = jax.nn.silu(jnp.einsum("tnk,tk->tn", gate, x)) * jnp.einsum("tnk,tk->tn", up, x)
            y += weights[:, s, None] * jnp.einsum("tnk,tk->tn", down, h)
        return (y**2).sum()

    def ours(x, weights):
        y = jax_moe.moe_ffn(x, Routing(routing.expert_ids, weights), w, implementation="reference")
        return (y**2).sum()

    for a, b in zip(
        jax.grad(ours, (0, 1))(x, routing.weights),
        jax.grad(dense, (0, 1))(x, routing.weights),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_export_and_back(op):
    pytest.importorskip("flatbuffers")
    arguments = (*inputs(), experts())
    exported = export.export(jax.jit(op), disabled_checks=jax_moe.DISABLED_EXPORT_CHECKS)
    again = export.deserialize(exported(*arguments).serialize())
    close(again.call(*arguments), op(*arguments))


@pytest.mark.parametrize("prepack", [False, True])
def test_an_exported_function_takes_and_returns_every_public_pytree(prepack):
    """MoEParams with a dense and packed weights, MoEConfig; Routing and Dispatch come back."""
    pytest.importorskip("flatbuffers")
    w = experts().prepack() if prepack else experts()
    params = MoEParams(experts=w, router=oracle.normal(np.random.default_rng(1), (E, H)))
    config = MoEConfig(top_k=K, gating="sigmoid", activation_betas=(1.5, 0.5), scale=0.1)

    def block(params, x, config):
        routing = jax_moe.route(x @ params.router.T, config.top_k, gating=config.gating)
        dispatch = jax_moe.sort_by_expert(routing.expert_ids, E)
        return params.experts, routing, dispatch, config, jax_moe.moe_ffn(x, routing, w)

    arguments = params, inputs()[0], config
    exported = export.export(jax.jit(block), disabled_checks=jax_moe.DISABLED_EXPORT_CHECKS)
    again = export.deserialize(exported(*arguments).serialize())
    assert again.in_tree == jax.tree.structure((arguments, {}))
    result, expected = again.call(*arguments), block(*arguments)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    jax.tree.map(close, result, expected)


def test_export_with_a_symbolic_number_of_tokens(op):
    pytest.importorskip("flatbuffers")
    w = experts()
    (tokens,) = export.symbolic_shape("t")
    arguments = (
        jax.ShapeDtypeStruct((tokens, H), jnp.float32),
        jax.ShapeDtypeStruct((tokens, K), jnp.int32),
        jax.ShapeDtypeStruct((tokens, K), jnp.float32),
    )
    exported = export.export(
        jax.jit(lambda x, ids, weights: op(x, Routing(ids, weights), w)),
        disabled_checks=jax_moe.DISABLED_EXPORT_CHECKS,
    )(*arguments)
    x, routing = inputs()
    close(exported.call(x, *routing), op(x, routing, w))


def test_lowering_for_cuda_without_a_gpu(op):
    x, routing = inputs()
    lowered = jax.jit(op).trace(x, routing, experts()).lower(lowering_platforms=("cuda",))
    assert "jax_moe_" in lowered.as_text()


def sharded_experts_sum(x, routing, w, reduce):
    """Experts split over four devices, tokens replicated; a device drops the ids of the others."""
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x, ids, weights, w):
        here = ids - jax.lax.axis_index("expert") * w.down.shape[0]
        y = jax_moe.moe_ffn(x, Routing(here, weights), w)
        return jax.lax.psum(y, "expert") if reduce else y

    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P(), P("expert")), out_specs=P())
    )(x, *routing, w)


def test_expert_parallelism():
    assert jax.device_count() == 4
    x, routing = inputs()
    w = experts()
    y = sharded_experts_sum(x, routing, w, reduce=True)
    np.testing.assert_allclose(y, jax_moe.moe_ffn(x, routing, w), rtol=1e-5, atol=1e-6)


def test_a_missing_psum_is_an_error():
    x, routing = inputs()
    with pytest.raises(ValueError, match=r"out_specs|varying|replicat"):
        sharded_experts_sum(x, routing, experts(), reduce=False)


def test_explicit_sharding_names_shard_map():
    mesh = jax.make_mesh((4,), ("t",), axis_types=(jax.sharding.AxisType.Explicit,))
    logits = jnp.zeros((8, 4))
    with jax.set_mesh(mesh):
        logits = jax.device_put(logits, jax.NamedSharding(mesh, P("t", None)))
        with pytest.raises(ValueError, match="shard_map"):
            jax_moe.route(logits, 2)


def test_packed_experts_is_a_pytree_of_one_leaf():
    packed = oracle.packed("Q4_0", E, F, H)[0]
    leaves, tree = jax.tree.flatten(packed)
    assert len(leaves) == 1 and leaves[0].dtype == jnp.uint8
    assert jax.tree.unflatten(tree, [object()]).format == packed.format
    assert isinstance(jax.tree.map(lambda leaf: leaf[:1], packed), PackedExperts)


def test_equality_of_weights():
    """By identity of arrays, and by value of what stands for them."""
    w = experts()
    other = jax.tree.map(jnp.copy, w)
    for a, b in ((w, other), (w.gate, other.gate)):
        assert a == jax.tree.map(lambda leaf: leaf, a) and a != b and a != 3
        shapes = [jax.eval_shape(lambda tree=tree: tree) for tree in (a, b)]
        assert shapes[0] == shapes[1] and hash(shapes[0]) == hash(shapes[1])
    assert w.gate != dataclasses.replace(w.gate, format="IQ4_NL")
    block = MoEParams(experts=w, router=jnp.ones((E, H)))
    assert block == dataclasses.replace(block)
    assert block != dataclasses.replace(block, experts=other)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize(
    "option", [("numpy_rank_promotion", "raise"), ("numpy_dtype_promotion", "strict")], ids=str
)
def test_strict_promotion(option, implementation):
    shared = Experts(**{name: oracle.packed("Q8_0", 1, H, H)[0] for name in ("up", "down")})
    half = jnp.ones(E, jnp.bfloat16)
    w = dataclasses.replace(experts(), up_scale=half, down_bias=jnp.ones((E, H), jnp.bfloat16))
    params = MoEParams(
        experts=w,
        router=jnp.ones((E, H), jnp.bfloat16),
        router_bias=half,
        selection_bias=half,
        router_scale=jnp.ones(H, jnp.bfloat16),
        shared=shared,
        shared_gate=jnp.ones(H, jnp.bfloat16),
        shared_post_norm=jnp.ones(H, jnp.bfloat16),
        routed_post_norm=jnp.ones(H, jnp.bfloat16),
    )
    hashed = dataclasses.replace(params, token_to_experts=jnp.zeros((300, K), jnp.int32))
    config = jax_moe.MoEConfig(top_k=K, num_groups=2, num_groups_used=1, shared_activation="silu")
    x, routing = inputs()
    run = {"implementation": implementation}
    with getattr(jax, option[0])(option[1]):
        jax_moe.moe_block(params, x, config, **run)
        ids = jnp.zeros(T, jnp.uint8)  # which the size of the vocabulary does not fit into
        jax_moe.moe_block(hashed, x.astype(jnp.bfloat16), config, token_ids=ids, **run)
        jax_moe.moe_ffn(x, routing, w, variant=MoEVariant.SCALAR_GGUF, **run)
        jax.vmap(lambda w: jax_moe.moe_ffn(x, routing, w, **run))(stack(w, w))
        jax_moe.sort_by_expert(routing.expert_ids, E, **run)


@pytest.mark.parametrize("name", FORMATS)
def test_strict_promotion_of_dequantize(name):
    data = jnp.zeros((1, 16, FORMATS[name].block_bytes), jnp.uint8)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        PackedExperts(data, name).dequantize()
