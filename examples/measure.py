"""Measures a model from a GGUF file: prefill, decode, and what the MoE blocks take of them.

    python examples/measure.py MODEL.gguf --prompt-tokens 512 --max-tokens 128

Prompts are random tokens. The MoE blocks' share is the time of a program with nothing but them and
norms, all layers one after another as in the model, over the time of the whole model. Loading is
over when all matrices are on the device, in the layout that the kernels are to read. Needs no more
than jax_moe itself: models of random weights (`tools/make_random_gguf.py`) have no vocabulary.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from decoding import Generator, Sampling
from jax import Array
from transformer import Transformer
from weights import load_transformer

import jax_moe

PIECE = 512


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--prompt-tokens", type=int, default=PIECE)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--stream", type=int, default=16, help="tokens a loop inside jit")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--prepack",
        action=argparse.BooleanOptionalAction,
        help="bring matrices into the layout that GPUs read fastest; on a GPU if not given",
    )
    options = parser.parse_args(arguments)
    dtype = options.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")

    start = time.perf_counter()
    file = jax_moe.GGUFFile(options.file)
    model = load_transformer(file, dtype=dtype, prepack=options.prepack)
    jax.block_until_ready(model)
    seconds = time.perf_counter() - start
    layout = getattr(model.output.weight, "layout", None) or "GGUF's layout"
    print(f"{jax.devices()[0].device_kind}, {dtype}, {layout}, {len(model.layers)} layers")
    size = sum(tensor.nbytes or 0 for tensor in file.tensors.values()) / 1e9
    print(f"load     {size:.2f} GB in {seconds:.1f} s, {size / seconds:.2f} GB/s", flush=True)

    start = time.perf_counter()
    generator = Generator(
        model,
        Sampling(),
        prompt_length=options.prompt_tokens,
        max_tokens=options.max_tokens,
        piece=PIECE,
        stream=options.stream,
    )
    print(f"compile  {time.perf_counter() - start:.1f} s", flush=True)

    vocabulary = model.output.weight.shape[1]
    prompt = np.random.default_rng(0).integers(0, vocabulary, options.prompt_tokens)
    prefill = fastest(lambda: generator.start(prompt), options.repeats)
    both = fastest(lambda: list(generator.tokens(generator.start(prompt))), options.repeats)
    steps = options.max_tokens - 1
    lengths = [piece.stop - piece.start for piece in generator.pieces]
    moe_prefill = sum(moe_seconds(model, length, 1, options.repeats) for length in lengths)
    moe_decode = moe_seconds(model, 1, steps, options.repeats)
    for name, tokens, seconds, moe in (
        ("prefill", options.prompt_tokens, prefill, moe_prefill),
        ("decode ", steps, both - prefill, moe_decode),
    ):
        print(
            f"{name}  {tokens / seconds:.1f} tokens/s ({tokens} in {1e3 * seconds:.1f} ms), "
            f"MoE blocks {1e3 * moe:.1f} ms, {moe / seconds:.0%}"
        )


def fastest(call: Callable[[], object], repeats: int) -> float:
    """Seconds, after a call that does not count."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)


def moe_seconds(model: Transformer, num_tokens: int, steps: int, repeats: int) -> float:
    """Seconds for the MoE blocks of all layers on so many tokens, so many times."""
    d_model = model.output_norm.shape[0]
    x = jax.random.normal(jax.random.key(0), (num_tokens, d_model), jnp.float32)
    return fastest(lambda: _moe_blocks(model, x, steps=steps), repeats)


@partial(jax.jit, static_argnames="steps")
def _moe_blocks(model: Transformer, x: Array, *, steps: int) -> Array:
    def step(_: int, x: Array) -> Array:
        for layer in model.layers:
            normed = x.astype(model.config.dtype)
            x += jax_moe.moe_block(layer.moe, normed, layer.moe_config)
            x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True))
        return x

    return jax.lax.fori_loop(0, steps, step, x)


if __name__ == "__main__":
    main()
