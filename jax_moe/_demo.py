"""The demo: runs the MoE layers of a GGUF file inside `jax.jit` and checks them against float64."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import MoEConfig, MoEParams, _ffi, moe_block, quantize
from jax_moe import _demo_reference as reference
from jax_moe._cli import describe_file, layer_table
from jax_moe._gguf import GGUFFile, GGUFLayer
from jax_moe._table import binary_size, table

# The largest error that an unrounded kernel may have: tensor cores may serve float32 on a GPU.
TOLERANCE = {"cpu": 1e-5, "gpu": 1e-3}

# Tokens that are compared. In a large model float64 takes a second for every few experts.
CHECKED_TOKENS = 4

LAYERS, EXPERTS, TOP_K, D_MODEL, D_EXPERT = 4, 32, 4, 512, 256


def run(path: str | None, *, num_tokens: int = 16, num_layers: int | None = None) -> int:
    """Prints what each MoE layer of a GGUF file holds, how fast it runs and how exact it is.

    Args:
      path: the file; None makes a small qwen3moe model in a temporary directory.
      num_tokens: random activations a layer.
      num_layers: run only the first so many MoE layers that can be run; all if None.

    Returns:
      the exit status: 1 if a layer's error is above TOLERANCE, or if there is no layer to run.

    Raises:
      ImportError: where the kernels cannot run, saying why.
    """
    _ffi.native()  # raises before any work is done
    if path is not None:
        return _run(GGUFFile(path), num_tokens, num_layers)
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "demo-qwen3moe.gguf"
        print(f"Making a small model: {write_model(made)}")
        return _run(GGUFFile(made), num_tokens, num_layers)


def _run(file: GGUFFile, num_tokens: int, num_layers: int | None) -> int:
    print(describe_file(file))
    if not file.layers:
        print("\nIt has no MoE layers, so there is nothing to run.")
        return 1
    print()
    print(layer_table(file.layers))
    layers = [layer for layer in file.layers if layer.problem is None][:num_layers]
    if not layers:
        print(
            "\nNo MoE layer can be run:", *{str(layer.problem) for layer in file.layers}, sep="\n  "
        )
        return 1
    print(f"\nThe same layers in jax.jit on {jax.devices()[0]}, {num_tokens} random tokens each:\n")
    header, *rows = table(
        ["layer", "formats", "packed", "as float32", "ratio"], [_sizes(layer) for layer in layers]
    ).splitlines()
    print(f"{header}        time  relative error")
    errors = []
    for layer, row in zip(layers, rows, strict=True):
        seconds, error = _run_layer(file, layer, num_tokens)
        print(f"{row:<{len(header)}}  {1e3 * seconds:7.2f} ms  {error:14.1e}", flush=True)
        errors.append(error)
    worst, tolerance = max(errors), TOLERANCE[jax.default_backend()]
    verdict = "within" if worst <= tolerance else "ABOVE"
    print(
        f"\nLargest relative error against float64: {worst:.1e}, "
        f"{verdict} the bound of {tolerance:.0e}."
    )
    return 0 if worst <= tolerance else 1


def _sizes(layer: GGUFLayer) -> list[str]:
    weights = [*layer.projections.values(), *layer.shared.values()]
    packed = sum(tensor.nbytes or 0 for tensor in weights)
    unpacked = sum(4 * math.prod(tensor.shape) for tensor in weights)
    return [
        str(layer.index),
        " ".join(f"{name}:{tensor.format}" for name, tensor in layer.projections.items()),
        binary_size(packed),
        binary_size(unpacked),
        f"{unpacked / packed:.1f}x",
    ]


@partial(jax.jit, static_argnames="config")
def _forward(
    params: MoEParams, x: jax.Array, config: MoEConfig, inputs: dict[str, Any]
) -> jax.Array:
    return moe_block(params, x, config, **inputs)


def _run_layer(file: GGUFFile, layer: GGUFLayer, num_tokens: int) -> tuple[float, float]:
    """Seconds for all tokens, and the relative error of the first few."""
    params, config = file.load(layer.index)
    rng = np.random.default_rng(layer.index)
    x = rng.standard_normal((num_tokens, layer.d_model)).astype(np.float32)
    inputs = {}
    if config.router_reads != "x":
        inputs["router_input"] = rng.standard_normal(x.shape).astype(np.float32)
    if params.token_to_experts is not None:
        vocabulary = params.token_to_experts.shape[0]
        inputs["token_ids"] = rng.integers(0, vocabulary, num_tokens, np.int32)
    arrays = jax.tree.map(jnp.asarray, inputs)
    y, seconds = _time(lambda: _forward(params, jnp.asarray(x), config, arrays))
    checked = {name: value[:CHECKED_TOKENS] for name, value in inputs.items()}
    if "router_input" in checked:
        checked["router_input"] = checked["router_input"].astype(np.float64)
    expected = reference.block(layer, x[:CHECKED_TOKENS].astype(np.float64), **checked)
    error = np.linalg.norm(y[:CHECKED_TOKENS] - expected) / np.linalg.norm(expected)
    return seconds, float(error)


def _time(call: Callable[[], jax.Array]) -> tuple[np.ndarray, float]:
    """The result, and the shortest of the times that it takes after the first, which compiles."""
    result = call().block_until_ready()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.2 and len(times) < 50):
        start = time.perf_counter()
        call().block_until_ready()
        times.append(time.perf_counter() - start)
    return np.asarray(result), min(times)


def write_model(path: Path) -> str:
    """Writes a model of qwen3moe's MoE layers with random weights; returns a description.

    The formats are those of llama.cpp's Q4_K_M: gate and up in Q4_K, down in Q6_K in about half of
    the layers. Without libggml-python, which quantises to them, Q4_0 and Q8_0 stand in.
    """
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_name("demo")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(D_MODEL)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_expert_feed_forward_length(D_EXPERT)
    writer.add_tokenizer_model("no_vocab")
    low, high, mix = _formats()
    for layer in range(LAYERS):
        prefix = f"blk.{layer}.ffn"
        writer.add_tensor(f"{prefix}_gate_inp.weight", _random(rng, EXPERTS, D_MODEL))
        for name, shape, form in (
            ("gate", (EXPERTS, D_EXPERT, D_MODEL), low),
            ("up", (EXPERTS, D_EXPERT, D_MODEL), low),
            ("down", (EXPERTS, D_MODEL, D_EXPERT), high if _more_bits(layer) else low),
        ):
            packed = quantize(_random(rng, *shape), form)
            writer.add_tensor(
                f"{prefix}_{name}_exps.weight",
                np.asarray(packed.data),
                raw_dtype=gguf.GGMLQuantizationType[form],
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"{LAYERS} layers of {EXPERTS} experts, {D_MODEL} x {D_EXPERT}, {mix}"


def _formats() -> tuple[str, str, str]:
    """Formats for most and for the more sensitive tensors, and what the mix is called."""
    try:
        quantize(np.zeros((1, 1, 256), np.float32), "Q4_K")
    except ImportError:
        return (
            "Q4_0",
            "Q8_0",
            "Q4_0 and Q8_0 (libggml-python, which makes Q4_K_M, is not installed)",
        )
    return "Q4_K", "Q6_K", "Q4_K_M's mix of formats"


def _more_bits(layer: int) -> bool:
    """The layers that llama.cpp's quantiser gives more bits in its "_M" mixes."""
    eighth = LAYERS // 8
    return layer < eighth or layer >= 7 * LAYERS // 8 or (layer - eighth) % 3 == 2


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
