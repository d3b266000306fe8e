"""Writes a GGUF model with random weights, of a real model's shapes and formats.

    python tools/make_random_gguf.py OUT.gguf --model qwen3-30b-a3b            # 18 GB
    python tools/make_random_gguf.py OUT.gguf --model gpt-oss-20b --layers 4

For measuring speed and memory where no real model is at hand: it has no vocabulary, takes token
ids, and gives tokens that mean nothing. Weights are as models have them before training: their
deviation is 1 / sqrt(K), less by sqrt(2 layers) where a layer adds to the residual stream, and 1 in
the embedding. Blocks hold random bits under scales that give that. Formats are those of llama.cpp's
Q4_K_M for Qwen3, and of the published gpt-oss files (MXFP4 experts, Q8_0 for the rest).

Written by several threads, at the speed of the disk; needs only NumPy and the gguf package.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    architecture: str
    layers: int
    d_model: int
    d_expert: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    rope_base: float


MODELS = {
    "qwen3-30b-a3b": Shape(
        "qwen3moe", 48, 2048, 768, 128, 8, 32, 4, 128, 151936, 40960, 1_000_000.0
    ),
    "gpt-oss-20b": Shape("gpt-oss", 24, 2880, 2880, 32, 4, 64, 8, 64, 201088, 131072, 150_000.0),
    "qwen3-tiny": Shape("qwen3moe", 8, 256, 256, 16, 4, 4, 2, 64, 512, 2048, 1_000_000.0),
    "gpt-oss-tiny": Shape("gpt-oss", 4, 256, 256, 8, 2, 4, 2, 64, 512, 2048, 150_000.0),
}


class Tensor(NamedTuple):
    """A tensor to be written: norms are ones, other vectors zeros, matrices of this deviation."""

    name: str
    shape: tuple[int, ...]
    type: Type
    deviation: float = 0.0


def tensors(shape: Shape) -> Iterator[Tensor]:
    """All tensors of a model in the file's order."""
    oss = shape.architecture == "gpt-oss"
    low, high = (Type.Q8_0, Type.Q8_0) if oss else (Type.Q4_K, Type.Q6_K)
    d, q, kv = shape.d_model, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    yield Tensor("token_embd.weight", (shape.vocabulary, d), low, 1.0)
    for layer in range(shape.layers):
        more = high if more_bits(layer, shape.layers) else low
        matrices = {
            "attn_q": ((q, d), low),
            "attn_k": ((kv, d), low),
            "attn_v": ((kv, d), more),
            "attn_output": ((d, q), low),
            "ffn_gate_inp": ((shape.experts, d), Type.F32),
            "ffn_gate_exps": ((shape.experts, shape.d_expert, d), Type.MXFP4 if oss else low),
            "ffn_up_exps": ((shape.experts, shape.d_expert, d), Type.MXFP4 if oss else low),
            "ffn_down_exps": ((shape.experts, d, shape.d_expert), Type.MXFP4 if oss else more),
        }
        vectors = {"attn_norm.weight": d}
        if oss:
            vectors |= {"post_attention_norm.weight": d, "attn_sinks.weight": shape.heads}
        else:
            vectors |= {"ffn_norm.weight": d}
            vectors |= {f"attn_{name}_norm.weight": shape.head_dim for name in "qk"}
        for name, (sizes, kind) in matrices.items():
            added = name in ("attn_output", "ffn_down_exps")
            deviation = (sizes[-1] * (2 * shape.layers if added else 1)) ** -0.5
            yield Tensor(f"blk.{layer}.{name}.weight", sizes, kind, deviation)
            if oss:
                yield Tensor(f"blk.{layer}.{name}.bias", sizes[:-1], Type.F32)
        for name, size in vectors.items():
            yield Tensor(f"blk.{layer}.{name}", (size,), Type.F32)
    yield Tensor("output_norm.weight", (d,), Type.F32)
    yield Tensor("output.weight", (shape.vocabulary, d), high, d**-0.5)


