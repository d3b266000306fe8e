"""Every weight format in a MoE block against llama.cpp, on the same file."""

import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from architecture_keys import EVERY_MODEL
from architecture_models import VOCABULARY
from client import PYTHON, LlamaCpp
from make_gguf import Tensor, Weights, model_keys, write_gguf

import jax_moe
from jax_moe import GGUFFile, moe_block
from jax_moe._formats import FORMATS, BlockFormat

if not PYTHON:
    pytest.skip("JAX_MOE_LLAMACPP_PYTHON is not set", allow_module_level=True)

E, K, H, F = 8, 2, 256, 512
TOKENS = [3, 1, 4, 10, 5, 9, 2, 6]

# llama.cpp rounds activations to 8 bits, or to the type of dense weights.
BOUNDS = dict.fromkeys(FORMATS, 3e-2) | {"F16": 1e-3, "BF16": 1e-2}


def stored(weights: np.ndarray, form: str) -> Tensor:
    if form == "F16":
        return weights.astype(np.float16)
    if form == "BF16":
        return weights, form
    importance = np.ones(weights.shape[-1], np.float32)
    return np.asarray(jax_moe.quantize(weights, form, importance).data).view(np.int8)


def declare(path: Path, name: str, form: BlockFormat, weights_a_row: int) -> None:
    """Makes a tensor of bytes, in the file, one of a format that the gguf package cannot name."""
    file = bytearray(path.read_bytes())
    at = file.index(name.encode()) + len(name) + 4  # behind the name: 3 axes, their sizes, the type
    struct.pack_into("<Q", file, at, weights_a_row)
    struct.pack_into("<I", file, at + 3 * 8, form.ggml_type)
    path.write_bytes(file)


@pytest.mark.parametrize("form", BOUNDS)
def test_format(form: str, llama_cpp: LlamaCpp, tmp_path: Path, errors):
    weights, path = Weights(seed=11), tmp_path / "model.gguf"
    shapes = {"gate": (E, F, H), "up": (E, F, H), "down": (E, H, F)}
    experts = {
        f"blk.0.ffn_{name}_exps.weight": 2 * weights(*shape) for name, shape in shapes.items()
    }
    tensors = {
        "token_embd.weight": weights(VOCABULARY, H),
        "blk.0.ffn_gate_inp.weight": 3 * weights(E, H),
    }
    keys = model_keys(layers=1, experts=E, top_k=K, d_model=H, d_expert=F) | EVERY_MODEL
    whole = llama_cpp.write_whole(path, "qwen3moe", keys, tensors | experts)
    write_gguf(
        path, "qwen3moe", keys, whole | {name: stored(w, form) for name, w in experts.items()}
    )
    if form in FORMATS:
        for name, w in experts.items():
            declare(path, name, FORMATS[form], w.shape[-1])
    nodes = llama_cpp.run(path, TOKENS)
    params, config = GGUFFile(path).load(0)
    y = moe_block(params, jnp.asarray(nodes["ffn_norm-0"]), config)
    expected = nodes["ffn_moe_out-0"]
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    errors["", form] = error
    assert error <= BOUNDS[form]
