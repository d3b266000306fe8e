"""jax_moe.nnx.MoE: moe_block's results, and what NNX, optax and Orbax do with its variables."""

import dataclasses
import json

import flax_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax_cases import CONFIG, E, F, H, T
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from make_gguf import write_qwen3moe

import jax_moe
from jax_moe.nnx import MoE, PackedParam


@pytest.fixture
def moe():
    return MoE(cases.block(), CONFIG)


def state_paths(state):
    return {".".join(path) for path, _ in nnx.to_flat_state(state)}


def test_it_is_moe_block(moe):
    x = cases.tokens()
    expected = jax_moe.moe_block(cases.block(), x, CONFIG)
    np.testing.assert_array_equal(moe(x), expected)
    np.testing.assert_array_equal(nnx.jit(lambda moe, x: moe(x))(moe, x), expected)
    cases.assert_same(moe.params, cases.block())


def test_arguments_of_a_call():
    x, other, ids = cases.tokens(), cases.tokens(1), jnp.arange(T)
    table = jnp.asarray(np.random.default_rng(0).integers(0, E, (T, 2)), jnp.int32)
    params = cases.block(token_to_experts=table)
    options = {"router_input": other, "token_ids": ids, "implementation": "reference"}
    y = MoE(params, CONFIG)(x, **options)
    np.testing.assert_array_equal(y, jax_moe.moe_block(params, x, CONFIG, **options))
    with pytest.raises(TypeError, match="WMMA takes x"):
        MoE(params, CONFIG)(x, token_ids=ids, variant=jax_moe.MoEVariant.WMMA)


def test_types_of_variables():
    moe = MoE(cases.block(token_to_experts=jnp.zeros((3, 2), jnp.int32)), CONFIG)
    graph, floats, packed = nnx.split(moe, nnx.Param, PackedParam)
    assert state_paths(floats) == {"router", "experts.up", "experts.down_bias"}
    assert state_paths(packed) == {
        "experts.gate.Q4_0",
        "experts.down.Q8_0",
        "shared.gate.Q8_0",
        "shared.up.Q8_0",
        "shared.down.Q8_0",
        "token_to_experts",
    }
    cases.assert_same(nnx.merge(graph, floats, packed).params, moe.params)


def test_a_model_around_it():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(H, rngs=rngs)
            self.moe = MoE(cases.block(), CONFIG)

        def __call__(self, x):
            return x + self.moe(self.norm(x))

    model, x = Block(nnx.Rngs(0)), cases.tokens()
    expected = x + jax_moe.moe_block(cases.block(), model.norm(x), CONFIG)
    np.testing.assert_allclose(nnx.jit(Block.__call__)(model, x), expected, rtol=1e-5, atol=1e-6)
    assert "moe.experts.gate.Q4_0" in state_paths(nnx.state(model, PackedParam))


def test_scan_over_layers():
    layers = [cases.block(seed) for seed in range(3)]
    stacked = MoE(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), CONFIG)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, moe):
        return x + moe(x)

    x = expected = cases.tokens()
    for layer in layers:
        expected = expected + jax_moe.moe_block(layer, expected, CONFIG)
    np.testing.assert_allclose(forward(x, stacked), expected, rtol=1e-5, atol=1e-5)


def test_eval_shape(moe):
    for abstract in (
        nnx.eval_shape(lambda: MoE(cases.block(), CONFIG)),
        MoE(jax.eval_shape(cases.block), CONFIG),
    ):
        assert jax.tree.structure(abstract.params) == jax.tree.structure(moe.params)
        assert abstract.params.experts.gate.shape == (E, F, H)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
        y = nnx.eval_shape(lambda moe, x: moe(x), abstract, cases.tokens())
        assert (y.shape, y.dtype) == ((T, H), jnp.float32)


