"""The time of one moe_ffn, in a jitted chain of layers with different weights and routings."""

import functools
import math

import clock
import jax
import jax.numpy as jnp
import numpy as np
import random_weights
from shapes import Model, draw_ids

import jax_moe

WEIGHT_BYTES = 3e9  # of a chain's layers together, about: many times the L2 cache
FEWEST_LAYERS, MOST_LAYERS = 2, 16


def make_layers(model: Model, formats, tokens: int, dtype: str, variant) -> list[jax_moe.Experts]:
    """Layers for chains of up to `tokens` tokens: WEIGHT_BYTES of them where memory allows."""
    first = random_weights.experts(0, formats, model)
    size = weight_bytes(first)
    count = int(np.clip(np.ceil(WEIGHT_BYTES / size), FEWEST_LAYERS, MOST_LAYERS))
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        x = jax.ShapeDtypeStruct((tokens, model.d_model), dtype)
        shape = (tokens, model.top_k)
        routing = jax_moe.Routing(
            jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
        )
        kernel = jax_moe.select_kernel("moe_ffn", x, routing, first, variant=variant)
        # Besides layers: scratch, a few activations, and one weight twice while it is repacked,
        # which may double it.
        rest = 1.2 * kernel.workspace_bytes + 16 * tokens * model.d_model + size
        free = stats["bytes_limit"] - stats["bytes_in_use"] - rest
        count = max(1, min(count, 1 + int(free // (2 * size))))
    return [first] + [random_weights.experts(i, formats, model) for i in range(1, count)]


def weight_bytes(layer: jax_moe.Experts) -> int:
    """Bytes of a layer's weights in the file, whatever their layout."""
    return sum(file_bytes(weight) for weight in (layer.gate, layer.up, layer.down))


def file_bytes(weight) -> int:
    if not isinstance(weight, jax_moe.PackedExperts):
        return weight.nbytes
    *leading, columns = weight.shape
    return math.prod(leading) * weight.format.row_bytes(columns)


def prepack(layers: list[jax_moe.Experts]) -> list[jax_moe.Experts] | None:
    """The layers in the tiled layout, their memory used again; None where there is none."""
    if not hasattr(jax_moe.Experts, "prepack"):
        print("  tiled: this jax_moe has no Experts.prepack")
        return None
    if not hasattr(layers[0].gate, "layout"):  # dense
        return None
    tiled = []
    while layers:
        tiled.append(layers.pop(0).prepack(donate=True))
    return tiled if tiled[0].gate.layout or tiled[0].down.layout else None


def measure(model: Model, layers, tokens: int, routing: str, dtype: str, variant) -> dict:
    """Seconds a layer, and the bytes of the experts that its routings use."""
    calls = 64 if tokens <= 4 else 32 if tokens <= 64 else 4
    layers = layers[:calls]
    rng = np.random.default_rng(tokens)
    ids = [draw_ids(rng, model, tokens, routing) for _ in range(calls)]
    x = random_weights.activations((tokens, model.d_model), dtype)
    routings, value = [], x
    for i, layer_ids in enumerate(ids):
        value, scaled = _scaled_layer(
            value, jnp.asarray(layer_ids), layers[i % len(layers)], variant
        )
        routings.append(scaled)

    def chain(x, routings, layers):
        for i, scaled in enumerate(routings):
            x = _layer(x, scaled, layers[i % len(layers)], variant)
        return x

    seconds = clock.chain_seconds(chain, x, routings, layers, tokens=tokens) / calls
    active = np.mean([len(np.unique(layer_ids)) for layer_ids in ids])
    return {
        "seconds": seconds,
        "bytes": weight_bytes(layers[0]) * active / model.experts,
        "flop": model.flop(tokens),
        "layers": len(layers),
        "calls": calls,
    }


@functools.partial(jax.jit, static_argnums=3)
def _layer(x, routing, layer, variant):
    return jax_moe.moe_ffn(x, routing, layer, variant=variant)


@functools.partial(jax.jit, static_argnums=3)
def _scaled_layer(x, ids, layer, variant):
    """A layer's output of a mean square of one, and the routing that makes it so.

    Both are exactly what the chain then computes: a layer squares its input's scale, so that the
    least difference would grow from layer to layer to infinity.
    """
    plain = jax_moe.Routing(ids, jnp.ones(ids.shape, jnp.float32) / ids.shape[1])
    y = _layer(x, plain, layer, variant).astype(jnp.float32)
    scaled = jax_moe.Routing(ids, plain.weights * jax.lax.rsqrt(jnp.mean(y**2)))
    return _layer(x, scaled, layer, variant), scaled
