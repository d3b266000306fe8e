"""What a JAX user has without this package: grouped products on bf16 experts.

A layer is two products, gate with up and down, on rows that are already sorted by expert; the
gather, the routing weights and the sum over slots, which moe_ffn's time includes, are left out.
"""

import functools
import importlib
import logging
import sys
import types

import clock
import jax
import jax.numpy as jnp
import numpy as np
import random_weights
from shapes import Model, draw_ids, group_sizes

WEIGHT_SETS = 2


class Peers:
    """The peers of one model: their weights are made on first use."""

    def __init__(self, model: Model, names: list[str]) -> None:
        self.model = model
        self.names = names
        self.sets: list = []

    def seconds(self, tokens: int, routing: str) -> dict[str, float | None]:
        """Seconds a layer of every peer, None where it cannot run."""
        return {f"{name}_seconds": self._seconds(name, tokens, routing) for name in self.names}

    def _seconds(self, name: str, tokens: int, routing: str) -> float | None:
        best = None
        for label, product in _PRODUCTS[name](tokens * self.model.top_k / self.model.experts):
            try:
                seconds = self._chain_seconds(product, tokens, routing)
            except Exception as error:  # a peer's failure is n/a, whatever it raises
                print(f"  {label}, {tokens} tokens: n/a ({one_line(error)})", flush=True)
                continue
            print(f"  {label}, {tokens} tokens: {seconds * 1e6:.0f} us", flush=True)
            best = seconds if best is None else min(best, seconds)
        return best

    def _chain_seconds(self, product, tokens: int, routing: str) -> float:
        model = self.model
        if not self.sets:
            for seed in range(WEIGHT_SETS):
                up = (model.experts, model.d_model, 2 * model.d_expert)
                down = (model.experts, model.d_expert, model.d_model)
                make = functools.partial(random_weights.dense, dtype=jnp.bfloat16)
                self.sets.append((make(np.uint32(seed), *up), make(np.uint32(seed + 9), *down)))
        rng = np.random.default_rng(tokens)
        calls = 8 if tokens <= 64 else WEIGHT_SETS
        ids = [draw_ids(rng, model, tokens, routing) for _ in range(calls)]
        sizes = [jnp.asarray(group_sizes(layer_ids, model)) for layer_ids in ids]
        x = random_weights.activations((tokens * model.top_k, model.d_model), jnp.bfloat16)

        def chain(x, sizes, sets):
            for i, counts in enumerate(sizes):
                up, down = sets[i % WEIGHT_SETS]
                gate, up = jnp.split(product(x, up, counts), 2, axis=1)
                x = product(jax.nn.silu(gate) * up, down, counts)
            return x

        return clock.chain_seconds(chain, x, sizes, self.sets, tokens=tokens) / calls


def one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:100] or type(error).__name__


def _ragged_dot(rows_an_expert: float) -> list:
    return [("jax.lax.ragged_dot", jax.lax.ragged_dot)]


@functools.cache
def _import_tokamax() -> types.ModuleType | None:
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every shape it has not tuned
    try:
        _stub_profiler()
        return importlib.import_module("tokamax")
    except Exception as error:  # incompatible versions raise anything
        print(f"  tokamax: n/a, it cannot be imported ({one_line(error)})", flush=True)
        return None


def _tokamax(rows_an_expert: float) -> list:
    """tokamax's Mosaic kernel: with its own choice of tile, and with what its table for the H100
    lists most often for many rows an expert, and for few."""
    tokamax = _import_tokamax()
    if tokamax is None:
        return []
    products = [("tokamax mosaic", functools.partial(tokamax.ragged_dot, implementation="mosaic"))]
    try:
        kernel = importlib.import_module("tokamax._src.ops.ragged_dot.pallas_mosaic_gpu")
        tile = {"block_n": 64, "block_k": 128, "num_stages": 4, "split_k": 1, "grid_minor_dim": 1}
        if rows_an_expert > 32:
            tile |= {"block_m": 128, "persistent": True, "grid_tile_width": 4}
        else:
            tile |= {"block_m": 64, "persistent": False, "grid_tile_width": 8}
        op = kernel.PallasMosaicGpuRaggedDot(config=kernel.Config(**tile))
        product = functools.partial(tokamax.ragged_dot, implementation=[op])
        products.append((f"tokamax mosaic, {tile['block_m']} rows", product))
    except Exception as error:
        print(f"  tokamax: only its own choice of tile ({one_line(error)})", flush=True)
    return products


def _stub_profiler() -> None:
    """tokamax imports xprof, which only its benchmarks use: without it, a stub does."""
    try:
        importlib.import_module("xprof.cli.tools")
    except ImportError:
        for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["xprof.cli.tools"].get_kernel_stats_tool = None


_PRODUCTS = {"ragged_dot": _ragged_dot, "tokamax": _tokamax}
NAMES = list(_PRODUCTS)
