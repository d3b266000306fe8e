"""A decoder-only transformer with MoE layers: Qwen3-MoE and gpt-oss, whichever its parts are from.

What tells the two apart is data: which optional parameters a layer has, and its window. A layer is

    x += o(attention(rotate(qk_norm(q(norm(x)))), rotate(qk_norm(k(norm(x)))), v(norm(x))))
    x += moe_block(norm(x))

All matrices stay packed as the file has them. Those of attention and the vocabulary are MoE weights
of one expert, so the same kernels multiply by them.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from attention import KVCache, Rope, Rotation, attend, rotate
from jax import Array

import jax_moe


@dataclass(frozen=True)
class Config:
    """What is the same in all layers: hashable, a static argument of jitted functions.

    Attributes:
      num_heads, num_kv_heads, head_dim: of attention.
      rope: the position embedding.
      norm_eps: epsilon of the RMS norms.
      dtype: of what goes into matrix products and of the KV cache. The residual stream is float32.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    norm_eps: float
    dtype: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Linear:
    """A matrix, packed or dense, `[1, N, K]`, and a bias, float32 `[N]`."""

    weight: jax_moe.PackedExperts | Array
    bias: Array | None = None

    def __call__(self, x: Array) -> Array:
        """`[T, K]` to float32 `[T, N]`: a grouped product in which every row goes to expert 0."""
        rows = jnp.arange(x.shape[0], dtype=jnp.int32)
        y = jax_moe.moe_gemm(
            x,
            self.weight,
            rows,
            jnp.zeros_like(rows),
            top_k=1,
            preferred_element_type=jnp.float32,
        )
        return y if self.bias is None else y + self.bias

    def rows(self, ids: Array) -> Array:
        """Rows of the matrix, float32 `[T, K]`: only these are unpacked."""
        if not isinstance(self.weight, jax_moe.PackedExperts):
            return self.weight[0, ids].astype(jnp.float32)
        packed = jax_moe.PackedExperts(self.weight.data[:, ids], self.weight.format)
        return packed.dequantize()[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """The parameters of one layer; norms and sinks are float32.

    The rows of `qkv`, one matrix after another, give queries, keys and values: a single matrix
    where all are packed alike, since few tokens take as long with few rows as with many.

    Qwen3-MoE has a norm of each query's and key's head, in rows of qk_norm
    `[num_heads + num_kv_heads, head_dim]`; gpt-oss has sinks, biases, and a window in every other
    layer.
    """

    attention_norm: Array
    qkv: list[Linear]
    o: Linear
    moe_norm: Array
    moe: jax_moe.MoEParams
    qk_norm: Array | None
    sinks: Array | None
    moe_config: jax_moe.MoEConfig = field(metadata={"static": True})
    window: int | None = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transformer:
    """A whole model: `embedding` and `output` are `[1, vocabulary, d_model]`."""

    embedding: Linear
    layers: list[Layer]
    output_norm: Array
    output: Linear
    config: Config = field(metadata={"static": True})

    def new_cache(self, capacity: int) -> list[KVCache]:
        """An empty cache for at least so many positions, one a layer."""
        config = self.config
        # Products with the cache's positions take these in tiles, on a GPU of up to 128: of another
        # capacity XLA copies the cache into a larger array, in every layer and for every token.
        shape = (config.num_kv_heads, -(-capacity // 128) * 128, config.head_dim)
        return [
            KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
            for _ in self.layers
        ]


def forward(
    model: Transformer, tokens: Array, caches: list[KVCache], start: Array
) -> tuple[Array, list[KVCache]]:
    """Runs tokens int32 `[T]` at positions from `start` on, which the caches must have room for.

    Returns:
      the residual stream after the last layer, float32 `[T, d_model]`, and the filled caches.
    """
    config = model.config
    positions = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)
    rotation = config.rope.rotation(positions, config.head_dim)
    x = model.embedding.rows(tokens)
    written = []
    # Layers are unrolled: `lax.scan` over stacked layers would have to slice the experts of one
    # layer out of the stack, a copy of them all, of which a token needs a few. Since `_layer` is
    # jitted, layers of one structure are traced once; each still has its own place in the program.
    for layer, cache in zip(model.layers, caches, strict=True):
        x, cache = _layer(layer, x, cache, start, rotation, config=config)
        written.append(cache)
    return x, written


def logits(model: Transformer, x: Array) -> Array:
    """Scores of all tokens of the vocabulary, float32 `[T, vocabulary]`, from `forward`'s x."""
    x = _rms_norm(x, model.output_norm, model.config.norm_eps)
    return model.output(x.astype(model.config.dtype))


@partial(jax.jit, static_argnames="config")
def _layer(
    layer: Layer, x: Array, cache: KVCache, start: Array, rotation: Rotation, *, config: Config
) -> tuple[Array, KVCache]:
    positions = start + jnp.arange(x.shape[0], dtype=jnp.int32)
    norm = partial(_rms_norm, eps=config.norm_eps)

    normed = norm(x, layer.attention_norm).astype(config.dtype)
    heads = jnp.concatenate([linear(normed) for linear in layer.qkv], axis=-1)
    heads = heads.reshape(x.shape[0], -1, config.head_dim)
    # What happens to queries and keys alike happens to both at once: each step of few tokens is a
    # small kernel that takes as long with few heads as with many.
    qk, v = jnp.split(heads, (config.num_heads + config.num_kv_heads,), axis=1)
    if layer.qk_norm is not None:
        qk = norm(qk, layer.qk_norm)
    q, k = jnp.split(rotate(qk, rotation), (config.num_heads,), axis=1)
    cache = cache.write(k, v, start)
    mixed = attend(q, cache, positions, window=layer.window, sinks=layer.sinks)
    x += layer.o(mixed.astype(config.dtype))

    normed = norm(x, layer.moe_norm).astype(config.dtype)
    x += jax_moe.moe_block(layer.moe, normed, layer.moe_config)
    return x, cache


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps) * weight
