"""The examples' whole models against llama.cpp on the same files."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tools")]

import make_random_gguf  # noqa: E402
import whole_models  # noqa: E402
from client import PYTHON  # noqa: E402
from decoding import Generator, Sampling  # noqa: E402
from transformer import forward, logits  # noqa: E402
from weights import load_transformer  # noqa: E402

import jax_moe  # noqa: E402

if not PYTHON:
    pytest.skip("JAX_MOE_LLAMACPP_PYTHON is not set", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("llama_cpp")


def llama_logits(path, tokens, *options):
    """llama.cpp's logits; see llama_logits.py."""
    inputs, outputs = path.with_suffix(".tokens.npy"), path.with_suffix(".logits.npy")
    np.save(inputs, tokens)
    script = Path(__file__).with_name("llama_logits.py")
    done = subprocess.run(
        [PYTHON, script, path, inputs, outputs, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.load(outputs)


@jax.jit
def all_logits(model, tokens):
    x, _ = forward(model, tokens, model.new_cache(len(tokens)), 0)
    return logits(model, x)


@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt-oss"])
def test_float32_weights_give_the_same_64_greedy_tokens(tmp_path, architecture):
    path = tmp_path / "model.gguf"
    whole_models.write_model(path, architecture)
    prompt = np.arange(3, 27)
    theirs = llama_logits(path, prompt, "--greedy", "64")
    expected = theirs[len(prompt) - 1 :].argmax(1)

    model = load_transformer(jax_moe.GGUFFile(path))
    generator = Generator(model, Sampling(), prompt_length=len(prompt), max_tokens=64)
    tokens = np.concatenate(list(generator.tokens(generator.start(prompt))))
    np.testing.assert_array_equal(tokens, expected)

    ours = np.asarray(all_logits(model, np.concatenate([prompt, tokens[:-1]])))
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    print(f"{architecture} F32: relative error of logits {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize("name", ["qwen3-tiny", "gpt-oss-tiny"])
def test_packed_weights_give_nearly_the_same_distribution(tmp_path, name):
    """llama.cpp rounds activations to 8 bits before every product, and we do not.

    Where that tips the choice of an expert, a token's distribution moves a hundred times as far as
    elsewhere. Routers of random weights choose by little more than chance, so half of the experts
    are chosen here, which makes the last of them matter little.
    """
    path = tmp_path / "model.gguf"
    shape = make_random_gguf.MODELS[name]
    shape = dataclasses.replace(shape, layers=4, top_k=shape.experts // 2)
    make_random_gguf.write_model(path, shape)
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, 256)
    theirs = llama_logits(path, tokens)
    model = load_transformer(jax_moe.GGUFFile(path))
    ours = np.asarray(all_logits(model, tokens))

    p, q = (log_softmax(scores.astype(np.float64)) for scores in (theirs, ours))
    divergence = (np.exp(p) * (p - q)).sum(1)
    same = (theirs.argmax(1) == ours.argmax(1)).mean()
    print(
        f"{name}: KL mean {divergence.mean():.1e}, median {np.median(divergence):.1e}, "
        f"largest {divergence.max():.1e}; same top token at {same:.0%} of 256 positions"
    )
    assert divergence.mean() <= 1e-3
    assert same >= 0.9


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