@pytest.mark.parametrize("prepack", [False, True])
def test_eval_shape_of_a_file(tmp_path, prepack):
    file = jax_moe.GGUFFile(write_qwen3moe(tmp_path / "model.gguf"))
    make = lambda: MoE.from_gguf(file, 1, prepack=prepack, expert_axis="expert")  # noqa: E731
    shapes = jax.eval_shape(lambda: make().params)
    abstract = nnx.eval_shape(make)
    assert abstract.config == make().config
    graph, state = nnx.get_abstract_model(make, cases.expert_mesh())
    for params in (abstract.params, nnx.merge(graph, state).params):
        assert jax.tree.structure(params) == jax.tree.structure(make().params)
        same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)  # noqa: E731
        assert jax.tree.all(jax.tree.map(same, params, shapes))
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(state["experts"])]
    assert set(specs) == {P("expert", None, None)}


def test_training_leaves_packed_weights_alone(moe):
    before = jax.tree.map(jnp.copy, moe.params)
    x, target = cases.tokens(), cases.tokens(1)

    def loss(moe):
        return jnp.mean((moe(x, implementation="reference") - target) ** 2)

    optimizer = nnx.Optimizer(moe, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(moe, optimizer):
        value, gradients = nnx.value_and_grad(loss)(moe)
        optimizer.update(moe, gradients)
        return value, gradients

    first, gradients = step(moe, optimizer)
    assert state_paths(gradients) == {"router", "experts.up", "experts.down_bias"}
    for _ in range(5):
        last, _ = step(moe, optimizer)
    assert last < first
    assert np.abs(moe.params.router - before.router).max() > 1e-3
    cases.assert_same(
        [moe.params.experts.gate, moe.params.experts.down, moe.params.shared],
        [before.experts.gate, before.experts.down, before.shared],
    )


def test_gradients_need_the_reference(moe):
    with pytest.raises(Exception, match='implementation="reference"'):
        nnx.grad(lambda moe: moe(cases.tokens()).sum())(moe)


def test_checkpoint_into_an_abstract_module(moe, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "moe", nnx.state(moe))
        checkpointer.wait_until_finished()
        abstract = MoE(jax.eval_shape(cases.block), CONFIG)
        state = checkpointer.restore(tmp_path / "moe", nnx.state(abstract))
    nnx.update(abstract, state)
    cases.assert_same(abstract.params, cases.block())
    np.testing.assert_array_equal(abstract(cases.tokens()), moe(cases.tokens()))


@pytest.mark.parametrize("pure", [False, True])
def test_checkpoint_without_anything_else(moe, tmp_path, pure):
    """The formats are in the checkpoint; the configuration is written beside it as JSON."""
    state = nnx.to_pure_dict(nnx.state(moe)) if pure else nnx.state(moe)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            tmp_path / "moe",
            ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                config=ocp.args.JsonSave(dataclasses.asdict(CONFIG)),
            ),
        )
        restored = checkpointer.restore(
            tmp_path / "moe",
            ocp.args.Composite(state=ocp.args.StandardRestore(), config=ocp.args.JsonRestore()),
        )
    again = MoE.from_state(restored.state, jax_moe.MoEConfig(**restored.config))
    assert again.config == CONFIG
    cases.assert_same(again.params, cases.block())


def test_from_state(moe):
    state = nnx.state(moe)
    cases.assert_same(MoE.from_state(state, CONFIG).params, moe.params)
    tree = nnx.to_pure_dict(state)
    cases.assert_same(MoE.from_state(tree, CONFIG).params, moe.params)
    for path, node, message in (
        (("experts", "gate"), {"Q9_9": tree["router"]}, r"experts\.gate: .*Q9_9"),
        (("experts", "gate"), {}, r"experts\.gate is an array or"),
        (("experts",), {"up": tree["router"]}, r"experts\.down is missing"),
        (("gates",), tree["router"], "gates is not the name"),
    ):
        bad = nnx.to_pure_dict(state)
        parent = bad if len(path) == 1 else bad[path[0]]
        parent[path[-1]] = node
        with pytest.raises(ValueError, match=message):
            MoE.from_state(bad, CONFIG)


