"""moe_block against float64, one variation point at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_moe
from jax_moe import Experts, MoEConfig, MoEParams, MoEVariant

E, H, F, T, K = 6, 64, 96, 7, 2
IMPLEMENTATIONS = (None, "reference")


def exact_route(logits, top_k, *, selection_bias=0.0, gating="softmax", normalize=True, scale=1.0):
    """Routing without groups, for logits without ties."""
    if gating == "softmax":
        gates = np.exp(logits - logits.max(axis=1, keepdims=True))
        gates /= gates.sum(axis=1, keepdims=True)
    elif gating == "sigmoid":
        gates = oracle.sigmoid(logits)
    else:
        gates = np.sqrt(np.log1p(np.exp(logits)))
    ids = np.argsort(-(gates + selection_bias), axis=1)[:, :top_k]
    return ids, exact_weights(gates, ids, normalize, scale)


def exact_weights(gates, ids, normalize=True, scale=1.0):
    weights = np.take_along_axis(gates, ids, axis=1)
    if normalize:
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 2.0**-14)
    return weights * scale


class Block:
    """A block of Q8_0 experts, with the exact values of what it holds."""

    def __init__(self, seed=0, experts=E, f=F, h=H):
        rng = np.random.default_rng(seed)
        self.rng = rng
        (gate, self.gate), (up, self.up), (down, self.down) = (
            oracle.packed("Q8_0", experts, *shape, seed=seed + i)
            for i, shape in enumerate([(f, h), (f, h), (h, f)])
        )
        self.experts = Experts(gate=gate, up=up, down=down)
        self.router = oracle.normal(rng, (experts, H))
        self.x = oracle.normal(rng, (T, H))

    def logits(self, x=None):
        x = self.x if x is None else x
        return np.asarray(x, np.float64) @ np.asarray(self.router, np.float64).T

    def run(self, config, implementation, x=None, call=None, variant=None, **fields):
        params = MoEParams(**({"experts": self.experts, "router": self.router} | fields))
        run = jax.jit(
            lambda p, x, call: jax_moe.moe_block(
                p, x, config, variant=variant, implementation=implementation, **call
            )
        )
        return run(params, self.x if x is None else x, call or {})

    def ffn(self, x, ids, weights, **options):
        return oracle.ffn(x, ids, weights, gate=self.gate, up=self.up, down=self.down, **options)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def check(y, expected, bound=2e-5):
    assert oracle.relative_error(y, expected) <= bound


def test_softmax_router(implementation):
    b = Block()
    for normalize, scale in ((True, 1.0), (False, 2.5)):
        config = MoEConfig(top_k=K, normalize=normalize, scale=scale)
        routing = exact_route(b.logits(), K, normalize=normalize, scale=scale)
        check(b.run(config, implementation), b.ffn(b.x, *routing))


def test_leading_axes(implementation):
    b = Block()
    config = MoEConfig(top_k=K)
    flat = b.run(config, implementation)
    y = b.run(config, implementation, x=b.x.reshape(1, T, 1, H))
    np.testing.assert_allclose(y.reshape(T, H), flat, rtol=1e-5, atol=1e-6)


def test_router_and_selection_bias(implementation):
    b = Block()
    router_bias = oracle.normal(b.rng, (E,))
    selection_bias = oracle.normal(b.rng, (E,))
    logits = b.logits() + np.asarray(router_bias, np.float64)
    routing = exact_route(
        logits, K, gating="sigmoid", selection_bias=np.asarray(selection_bias, np.float64)
    )
    y = b.run(
        MoEConfig(top_k=K, gating="sigmoid"),
        implementation,
        router_bias=router_bias,
        selection_bias=selection_bias,
    )
    check(y, b.ffn(b.x, *routing))


def test_router_input(implementation):
    b = Block()
    other = oracle.normal(b.rng, (T, H))
    y = b.run(MoEConfig(top_k=K), implementation, call={"router_input": other})
    check(y, b.ffn(b.x, *exact_route(b.logits(other), K)))


def test_a_router_that_reads_something_else_must_be_given_it():
    b = Block()
    for reads, words in (("layer_input", "layer's input"), ("unnormed", "norm of")):
        with pytest.raises(ValueError, match=f"router_input is needed: .*{words}"):
            b.run(MoEConfig(top_k=K, router_reads=reads), "reference")
    with pytest.raises(ValueError, match=r"config\.router_reads is one of 'x'"):
        b.run(MoEConfig(top_k=K, router_reads="y"), "reference")
    other = oracle.normal(b.rng, (T, H - 1))
    with pytest.raises(ValueError, match="router_input has x's shape"):
        b.run(MoEConfig(top_k=K), "reference", call={"router_input": other})


def test_router_scale(implementation):
    b = Block()
    scale = oracle.normal(b.rng, (H,))
    x = np.asarray(b.x, np.float64)
    seen = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * np.asarray(scale) / np.sqrt(H)
    y = b.run(MoEConfig(top_k=K), implementation, router_scale=scale)
    check(y, b.ffn(b.x, *exact_route(b.logits(seen), K)))


@pytest.mark.parametrize("sum_scale", [1.0, 0.5])
def test_shared_experts_with_a_gate(implementation, sum_scale):
    b, s = Block(), Block(seed=9, experts=1, f=160)
    gate = oracle.normal(b.rng, (H,))
    y = b.run(
        MoEConfig(top_k=K, sum_scale=sum_scale),
        implementation,
        shared=s.experts,
        shared_gate=gate,
    )
    weight = oracle.sigmoid(np.asarray(b.x, np.float64) @ np.asarray(gate, np.float64))[:, None]
    shared = s.ffn(b.x, np.zeros((T, 1), int), weight)
    expected = b.ffn(b.x, *exact_route(b.logits(), K)) + shared
    check(y, expected * sum_scale)


def test_shared_experts_with_their_own_activation(implementation):
    b, s = Block(), Block(seed=9, experts=1)
    y = b.run(
        MoEConfig(
            top_k=K,
            activation="swiglu_clamp",
            activation_limit=0.5,
            shared_activation="swiglu_oai",
        ),
        implementation,
        shared=s.experts,
    )
    expected = b.ffn(b.x, *exact_route(b.logits(), K), act="swiglu_clamp", limit=0.5)
    expected += s.ffn(b.x, np.zeros((T, 1), int), np.ones((T, 1)), act="swiglu_oai")
    check(y, expected)


def test_latent_experts(implementation):
    latent = 32
    b = Block(h=latent)
    down, exact_down = oracle.packed("Q8_0", 1, latent, H, seed=20)
    up, exact_up = oracle.packed("Q8_0", 1, H, latent, seed=21)
    norm = oracle.normal(b.rng, (latent,))
    x = np.asarray(b.x, np.float64)
    y = b.run(MoEConfig(top_k=K), implementation, latent_down=down, latent_up=up, latent_norm=norm)
    inner = b.ffn(x @ exact_down[0].T, *exact_route(b.logits(), K))
    inner /= np.sqrt((inner**2).mean(axis=1, keepdims=True) + 1e-6)
    check(y, (inner * np.asarray(norm)) @ exact_up[0].T)


def test_experts_by_token(implementation):
    b = Block()
    table = jnp.asarray(b.rng.integers(0, E, (11, K)), jnp.int32)
    tokens = jnp.asarray(b.rng.integers(0, 11, T), jnp.int32)
    y = b.run(
        MoEConfig(top_k=K, gating="sqrt_softplus", scale=1.5),
        implementation,
        token_to_experts=table,
        call={"token_ids": tokens},
    )
    ids = np.asarray(table)[np.asarray(tokens)]
    gates = np.sqrt(np.log1p(np.exp(b.logits())))
    check(y, b.ffn(b.x, ids, exact_weights(gates, ids, scale=1.5)))


def test_an_unknown_token_has_no_routed_experts(implementation):
    b = Block()
    tokens = jnp.asarray([0, -1, 11, 10, 2**31 - 1, 3, 5], jnp.int32)
    table = jnp.asarray(b.rng.integers(0, E, (11, K)), jnp.int32)
    y = b.run(
        MoEConfig(top_k=K), implementation, token_to_experts=table, call={"token_ids": tokens}
    )
    known = np.array([True, False, False, True, False, True, True])
    np.testing.assert_array_equal(np.any(np.asarray(y) != 0, axis=1), known)


def test_token_ids_are_checked():
    b = Block()
    table = jnp.zeros((11, K), jnp.int32)

    def run(**call):
        return b.run(MoEConfig(top_k=K), "reference", token_to_experts=table, call=call)

    with pytest.raises(ValueError, match="token_ids is needed"):
        run()
    with pytest.raises(ValueError, match=r"token_ids has the shape of x without .* \(7,\)"):
        run(token_ids=jnp.zeros(6, jnp.int32))
    with pytest.raises(TypeError, match="token_ids holds integers, not float32"):
        run(token_ids=jnp.zeros(T))


def test_norms_of_the_paths(implementation):
    b, s = Block(), Block(seed=9, experts=1)
    stream = oracle.normal(b.rng, (T, H))
    pre, routed_post, shared_post = (oracle.normal(b.rng, (H,)) for _ in range(3))

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * np.asarray(weight, float)

    y = b.run(
        MoEConfig(top_k=K, router_reads="unnormed", sum_scale=0.25),
        implementation,
        shared=s.experts,
        shared_pre_norm=pre,
        routed_post_norm=routed_post,
        shared_post_norm=shared_post,
        call={"router_input": stream},
    )
    routed = b.ffn(b.x, *exact_route(b.logits(stream), K))
    read = norm(np.asarray(stream, np.float64), pre)
    shared = s.ffn(read, np.zeros((T, 1), int), np.ones((T, 1)))
    check(y, 0.25 * (norm(routed, routed_post) + norm(shared, shared_post)))


def test_chunk_experts_are_checked():
    b, c = Block(), Block(seed=30, experts=3, f=32)
    with pytest.raises(
        ValueError, match=r"params\.chunk_experts has 3 experts, not one for each 3"
    ):
        b.run(MoEConfig(top_k=K, experts_per_group=3), "reference", chunk_experts=c.experts)


def test_second_pass_of_chunk_experts(implementation):
    b, c = Block(), Block(seed=30, experts=3, f=32)
    y = b.run(
        MoEConfig(top_k=K, experts_per_group=2, chunk_scale=0.05),
        implementation,
        chunk_experts=c.experts,
    )
    logits = b.logits()
    ids, weights = exact_route(logits, K)
    first = b.ffn(b.x, ids, weights)
    gates = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    second = c.ffn(first, ids // 2, exact_weights(gates, ids // 2))
    check(y, first + 0.05 * second)


def test_a_variant_is_for_the_weights_that_it_takes(implementation):
    """Of a block of packed and dense weights; the routed experts are what it is asked for."""
    b, s, c = Block(h=32), Block(seed=9, experts=1), Block(seed=30, experts=3, f=32, h=32)
    down, up = oracle.normal(b.rng, (1, 32, H)), oracle.normal(b.rng, (1, H, 32))
    shared, chunks = (
        Experts(**{name: w.dequantize() for name, w in block.experts.weights.items()})
        for block in (s, c)
    )
    fields = {"shared": shared, "chunk_experts": chunks, "latent_down": down, "latent_up": up}
    config = MoEConfig(top_k=K, experts_per_group=2)
    scalar, wmma = MoEVariant.SCALAR_GGUF, MoEVariant.WMMA
    y = b.run(config, implementation, variant=scalar, **fields)
    exact = b.run(config, "reference", **fields)
    assert 1e-4 < oracle.relative_error(y, np.asarray(exact, np.float64)) < 5e-2
    mixed = Experts(gate=s.experts.gate, up=s.experts.up, down=shared.down)
    rounded = b.run(config, implementation, variant=scalar, **fields | {"shared": mixed})
    np.testing.assert_allclose(rounded, y, rtol=1e-4, atol=1e-4)
    halves = {name: w.astype(jnp.bfloat16) for name, w in fields.items() if "latent" in name}
    x = b.x.astype(jnp.bfloat16)
    dense = Experts(**{name: w.dequantize(jnp.bfloat16) for name, w in b.experts.weights.items()})
    y = b.run(config, implementation, x=x, variant=wmma, experts=dense, shared=s.experts, **halves)
    assert y.dtype == jnp.bfloat16


def test_reference_in_float64():
    b, s = Block(), Block(seed=9, experts=1)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(v, np.float64)) for v in (b.router, b.x)]
        bias = jnp.asarray(b.rng.standard_normal(E))
        y = b.run(
            MoEConfig(top_k=K),
            "reference",
            x=wide[1],
            router=wide[0],
            router_bias=bias,
            shared=s.experts,
        )
        routing = exact_route(b.logits() + np.asarray(bias), K)
        expected = b.ffn(b.x, *routing) + s.ffn(b.x, np.zeros((T, 1), int), np.ones((T, 1)))
        assert y.dtype == jnp.float64
        check(y, expected, 1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_routes_in_float32(implementation, dtype):
    b = Block()
    x = b.x.astype(dtype)
    y = b.run(MoEConfig(top_k=K), implementation, x=x)
    assert y.dtype == x.dtype
    check(y, b.ffn(x, *exact_route(b.logits(x), K)), oracle.ERROR_BOUNDS[dtype])
