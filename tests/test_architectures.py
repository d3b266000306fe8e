"""A tiny model of every architecture, loaded and compared with llama.cpp's graph in float64."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from architecture_models import MODELS, VOCABULARY, H
from llama_cpp_reference import BLOCKS

from jax_moe import GGUFFile, moe_block
from jax_moe._ffi import unusable
from jax_moe._formats import FORMATS
from jax_moe._gguf.architectures import ARCHITECTURES

T = 5
ERROR_BOUND = 1e-5

needs_kernels = pytest.mark.skipif(unusable() is not None, reason=str(unusable()))

# Where the pure JAX implementation is compared too: one of each structure.
REFERENCE_TOO = {
    "grok with a dense network",
    "gemma4",
    "granite_swa",
    "gpt-oss",
    "deepseek2 as V3",
    "nemotron_h_moe",
    "kimi-k3",
    "llama4",
    "grovemoe",
    "deepseek4",
}


def compare(made, path, implementation):
    file = GGUFFile(made.write(path))
    assert [layer.index for layer in file.layers] == list(made.moe_layers)
    rng = np.random.default_rng(3)
    for layer in file.layers:
        assert layer.problem is None
        params, config = file.load(layer.index)
        x, other = rng.standard_normal((2, T, H)).astype(np.float32)
        inputs = {}
        if config.router_reads != "x":
            inputs["router_input"] = other
        if params.token_to_experts is not None:
            inputs["token_ids"] = rng.integers(0, VOCABULARY, T)
        exact_inputs = {k: v if k == "token_ids" else v.astype(float) for k, v in inputs.items()}
        expected = BLOCKS[made.architecture](
            made.layer(layer.index), x.astype(np.float64), **exact_inputs
        )
        y = moe_block(
            params,
            jax.numpy.asarray(x),
            config,
            implementation=implementation,
            **jax.tree.map(jax.numpy.asarray, inputs),
        )
        assert np.linalg.norm(y - expected) <= ERROR_BOUND * np.linalg.norm(expected)


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_block(name, tmp_path):
    compare(MODELS[name], tmp_path / "model.gguf", None)


@pytest.mark.parametrize("name", sorted(REFERENCE_TOO))
def test_block_in_pure_jax(name, tmp_path):
    compare(MODELS[name], tmp_path / "model.gguf", "reference")


def test_every_architecture_is_compared():
    assert {made.architecture for made in MODELS.values()} == set(ARCHITECTURES) == set(BLOCKS)
    assert len(ARCHITECTURES) == 63


def test_the_page_of_architectures_is_up_to_date():
    tools = Path(__file__).parent.parent / "tools"
    spec = importlib.util.spec_from_file_location("page", tools / "make_architectures_page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = page.PAGE.read_text()
    assert page.render(text) == text
    assert all(f"<!-- table {name} -->" in text for name in page.TABLES)
    assert all(f"| `{name}` |" in text for name in (*ARCHITECTURES, *FORMATS))