def test_sharding(tmp_path):
    mesh, sharded = cases.expert_mesh(), P("expert", None, None)

    def make():
        return MoE(cases.block(), CONFIG, expert_axis="expert")

    moe = make()
    specs = {
        ".".join(path): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.get_partition_spec(nnx.state(moe)))
    }
    assert specs == {
        "router": P(),
        "experts.gate.Q4_0": sharded,
        "experts.up": sharded,
        "experts.down.Q8_0": sharded,
        "experts.down_bias": P("expert", None),
        "shared.gate.Q8_0": P(),
        "shared.up.Q8_0": P(),
        "shared.down.Q8_0": P(),
    }
    state = nnx.state(moe)
    nnx.update(moe, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
    data = moe.experts.gate["Q4_0"].get_value()
    assert data.addressable_shards[0].data.shape == (1, *data.shape[1:])
    x = jax.device_put(cases.tokens(), NamedSharding(mesh, P()))
    expected = jax_moe.moe_block(cases.block(), cases.tokens(), CONFIG)
    np.testing.assert_allclose(nnx.jit(MoE.__call__)(moe, x), expected, rtol=1e-5, atol=1e-6)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "moe", nnx.state(moe))
        checkpointer.wait_until_finished()
        graph, abstract = nnx.get_abstract_model(make, mesh)
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "moe", abstract))
    assert restored.experts.gate["Q4_0"].get_value().sharding == data.sharding
    cases.assert_same(restored.params, cases.block())


def test_annotations_of_stacked_layers():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cases.block())
    moe = MoE(stacked, CONFIG, expert_axis="expert")
    assert moe.experts.gate["Q4_0"].out_sharding == (None, "expert", None, None)
    assert moe.experts.down_bias.out_sharding == (None, "expert", None)


def test_from_gguf(tmp_path):
    path = write_qwen3moe(tmp_path / "model.gguf")
    file = jax_moe.GGUFFile(path)
    params, config = file.load(1)
    for source in (path, str(path), file):
        moe = MoE.from_gguf(source, 1)
        assert moe.config == config
        cases.assert_same(moe.params, params)
    assert moe.params.experts.up.format.name == "Q4_0"
    assert MoE.from_gguf(file, 1, prepack=True).params.experts.up.layout == "tiled"

    sharding = NamedSharding(cases.expert_mesh(), P("expert"))
    moe = MoE.from_gguf(file, 1, sharding, expert_axis="expert")
    data = moe.experts.up["Q4_0"].get_value()
    assert len(data.sharding.device_set) == E and not data.sharding.is_fully_replicated


def test_from_floats():
    floats = cases.float_block()
    moe = MoE.from_floats(floats, CONFIG, "Q8_0")
    packed = {
        name: jax_moe.quantize(getattr(floats.experts, name), "Q8_0")
        for name in ("gate", "up", "down")
    }
    expected = jax_moe.MoEParams(experts=jax_moe.Experts(**packed), router=floats.router)
    cases.assert_same(moe.params, expected)

    moe = MoE.from_floats(floats, CONFIG, {"experts.up": "Q4_0", "experts.down": "MXFP4"})
    assert state_paths(nnx.state(moe, PackedParam)) == {"experts.up.Q4_0", "experts.down.MXFP4"}
    assert isinstance(moe.experts.gate, nnx.Param)
    with pytest.raises(ValueError, match=r"'experts\.sideways'; the weights here are experts\."):
        MoE.from_floats(floats, CONFIG, {"experts.sideways": "Q4_0"})
    with pytest.raises(ValueError, match=r"params\.experts\.(gate|up|down): weights has rows of K"):
        MoE.from_floats(floats, CONFIG, "Q4_K")
    cases.check_prepacked_from_floats(MoE)


def test_needs_flax():
    assert cases.run_without_flax("import jax_moe") == ""
    message = cases.run_without_flax("import jax_moe.nnx")
    assert message == "ImportError: jax_moe.nnx needs Flax: pip install 'jax_moe[flax]'"


def test_json_configuration():
    config = dataclasses.replace(CONFIG, activation="situ", activation_betas=(1.5, 0.0))
    again = jax_moe.MoEConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config)
