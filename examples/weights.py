"""Reads a whole model from a GGUF file: shapes and rules from its keys, tensors by their names."""

import dataclasses
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from attention import Rope
from transformer import Config, Layer, Linear, Transformer

import jax_moe

# The norm before the MoE block, by architecture.
MOE_NORM = {"qwen3moe": "ffn_norm", "gpt-oss": "post_attention_norm"}


def load_transformer(
    file: jax_moe.GGUFFile,
    *,
    dtype: str = "float32",
    device: jax.Device | None = None,
    prepack: bool | None = None,
) -> Transformer:
    """Loads a Qwen3-MoE or gpt-oss model.

    Layers go to the device one by one, so a model may be larger than the host's memory. On the CPU
    they may be views of the file, which is then not copied at all.

    Args:
      file: an open model.
      dtype: "float32", "bfloat16" or "float16", of activations and of the KV cache.
      device: where to put the weights; JAX's default device if None.
      prepack: whether matrices get the layout that GPUs read fastest, those of the experts and all
        others but the embedding, of which rows are read; None: on a GPU.

    Raises:
      ValueError: the architecture is another one, a tensor is missing, or a layer cannot be run.
    """
    if prepack is None:
        prepack = (jax.devices()[0] if device is None else device).platform == "gpu"
    return _Reader(file, dtype, device, prepack).transformer()


class _Reader:
    def __init__(
        self, file: jax_moe.GGUFFile, dtype: str, device: jax.Device | None, prepack: bool
    ):
        if file.architecture not in MOE_NORM:
            known = ", ".join(MOE_NORM)
            raise ValueError(f"architecture {file.architecture!r} is not one of {known}.")
        self.file = file
        self.dtype = dtype
        self.device = device
        self.prepack = prepack

    def transformer(self) -> Transformer:
        num_layers = self.key("block_count")
        layers = []
        for i in range(num_layers):
            layers.append(self.layer(i))
            if sys.stderr.isatty():
                print(f"\rloaded layer {i + 1} of {num_layers}", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        embedding = self.linear("token_embd", prepack=False)
        # A model without an output matrix uses the embedding's.
        tied = "output.weight" not in self.file.tensors
        return Transformer(
            embedding=embedding,
            layers=layers,
            output_norm=self.vector("output_norm.weight"),
            output=embedding if tied else self.linear("output"),
            config=self.config(),
        )

    def key(self, name: str, default: Any = None) -> Any:
        """The value of a key of the architecture, like "qwen3moe.block_count"."""
        name = f"{self.file.architecture}.{name}"
        value = self.file.metadata.get(name, default)
        if value is None:
            raise ValueError(f"{self.file.path}: key {name!r} is missing.")
        return value

    def config(self) -> Config:
        num_heads = self.key("attention.head_count")
        head_dim = self.key("attention.key_length", self.key("embedding_length") // num_heads)
        rotated = self.key("rope.dimension_count", head_dim)
        if rotated != head_dim or self.key("attention.value_length", head_dim) != head_dim:
            raise ValueError(f"{self.file.path}: keys, values and rotation differ in width.")
        return Config(
            num_heads=num_heads,
            num_kv_heads=self.key("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rope=self.rope(),
            norm_eps=self.key("attention.layer_norm_rms_epsilon"),
            dtype=self.dtype,
        )

    def rope(self) -> Rope:
        scaling = self.key("rope.scaling.type", "linear")
        if scaling not in ("none", "linear", "yarn"):
            raise ValueError(f"{self.file.path}: no code for {scaling!r} scaling of positions.")
        return Rope(
            base=self.key("rope.freq_base", 10000.0),
            factor=1.0 if scaling == "none" else self.key("rope.scaling.factor", 1.0),
            yarn=scaling == "yarn",
            original_context=self.key(
                "rope.scaling.original_context_length", self.key("context_length")
            ),
            scale=self.key("rope.scaling.attn_factor", 1.0),
        )

    def window(self, layer: int) -> int | None:
        """gpt-oss has a window in its even layers, unless the file tells otherwise."""
        if self.file.architecture != "gpt-oss":
            return None
        pattern = self.key("attention.sliding_window_pattern", 2)
        if isinstance(pattern, int):  # all but the last of so many layers
            windowed = pattern == 0 or layer % pattern < pattern - 1
        else:
            windowed = bool(pattern[layer])
        return self.key("attention.sliding_window") if windowed else None

    def layer(self, i: int) -> Layer:
        moe, moe_config = self.file.load(i, self.device, prepack=self.prepack, progress=False)
        prefix = f"blk.{i}"
        return Layer(
            attention_norm=self.vector(f"{prefix}.attn_norm.weight"),
            qkv=self.joined(*(f"{prefix}.attn_{which}" for which in "qkv")),
            o=self.linear(f"{prefix}.attn_output"),
            moe_norm=self.vector(f"{prefix}.{MOE_NORM[self.file.architecture]}.weight"),
            moe=moe,
            qk_norm=self.qk_norm(prefix),
            sinks=self.optional(f"{prefix}.attn_sinks.weight"),
            moe_config=moe_config,
            window=self.window(i),
        )

    def qk_norm(self, prefix: str) -> jax.Array | None:
        """Of all heads of queries and then of keys, where the file has a norm for either."""
        q_norm, k_norm = (f"{prefix}.attn_{which}_norm.weight" for which in "qk")
        if not {q_norm, k_norm} & set(self.file.tensors):
            return None
        config = self.config()
        rows = (config.num_heads, 1), (config.num_kv_heads, 1)
        return jnp.concatenate(
            [jnp.tile(self.vector(q_norm), rows[0]), jnp.tile(self.vector(k_norm), rows[1])]
        )

    def linear(self, name: str, prepack: bool | None = None) -> Linear:
        weight = self.file.load_tensor(
            f"{name}.weight",
            self.device,
            prepack=self.prepack if prepack is None else prepack,
            progress=False,
        )
        if not isinstance(weight, jax_moe.PackedExperts):
            weight = weight[None]
        return Linear(weight, self.optional(f"{name}.bias"))

    def joined(self, *names: str) -> list[Linear]:
        """Matrices one after another; neighbours of one format are one, with the rows of both."""
        parts = [self.linear(name, prepack=False) for name in names]
        result = []
        for _, same in itertools.groupby(parts, _kind):
            part = jax.tree.map(_rows_of_all, *same)
            if self.prepack and isinstance(part.weight, jax_moe.PackedExperts):
                part = dataclasses.replace(part, weight=part.weight.prepack(donate=True))
            result.append(part)
        return result

    def optional(self, name: str) -> jax.Array | None:
        return self.vector(name) if name in self.file.tensors else None

    def vector(self, name: str) -> jax.Array:
        """A norm, bias or sink. Such small tensors are never packed."""
        tensor = self.file.load_tensor(name, self.device, progress=False)
        if isinstance(tensor, jax_moe.PackedExperts):
            raise ValueError(f"{self.file.path}: tensor {name!r} is packed.")
        return tensor.astype(jnp.float32)


def _kind(linear: Linear) -> tuple[Any, ...]:
    """What is the same in matrices that can be one: the format, and whether there is a bias."""
    leaves, structure = jax.tree.flatten(linear)
    return structure, *(leaf.dtype for leaf in leaves)


def _rows_of_all(*leaves: jax.Array) -> jax.Array:
    """Weights `[1, N, ...]` or biases `[N]`, one after another along N."""
    if len(leaves) == 1:
        return leaves[0]
    return jnp.concatenate(leaves, axis=min(1, leaves[0].ndim - 1))
