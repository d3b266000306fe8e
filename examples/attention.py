"""Attention of one layer: rotary positions, the key-value cache, and grouped-query attention."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Rotation(NamedTuple):
    """Cosines and sines of the angles, each `[T, 1, head_dim / 2]`: for all heads and layers."""

    cos: Array
    sin: Array


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, with the YaRN extension of a model's context.

    Attributes:
      base: of the frequencies `base ** (-2 i / head_dim)`.
      factor: how far the context is stretched; 1 leaves the frequencies alone.
      yarn: stretch only the low frequencies (https://arxiv.org/abs/2309.00071), which tell far
        positions apart; otherwise all of them alike.
      original_context: tokens that the model was trained on before the stretch.
      scale: of the rotated vectors.
    """

    base: float
    factor: float = 1.0
    yarn: bool = False
    original_context: int = 0
    scale: float = 1.0

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Radians a position, `[head_dim / 2]`, and the scale of the rotated vectors."""
        pairs = np.arange(head_dim // 2)
        trained = self.base ** (-2.0 * pairs / head_dim)
        stretched = trained / self.factor
        if not self.yarn:
            return stretched, self.scale

        def pair_that_turns(times: float) -> float:
            """The pair that makes so many turns within the original context."""
            turns = self.original_context / (times * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.base))

        # Pairs that turn 32 times or more keep their frequency; below one turn they are stretched.
        low = max(0, math.floor(pair_that_turns(32)))
        high = min(head_dim - 1, math.ceil(pair_that_turns(1)))
        keep = 1 - np.clip((pairs - low) / max(1e-3, high - low), 0, 1)
        scale = self.scale * (1 + 0.1 * math.log(max(1.0, self.factor)))
        return stretched * (1 - keep) + trained * keep, scale

    def rotation(self, positions: Array, head_dim: int) -> Rotation:
        """By positions `[T]`."""
        frequencies, scale = self.frequencies(head_dim)
        angles = positions[:, None, None].astype(jnp.float32) * frequencies.astype(np.float32)
        return Rotation(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def rotate(x: Array, rotation: Rotation) -> Array:
    """Turns x `[T, heads, head_dim]`; element i pairs with i + head_dim / 2."""
    cos, sin = rotation
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class KVCache(NamedTuple):
    """The keys and values of one layer, each `[kv_heads, capacity, head_dim]`.

    Heads come first, so that each head's rows are one matrix. What positions beyond the sequence
    hold does not matter: no query looks ahead.
    """

    keys: Array
    values: Array

    def write(self, keys: Array, values: Array, start: Array) -> "KVCache":
        """Puts `[T, kv_heads, head_dim]` at positions from `start` on."""

        def put(old: Array, new: Array) -> Array:
            new = new.transpose(1, 0, 2).astype(old.dtype)
            return jax.lax.dynamic_update_slice(old, new, (0, start, 0))

        return KVCache(put(self.keys, keys), put(self.values, values))


def attend(
    q: Array, cache: KVCache, positions: Array, *, window: int | None, sinks: Array | None
) -> Array:
    """Attention of queries to all positions up to their own.

    Args:
      q: float32 `[T, heads, head_dim]`; every `heads / kv_heads` heads in a row share a key.
      cache: with the queries' own positions already written.
      positions: int32 `[T]` of the queries.
      window: how many positions a query sees, its own included; None: all.
      sinks: float32 `[heads]`: a logit of every head that takes part in the softmax and has no
        value, so that a head can attend to nothing.

    Returns:
      float32 `[T, heads * head_dim]`.
    """
    num_tokens, num_heads, head_dim = q.shape
    kv_heads, capacity, _ = cache.keys.shape
    q = (q * head_dim**-0.5).astype(cache.keys.dtype)
    q = q.reshape(num_tokens, kv_heads, -1, head_dim)

    # Products are of the cache's dtype, sums float32; without HIGHEST a GPU rounds float32 inputs.
    exact = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    scores = jnp.einsum("tghd,gsd->gths", q, cache.keys, **exact)
    distance = positions[:, None] - jnp.arange(capacity)
    seen = (distance >= 0) & (distance < (window or capacity))
    scores = jnp.where(seen[:, None, :], scores, -jnp.inf)

    highest = scores.max(-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.reshape(kv_heads, 1, -1, 1)
        highest = jnp.maximum(highest, sinks)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - highest)
    weights = (weights / total).astype(cache.values.dtype)
    mixed = jnp.einsum("gths,gsd->tghd", weights, cache.values, **exact)
    return mixed.reshape(num_tokens, num_heads * head_dim)
