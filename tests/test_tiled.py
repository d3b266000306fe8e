"""The tiled layout of packed experts: its bytes, the way back, and the ops on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiled_oracle
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe
from jax_moe import Experts, MoEConfig, MoEParams, MoEVariant, PackedExperts, Routing, _ffi
from jax_moe._formats import FORMATS
from jax_moe._tree import from_tree, is_trainable, to_tree

E, H, F, T, K = 4, 64, 96, 5, 2

by_format = pytest.mark.parametrize("name", tiled_oracle.FORMATS)


def random_bytes(name, *shape, seed=0):
    """Packed experts [..., N, K] of any bytes, as numpy."""
    *leading, k = shape
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*leading, FORMATS[name].row_bytes(k)), dtype=np.uint8)


def widths(name):
    return [
        k for k in (32, 64, 96, 128, 160, 256, 640, 704, 768) if k % FORMATS[name].block_size == 0
    ]


def experts(seed=0, gate="Q4_0", up="IQ4_NL", down="Q8_0"):
    return Experts(
        gate=oracle.packed(gate, E, F, H, seed)[0],
        up=oracle.packed(up, E, F, H, seed)[0],
        down=oracle.packed(down, E, H, F, seed)[0],
    )


def inputs(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    routing = oracle.random_routing(rng, T, E, K)
    ids = routing.expert_ids.at[0, 1].set(-1).at[2].set(E)
    return oracle.normal(rng, (T, H), dtype), Routing(ids, routing.weights)


def stack(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def gemm(x, weight, routing, **options):
    dispatch = jax_moe.sort_by_expert(routing.expert_ids, weight.shape[0])
    ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
    return jax_moe.moe_gemm(x, weight, *ids, top_k=K, topk_weights=routing.weights, **options)


OPS = {
    "gemm": lambda x, routing, w: gemm(x, w.up, routing),
    "ffn": lambda x, routing, w: jax_moe.moe_ffn(x, routing, w),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def assert_same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


# --- Bytes ---


def test_sizes():
    assert set(tiled_oracle.FORMATS) == set(FORMATS)
    for name, format in FORMATS.items():
        assert _ffi.native().tiled_block_bytes(format.ggml_type) == format.tiled_bytes
        assert (format.tiled_bytes == format.block_bytes) == (name in tiled_oracle.PERMUTED)


@pytest.mark.parametrize("name", tiled_oracle.PERMUTED)
def test_every_bit_of_a_row_goes_to_one_place_and_back(name):
    """Bands with a single bit set: a permutation and its inverse."""
    format, seen = FORMATS[name], set()
    row_bytes = format.row_bytes(widths(name)[0])
    bit = np.arange(8 * row_bytes)
    for row in (0, 11):
        data = np.zeros((len(bit), 16, row_bytes), np.uint8)
        data[bit, row, bit // 8] = 1 << bit % 8
        packed = PackedExperts(jnp.asarray(data), format)
        tiled = packed.prepack()
        ones = np.unpackbits(np.asarray(tiled.data).reshape(len(bit), -1), axis=1)
        assert (ones.sum(axis=1) == 1).all()
        seen |= set(ones.argmax(axis=1))
        assert_same(tiled.unpack().data, data)
    assert len(seen) == 2 * len(bit)


@by_format
def test_bytes_and_the_way_back(name):
    for k in widths(name):
        data = random_bytes(name, 2, 3, 48, k)
        packed = PackedExperts(jnp.asarray(data), name)
        tiled = packed.prepack()
        assert (tiled.layout, tiled.format, tiled.shape) == ("tiled", packed.format, packed.shape)
        assert tiled.aux.shape == (2, 3, 48, 2) and tiled.aux.dtype == jnp.float32
        expected = tiled_oracle.tile(name, data.reshape(6, 48, -1), FORMATS[name].block_bytes)
        assert_same(tiled.data, expected.reshape(*data.shape[:-1], -1))
        back = tiled.unpack()
        assert back.layout is None and back.aux is None
        assert_same(back.data, data)


@by_format
def test_aux(name):
    format, k = FORMATS[name], max(widths(name)[1:3])
    data = [random_bytes(name, 3, 32, k), np.asarray(oracle.packed(name, 3, 32, k)[0].data)]
    data.append(np.zeros_like(data[0]))
    data.append(np.concatenate([data[1][:2], data[0][2:]]))
    if name == "MXFP4":
        data[0][0, :, ::17] = 255  # 2^127: the exponent of r is clamped
        data[2][1] = 255
    for blocks in data:
        weights = _ffi.native().dequantize(format.ggml_type, blocks.reshape(-1, blocks.shape[-1]))
        weights = weights.reshape(*blocks.shape[:2], -1)
        expected = tiled_oracle.aux(name, blocks, format.block_bytes, weights)
        aux = np.asarray(PackedExperts(jnp.asarray(blocks), name).prepack().aux)
        assert_same(aux[..., 0], expected[..., 0])
        usable = np.isfinite(expected[..., 1])
        np.testing.assert_allclose(aux[..., 1][usable], expected[..., 1][usable], rtol=1e-5)
        assert np.isfinite(aux[..., 1]).all()


def test_aux_of_ordinary_weights_normalises_them():
    tiled = oracle.packed("Q4_K", 2, 16, 512)[0].prepack()
    r, bound = np.asarray(tiled.aux)[..., 0], np.asarray(tiled.aux)[..., 1]
    assert (np.log2(r) % 1 == 0).all()
    norms = np.linalg.norm(np.asarray(tiled.dequantize(), np.float64), axis=-1)
    assert (norms <= bound).all() and (bound <= 1.01 * norms.max(axis=1, keepdims=True)).all()


@by_format
def test_dequantize(name):
    packed, exact = oracle.packed(name, 2, 32, widths(name)[-1])
    assert_same(packed.prepack().dequantize(), exact.astype(np.float32))
    assert_same(jax.jit(lambda w: w.prepack().dequantize())(packed), exact.astype(np.float32))


def test_what_stays_as_it_is():
    packed = PackedExperts(jnp.asarray(random_bytes("Q4_0", 1, 24, 64)), "Q4_0")
    assert packed.prepack() is packed and packed.unpack() is packed
    tiled = oracle.packed("Q4_0", 1, 16, 64)[0].prepack()
    assert tiled.prepack() is tiled


def test_no_experts():
    packed = PackedExperts(jnp.zeros((0, 16, 18), jnp.uint8), "Q4_0")
    assert packed.prepack().unpack().data.shape == (0, 16, 18)


@pytest.mark.parametrize("shape", [(2, 0, 18), (2, 16, 0), (2, 0, 0)])
def test_no_weights(shape):
    packed = PackedExperts(jnp.zeros(shape, jnp.uint8), "Q4_0")
    assert packed.prepack() is packed
    tiled = PackedExperts(packed.data, "Q4_0", "tiled", jnp.zeros((*shape[:-1], 2)))
    assert tiled.unpack().data.shape == shape


# --- Donation, devices, transforms of prepack ---


def test_donation():
    data = random_bytes("Q4_K", 2, 16, 256)
    packed = PackedExperts(jnp.asarray(data), "Q4_K")
    tiled = packed.prepack(donate=True)
    assert packed.data.is_deleted() and not tiled.data.is_deleted()
    back = tiled.unpack(donate=True)
    assert tiled.data.is_deleted()
    assert_same(back.data, data)
    with pytest.raises(ValueError, match="donate"):
        jax.jit(lambda w: w.prepack(donate=True))(back)


def test_experts():
    w = jax.tree.map(jnp.copy, experts())
    shared = dataclasses.replace(w, gate=w.up, down=w.down.dequantize(), up_bias=jnp.ones((E, F)))
    kept = np.asarray(w.up.data)
    tiled = shared.prepack(donate=True)
    assert tiled.gate.layout == tiled.up.layout == "tiled" and w.up.data.is_deleted()
    assert tiled.down is shared.down and tiled.up_bias is shared.up_bias
    assert_same(tiled.unpack().up.data, kept)


def test_prepack_under_vmap_and_jit():
    layers = [oracle.packed("Q5_K", 2, 32, 256, seed)[0] for seed in range(3)]
    stacked = stack(*layers)
    expected = stacked.prepack()
    for got in (jax.vmap(lambda w: w.prepack())(stacked), jax.jit(lambda w: w.prepack())(stacked)):
        jax.tree.map(assert_same, got, expected)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: assert_same(a[1], b), expected, layers[1].prepack())
    assert_same(jax.vmap(lambda w: w.unpack())(expected).data, stacked.data)
    shapes = jax.eval_shape(lambda w: w.prepack(), stacked)
    assert shapes.aux.shape == (3, 2, 32, 2) and shapes.layout == "tiled"


@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P("d", None, None), P()])
def test_prepack_of_a_sharded_array(spec):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    packed = oracle.packed("Q8_0", 4, 64, 96)[0]
    expected = packed.prepack()
    placed = jax.device_put(packed, NamedSharding(mesh, spec))
    tiled = placed.prepack()
    jax.tree.map(assert_same, tiled, expected)
    shard = tiled.data.sharding.shard_shape(tiled.data.shape)
    assert shard == placed.data.sharding.shard_shape(placed.data.shape)
    assert_same(tiled.unpack().data, packed.data)


@pytest.mark.parametrize("spec, n", [(P(None, None, "d"), 64), (P(None, "d"), 32)])
def test_prepack_of_shards_without_whole_bands(spec, n):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    packed = oracle.packed("Q8_0", 2, n, 256)[0]
    placed = jax.device_put(packed, NamedSharding(mesh, spec))
    with pytest.raises(ValueError, match="whole rows"):
        placed.prepack()


# --- The ops ---


@by_format
@pytest.mark.parametrize(
    "dtype, variant",
    [
        ("float32", None),
        ("bfloat16", None),
        ("float32", MoEVariant.SCALAR_GGUF),
        ("float16", MoEVariant.WMMA_GGUF),
    ],
)
def test_gemm(name, dtype, variant):
    packed, _ = oracle.packed(name, 3, 32, widths(name)[-1])
    rng = np.random.default_rng(0)
    routing = oracle.random_routing(rng, T, 3, K)
    x = oracle.normal(rng, (T, packed.shape[2]), dtype)
    for options in ({"variant": variant}, {"variant": variant, "implementation": "reference"}):
        tiled = gemm(x, packed.prepack(), routing, **options)
        assert_same(tiled, gemm(x, packed, routing, **options))


@pytest.mark.parametrize("tiled", [("gate",), ("up", "down"), ("gate", "up", "down")])
@pytest.mark.parametrize("variant", [None, MoEVariant.SCALAR_GGUF])
def test_ffn_of_any_mixture(tiled, variant):
    w, (x, routing) = experts(), inputs()
    mixed = dataclasses.replace(w, **{name: getattr(w, name).prepack() for name in tiled})
    for implementation in (None, "reference"):
        options = {"variant": variant, "implementation": implementation}
        expected = jax_moe.moe_ffn(x, routing, w, **options)
        assert_same(jax_moe.moe_ffn(x, routing, mixed, **options), expected)


def test_ffn_with_a_dense_weight_and_merged():
    x, routing = inputs()
    both = oracle.packed("Q4_0", E, 2 * F, H)[0]
    w = Experts(gate_up=both, down=oracle.packed("Q8_0", E, H, F)[0].dequantize())
    assert_same(jax_moe.moe_ffn(x, routing, w.prepack()), jax_moe.moe_ffn(x, routing, w))


def test_block():
    rng = np.random.default_rng(1)
    params = MoEParams(
        experts=experts(),
        router=oracle.normal(rng, (E, H)),
        shared=jax.tree.map(lambda leaf: leaf[:1], experts(3)),
    )
    tiled = params.prepack()
    assert tiled.experts.gate.layout == tiled.shared.down.layout == "tiled"
    x = oracle.normal(rng, (2, T, H))
    block = jax.jit(lambda p, x: jax_moe.moe_block(p, x, MoEConfig(top_k=K)))
    assert_same(block(tiled, x), block(params, x))


def test_prepack_of_a_block():
    """Every packed weight that has a tiled layout; an array that is in two places is still one."""
    w = jax.tree.map(jnp.copy, experts())
    one = jax.tree.map(lambda leaf: leaf[:1], experts(3))
    params = MoEParams(
        experts=dataclasses.replace(w, down=w.down.dequantize()),
        router=jnp.ones((E, H)),
        shared=one,
        chunk_experts=dataclasses.replace(w, down=PackedExperts(w.down.data[:, :24], "Q8_0")),
        latent_down=oracle.packed("Q4_0", 1, 32, H)[0],
        latent_up=oracle.packed("Q4_0", 1, H, 32)[0],
    )
    kept = jax.tree.map(np.asarray, params)
    tiled = params.prepack(donate=True)
    assert w.gate.data.is_deleted() and params.latent_up.data.is_deleted()
    assert tiled.experts.gate.data is tiled.chunk_experts.gate.data
    assert tiled.experts.down is params.experts.down and tiled.router is params.router
    assert tiled.chunk_experts.down.layout is None
    for weight in (tiled.experts.up, tiled.shared.up, tiled.latent_down, tiled.latent_up):
        assert weight.layout == "tiled"
    jax.tree.map(assert_same, tiled.unpack(donate=True), kept)
    assert tiled.latent_up.data.is_deleted()


@pytest.mark.parametrize("axes", [(0, None, None), (None, None, 0), (0, 0, 0)])
def test_vmap(op, axes):
    values = [[inputs(s)[0] for s in range(3)], [inputs(s)[1] for s in range(3)]]
    values.append([experts(s) for s in range(3)])
    batched = [stack(*v) if a == 0 else v[0] for v, a in zip(values, axes, strict=True)]
    batched[2] = batched[2].prepack()
    y = jax.jit(jax.vmap(op, in_axes=axes))(*batched)
    for b in range(3):
        close(y[b], op(*(v[b] if a == 0 else v[0] for v, a in zip(values, axes, strict=True))))


def test_vmap_where_aux_alone_has_no_batch_axis():
    x, routing = inputs()
    w = [oracle.packed("Q4_0", E, F, H, seed)[0].prepack() for seed in range(2)]
    data, aux = jnp.stack([w[0].data, w[1].data]), w[0].aux

    def f(data):
        return gemm(x, PackedExperts(data, "Q4_0", "tiled", aux), routing)

    y = jax.vmap(f)(data)
    for b in range(2):
        close(y[b], gemm(x, w[b], routing))


def test_scan_over_stacked_layers():
    layers = [experts(s) for s in range(3)]
    x, routing = inputs()

    def step(x, layer):
        return x + jax_moe.moe_ffn(x, routing, layer), None

    expected = x
    for layer in layers:
        expected = step(expected, layer)[0]
    stacked = stack(*layers).prepack()
    close(jax.jit(lambda x, w: jax.lax.scan(step, x, w)[0])(x, stacked), expected)


def test_remat_and_eval_shape(op):
    x, routing = inputs()
    w = experts().prepack()
    y = op(x, routing, experts())
    close(jax.jit(jax.checkpoint(op))(x, routing, w), y)
    shapes = jax.eval_shape(op, x, routing, w)
    assert (shapes.shape, shapes.dtype) == (y.shape, y.dtype)


def test_gradient_of_the_reference():
    x, routing = inputs()

    def loss(x, w):
        return (jax_moe.moe_ffn(x, routing, w, implementation="reference") ** 2).sum()

    expected = jax.grad(loss)(x, experts())
    close(jax.grad(loss)(x, experts().prepack()), expected)
    close(jax.jit(jax.grad(loss))(x, experts().prepack()), expected)


def test_grad_names_the_reference(op):
    x, routing = inputs()
    with pytest.raises(NotImplementedError, match='implementation="reference"'):
        jax.grad(lambda x: op(x, routing, experts().prepack()).sum())(x)


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")])
def test_export(op, platforms):
    pytest.importorskip("flatbuffers")
    x, routing = inputs()
    w = experts().prepack()
    exported = export.export(
        jax.jit(op), platforms=platforms, disabled_checks=jax_moe.DISABLED_EXPORT_CHECKS
    )(x, routing, w)
    again = export.deserialize(exported.serialize())
    close(again.call(x, routing, w), op(x, routing, experts()))


def test_what_is_lowered_for_a_platform(op):
    """CUDA's kernels are given the tiled bytes; elsewhere they are unpacked."""
    x, routing = inputs()
    traced = jax.jit(op).trace(x, routing, experts().prepack())
    cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    up = 0x10000 | FORMATS["IQ4_NL"].ggml_type
    assert f"format = {up} : i32" in cuda and "jax_moe_unpack" not in cuda
    cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert f"format = {up} : i32" not in cpu and "jax_moe_unpack" in cpu


