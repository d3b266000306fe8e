"""jax_moe.linen.MoE: moe_block's results, and what Linen, optax and Orbax do with its variables."""

import flax_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax_cases import CONFIG, E, H, T
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from make_gguf import write_qwen3moe

import jax_moe
from jax_moe.linen import MoE

KEY = jax.random.key(0)


def paths(tree):
    return {".".join(entry.key for entry in path) for path, _ in jax.tree.leaves_with_path(tree)}


def init(params, **attributes):
    moe = MoE(params, CONFIG, **attributes)
    return moe, moe.init(KEY, cases.tokens())


def test_it_is_moe_block():
    moe, variables = init(cases.block())
    x = cases.tokens(1)
    expected = jax_moe.moe_block(cases.block(), x, CONFIG)
    np.testing.assert_array_equal(moe.apply(variables, x), expected)
    np.testing.assert_array_equal(jax.jit(moe.apply)(variables, x), expected)


def test_arguments_of_a_call():
    x, other, ids = cases.tokens(), cases.tokens(1), jnp.arange(T)
    table = jnp.asarray(np.random.default_rng(0).integers(0, E, (T, 2)), jnp.int32)
    params = cases.block(token_to_experts=table)
    options = {"router_input": other, "token_ids": ids, "implementation": "reference"}
    y, _ = MoE(params, CONFIG).init_with_output(KEY, x, **options)
    np.testing.assert_array_equal(y, jax_moe.moe_block(params, x, CONFIG, **options))
    with pytest.raises(TypeError, match="WMMA takes x"):
        MoE(params, CONFIG).init(KEY, x, token_ids=ids, variant=jax_moe.MoEVariant.WMMA)


def test_collections():
    moe = MoE(cases.block(token_to_experts=jnp.zeros((3, 2), jnp.int32)), CONFIG)
    variables = moe.init(KEY, cases.tokens(), token_ids=jnp.zeros(T, jnp.int32))
    assert variables.keys() == {"params", "packed"}
    assert paths(variables["params"]) == {"router", "experts.up", "experts.down_bias"}
    assert paths(variables["packed"]) == {
        "experts.gate.Q4_0",
        "experts.down.Q8_0",
        "shared.gate.Q8_0",
        "shared.up.Q8_0",
        "shared.down.Q8_0",
        "token_to_experts",
    }
    assert variables["packed"]["experts"]["gate"]["Q4_0"] is moe.params.experts.gate.data


def test_abstract_params():
    moe, abstract = MoE(jax.eval_shape(cases.block), CONFIG), jax.eval_shape(cases.block)
    assert hash(moe) == hash(MoE(abstract, CONFIG)) and moe == MoE(abstract, CONFIG)
    _, variables = init(cases.block())
    shapes = jax.eval_shape(moe.init, KEY, cases.tokens())
    assert shapes == jax.eval_shape(lambda: variables)
    assert not any(leaf.any() for leaf in jax.tree.leaves(moe.init(KEY, cases.tokens())))
    y = jax_moe.moe_block(cases.block(), cases.tokens(), CONFIG)
    np.testing.assert_array_equal(moe.apply(variables, cases.tokens()), y)


@pytest.mark.parametrize("transform", [nn.jit, nn.remat])
def test_a_model_around_it(transform):
    class Block(nn.Module):
        moe: jax_moe.MoEParams

        @nn.compact
        def __call__(self, x):
            return x + transform(MoE)(self.moe, CONFIG, name="moe")(nn.RMSNorm(name="norm")(x))

    x = cases.tokens()
    variables = Block(jax.eval_shape(cases.block)).init(KEY, x)
    _, loaded = init(cases.block())
    for collection, values in loaded.items():
        variables[collection]["moe"] = values
    y = jax.jit(Block(jax.eval_shape(cases.block)).apply)(variables, x)
    normed = nn.RMSNorm().apply({"params": variables["params"]["norm"]}, x)
    expected = x + jax_moe.moe_block(cases.block(), normed, CONFIG)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_scan_over_layers():
    layers = [cases.block(seed) for seed in range(3)]

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + MoE(jax.eval_shape(cases.block), CONFIG, name="moe")(x), None

    model = nn.scan(
        Layer, variable_axes={"params": 0, "packed": 0}, split_rngs={"params": True}, length=3
    )()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(init(layer)[1] for layer in layers))
    x = expected = cases.tokens()
    for layer in layers:
        expected = expected + jax_moe.moe_block(layer, expected, CONFIG)
    y, _ = model.apply({name: {"moe": values} for name, values in stacked.items()}, x, None)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_training_the_collection_params():
    moe, variables = init(cases.block())
    x, target = cases.tokens(), cases.tokens(1)
    optimizer = optax.adamw(1e-2)

    def loss(params):
        y = moe.apply(variables | {"params": params}, x, implementation="reference")
        return jnp.mean((y - target) ** 2)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    params, losses = variables["params"], []
    state = optimizer.init(params)
    for _ in range(5):
        value, params, state = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert np.abs(params["router"] - variables["params"]["router"]).max() > 1e-3


