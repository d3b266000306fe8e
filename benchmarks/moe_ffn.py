"""Time of moe_ffn on one GPU against what its memory and tensor cores allow.

    python benchmarks/moe_ffn.py --models qwen3-30b-a3b --formats Q4_K,Q6_K --tokens 1,16,256

A measured program is one jitted chain of layers with different weights, so that the L2 cache does
not serve them. A row's bound is the larger of the bytes of the experts that its routing really uses
over the read bandwidth, and the operations over the rate of a large bf16 product, both measured in
the same run. Rows that the JSON file already holds are skipped.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import random_weights

import jax_moe


@dataclass(frozen=True)
class Model:
    experts: int
    top_k: int
    d_model: int
    d_expert: int


MODELS = {
    "qwen3-30b-a3b": Model(128, 8, 2048, 768),
    "mixtral-8x7b": Model(8, 2, 4096, 14336),
    "deepseek-v3": Model(256, 8, 7168, 2048),
    "gpt-oss-120b": Model(128, 4, 2880, 2880),
}
WEIGHT_BYTES = 12e9  # of a chain's layers together, at most


def median_time(call, repeats: int = 5, seconds: float = 0.15) -> float:
    """Seconds of one call(), the median of `repeats` batches of back-to-back calls."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    batch = max(1, int(seconds / repeats / max(time.perf_counter() - start, 1e-6)))
    for _ in range(2):  # a command buffer is recorded on the second execution
        jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(batch):
            result = call()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / batch)
    return float(np.median(times))


def ceilings() -> dict[str, float]:
    """Read bandwidth in bytes a second, and the rate of a bf16 product in operations a second."""
    words = jnp.ones((1 << 30,), jnp.float32)
    total = jax.jit(jnp.sum)
    read = words.nbytes / median_time(lambda: total(words))
    n = 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    rate = 2 * n**3 / median_time(lambda: product(a, b))
    return {"read_bytes_per_s": read, "bf16_flop_per_s": rate}


def draw_ids(rng: np.random.Generator, model: Model, tokens: int, routing: str) -> np.ndarray:
    """int32 [tokens, top_k], distinct in a row; "zipf" makes expert e likely as 1 / (e + 1)."""
    scores = rng.gumbel(size=(tokens, model.experts))
    if routing == "zipf":
        scores -= np.log1p(rng.permutation(model.experts))
    return np.argsort(-scores, axis=1)[:, : model.top_k].astype(np.int32)


def make_layers(model: Model, formats: tuple[str, str], chain: int) -> list[jax_moe.Experts]:
    """Layers of gate and up in formats[0] and down in formats[1]."""
    hidden = (model.experts, model.d_expert, model.d_model)
    out = (model.experts, model.d_model, model.d_expert)
    layers = []
    for layer in range(chain):
        keys = jax.random.split(jax.random.key(layer), 3)
        layers.append(
            jax_moe.Experts(
                gate=random_weights.packed(keys[0], formats[0], *hidden),
                up=random_weights.packed(keys[1], formats[0], *hidden),
                down=random_weights.packed(keys[2], formats[1], *out),
            )
        )
    return layers


def layer_bytes(layer: jax_moe.Experts) -> int:
    return sum(weight.data.nbytes for weight in (layer.gate, layer.up, layer.down))


