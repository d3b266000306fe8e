"""moe_block and the Flax modules with experts sharded over four devices, against one device."""

import dataclasses
import functools

import flax_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architecture_models import MODELS, VOCABULARY, H
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe
import jax_moe.linen
import jax_moe.nnx

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")

T = 5

# One of each structure: what a block may have besides experts, and every kind of router.
STRUCTURES = (
    "qwen3moe",
    "qwen3moe, scales",
    "qwen2moe",
    "gpt-oss",
    "gemma4",
    "deepseek2 as V2",
    "deepseek2 as V3",
    "glm4moe",
    "deepseek2, merged",
    "llama4",
    "granite_swa",
    "nemotron_h_moe",
    "kimi-k3",
    "grovemoe",
    "deepseek4",
)


def make_mesh(**axes):
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


EVERYWHERE = P()


def sharded(params, config, mesh, x, inputs=None, *, tokens=EVERYWHERE, axis="expert", **options):
    """moe_block inside shard_map; tokens are on all devices unless `tokens` says otherwise."""

    def local(params, x, inputs):
        return jax_moe.moe_block(params, x, config, expert_axis=axis, **inputs, **options)

    specs = (params.partition_specs(axis), tokens, tokens)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens)
    return jax.jit(run)(params, x, inputs or {})


def inputs_of(params, config, seed=0):
    rng = np.random.default_rng(seed)
    x, other = jnp.asarray(rng.standard_normal((2, T, H)), jnp.float32)
    inputs = {}
    if config.router_reads != "x":
        inputs["router_input"] = other
    if params.token_to_experts is not None:
        inputs["token_ids"] = jnp.asarray(rng.integers(0, VOCABULARY, T))
    return x, inputs


def close(y, expected, bound=2e-6):
    y, expected = (np.asarray(a, np.float64) for a in (y, expected))
    assert np.linalg.norm(y - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("name", STRUCTURES)
def test_architectures(name, tmp_path):
    file = jax_moe.GGUFFile(MODELS[name].write(tmp_path / "model.gguf"))
    mesh = make_mesh(expert=4)
    for layer in file.layers:
        params, config = file.load(layer.index)
        x, inputs = inputs_of(params, config)
        expected = jax_moe.moe_block(params, x, config, **inputs)
        shares, _ = file.load(layer.index, NamedSharding(mesh, P("expert")))
        assert shares.experts.down_bias is None or len(shares.experts.down_bias.devices()) == 4
        close(sharded(shares, config, mesh, x, inputs), expected)


def test_pure_jax_and_its_gradient():
    params, x = cases.float_block(), cases.tokens()

    def loss(call):
        return jax.value_and_grad(lambda x: (call(x) ** 2).sum())(x)

    options = {"implementation": "reference"}
    mesh = make_mesh(expert=4)
    expected = loss(lambda x: jax_moe.moe_block(params, x, cases.CONFIG, **options))
    y = loss(lambda x: sharded(params, cases.CONFIG, mesh, x, **options))
    jax.tree.map(functools.partial(close, bound=1e-5), y, expected)


def test_tokens_over_another_axis():
    params, x = cases.block(), jnp.concatenate([cases.tokens(), cases.tokens(1)])
    expected = jax_moe.moe_block(params, x, cases.CONFIG)
    y = sharded(params, cases.CONFIG, make_mesh(data=2, expert=2), x, tokens=P("data"))
    close(y, expected)


def test_experts_over_two_axes():
    params, x = cases.block(), cases.tokens()
    y = sharded(params, cases.CONFIG, make_mesh(a=2, b=2), x, axis=("a", "b"))
    close(y, jax_moe.moe_block(params, x, cases.CONFIG))


def test_tiled_weights():
    mesh = make_mesh(expert=4)
    params, x = cases.block(), cases.tokens()
    specs = params.partition_specs("expert")
    placed = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), params, specs)
    tiled = dataclasses.replace(placed, experts=placed.experts.prepack())
    assert tiled.experts.gate.layout == "tiled"
    y = sharded(tiled, cases.CONFIG, mesh, x)
    close(y, jax_moe.moe_block(params, x, cases.CONFIG))