def test_expert_parallelism(op):
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    x, routing = inputs()

    def local(x, ids, weights, w):
        here = ids - jax.lax.axis_index("expert") * w.down.shape[0]
        return jax.lax.psum(op(x, Routing(here, weights), w), "expert")

    specs = P(), P(), P(), P("expert")
    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
    close(split(x, *routing, experts().prepack()), op(x, routing, experts()))


def test_prepack_inside_shard_map():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    w = oracle.packed("Q4_0", E, F, H)[0]
    specs = {"in_specs": P("expert"), "out_specs": P("expert")}
    tiled = jax.jit(jax.shard_map(lambda w: w.prepack(), mesh=mesh, **specs))(w)
    jax.tree.map(assert_same, tiled, w.prepack())


def test_select_kernel():
    x, routing = inputs()
    w = experts()
    for platform in ("cpu", "cuda"):
        plain, tiled = (
            jax_moe.select_kernel("moe_ffn", x, routing, e, platform=platform)
            for e in (w, w.prepack())
        )
        assert plain.error_bound == tiled.error_bound
        if platform == "cpu":
            assert plain == tiled


def test_tree_names_the_layout_and_trains_nothing_packed():
    params = MoEParams(experts=experts().prepack(), router=jnp.ones((E, H)))
    tree = to_tree(params)
    assert set(tree["experts"]["up"]) == {"IQ4_NL_tiled", "aux"}
    assert [leaf.dtype for leaf in jax.tree.leaves(tree) if is_trainable(leaf)] == [jnp.float32]
    back = from_tree(tree)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(assert_same, back, params)
    shapes = jax.eval_shape(lambda: params)
    assert from_tree(to_tree(shapes)).experts.up.aux.dtype == jnp.float32
    del tree["experts"]["up"]["aux"]
    with pytest.raises(ValueError, match=r"experts\.up has aux"):
        from_tree(tree)


