"""The CPU kernels of every instruction set that this machine has, not only of the best one."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_moe
from jax_moe import MoEVariant, _ffi, _libggml

SETS = ("baseline", "avx2", "avx512")
TOKENS = (1, 2, 3, 7)  # of each expert
ROWS, WIDTH = 5, 2304  # a tile of 4 rows and more, a chunk of 2048 columns and more


def packed(name, width):
    """As oracle.packed, but of random blocks of moderate magnitude: quantisers take longer."""
    format = oracle.as_format(name)
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (4096, format.block_bytes), np.uint8)
    values = _libggml.dequantize(format.ggml_type, blocks).astype(np.float64)
    largest = np.abs(values).max(axis=1)
    (moderate,) = np.nonzero((largest > 0.1) & (largest < 10))
    shape = len(TOKENS), ROWS, width // format.block_size
    picked = rng.choice(moderate, shape)
    data = blocks[picked].reshape(*shape[:2], -1)
    weight = jax_moe.PackedExperts(data=jnp.asarray(data), format=format)
    return weight, values[picked].reshape(*shape[:2], width)


def check_all_formats():
    """moe_gemm against float64, rounding activations and not."""
    experts = np.repeat(np.arange(len(TOKENS)), TOKENS)
    ids = jnp.arange(experts.size), jnp.asarray(experts)
    for name in oracle.all_formats():
        width = oracle.width(name, WIDTH)
        weight, exact = packed(name, width)
        x = jnp.asarray(oracle.normal(np.random.default_rng(0), (experts.size, width)))
        expected = oracle.gemm(x, exact, *ids, 1)
        for variant in (None, MoEVariant.SCALAR_GGUF):
            y = np.asarray(jax_moe.moe_gemm(x, weight, *ids, top_k=1, variant=variant))
            error = oracle.relative_error(y, expected)
            print(f"{name} {variant}: {error:.1e}")
            if variant is None:
                for e in range(len(TOKENS)):
                    of = experts == e
                    error = oracle.relative_error(y[of], expected[of])
                    assert error <= oracle.ERROR_BOUNDS["float32"]
            else:
                assert 1e-4 < error <= oracle.Q8_1_BOUND


@pytest.mark.parametrize("isa", SETS)
def test_all_formats(isa):
    own = _ffi.build_info()["cpu_isa"]
    if SETS.index(isa) > SETS.index(own):
        pytest.skip(f"this machine's best instruction set is {own}")
    environment = os.environ | {"JAX_MOE_ISA": isa, "JAX_PLATFORMS": "cpu"}
    check = "import test_isa as t; t.check_all_formats(); print(t._ffi.build_info()['cpu_isa'])"
    child = subprocess.run(
        [sys.executable, "-c", check],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(child.stdout)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split()[-1] == isa
