"""Wrong arguments: the exception's type, and a message that names the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_moe
from jax_moe import Experts, MoEConfig, MoEParams, MoEVariant, PackedExperts, Routing, _ffi
from jax_moe._operands import TILED_FORMAT

E, N, K, T, TOP_K = 3, 10, 64, 4, 2
IDS = jnp.zeros(T * TOP_K, jnp.int32)


def gemm_arguments(**changes):
    arguments = {
        "x": jnp.ones((T, K)),
        "weight": oracle.packed("Q8_0", E, N, K)[0],
        "sorted_token_ids": IDS,
        "flat_expert_ids": IDS,
        "top_k": TOP_K,
    } | changes
    return [arguments.pop("x"), arguments.pop("weight")], arguments


def short_rows(rows=E):
    return PackedExperts(jnp.zeros((rows, N, 33), jnp.uint8), "Q8_0")


GEMM_ERRORS = [
    ({"x": jnp.ones((T, K, 1))}, ValueError, "x has 2 axes"),
    ({"x": jnp.ones((T, K), jnp.int32)}, TypeError, "x has dtype float32 or float16 or bfloat16"),
    ({"x": [[1.0]]}, TypeError, "x is an array"),
    ({"x": jnp.ones((T, 32))}, ValueError, "weight has K = 64"),
    ({"x": jnp.ones((5, K))}, ValueError, "x has 4 rows .* or 8"),
    ({"weight": jnp.ones((E, N, K), jnp.int8)}, TypeError, "weight has dtype"),
    ({"weight": jnp.ones((N, K))}, ValueError, "weight has 3 axes"),
    ({"weight": short_rows()}, ValueError, "33 bytes.*34 bytes of a Q8_0 block"),
    (
        {"weight": PackedExperts(jnp.ones((E, N, 68)), "Q8_0")},
        TypeError,
        "weight.data has dtype uint8",
    ),
    ({"weight": jnp.ones((0, N, K))}, ValueError, "without a zero"),
    ({"sorted_token_ids": IDS.astype(jnp.float32)}, TypeError, "sorted_token_ids has dtype int32"),
    ({"flat_expert_ids": IDS[:-1]}, ValueError, "flat_expert_ids has shape"),
    ({"flat_expert_ids": IDS[None]}, ValueError, "flat_expert_ids has 1 axes"),
    ({"top_k": 3}, ValueError, "not a multiple of top_k = 3"),
    ({"top_k": 0}, ValueError, "top_k is at least 1"),
    ({"top_k": 1.0}, TypeError, "top_k is an int"),
    ({"topk_weights": jnp.ones((T, 1))}, ValueError, "topk_weights has shape"),
    ({"topk_weights": IDS}, TypeError, "topk_weights has dtype"),
    ({"variant": "WMMA"}, TypeError, "variant is a jax_moe.MoEVariant"),
    ({"variant": MoEVariant.WMMA_GGUF}, TypeError, "WMMA_GGUF takes x of float16 or bfloat16"),
    (
        {"variant": MoEVariant.SCALAR_GGUF, "weight": jnp.ones((E, N, K))},
        TypeError,
        "SCALAR_GGUF takes packed weights",
    ),
    (
        {"variant": MoEVariant.WMMA, "x": jnp.ones((T, K), jnp.float16)},
        TypeError,
        "WMMA takes dense weights",
    ),
    (
        {
            "variant": MoEVariant.WMMA,
            "x": jnp.ones((T, K), jnp.float16),
            "weight": jnp.ones((E, N, K), jnp.bfloat16),
        },
        TypeError,
        "WMMA takes weights of x's dtype",
    ),
    ({"implementation": "xla"}, ValueError, "implementation is one of None, 'reference'"),
    ({"preferred_element_type": jnp.int8}, TypeError, "preferred_element_type"),
    (
        {"variant": MoEVariant.SCALAR_GGUF, "preferred_element_type": jnp.float16},
        ValueError,
        "preferred_element_type: SCALAR_GGUF gives",
    ),
    ({"preferred_element_type": "junk"}, TypeError, "preferred_element_type is .* not 'junk'"),
    ({"implementation": ["reference"]}, ValueError, "implementation is one of"),
]


@pytest.mark.parametrize(("changes", "error", "message"), GEMM_ERRORS)
def test_moe_gemm(changes, error, message):
    args, kwargs = gemm_arguments(**changes)
    with pytest.raises(error, match=message):
        jax_moe.moe_gemm(*args, **kwargs)
    with pytest.raises(error, match=message):
        jax_moe.select_kernel("moe_gemm", *args, **kwargs)


def ffn_arguments(**changes):
    packed = lambda n, k: oracle.packed("Q8_0", E, n, k)[0]  # noqa: E731
    experts = {"gate": packed(N * 32, K), "up": packed(N * 32, K), "down": packed(K, N * 32)}
    arguments = {
        "x": jnp.ones((T, K)),
        "routing": Routing(jnp.zeros((T, TOP_K), jnp.int32), jnp.ones((T, TOP_K))),
    }
    names = Experts.__dataclass_fields__
    experts |= {name: value for name, value in changes.items() if name in names}
    arguments |= {name: value for name, value in changes.items() if name not in names}
    arguments.setdefault("experts", Experts(**experts))
    return arguments


def routing(ids=(T, TOP_K), weights=(T, TOP_K), ids_dtype=jnp.int32, weights_dtype=jnp.float32):
    return Routing(jnp.zeros(ids, ids_dtype), jnp.ones(weights, weights_dtype))


def situ(betas):
    return {"activation": "situ", "activation_betas": betas}


FFN_ERRORS = [
    ({"x": jnp.ones(K)}, ValueError, "x has 2 axes"),
    ({"x": jnp.ones((T, 32))}, ValueError, "experts.down has .* but x has H = 32"),
    ({"routing": routing(ids=(5, 2))}, ValueError, "routing.expert_ids has shape"),
    ({"routing": routing(weights=(T, 3))}, ValueError, "routing.weights has shape"),
    ({"routing": routing(ids=(T, 0), weights=(T, 0))}, ValueError, "at least 1"),
    ({"routing": routing(ids_dtype=jnp.int8)}, TypeError, "routing.expert_ids has dtype int32"),
    ({"routing": routing(weights_dtype=jnp.int32)}, TypeError, "routing.weights has dtype"),
    ({"experts": 3}, TypeError, "experts is jax_moe.Experts"),
    (
        {"gate_up": oracle.packed("Q8_0", E, N, K)[0]},
        ValueError,
        "gate, up and down, or gate_up",
    ),
    ({"up": None}, ValueError, "gate, up and down, or gate_up"),
    ({"up": oracle.packed("Q8_0", E, N, K)[0]}, ValueError, "experts.up has"),
    ({"gate": oracle.packed("Q8_0", 2, N * 32, K)[0]}, ValueError, "experts.gate has"),
    ({"down_bias": jnp.ones((E, 3))}, ValueError, "experts.down_bias has shape"),
    ({"gate_up_bias": jnp.ones((E, 3))}, ValueError, "experts.gate_up_bias is given without"),
    ({"up_scale": jnp.ones((E, 1))}, ValueError, "experts.up_scale has 1 axes"),
    ({"up_scale": jnp.ones(E, jnp.int32)}, TypeError, "experts.up_scale has dtype"),
    ({"activation": "tanh"}, ValueError, "activation is one of"),
    ({"activation": "relu2"}, ValueError, "without a gate"),
    ({"gate": None}, ValueError, "is gated"),
    ({"activation": "swiglu_clamp"}, ValueError, "needs an activation_limit"),
    ({"activation_limit": 7.0}, ValueError, "takes no activation_limit"),
    (
        {"activation": "swiglu_oai", "activation_limit": 0.0},
        ValueError,
        "activation_limit is positive",
    ),
    ({"activation": "situ"}, ValueError, "activation_betas"),
    ({"activation_betas": (1.0, 1.0)}, ValueError, "activation_betas"),
    ({"variant": MoEVariant.WMMA}, TypeError, "WMMA takes x of"),
    ({"implementation": "cpu"}, ValueError, "implementation is one of"),
    ({"routing": tuple(routing())}, TypeError, "routing is jax_moe.Routing, not tuple"),
    ({"routing": None}, TypeError, "routing is jax_moe.Routing, not NoneType"),
    ({"x": [1.0, 2.0]}, TypeError, "x is an array, not list"),
    ({"activation": ["swiglu"]}, ValueError, "activation is one of .* not \\['swiglu'\\]"),
    ({"activation": "swiglu_clamp", "activation_limit": "7"}, TypeError, "limit is a number"),
    (situ(3.0), TypeError, r"activation_betas is a pair \(beta, linear_beta\), not 3.0"),
    (situ((1.0, 2.0, 3.0)), TypeError, "activation_betas is a pair"),
    (situ((1.0, None)), TypeError, r"activation_betas\[1\] is a number, not None"),
    (situ((0.0, 1.0)), ValueError, r"activation_betas\[0\], beta, is positive, not 0.0"),
    (situ((1.0, -1.0)), ValueError, r"activation_betas\[1\], linear_beta, is positive or 0, not"),
]


@pytest.mark.parametrize(("changes", "error", "message"), FFN_ERRORS)
def test_moe_ffn(changes, error, message):
    with pytest.raises(error, match=message):
        jax_moe.moe_ffn(**ffn_arguments(**changes))
    with pytest.raises(error, match=message):
        jax_moe.select_kernel("moe_ffn", **ffn_arguments(**changes))


def test_more_pairs_than_ids():
    """A batch that vmap folds into the tokens counts too."""
    weight = jax.ShapeDtypeStruct((1, 32, 32), jnp.float32)
    tokens = 2**20
    x = jax.ShapeDtypeStruct((2**11, tokens, 32), jnp.float32)
    ids = jax.ShapeDtypeStruct((2**11, tokens, 1), jnp.int32)
    weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32)

    def batched(x, ids, weights, weight):
        experts = Experts(up=weight, down=weight)
        call = lambda x, i, w: jax_moe.moe_ffn(x, Routing(i, w), experts, activation="silu")  # noqa: E731
        return jax.vmap(call)(x, ids, weights)

    with pytest.raises(ValueError, match=r"2147483648 .* pairs"):
        jax.eval_shape(batched, x, ids, weights, weight)


def test_select_kernel_refuses_more_pairs_than_ids():
    x = jax.ShapeDtypeStruct((2**30, K), jnp.float32)
    ids = jax.ShapeDtypeStruct((2**30, 2), jnp.int32)
    weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
    with pytest.raises(ValueError, match=r"2147483648 .* pairs"):
        jax_moe.select_kernel("moe_ffn", **ffn_arguments(x=x, routing=Routing(ids, weights)))
    pairs = jax.ShapeDtypeStruct((2**31,), jnp.int32)
    args, kwargs = gemm_arguments(x=x, sorted_token_ids=pairs, flat_expert_ids=pairs)
    with pytest.raises(ValueError, match=r"2147483648 .* pairs"):
        jax_moe.select_kernel("moe_gemm", *args, **kwargs)


def test_select_kernel_names_its_ops():
    with pytest.raises(ValueError, match="op is 'moe_gemm' or 'moe_ffn'"):
        jax_moe.select_kernel("moe")


def block_arguments(**changes):
    fields = {
        "experts": Experts(
            up=oracle.packed("Q8_0", E, 32, K)[0], down=oracle.packed("Q8_0", E, K, 32)[0]
        ),
        "router": jnp.ones((E, K)),
    }
    fields |= {
        name: changes.pop(name) for name in list(changes) if name in MoEParams.__dataclass_fields__
    }
    arguments = {
        "params": MoEParams(**fields),
        "x": jnp.ones((2, T, K)),
        "config": block_config(),
    }
    return arguments | changes


def block_config(**fields):
    return MoEConfig(**({"top_k": 2, "activation": "silu", "shared_activation": "silu"} | fields))


def network(experts=1, width=K, **fields):
    return Experts(up=jnp.ones((experts, 32, width)), down=jnp.ones((experts, width, 32)), **fields)


def table(k=2, rows=9, dtype=jnp.int32):
    return {
        "token_to_experts": jnp.zeros((rows, k), dtype),
        "token_ids": jnp.zeros((2, T), jnp.int32),
    }


LATENT = {"latent_down": jnp.ones((1, 32, K)), "latent_up": jnp.ones((1, K, 32))}

# Fields with one axis: what they need beside them, and an element too few.
VECTORS = [
    ("router_bias", {}, E),
    ("selection_bias", {}, E),
    ("selection_bias", table(), E),
    ("router_scale", {}, K),
    ("shared_gate", {"shared": network()}, K),
    ("shared_pre_norm", {"shared": network()}, K),
    ("shared_post_norm", {"shared": network()}, K),
    ("routed_post_norm", {}, K),
    ("latent_norm", {**LATENT, "experts": network(E, 32)}, 32),
]
BAD_VECTORS = [
    (lambda n: jnp.ones(1), ValueError, "has shape"),
    (lambda n: jnp.ones(n + 1), ValueError, "has shape"),
    (lambda n: jnp.ones((1, n)), ValueError, "has 1 axes"),
    (lambda n: jnp.ones((2 * T, 1)), ValueError, "has 1 axes"),
    (lambda n: jnp.ones((2 * T, n)), ValueError, "has 1 axes"),
    (lambda n: jnp.ones(n, jnp.int32), TypeError, "has dtype"),
    (lambda n: 3.0, TypeError, "is an array, not float"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_VECTORS)
@pytest.mark.parametrize(("name", "beside", "length"), VECTORS)
def test_vectors_of_a_block(name, beside, length, make, error, message):
    good = block_arguments(**beside, **{name: jnp.ones(length)})
    config = good.pop("config")
    jax.eval_shape(lambda good: jax_moe.moe_block(**good, config=config), good)
    bad = block_arguments(**beside, **{name: make(length)})
    with pytest.raises(error, match=rf"params\.{name} {message}"):
        jax_moe.moe_block(**bad)


BLOCK_ERRORS = [
    ({"params": {}}, TypeError, "params is jax_moe.MoEParams"),
    ({"config": {}}, TypeError, "config is jax_moe.MoEConfig"),
    ({"router": jnp.ones((E, 7))}, ValueError, r"params.router has shape \[E, H\]"),
    ({"router": jnp.ones((2 * E, K))}, ValueError, "params.router.*experts"),
    ({"router_input": jnp.ones((T, K))}, ValueError, "router_input has x's shape"),
    ({"token_to_experts": jnp.zeros((9, 2), jnp.int32)}, ValueError, "token_ids is needed"),
    ({"config": block_config(top_k=E + 1)}, ValueError, r"config\.top_k is at most"),
    ({"config": block_config(gating="none")}, ValueError, r"config\.gating is one of"),
    ({**table(), "config": block_config(gating="none")}, ValueError, r"config\.gating is one of"),
    ({"config": block_config(top_k=1.0)}, TypeError, r"config\.top_k is an int"),
    ({"config": block_config(num_groups=2)}, ValueError, r"config\.num_groups divides 3"),
    ({"config": block_config(norm_eps=None)}, TypeError, r"config\.norm_eps is a number, not None"),
    ({"config": block_config(scale="2")}, TypeError, r"config\.scale is a number, not '2'"),
    ({"config": block_config(activation="relu3")}, ValueError, r"config\.activation is one of"),
    ({"config": block_config(activation_betas=3.0)}, ValueError, r"config\.activation_betas is"),
    (
        {"config": block_config(activation="swiglu")},
        ValueError,
        r"config\.activation 'swiglu' is gated",
    ),
    (
        {"config": block_config(shared_activation="swiglu"), "shared": network()},
        ValueError,
        r"config\.shared_activation 'swiglu' is gated",
    ),
    ({"x": [1.0, 2.0]}, TypeError, "x is an array, not list"),
    ({"x": jnp.ones((T, K), jnp.int32)}, TypeError, "x has dtype"),
    ({"x": jnp.float32(1)}, ValueError, "x has at least one axis"),
    ({"router_input": [1.0]}, TypeError, "router_input is an array, not list"),
    (
        {"router_input": jnp.ones((2, T, K), jnp.int32)},
        TypeError,
        "router_input has dtype float32",
    ),
    ({**table(), "token_ids": [1, 2]}, TypeError, "token_ids is an array, not list"),
    ({"router": None}, TypeError, "params.router is an array, not NoneType"),
    ({"router": jnp.ones((E, K), jnp.int32)}, TypeError, "params.router has dtype"),
    ({"experts": None}, TypeError, r"params\.experts is jax_moe\.Experts, not NoneType"),
    ({"experts": network(E, 32)}, ValueError, r"params\.experts\.down has .* but x has H = 64"),
    ({"shared": 3}, TypeError, r"params\.shared is jax_moe\.Experts, not int"),
    ({"shared": network(2)}, ValueError, r"params\.shared is one network, E = 1, but has 2"),
    ({"shared": network(1, 32)}, ValueError, r"params\.shared\.down has .* but x has H = 64"),
    (
        {"shared": network(up_bias=jnp.ones((1, 3)))},
        ValueError,
        r"params\.shared\.up_bias has shape",
    ),
    ({"shared_gate": jnp.ones(K)}, ValueError, r"shared_gate is given without params\.shared"),
    ({"shared_pre_norm": jnp.ones(K)}, ValueError, "given without params.shared"),
    ({"shared_post_norm": jnp.ones(K)}, ValueError, "given without params.shared"),
    ({"latent_norm": jnp.ones(K)}, ValueError, "latent_norm is given without params.latent_up"),
    ({"latent_up": LATENT["latent_up"]}, ValueError, "latent_up is given without params.latent_d"),
    ({"latent_down": LATENT["latent_down"]}, ValueError, "latent_down is given without params.lat"),
    (LATENT, ValueError, r"params\.experts\.down has .*latent_down's result has H = 32"),
    (
        {**LATENT, "latent_down": jnp.ones((2, 32, K))},
        ValueError,
        r"params\.latent_down has shape \[1, latent, H\] = \(1, 32, 64\), not \(2, 32, 64\)",
    ),
    (
        {**LATENT, "latent_up": jnp.ones((1, K, K))},
        ValueError,
        r"params\.latent_up has shape \[1, H, latent\] = \(1, 64, 32\), not \(1, 64, 64\)",
    ),
    (table(k=3), ValueError, r"token_to_experts has shape .* config\.top_k = 2 .* not \(9, 3\)"),
    (table(rows=0), ValueError, "token_to_experts has shape"),
    (table(dtype=jnp.float32), TypeError, "params.token_to_experts has dtype int32"),
    ({"chunk_experts": network(2)}, ValueError, r"params\.chunk_experts has 2 experts"),
    ({"chunk_experts": network(3, 32)}, ValueError, r"params\.chunk_experts\.down has"),
    (
        {"chunk_experts": network(3), "config": block_config(experts_per_group=0)},
        ValueError,
        "config.experts_per_group is at least 1",
    ),
    ({"variant": "SCALAR_GGUF"}, TypeError, "variant is a jax_moe.MoEVariant"),
    ({"variant": MoEVariant.WMMA}, TypeError, "WMMA takes x of"),
    (
        {"variant": MoEVariant.SCALAR_GGUF, "experts": network(E)},
        TypeError,
        r"SCALAR_GGUF takes packed weights, but params\.experts\.up is a dense array",
    ),
    ({"implementation": "xla"}, ValueError, "implementation is one of"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BLOCK_ERRORS)
def test_moe_block(changes, error, message):
    with pytest.raises(error, match=message):
        jax_moe.moe_block(**block_arguments(**changes))


def test_float64_of_a_block():
    """Only the reference takes it; otherwise the field is named."""
    with jax.enable_x64(True):
        for name, shape in (("router", (E, K)), ("router_bias", (E,)), ("selection_bias", (E,))):
            fields = {"router": jnp.ones((E, K), jnp.float32), name: jnp.ones(shape, jnp.float64)}
            arguments = block_arguments(x=jnp.ones((T, K), jnp.float32), **fields)
            with pytest.raises(TypeError, match=rf"params\.{name} has dtype .* not float64"):
                jax_moe.moe_block(**arguments)
            jax_moe.moe_block(**arguments, implementation="reference")


@pytest.mark.parametrize("bad", ["Q9_K", "", "F32"])
def test_unknown_format(bad):
    with pytest.raises(ValueError, match="format"):
        PackedExperts(jnp.zeros((1, 1, 18), jnp.uint8), bad)


@pytest.mark.parametrize("bad", [2, None, 1.5])
def test_format_of_a_wrong_type(bad):
    with pytest.raises(TypeError, match="format"):
        PackedExperts(jnp.zeros((1, 1, 18), jnp.uint8), bad)


def test_a_good_call_passes():
    """The tables above change one thing of a call that works."""
    args, kwargs = gemm_arguments()
    assert jax_moe.moe_gemm(*args, **kwargs).shape == (T * TOP_K, N)
    assert jax_moe.moe_ffn(**ffn_arguments()).shape == (T, K)
    assert jax_moe.moe_block(**block_arguments()).shape == (2, T, K)


F32, S32, U8 = np.float32, np.int32, np.uint8
TILED_Q4_K = 12 | TILED_FORMAT


def gemm_call(**changes):
    """Operands, results and attributes of jax_moe_gemm: names to arrays, structs and numbers."""
    call = {
        "x": np.zeros((2, 256), F32),
        "weight": np.zeros((3, 16, 144), U8),
        "sorted_token_ids": np.zeros(4, S32),
        "flat_expert_ids": np.zeros(4, S32),
        "topk_weights": np.zeros(0, F32),
        "weight_aux": np.zeros(0, F32),
        "y": jax.ShapeDtypeStruct((4, 16), F32),
        "workspace": jax.ShapeDtypeStruct((1 << 20,), U8),
        "format": 12,
        "top_k": 2,
        "variant": 0,
    }
    assert call.keys() >= changes.keys()
    return call | changes


def ffn_call(**changes):
    """The same of jax_moe_ffn."""
    weight, absent = np.zeros((3, 256, 144), U8), np.zeros(0, F32)
    call = {
        "x": np.zeros((2, 256), F32),
        "expert_ids": np.zeros((2, 2), S32),
        "weights": np.zeros((2, 2), F32),
        **dict.fromkeys(("gate", "up", "down"), weight),
        **{
            f"{name}_{kind}": absent
            for kind in ("bias", "scale", "aux")
            for name in ("gate", "up", "down")
        },
        "y": jax.ShapeDtypeStruct((2, 256), F32),
        "workspace": jax.ShapeDtypeStruct((1 << 20,), U8),
        **dict.fromkeys(("gate_format", "up_format", "down_format"), 12),
        **dict.fromkeys(("merged", "activation", "weights_before", "variant"), 0),
        **dict.fromkeys(("limit", "beta", "linear_beta"), 0.0),
    }
    assert call.keys() >= changes.keys()
    return call | changes


def run_handler(target, call, without=()):
    """Calls the FFI target past every check of Python's."""
    operands = [v for v in call.values() if isinstance(v, np.ndarray)]
    results = [v for v in call.values() if isinstance(v, jax.ShapeDtypeStruct)]
    attributes = {k: v for k, v in call.items() if isinstance(v, int | float) and k not in without}
    jax.block_until_ready(_ffi.call(target, results, *map(jnp.asarray, operands), **attributes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "weight has unknown format 99"),
        ({"weight": np.zeros((3, 16), U8)}, r"weight has shape \[3, 16\], expected rank 3"),
        ({"weight": np.zeros((3, 16, 144), F32)}, "weight has an element type that is not its"),
        ({"weight": np.zeros((3, 16, 143), U8)}, "rows of 143 bytes, expected a multiple of 144"),
        ({"weight": np.zeros((3, 16, 288), U8)}, "x has rows of 256, weight of 512"),
        ({"format": TILED_Q4_K}, r"weight_aux has shape \[0\], expected \[3, 16, 2\]"),
        ({"weight_aux": np.zeros((3, 16, 2), F32)}, "weight_aux must be absent"),
        ({"top_k": 0}, "top_k is 0, expected at least 1"),
        ({"top_k": 3}, "4 entries, expected a multiple of top_k = 3"),
        ({"x": np.zeros((3, 256), F32)}, r"x has 3 rows, expected 2 \(tokens\) or 4 \(pairs\)"),
        ({"x": np.zeros((2, 256), S32)}, "x must be float32, float16 or bfloat16"),
        ({"sorted_token_ids": np.zeros(4, F32)}, "sorted_token_ids has shape .* of the type"),
        ({"flat_expert_ids": np.zeros(3, S32)}, "flat_expert_ids has shape"),
        ({"topk_weights": np.zeros(3, F32)}, r"topk_weights has shape \[3\], expected \[4\]"),
        ({"y": jax.ShapeDtypeStruct((4, 15), F32)}, r"y has shape \[4, 15\], expected \[4, 16\]"),
        ({"workspace": jax.ShapeDtypeStruct((64,), U8)}, "workspace has 64 bytes, expected"),
        ({"x": np.zeros((2, 256), np.float16), "variant": 1}, "SCALAR_GGUF takes float32 x"),
    ],
)
def test_gemm_handlers_check_too(changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_moe_gemm: .*{message}"):
        run_handler("jax_moe_gemm", gemm_call(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": 10}, "unknown activation 10"),
        ({"activation": 7}, "gate must be given for a gated activation only"),
        ({"merged": 1}, "up must be given unless gate is merged"),
        ({"up_format": -1}, "up must be given unless gate is merged"),
        ({"merged": 1, "up_format": -1}, r"gate is not \[experts, 512, 256\] as down demands"),
        ({"up": np.zeros((2, 256, 144), U8)}, r"up is not \[experts, 256, 256\]"),
        ({"down_format": 98}, "down has unknown format 98"),
        ({"expert_ids": np.zeros(4, S32)}, "expert_ids has shape .* expected rank 2"),
        ({"weights": np.zeros((2, 3), F32)}, "weights has shape"),
        ({"x": np.zeros((2, 255), F32)}, r"x has shape \[2, 255\], expected \[2, 256\]"),
        ({"y": jax.ShapeDtypeStruct((2, 256), np.float16)}, "y has shape .* of the type"),
        ({"up_bias": np.zeros((3, 255), F32)}, "up_bias has shape"),
        ({"down_scale": np.zeros(2, F32)}, "down_scale has shape"),
        ({"gate_aux": np.zeros((3, 256, 2), F32)}, "gate_aux must be absent"),
        ({"workspace": jax.ShapeDtypeStruct((64,), U8)}, "workspace has 64 bytes, expected"),
        (
            {"down": np.zeros((3, 256, 256), F32), "down_format": 0, "variant": 1},
            "SCALAR_GGUF takes packed weights",
        ),
    ],
)
def test_ffn_handlers_check_too(changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_moe_ffn: .*{message}"):
        run_handler("jax_moe_ffn", ffn_call(**changes))


def repack_call(**changes):
    """The same of jax_moe_repack, of IQ1_S, whose blocks grow from 50 to 70 bytes."""
    call = {
        "data": np.zeros((2, 16, 100), U8),
        "tiled": jax.ShapeDtypeStruct((2, 16, 140), U8),
        "aux": jax.ShapeDtypeStruct((2, 16, 2), F32),
        "format": 19,
    }
    assert call.keys() >= changes.keys()
    return call | changes


def unpack_call(**changes):
    """The same of jax_moe_unpack."""
    call = {
        "tiled": np.zeros((2, 16, 140), U8),
        "data": jax.ShapeDtypeStruct((2, 16, 100), U8),
        "format": 19,
    }
    assert call.keys() >= changes.keys()
    return call | changes


# Platforms word it each in a way of their own: what is wrong is named by all.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "unknown format 99"),
        ({"data": np.zeros((32, 100), U8)}, "data|rank"),
        ({"data": np.zeros((2, 16, 100), F32)}, "data|dtype|type"),
        ({"data": np.zeros((2, 15, 100), U8)}, "data .* multiple of 16"),
        ({"data": np.zeros((2, 16, 99), U8)}, "data .* of 50"),
        ({"data": np.zeros((1, 16, 100), U8)}, "tiled"),
        ({"tiled": jax.ShapeDtypeStruct((2, 16, 100), U8)}, "tiled"),
        ({"aux": jax.ShapeDtypeStruct((2, 16, 1), F32)}, "aux"),
    ],
)
def test_repack_handlers_check_too(changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        run_handler("jax_moe_repack", repack_call(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "unknown format 99"),
        ({"tiled": np.zeros((2, 15, 140), U8)}, "tiled"),
        ({"tiled": np.zeros((2, 16, 139), U8)}, "tiled"),
        ({"data": jax.ShapeDtypeStruct((2, 15, 100), U8)}, "data .* multiple of 16"),
        ({"data": jax.ShapeDtypeStruct((2, 16, 50), U8)}, "tiled"),
        ({"data": jax.ShapeDtypeStruct((2, 16, 99), U8)}, "data .* of 50"),
    ],
)
def test_unpack_handlers_check_too(changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        run_handler("jax_moe_unpack", unpack_call(**changes))


def test_handlers_miss_nothing():
    """The calls above change one thing of a call that works; parts may also be missing."""
    run_handler("jax_moe_gemm", gemm_call())
    run_handler("jax_moe_ffn", ffn_call())
    run_handler("jax_moe_repack", repack_call())
    run_handler("jax_moe_unpack", unpack_call())
    for target, call, name in (
        ("jax_moe_gemm", gemm_call(), "top_k"),
        ("jax_moe_ffn", ffn_call(), "limit"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"attribute {name} is missing"):
            run_handler(target, call, without=(name,))
        without_workspace = {k: v for k, v in call.items() if k != "workspace"}
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"operands and 1 results, expected"):
            run_handler(target, without_workspace)


def test_handlers_check_too():
    """The FFI layer does not rely on Python's checks."""
    call = jax.ffi.ffi_call(
        "jax_moe_dequantize", jax.ShapeDtypeStruct((1, 32), jnp.float32), vmap_method=None
    )
    with pytest.raises(Exception, match=r"(?i)format|block|byte"):
        jax.block_until_ready(call(jnp.zeros((1, 18), jnp.uint8), format=np.int32(99)))
    with pytest.raises(Exception, match=r"(?i)format|block|byte"):
        jax.block_until_ready(call(jnp.zeros((1, 17), jnp.uint8), format=np.int32(2)))