def measure(model: Model, layers, tokens: int, routing: str, dtype, variant) -> dict[str, float]:
    rng = np.random.default_rng(tokens)
    ids = [draw_ids(rng, model, tokens, routing) for _ in layers]
    x = jnp.asarray(rng.standard_normal((tokens, model.d_model)), dtype)
    step = jax.jit(lambda x, r, e: jax_moe.moe_ffn(x, r, e, variant=variant))
    # Routing weights that keep the activations of the chain near one.
    routings, value = [], x
    for layer, layer_ids in zip(layers, ids, strict=True):
        plain = jnp.full((tokens, model.top_k), 1 / model.top_k, jnp.float32)
        rms = jnp.sqrt(jnp.mean(step(value, jax_moe.Routing(layer_ids, plain), layer) ** 2.0))
        routings.append(jax_moe.Routing(jnp.asarray(layer_ids), plain / rms))
        value = step(value, routings[-1], layer)
    rounds = max(1, 32 // len(layers)) if tokens <= 64 else 1

    @jax.jit
    def chain(x, routings, layers):
        for _ in range(rounds):
            for r, e in zip(routings, layers, strict=True):
                x = jax_moe.moe_ffn(x, r, e, variant=variant)
        return x

    seconds = median_time(lambda: chain(x, routings, layers)) / (rounds * len(layers))
    active = np.mean([len(np.unique(layer_ids)) for layer_ids in ids])
    flop = 6 * tokens * model.top_k * model.d_model * model.d_expert
    return {
        "seconds": seconds,
        "bytes": layer_bytes(layers[0]) * active / model.experts,
        "flop": flop,
    }


def ragged_dot_seconds(model: Model, tokens: int) -> float:
    """A layer through jax.lax.ragged_dot on bf16 weights, rows already sorted, uniform groups."""
    pairs = tokens * model.top_k
    rng = np.random.default_rng(0)
    counts = np.bincount(draw_ids(rng, model, tokens, "uniform").ravel(), minlength=model.experts)
    sizes = jnp.asarray(counts, jnp.int32)
    key = jax.random.key(0)
    shape = (model.experts, model.d_model, model.d_expert)
    gate, up = (jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key))
    down = jax.random.normal(key, (model.experts, model.d_expert, model.d_model), jnp.bfloat16)
    x = jax.random.normal(key, (pairs, model.d_model), jnp.bfloat16)

    @jax.jit
    def layer(x, gate, up, down):
        h = jax.nn.silu(jax.lax.ragged_dot(x, gate, sizes)) * jax.lax.ragged_dot(x, up, sizes)
        return jax.lax.ragged_dot(h, down, sizes)

    return median_time(lambda: layer(x, gate, up, down))


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    for name in sorted({(row["model"], row["format"]) for row in rows}):
        line = sorted(
            (r["tokens"], r["fraction"]) for r in rows if (r["model"], r["format"]) == name
        )
        axes.plot(*zip(*line, strict=True), marker="o", label=" ".join(name))
    axes.set(xscale="log", xlabel="tokens", ylabel="fraction of the bound", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", default="qwen3-30b-a3b", help="comma-separated, or all: " + ", ".join(MODELS))
    add("--formats", default="Q4_K", help="comma-separated; A/B is gate and up in A, down in B")
    add("--tokens", default="1,4,16,64,256,1024,4096")
    add("--routing", choices=("uniform", "zipf"), default="uniform")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    add("--variant", choices=[variant.name for variant in jax_moe.MoEVariant])
    add("--ragged-dot", action="store_true", help="also time jax.lax.ragged_dot on bf16 weights")
    add("--json", type=Path, help="file that rows are added to and taken from")
    add("--plot", type=Path, help="image of the fractions")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    limits = ceilings()
    device = jax.devices()[0].device_kind
    print(
        f"{device}: read {limits['read_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"bf16 product {limits['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s"
    )
    print(
        f"{'model':14} {'format':11} {'tokens':>6} {'us/layer':>9} {'bound us':>9} {'fraction':>8}"
    )
    names = list(MODELS) if args.models == "all" else args.models.split(",")
    for name in names:
        model = MODELS[name]
        for format_name in args.formats.split(","):
            formats = tuple((format_name.split("/") * 2)[:2])
            layers = None
            for tokens in map(int, args.tokens.split(",")):
                key = {
                    "model": name,
                    "format": format_name,
                    "routing": args.routing,
                    "dtype": args.dtype,
                    "variant": args.variant or "default",
                    "tokens": tokens,
                }
                if any(key.items() <= row.items() for row in rows):
                    continue
                if layers is None:
                    one = make_layers(model, formats, 1)
                    count = int(np.clip(WEIGHT_BYTES // layer_bytes(one[0]), 3, 8))
                    layers = one + make_layers(model, formats, count)[1:]
                variant = args.variant and jax_moe.MoEVariant[args.variant]
                row = key | measure(model, layers, tokens, args.routing, args.dtype, variant)
                memory = row["bytes"] / limits["read_bytes_per_s"]
                bound = max(memory, row["flop"] / limits["bf16_flop_per_s"])
                row |= (
                    limits | asdict(model) | {"device": device, "fraction": bound / row["seconds"]}
                )
                if args.ragged_dot:
                    row["ragged_dot_seconds"] = ragged_dot_seconds(model, tokens)
                rows.append(row)
                print(
                    f"{name:14} {format_name:11} {tokens:6} {row['seconds'] * 1e6:9.1f} "
                    f"{bound * 1e6:9.1f} {row['fraction']:8.2f}"
                    + (
                        f"  ragged_dot {row['ragged_dot_seconds'] / row['seconds']:.1f} x"
                        if args.ragged_dot
                        else ""
                    ),
                    flush=True,
                )
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