def test_checkpoint(tmp_path):
    moe, variables = init(cases.block())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "moe", variables)
        checkpointer.wait_until_finished()
        abstract = MoE(jax.eval_shape(cases.block), CONFIG)
        target = jax.eval_shape(abstract.init, KEY, cases.tokens())
        cases.assert_same(checkpointer.restore(tmp_path / "moe", target), variables)
        alone = checkpointer.restore(tmp_path / "moe")  # with nothing that says what it holds
    cases.assert_same(alone, variables)
    again = MoE.from_variables(alone, CONFIG)
    assert again == abstract
    np.testing.assert_array_equal(
        again.apply(alone, cases.tokens()), moe.apply(variables, cases.tokens())
    )


def test_from_variables_names_what_is_wrong():
    _, variables = init(cases.block())
    with pytest.raises(ValueError, match="router is missing"):
        MoE.from_variables({"packed": variables["packed"]}, CONFIG)
    extra = {"params": variables["params"] | {"gates": variables["params"]["router"]}}
    with pytest.raises(ValueError, match="gates is not the name"):
        MoE.from_variables(variables | extra, CONFIG)


def test_sharding():
    mesh, sharded = cases.expert_mesh(), P("expert", None, None)
    moe, variables = init(cases.block(), expert_axis="expert")
    specs = nn.get_partition_spec(variables)
    assert specs["params"] == {
        "router": P(),
        "experts": {"up": sharded, "down_bias": P("expert", None)},
    }
    assert specs["packed"]["experts"] == {"gate": {"Q4_0": sharded}, "down": {"Q8_0": sharded}}
    assert specs["packed"]["shared"]["gate"] == {"Q8_0": P()}

    x, expected = cases.tokens(), jax_moe.moe_block(cases.block(), cases.tokens(), CONFIG)
    np.testing.assert_array_equal(moe.apply(variables, x), expected)
    placed = jax.device_put(nn.unbox(variables), nn.get_sharding(variables, mesh))
    data = placed["packed"]["experts"]["gate"]["Q4_0"]
    assert data.addressable_shards[0].data.shape == (1, *data.shape[1:])
    x = jax.device_put(x, NamedSharding(mesh, P()))
    np.testing.assert_allclose(jax.jit(moe.apply)(placed, x), expected, rtol=1e-5, atol=1e-6)
    assert MoE.from_variables(variables, CONFIG) == MoE(jax.eval_shape(cases.block), CONFIG)


def test_from_gguf(tmp_path):
    path = write_qwen3moe(tmp_path / "model.gguf")
    file = jax_moe.GGUFFile(path)
    params, config = file.load(1)
    for source in (path, str(path), file):
        moe = MoE.from_gguf(source, 1)
        assert moe.config == config
        cases.assert_same(moe.params, params)
    variables = moe.init(KEY, cases.tokens())
    assert paths(variables["packed"]) == {
        "experts.gate.Q8_0",
        "experts.up.Q4_0",
        "experts.down.Q5_1",
    }
    y = jax_moe.moe_block(params, cases.tokens(), config)
    np.testing.assert_array_equal(moe.apply(variables, cases.tokens()), y)
    assert MoE.from_gguf(file, 1, prepack=True).params.experts.up.layout == "tiled"


def test_from_floats():
    moe = MoE.from_floats(cases.float_block(), CONFIG, {"experts.up": "Q4_0"}, expert_axis="e")
    assert moe.expert_axis == "e"
    up = jax_moe.quantize(cases.float_block().experts.up, "Q4_0")
    cases.assert_same(moe.params.experts.up, up)
    assert moe.params.experts.gate.shape == (E, cases.F, H)
    _, variables = init(MoE.from_floats(cases.float_block(), CONFIG, "Q8_0").params)
    assert paths(variables["params"]) == {"router"}
    cases.check_prepacked_from_floats(MoE)


def test_needs_flax():
    message = cases.run_without_flax("import jax_moe.linen")
    assert message == "ImportError: jax_moe.linen needs Flax: pip install 'jax_moe[flax]'"
