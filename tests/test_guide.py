"""Runs the Python of docs/guide.md and of README.md, each from top to bottom, on a small file under
the name that they use."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
from make_gguf import Weights, expert_tensors, model_keys, write_gguf

from jax_moe._ffi import unusable

ROOT = Path(__file__).parent.parent
GUIDE, README = ROOT / "docs" / "guide.md", ROOT / "README.md"
FILE = "Qwen3-30B-A3B-Q4_K_M.gguf"
SIZES = {"experts": 8, "d_model": 64, "d_expert": 32}

needs_kernels = pytest.mark.skipif(unusable() is not None, reason=str(unusable()))


def snippets(path):
    """Each with as many empty lines before it as the page has, so that errors name the line."""
    page = path.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        yield compile("\n" * page[: match.start(1)].count("\n") + match[1], str(path), "exec")


def write_model(path):
    weights = Weights()
    tensors = {"token_embd.weight": (weights(16, 64), "Q8_0"), "output_norm.weight": weights(64)}
    for layer in (0, 1):
        tensors[f"blk.{layer}.ffn_norm.weight"] = np.ones(64, np.float32)
        tensors |= expert_tensors(weights, layer, **SIZES)
    return write_gguf(path, "qwen3moe", model_keys(**SIZES), tensors)


@needs_kernels
def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / FILE)
    results, names = [], {"__name__": "guide"}
    for snippet in snippets(GUIDE):
        names.pop("y", None)
        exec(snippet, names)
        if "y" in names:
            results.append(np.asarray(names["y"]).reshape(-1, SIZES["d_model"]))
    # A layer in plain JAX; two layers; the experts alone; the layer in NNX, Linen, and Linen with
    # abstract parameters; the block alone, from a checkpoint and on four devices.
    layer, two_layers, experts, *layers, block, on_devices, on_devices_in_flax = results
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    assert len(layers) == 3
    for other in layers:
        close(other, layer)
    for other in (experts, on_devices, on_devices_in_flax):
        close(other, block)
    assert np.isfinite(two_layers).all()
    # The whole model from a checkpoint, which was built without its weights.
    np.testing.assert_array_equal(names["model"](names["x"]), names["block"](names["x"]))
    assert "softmax, top 2 of 8" in capsys.readouterr().out


@needs_kernels
def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / FILE)
    names = {"__name__": "readme"}
    for snippet in snippets(README):
        exec(snippet, names)
    y = names["feed_forward"](names["params"], np.ones((3, SIZES["d_model"]), np.float32))
    assert y.shape == (3, SIZES["d_model"])
    assert names["y"].shape == names["x"].shape and np.isfinite(names["y"]).all()


@pytest.mark.parametrize("page", [GUIDE, README])
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
