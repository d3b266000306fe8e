"""The CUDA handlers inside XLA's command buffers (CUDA graphs): captured, replayed, same bits."""

import os
import subprocess
import sys
from pathlib import Path

import cuda_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_moe
from jax_moe import Experts

pytestmark = pytest.mark.gpu

# Runs a chain of layers several times with new routing and weights; prints digests of the results.
PROGRAM = """
import hashlib
import jax, jax.extend, jax.numpy as jnp, numpy as np
import cuda_cases as cases
import jax_moe
from jax_moe import Experts, Routing

E, K, H, F = 6, 2, 256, 512
tokens = {tokens}

def experts(seed):
    blocks = [cases.sane_blocks("Q4_K", shape, seed + i)
              for i, shape in enumerate([(E, F, H), (E, F, H), (E, H, F)])]
    return Experts(gate=blocks[0], up=blocks[1], down=blocks[2])

@jax.jit
def chain(x, logits, layers):
    for layer in layers:
        routing = jax_moe.route(logits, K)
        x = jax_moe.moe_ffn(x, routing, layer)
        dispatch = jax_moe.sort_by_expert(routing.expert_ids, E)
        ids = dispatch.sorted_token_ids, dispatch.flat_expert_ids
        y = jax_moe.moe_gemm(x, layer.up, *ids, top_k=K)
        y = (y / (1 + jnp.abs(y).max())).reshape(tokens, K, F).mean(axis=1)
        x = x / (1 + jnp.abs(x).max()) + y[:, :H]
    return x

rng = np.random.default_rng(0)
for run in range(6):
    if run == 4:  # what the handlers have loaded once outlives JAX's backend
        del x, logits, layers
        jax.clear_caches()
        jax.extend.backend.clear_backends()
    x = jnp.asarray(rng.standard_normal((tokens, H)), jnp.float32)
    logits = jnp.asarray(rng.standard_normal((tokens, E)), jnp.float32)
    layers = [experts(100 * run + 10 * i) for i in range(3)]
    y = np.asarray(chain(x, logits, layers))
    assert np.isfinite(y).all()
    print(hashlib.sha256(y.tobytes()).hexdigest())
"""


def run_program(tokens: int, flags: str, dump: Path) -> tuple[list[str], str]:
    """The digests, and what XLA says about the compiled program's thunks."""
    tests = str(Path(__file__).parent)
    env = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_dump_to={dump}",
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM.format(tokens=tokens)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    # The sequence that runs is dumped last, after XLA has made command buffers of it.
    thunks = "".join(p.read_text() for p in dump.glob("*jit_chain*thunk_sequence*"))
    return result.stdout.split(), thunks


@pytest.mark.parametrize("tokens", (1, 70))
def test_captured_and_the_same_bits(tokens, tmp_path):
    off, thunks_off = run_program(tokens, "--xla_gpu_graph_min_graph_size=100000", tmp_path / "off")
    on, thunks_on = run_program(tokens, "--xla_gpu_graph_min_graph_size=1", tmp_path / "on")
    assert thunks_off and "kCommandBuffer" not in thunks_off
    assert "kCommandBuffer" in thunks_on
    assert len(set(off)) == 6
    assert on == off


def test_scan_over_stacked_layers():
    """Weights that are slices of a stack, at whatever address the slice has."""
    layers, experts, d_model, d_expert = 5, 3, 64, 96
    shapes = ((layers, experts, d_expert, d_model),) * 2 + ((layers, experts, d_model, d_expert),)
    gate, up, down = (cases.sane_blocks("Q8_0", s, i) for i, s in enumerate(shapes))
    stacked = Experts(gate=gate, up=up, down=down)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((7, d_model)), jnp.float32)
    routing = oracle.random_routing(rng, 7, experts, 2)

    def step(x, layer):
        y = jax_moe.moe_ffn(x, routing, layer)
        return x + y, None

    scanned = jax.jit(lambda x, e: jax.lax.scan(step, x, e)[0])
    looped = x
    for i in range(layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        looped = jax.jit(lambda x, layer: step(x, layer)[0])(looped, layer)
    for _ in range(3):
        np.testing.assert_allclose(scanned(x, stacked), looped, rtol=1e-5, atol=1e-5)