def test_partial_sums_are_added_in_float32():
    """bfloat16's accuracy holds for the sum of the devices' results too."""
    params, x = cases.block(), cases.tokens().astype(jnp.bfloat16)
    exact = jax_moe.moe_block(params, x.astype(jnp.float32), cases.CONFIG)
    y = sharded(params, cases.CONFIG, make_mesh(expert=4), x)
    assert y.dtype == jnp.bfloat16
    close(y, exact, bound=4e-3)  # two roundings of bfloat16 on the way, and the shared expert's


def test_errors():
    params, x, mesh = cases.block(), cases.tokens(), make_mesh(expert=4)
    with pytest.raises(ValueError, match="'expert' is none"):
        jax_moe.moe_block(params, x, cases.CONFIG, expert_axis="expert")
    with pytest.raises(ValueError, match="x, or router_input, differs between the devices of exp"):
        four = jnp.concatenate([x[:4], x[:4]])
        sharded(params, cases.CONFIG, mesh, four, tokens=P("expert"))
    with pytest.raises(ValueError, match="has 16 experts, 4 on each device of 'expert'"):
        jax.shard_map(
            lambda params, x: jax_moe.moe_block(params, x, cases.CONFIG, expert_axis="expert"),
            mesh=mesh,
            in_specs=(P(), P()),
            out_specs=P(),
        )(params, x)
    with pytest.raises(ValueError, match=r"params.experts has 1 experts\."):
        jax.shard_map(
            lambda params, x: jax_moe.moe_block(params, x, cases.CONFIG),
            mesh=mesh,
            in_specs=(params.partition_specs("expert"), P()),
            out_specs=P(),
        )(params, x)


class NnxModel(nnx.Module):
    def __init__(self, params):
        self.norm = nnx.RMSNorm(cases.H, rngs=nnx.Rngs(0))
        self.moe = jax_moe.nnx.MoE(params, cases.CONFIG, expert_axis="expert")

    def __call__(self, x):
        return x + self.moe(self.norm(x))


def test_nnx():
    model, x, mesh = NnxModel(cases.block()), cases.tokens(), make_mesh(expert=4)
    expected = model(x)  # outside shard_map the module is whole
    graph, state = nnx.split(model)
    specs = nnx.get_partition_spec(state)
    run = jax.shard_map(
        lambda state, x: nnx.merge(graph, state)(x),
        mesh=mesh,
        in_specs=(specs, P()),
        out_specs=P(),
    )
    placed = jax.device_put(state, nnx.get_named_sharding(state, mesh))
    close(jax.jit(run)(placed, x), expected)

    params = cases.block()  # without annotations a call names the axis
    run = jax.shard_map(
        lambda params, x: jax_moe.nnx.MoE(params, cases.CONFIG)(x, expert_axis="expert"),
        mesh=mesh,
        in_specs=(params.partition_specs("expert"), P()),
        out_specs=P(),
    )
    close(jax.jit(run)(params, x), jax_moe.moe_block(params, x, cases.CONFIG))


class LinenModel(nn.Module):
    params: jax_moe.MoEParams

    @nn.compact
    def __call__(self, x):
        moe = jax_moe.linen.MoE(self.params, cases.CONFIG, expert_axis="expert", name="moe")
        return x + moe(nn.RMSNorm(name="norm")(x))


@pytest.mark.parametrize("abstract", [False, True])
def test_linen(abstract):
    x, mesh = cases.tokens(), make_mesh(expert=4)
    boxed = LinenModel(cases.block()).init(jax.random.key(0), x)
    variables, specs = nn.unbox(boxed), nn.get_partition_spec(boxed)
    model = LinenModel(jax.eval_shape(cases.block) if abstract else cases.block())
    expected = model.apply(variables, x)
    placed = jax.device_put(variables, nn.get_sharding(boxed, mesh))
    assert (
        placed["packed"]["moe"]["experts"]["gate"]["Q4_0"].addressable_shards[0].data.shape[0] == 1
    )
    run = jax.shard_map(model.apply, mesh=mesh, in_specs=(specs, P()), out_specs=P())
    close(jax.jit(run)(placed, x), expected)