def more_bits(layer: int, layers: int) -> bool:
    """The layers whose attn_v and ffn_down llama.cpp's quantiser gives more bits in Q4_K_M."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


class Source:
    """Makes tensors' bytes, the same for the same seed.

    Random bits are made once for each format and get their scales once for each deviation. Tensors
    begin at different places of such a sheet of blocks and go around it. Its number of blocks is a
    prime, so that the experts of a tensor are all different.
    """

    BLOCKS = 262139

    def __init__(self, seed: int):
        self.seed = seed
        self._bits: dict[Type, np.ndarray] = {}
        self._sheets: dict[tuple[Type, float], np.ndarray] = {}

    def prepare(self, table: list[Tensor]) -> None:
        """Makes the sheets of all tensors, which threads may then read."""
        for tensor in table:
            if is_packed(tensor):
                self._sheet(tensor.type, tensor.deviation)

    def pieces(self, tensor: Tensor, index: int) -> Iterator[np.ndarray]:
        """The bytes of a tensor, the `index`-th of the file, as uint8 arrays one after another."""
        rng = np.random.Generator(np.random.SFC64((self.seed, 1 + index)))
        if not is_packed(tensor):
            yield values(tensor, rng).reshape(-1).view(np.uint8)
            return
        sheet = self._sheet(tensor.type, tensor.deviation)
        left, start = num_blocks(tensor), int(rng.integers(self.BLOCKS))
        while left:
            piece = sheet[start : start + left]
            yield piece.reshape(-1)
            left, start = left - len(piece), 0

    def _sheet(self, kind: Type, deviation: float) -> np.ndarray:
        """Blocks, uint8 `[BLOCKS, block_bytes]`."""
        if (kind, deviation) not in self._sheets:
            blocks = self._random(kind).copy()
            set_scales(blocks, kind, deviation)
            self._sheets[kind, deviation] = blocks
        return self._sheets[kind, deviation]

    def _random(self, kind: Type) -> np.ndarray:
        if kind not in self._bits:
            rng = np.random.Generator(np.random.SFC64((self.seed, 0, kind)))
            shape = (self.BLOCKS, gguf.GGML_QUANT_SIZES[kind][1])
            # Whole 64-bit words are what generators make fastest.
            words = rng.integers(0, 1 << 64, -(-math.prod(shape) // 8), np.uint64)
            self._bits[kind] = words.view(np.uint8)[: math.prod(shape)].reshape(shape)
        return self._bits[kind]


def is_packed(tensor: Tensor) -> bool:
    return tensor.type != Type.F32


def num_blocks(tensor: Tensor) -> int:
    return math.prod(tensor.shape) // gguf.GGML_QUANT_SIZES[tensor.type][0]


def num_bytes(tensor: Tensor) -> int:
    return num_blocks(tensor) * gguf.GGML_QUANT_SIZES[tensor.type][1]


def values(tensor: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Float32 of a tensor that is not packed."""
    if "norm" in tensor.name:
        return np.ones(tensor.shape, np.float32)
    if tensor.name.endswith(".bias") or "sinks" in tensor.name:
        return np.zeros(tensor.shape, np.float32)
    return rng.standard_normal(tensor.shape, np.float32) * np.float32(tensor.deviation)


def set_scales(blocks: np.ndarray, kind: Type, deviation: float) -> None:
    """Writes the scales of blocks of random bits so that weights have mean 0 and this deviation."""
    write = SCALES[kind]
    # How far off a scale of about 1 is, is seen on a sample.
    sample = blocks[:4096].copy()
    write(sample, 1.0)
    write(blocks, deviation / float(gguf.quants.dequantize(sample, kind).std()))


def half(position: int, factor: float = 1.0) -> Callable[[np.ndarray, float], None]:
    """Writes `factor` times a scale as float16 at a position in every block."""

    def write(blocks: np.ndarray, scale: float) -> None:
        blocks[:, position : position + 2] = np.array([factor * scale], np.float16).view(np.uint8)

    return write


def q4_k(blocks: np.ndarray, scale: float) -> None:
    """A weight is d s q - m t: q, from 0 to 15, has mean 7.5, and s and t are alike."""
    half(0)(blocks, scale)
    half(2, 7.5)(blocks, scale)


def mxfp4(blocks: np.ndarray, scale: float) -> None:
    """A power of two, with a bias of 127."""
    blocks[:, 0] = 127 + round(math.log2(scale))


SCALES: dict[Type, Callable[[np.ndarray, float], None]] = {
    Type.Q4_K: q4_k,
    Type.Q6_K: half(208),
    Type.Q8_0: half(0),
    Type.MXFP4: mxfp4,
}


def add_keys(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.d_expert)
    writer.add_expert_feed_forward_length(shape.d_expert)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_tokenizer_model("no_vocab")
    if shape.architecture == "gpt-oss":
        writer.add_sliding_window(128)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(32.0)
        writer.add_rope_scaling_orig_ctx_len(4096)


def write_model(path: Path, shape: Shape, *, seed: int = 0, threads: int | None = None) -> None:
    """Writes the model; the same seed gives the same bytes."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    add_keys(writer, shape)
    table = list(tensors(shape))
    for tensor in table:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            num_bytes(tensor),
            raw_dtype=tensor.type,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()

    def aligned(position: int) -> int:
        return writer.ggml_pad(position, writer.data_alignment)

    offsets = [aligned(path.stat().st_size)]
    for tensor in table:
        offsets.append(aligned(offsets[-1] + num_bytes(tensor)))
    os.truncate(path, offsets[-1])
    source = Source(seed)
    source.prepare(table)

    def write(index: int) -> None:
        position = offsets[index]
        for piece in source.pieces(table[index], index):
            position = write_at(file, piece, position)

    with open(path, "r+b") as opened, ThreadPoolExecutor(threads) as pool:
        file = opened.fileno()
        for i, _ in enumerate(pool.map(write, range(len(table)))):
            if sys.stderr.isatty():
                print(f"\rtensor {i + 1} of {len(table)}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)


def write_at(file: int, data: np.ndarray, position: int) -> int:
    """Writes all bytes of `data`; returns the position after them."""
    while len(data):
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written
    return position


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a GGUF model with random weights.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="that write; by default about one a processor")
    options = parser.parse_args()
    shape = MODELS[options.model]
    if options.layers is not None:
        shape = dataclasses.replace(shape, layers=options.layers)
    start = time.perf_counter()
    write_model(options.path, shape, seed=options.seed, threads=options.threads)
    seconds, size = time.perf_counter() - start, options.path.stat().st_size / 1e9
    print(f"{options.path}: {size:.2f} GB in {seconds:.1f} s, {size / seconds:.2f} GB/s")


if __name__ == "__main__":
    main()