# --- Bad input ---


def test_errors():
    x, routing = inputs()
    w = oracle.packed("Q4_0", E, F, H)[0].prepack()
    cases = [
        ({"aux": None}, ValueError, "weight is tiled but has no aux"),
        ({"aux": w.aux[:, :-1]}, ValueError, r"weight.aux has shape \[..., E, N, 2\]"),
        ({"aux": w.aux.astype(jnp.bfloat16)}, TypeError, "weight.aux has dtype float32"),
        ({"layout": None}, ValueError, "weight.aux is for the tiled layout"),
        ({"data": w.data[:, :24], "aux": w.aux[:, :24]}, ValueError, "multiple of 16"),
        ({"format": "IQ2_XXS"}, ValueError, "102 bytes of a tiled IQ2_XXS block"),
    ]
    for changes, error, message in cases:
        bad = dataclasses.replace(w, **changes)
        for implementation in (None, "reference"):
            with pytest.raises(error, match=message):
                gemm(x, bad, routing, implementation=implementation)
        if changes != {"layout": None}:
            with pytest.raises(error, match=message.replace("weight", "self")):
                bad.dequantize()
    with pytest.raises(ValueError, match="layout is None or 'tiled'"):
        PackedExperts(w.data, "Q4_0", "wide")
    for data in (w.data.astype(jnp.int8), jax.ShapeDtypeStruct(w.data.shape, jnp.uint8), [1]):
        with pytest.raises(TypeError, match=r"self\.data is an array of uint8"):
            PackedExperts(data, "Q4_0").prepack()
        with pytest.raises(TypeError, match=r"self\.data is an array of uint8"):
            PackedExperts(data, "Q4_0", "tiled", w.aux).unpack()
    with pytest.raises(ValueError, match="19 bytes"):
        PackedExperts(jnp.zeros((1, 16, 19), jnp.uint8), "Q4_0").prepack()


