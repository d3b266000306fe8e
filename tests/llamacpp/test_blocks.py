"""Every architecture's MoE block against llama.cpp's: on one file, for the x that it has there."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from architecture_keys import EVERY_MODEL, KEYS, OPTIONAL
from architecture_models import MODELS, VOCABULARY, Model, exact
from client import PYTHON, LlamaCpp, LlamaCppError
from nodes import block_input, block_output, router_input

from jax_moe import GGUFFile, moe_block
from jax_moe._gguf.architectures import ARCHITECTURES
from jax_moe._gguf.header import GGUFError

if not PYTHON:
    pytest.skip("JAX_MOE_LLAMACPP_PYTHON is not set", allow_module_level=True)

TOKENS = [3, 1, 4, 10, 5, 9, 2, 6]
assert max(TOKENS) < VOCABULARY

# llama.cpp's graph of this one reads past the end of a tensor.
CASES = sorted(set(MODELS) - {"grovemoe, more slots than chunks"})

# Keys that some architectures heed and others do not.
OTHER_KEYS = {
    "scale and norm": {"expert_weights_scale": 1.7, "expert_weights_norm": True},
    "neither": {"expert_weights_scale": 0.0, "expert_weights_norm": False},
    "softmax": {"expert_gating_func": 1},
    "sigmoid": {"expert_gating_func": 2},
    "softmax after top-k": {"expert_gating_func": 3},
    "square root of softplus": {"expert_gating_func": 4},
    "groups": {"expert_group_count": 4, "expert_group_used_count": 2},
    "limits": {"swiglu_clamp_exp": 0.3, "swiglu_clamp_shexp": 0.5},
}
REFUSED_BY_US = {("llama4", "groups"), ("grovemoe", "groups")}


def error_bound(architecture: str, form: str) -> float:
    if form != "F32":  # llama.cpp rounds activations to 8 bits
        return 3e-2
    # It looks GELU up in a float16 table.
    return 1e-3 if ARCHITECTURES[architecture].activation in ("gelu", "geglu") else 1e-5


def write(llama_cpp: LlamaCpp, path: Path, made: Model, form: str, keys: Mapping[str, object] = {}):
    """The model as a whole one; as F32 with the values that its packed tensors stand for."""
    keys = made.keys | EVERY_MODEL | KEYS.get(made.architecture, {}) | keys
    tensors = {
        name: exact(tensor).astype(np.float32)
        if form == "F32" and isinstance(tensor, tuple)
        else tensor
        for name, tensor in made.tensors.items()
        if not name.endswith(".ffn_norm.weight")  # llama.cpp asks for those it needs
    }
    optional = OPTIONAL.get(made.architecture, {})
    llama_cpp.write_whole(path, made.architecture, keys, tensors, optional)


def largest_error(llama_cpp: LlamaCpp, path: Path, made: Model) -> float:
    """Of the MoE layers' errors in the L2 norm, relative to llama.cpp's result."""
    nodes, file, errors = llama_cpp.run(path, TOKENS), GGUFFile(path), {}
    for layer in (layer.index for layer in file.layers):
        params, config = file.load(layer)
        inputs = {}
        if config.router_reads != "x":
            inputs["router_input"] = jnp.asarray(router_input(nodes, made.architecture, layer))
        if params.token_to_experts is not None:
            inputs["token_ids"] = jnp.asarray(TOKENS)
        x = jnp.asarray(block_input(nodes, made.architecture, layer))
        expected = block_output(nodes, made.architecture, layer)
        assert np.all(np.isfinite(expected)) and np.any(expected)
        y = moe_block(params, x, config, **inputs)
        errors[layer] = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert set(made.moe_layers) <= set(errors)
    return max(errors.values())


@pytest.mark.parametrize("form", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", CASES)
def test_block(name: str, form: str, llama_cpp: LlamaCpp, tmp_path: Path, errors):
    made, path = MODELS[name], tmp_path / "model.gguf"
    if form == "Q8_0" and made.form == "F32":
        pytest.skip("this model has no packed weights")
    write(llama_cpp, path, made, form)
    error = largest_error(llama_cpp, path, made)
    errors[name, form] = error
    assert error <= error_bound(made.architecture, form)


@pytest.mark.parametrize("keys", OTHER_KEYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_keys(architecture: str, keys: str, llama_cpp: LlamaCpp, tmp_path: Path):
    """A key has the effect that it has in llama.cpp, or none where it has none there."""
    made = next(made for made in MODELS.values() if made.architecture == architecture)
    path = tmp_path / "model.gguf"
    try:
        write(llama_cpp, path, made, "F32", OTHER_KEYS[keys])
        refused = (architecture, keys) in REFUSED_BY_US
    except LlamaCppError:
        refused = True
    if refused:
        with pytest.raises(GGUFError, match="expert_g"):
            file = GGUFFile(path)
            for layer in file.layers:
                file.load(layer.index)
    else:
        assert largest_error(llama_cpp, path, made) <= error_bound(architecture, "F32")


def test_every_architecture_is_compared():
    assert {MODELS[name].architecture for name in CASES} == set(ARCHITECTURES)
