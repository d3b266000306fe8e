"""Runs a Qwen3-MoE or gpt-oss model from a GGUF file.

    python examples/generate.py MODEL.gguf --prompt "The capital of France is"
    python examples/generate.py MODEL.gguf --chat "What is a mixture of experts?" --temperature 0.7

Needs the packages `tokenizers` and, for --chat, `jinja2`. How it works, from the outside in:
`decoding.py` (the loop), `transformer.py` (the model, 150 lines), `attention.py`, and beside them
`weights.py` (from file to parameters) and `tokenizer.py`.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from decoding import Generator, Sampling
from tokenizer import Tokenizer
from weights import load_transformer

import jax_moe


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    file = jax_moe.GGUFFile(options.file)
    tokenizer = None if options.tokens else Tokenizer(file.metadata)
    if tokenizer is None:
        prompt, stop_tokens = options.tokens, []
    else:
        text = tokenizer.chat(options.chat) if options.chat else options.prompt
        prompt, stop_tokens = tokenizer.encode(text), tokenizer.stop_tokens
        if not prompt:
            sys.exit("The prompt is empty.")

    # Tensor cores take 16-bit activations; the CPU kernels work in float32.
    dtype = options.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    start = time.perf_counter()
    model = jax.block_until_ready(load_transformer(file, dtype=dtype, prepack=options.prepack))
    loaded = time.perf_counter()
    vocabulary = model.embedding.weight.shape[1]
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        sys.exit(f"Token ids are from 0 to {vocabulary - 1}.")
    generator = Generator(
        model,
        Sampling(options.temperature, options.top_k, options.top_p),
        prompt_length=len(prompt),
        max_tokens=options.max_tokens,
        stop_tokens=stop_tokens,
    )
    compiled = time.perf_counter()
    report(f"load {loaded - start:.1f} s, compile {compiled - loaded:.1f} s, {jax.devices()[0]}")

    state = jax.block_until_ready(generator.start(prompt, options.seed))
    prefilled = time.perf_counter()
    generated = []

    def tokens() -> Iterator[int]:
        for group in generator.tokens(state):
            generated.extend(group.tolist())
            yield from group.tolist()

    pieces = map("{} ".format, tokens()) if tokenizer is None else tokenizer.decode_stream(tokens())
    if options.prompt and tokenizer is not None:
        print(options.prompt, end="")
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    finished = time.perf_counter()
    # The first token is the prefill's.
    report(
        f"prefill {len(prompt)} tokens, {len(prompt) / (prefilled - compiled):.1f} tokens/s; "
        f"decode {len(generated)} tokens, "
        f"{max(0, len(generated) - 1) / (finished - prefilled):.1f} tokens/s"
    )


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Runs a Qwen3-MoE or gpt-oss model from a GGUF file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("file", help="GGUF file; of a split model any part")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--chat", help="message to answer, put into the model's chat template")
    prompt.add_argument(
        "--tokens",
        type=lambda text: [int(token) for token in text.split(",")],
        help="token ids to continue, like 1,2,3, for a file without a vocabulary",
    )
    parser.add_argument("--max-tokens", type=positive, default=128, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0 is all tokens")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of activations and KV cache; bfloat16 on a GPU and float32 on a CPU if not given",
    )
    parser.add_argument(
        "--prepack",
        action=argparse.BooleanOptionalAction,
        help="bring matrices into the layout that GPUs read fastest; on a GPU if not given",
    )
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    main()
