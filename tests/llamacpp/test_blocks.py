"""Every MoE block against llama.cpp's: on the same file, for the x that llama.cpp's layer had."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from architecture_keys import EVERY_MODEL, KEYS, NAMES
from architecture_models import MODELS, VOCABULARY, Model, exact
from client import LlamaCpp

from jax_moe import GGUFFile, moe_block
from jax_moe._gguf.architectures import ARCHITECTURES

TOKENS = [3, 1, 4, 10, 5, 9, 2, 6]
GELU_TABLE = {"geglu", "gelu"}  # llama.cpp looks these up in a float16 table
assert max(TOKENS) < VOCABULARY

CASES = [name for name, made in MODELS.items() if made.architecture not in NAMES["left out"]]


def error_bound(architecture: str, form: str) -> float:
    """With packed weights llama.cpp rounds activations to 8 bits."""
    if form != "F32":
        return 3e-2
    return 1e-3 if ARCHITECTURES[architecture].activation in GELU_TABLE else 1e-5


def tensors_of(made: Model, form: str):
    """The model's tensors; as F32, those that its packed ones stand for."""
    return {
        name: exact(tensor).astype(np.float32) if form == "F32" else tensor
        for name, tensor in made.tensors.items()
        if not name.endswith(".ffn_norm.weight")  # llama.cpp asks for those it needs
    }


def block_input(nodes, layer: int, architecture: str) -> np.ndarray:
    """The result of the norm that the documentation names."""
    norm = f"blk.{layer}.{ARCHITECTURES[architecture].x}"
    return nodes.get(f"{norm}.bias", nodes[f"{norm}.weight"])


def block_output(nodes, layer: int, architecture: str) -> np.ndarray:
    for name in NAMES["output"].get(architecture, ("ffn_out", "ffn_moe_out")):
        name, _, second = name.partition("#")
        if (key := f"{name}-{layer}" + (f"#{second}" if second else "")) in nodes:
            return nodes[key]
    raise KeyError(sorted(nodes))


def router_input(nodes, layer: int, architecture: str) -> np.ndarray:
    name = NAMES["router input"].get(architecture)
    return nodes[f"{name}-{layer}" if name else f"blk.{layer}.ffn_gate_inp.weight:input"]


@pytest.mark.parametrize("form", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", CASES)
def test_block(name: str, form: str, llama_cpp: LlamaCpp, tmp_path: Path, errors):
    made = MODELS[name]
    if form == "Q8_0" and made.form == "F32":
        pytest.skip("this model has no packed weights")
    architecture, path = made.architecture, tmp_path / "model.gguf"
    keys = made.keys | EVERY_MODEL | KEYS.get(architecture, {})
    llama_cpp.write_whole(path, architecture, keys, tensors_of(made, form))
    nodes = llama_cpp.run(path, TOKENS)
    file = GGUFFile(path)
    assert [layer.index for layer in file.layers] == list(made.moe_layers)
    for layer in made.moe_layers:
        params, config = file.load(layer)
        x, expected = (f(nodes, layer, architecture) for f in (block_input, block_output))
        inputs = {}
        if config.router_reads != "x":
            inputs["router_input"] = jnp.asarray(router_input(nodes, layer, architecture))
        if params.token_to_experts is not None:
            inputs["token_ids"] = jnp.asarray(TOKENS)
        y = moe_block(params, jnp.asarray(x), config, **inputs)
        assert np.all(np.isfinite(expected)) and np.linalg.norm(expected) > 0
        error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
        errors[name, form] = max(error, errors.get((name, form), 0.0))
        assert error <= error_bound(architecture, form)
