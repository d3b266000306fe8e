"""What the tests of the two Flax modules share: a block, float weights, and Python without Flax."""

import subprocess
import sys

import jax
import numpy as np
import oracle

import jax_moe
from jax_moe import Experts, MoEConfig, MoEParams

E, H, F, T, K = 4, 64, 96, 5, 2
CONFIG = MoEConfig(top_k=K)


def block(seed=0, **fields):
    """Routed experts in two formats and a dense matrix, with a bias, and a shared expert."""
    rng = np.random.default_rng(seed)
    routed = Experts(
        gate=oracle.packed("Q4_0", E, F, H, seed)[0],
        up=oracle.normal(rng, (E, F, H)) * H**-0.5,
        down=oracle.packed("Q8_0", E, H, F, seed)[0],
        down_bias=oracle.normal(rng, (E, H)),
    )
    shared = Experts(
        **{
            name: oracle.packed("Q8_0", 1, H, H, seed + i)[0]
            for i, name in enumerate(("gate", "up", "down"))
        }
    )
    fields = {"experts": routed, "router": oracle.normal(rng, (E, H)), "shared": shared} | fields
    return MoEParams(**fields)


def float_block():
    rng = np.random.default_rng(3)
    weights = {
        name: oracle.normal(rng, shape) * shape[-1] ** -0.5
        for name, shape in (("gate", (E, F, H)), ("up", (E, F, H)), ("down", (E, H, F)))
    }
    return MoEParams(experts=Experts(**weights), router=oracle.normal(rng, (E, H)))


def tokens(seed=0):
    return oracle.normal(np.random.default_rng(seed + 100), (T, H))


def expert_mesh():
    return jax.make_mesh((E,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))


def assert_same(a, b):
    """Equal arrays, formats and absent fields."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def check_prepacked_from_floats(module):
    """That `module.from_floats` packs into the tiled layout, and leaves what came packed alone."""
    floats = float_block()
    tiled = module.from_floats(floats, CONFIG, {"experts.up": "Q4_0"}, prepack=True)
    assert tiled.params.experts.up.layout == "tiled"
    unpacked = tiled.params.unpack()
    assert_same(unpacked.experts.up, jax_moe.quantize(floats.experts.up, "Q4_0"))
    again = module.from_floats(unpacked, CONFIG, {}, prepack=True)
    assert_same(again.params, tiled.params)


def run_without_flax(code):
    """The last line of stderr of a Python process that finds no Flax."""
    code = f"import sys; sys.modules['flax'] = None; {code}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return (run.stderr.splitlines() or [""])[-1]