# --- Flax ---


def block():
    rng = np.random.default_rng(2)
    return MoEParams(experts=experts(), router=oracle.normal(rng, (E, H))), MoEConfig(top_k=K)


def tiled_block():
    params, config = block()
    return dataclasses.replace(params, experts=params.experts.prepack()), config


def test_nnx():
    nnx = pytest.importorskip("flax.nnx")
    from jax_moe.nnx import MoE, PackedParam

    x = inputs()[0]
    moe = MoE(*tiled_block(), expert_axis="expert")
    assert_same(moe(x), MoE(*block())(x))
    assert set(nnx.state(moe, nnx.Param)) == {"router"}
    assert isinstance(moe.experts["up"]["aux"], PackedParam)
    restored = MoE.from_state(nnx.state(moe), moe.config)
    jax.tree.map(assert_same, restored.params, moe.params)

    def loss(moe):
        return (moe(x, implementation="reference") ** 2).sum()

    gradient = nnx.grad(loss)(moe)
    close(gradient["router"].get_value(), nnx.grad(loss)(MoE(*block()))["router"].get_value())


def test_linen():
    pytest.importorskip("flax.linen")
    from jax_moe.linen import MoE

    x = inputs()[0]
    moe = MoE(*tiled_block(), expert_axis="expert")
    variables = moe.init(jax.random.key(0), x)
    assert set(variables["params"]) == {"router"}
    expected = MoE(*block()).apply(MoE(*block()).init(jax.random.key(0), x), x)
    assert_same(moe.apply(variables, x), expected)
    again = MoE.from_variables(variables, moe.config)
    assert_same(again.apply(variables, x), expected)
