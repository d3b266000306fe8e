"""`python -m jax_moe bench`: moe_ffn against ggml's CPU graph, in the same run on the same threads.

The weights are real: a tile of normally distributed rows, quantised, and every expert's rows drawn
from it. Each repetition routes to other experts, so that a token's weights come from memory.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe._cli import positive
from jax_moe._ffn import Experts, moe_ffn
from jax_moe._formats import FORMATS, BlockFormat, as_format
from jax_moe._ggml_moe import GgmlFfn, aligned
from jax_moe._packed import PackedExperts
from jax_moe._quantize import quantize
from jax_moe._routing import Routing
from jax_moe._select import select_kernel
from jax_moe._table import table
from jax_moe._variants import MoEVariant

_ROUTINGS = 16
_TILE_ROWS = 32
_REST_SECONDS = 0.005
_IN_A_ROW = 4


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark on the CPU and prints its table; returns the exit status.

    Raises: ImportError where ggml's libraries are needed and not installed.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    formats = [format for named in options.formats for format in named]
    _check_sizes(parser, options, formats)
    with jax.default_device(jax.devices("cpu")[0]):
        return _run(formats, options)


def _run(formats: Sequence[BlockFormat], options: argparse.Namespace) -> int:
    rows = []
    header: dict[str, Any] = {}
    for format in formats:
        layer = _Layer(format, options)
        for tokens in options.tokens:
            row = _measure(layer, tokens, options)
            header = {
                "cpu": _cpu_name(),
                "threads": _threads(),
                "instruction_set": row.pop("instruction_set"),
                "ggml": _ggml_version() if options.ggml else None,
                "experts": options.experts,
                "top_k": options.top_k,
                "d_model": options.d_model,
                "d_expert": options.d_expert,
            }
            rows.append(row)
    if options.json:
        print(json.dumps({"setting": header, "rows": rows}, indent=1))
    else:
        print(
            f"moe_ffn, {options.experts} experts, top_k {options.top_k}, d_model "
            f"{options.d_model}, d_expert {options.d_expert}; {header['cpu']}, "
            f"{header['threads']} threads, kernels for {header['instruction_set']}; "
            f"ggml: {header['ggml'] or 'not measured'}"
        )
        print(_text(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_moe bench",
        description="Time moe_ffn on this CPU against ggml's mul_mat_id graph: median "
        "milliseconds of a call. The defaults are the shape of Qwen3-30B-A3B.",
    )
    names = ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "MXFP4"]
    parser.add_argument(
        "--formats",
        nargs="+",
        type=_formats,
        default=list(map(_formats, names)),
        metavar="NAME",
        help="block formats, or all",
    )
    parser.add_argument("--tokens", nargs="+", type=positive, default=[1, 16, 256], metavar="T")
    parser.add_argument("--experts", type=positive, default=128)
    parser.add_argument("--top-k", type=positive, default=8)
    parser.add_argument("--d-model", type=positive, default=2048)
    parser.add_argument("--d-expert", type=positive, default=768)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="measuring time a row (default 2)"
    )
    parser.add_argument("--no-ggml", dest="ggml", action="store_false", help="leave ggml out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _formats(text: str) -> list[BlockFormat]:
    try:
        return list(FORMATS.values()) if text == "all" else [as_format(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _check_sizes(
    parser: argparse.ArgumentParser, options: argparse.Namespace, formats: Sequence[BlockFormat]
) -> None:
    """Ends the process with a message where the sizes do not fit one another or the formats."""
    if options.top_k > options.experts:
        parser.error(f"--top-k is at most --experts, {options.experts}, not {options.top_k}")
    for name, size in (("--d-model", options.d_model), ("--d-expert", options.d_expert)):
        for format in formats:
            if size % format.block_size:
                parser.error(
                    f"{name} is a multiple of the {format.block_size} weights of a {format.name} "
                    f"block, not {size}"
                )


def _threads() -> int:
    """The threads of XLA's CPU client: the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return "unknown CPU"


def _ggml_version() -> str:
    return f"libggml-python {importlib.metadata.version('libggml-python')}"


class _Layer:
    """Packed experts of one format, the same bytes for JAX and for ggml."""

    def __init__(self, format: BlockFormat, options: argparse.Namespace) -> None:
        self.format = format
        self.rng = np.random.default_rng(0)
        experts, d_model, d_expert = options.experts, options.d_model, options.d_expert
        self.gate = self._weights(experts, d_expert, d_model)
        self.up = self._weights(experts, d_expert, d_model)
        self.down = self._weights(experts, d_model, d_expert)
        packed = (PackedExperts(jax.device_put(w), format) for w in (self.gate, self.up, self.down))
        gate, up, down = packed
        self.experts = Experts(gate=gate, up=up, down=down)

    def _weights(self, experts: int, n: int, k: int) -> np.ndarray:
        rows = self.rng.standard_normal((1, _TILE_ROWS, k), dtype=np.float32) / np.sqrt(k)
        tile = np.asarray(quantize(rows, self.format, np.ones(k, np.float32)).data)[0]
        weights = aligned((experts, n, tile.shape[-1]), np.uint8)
        for expert in weights:
            expert[...] = tile[self.rng.integers(0, _TILE_ROWS, n)]
        return weights

    def bytes_read(self, routing: np.ndarray) -> int:
        """Bytes of the experts that a routing uses."""
        total = self.gate.nbytes + self.up.nbytes + self.down.nbytes
        return total // len(self.gate) * len(np.unique(routing))


def _measure(layer: _Layer, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Median times of one format and number of tokens, all contenders in turn."""
    rng, top_k = layer.rng, options.top_k
    x = rng.standard_normal((tokens, options.d_model), dtype=np.float32)
    weights = rng.dirichlet(np.ones(top_k), tokens).astype(np.float32)
    choices = [
        rng.permuted(np.tile(np.arange(options.experts, dtype=np.int32), (tokens, 1)), axis=1)[
            :, :top_k
        ]
        for _ in range(_ROUTINGS)
    ]
    routings = [Routing(jnp.asarray(ids), jnp.asarray(weights)) for ids in choices]
    on_device = jnp.asarray(x)

    contenders: dict[str, Callable[[int], Any]] = {}
    for name, variant in (("scalar_gguf", MoEVariant.SCALAR_GGUF), ("default", None)):
        call = jax.jit(functools.partial(moe_ffn, variant=variant))

        def run_ours(i: int, call: Callable = call) -> Any:
            return call(on_device, routings[i], layer.experts).block_until_ready()

        contenders[name] = run_ours
    ggml = None
    if options.ggml:
        ggml = GgmlFfn(
            layer.format.ggml_type,
            layer.gate,
            layer.up,
            layer.down,
            options.d_expert,
            tokens,
            top_k,
            _threads(),
        )
        ggml.x[...] = x

        def run_ggml(i: int) -> None:
            ggml.expert_ids[...] = choices[i]
            ggml.run()

        contenders["ggml"] = run_ggml

    for run in contenders.values():
        run(0)  # compiles
    if ggml is not None:
        try:
            _check_agreement(contenders["scalar_gguf"](0), ggml, weights)
        except RuntimeError:
            ggml.close()
            raise
        ggml.pause()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    until = time.perf_counter() + options.seconds
    repetition = 0
    while time.perf_counter() < until or repetition < 3 * _IN_A_ROW:
        for name, run in contenders.items():
            # The threads of the one before go on looking for work for a while, then sleep.
            time.sleep(_REST_SECONDS)
            if name == "ggml":
                ggml.resume()  # type: ignore[union-attr]
            run((repetition - 1) % _ROUTINGS)  # wakes its own threads
            for i in range(repetition, repetition + _IN_A_ROW):
                start = time.perf_counter()
                run(i % _ROUTINGS)
                times[name].append(time.perf_counter() - start)
            if name == "ggml":
                ggml.pause()  # type: ignore[union-attr]
        repetition += _IN_A_ROW
    if ggml is not None:
        ggml.close()
    median = {name: statistics.median(values) for name, values in times.items()}
    read = statistics.mean(layer.bytes_read(ids) for ids in choices)
    row: dict[str, Any] = {
        "format": layer.format.name,
        "tokens": tokens,
        "repetitions": repetition,
        **{f"{name}_ms": seconds * 1e3 for name, seconds in median.items()},
        "scalar_gguf_gbps": read / median["scalar_gguf"] / 1e9,
        "instruction_set": select_kernel(
            "moe_ffn", on_device, routings[0], layer.experts, platform="cpu"
        ).architecture,
    }
    if ggml is not None:
        row["scalar_gguf_ratio"] = median["scalar_gguf"] / median["ggml"]
        row["default_ratio"] = median["default"] / median["ggml"]
    return row


def _check_agreement(y: jax.Array, ggml: GgmlFfn, weights: np.ndarray) -> None:
    """Both computed the same thing: a benchmark of wrong results is worth nothing."""
    theirs = np.einsum("tkh,tk->th", ggml.result, weights)
    error = np.linalg.norm(np.asarray(y) - theirs) / np.linalg.norm(theirs)
    if not error < 0.05:
        raise RuntimeError(f"ggml's result and ours differ by {error:.2g}")


def _text(rows: Sequence[dict[str, Any]]) -> str:
    columns = {
        "format": ("format", "{}"),
        "tokens": ("T", "{}"),
        "scalar_gguf_ms": ("SCALAR_GGUF ms", "{:.2f}"),
        "default_ms": ("default ms", "{:.2f}"),
        "ggml_ms": ("ggml ms", "{:.2f}"),
        "scalar_gguf_ratio": ("SCALAR_GGUF / ggml", "{:.2f}"),
        "default_ratio": ("default / ggml", "{:.2f}"),
        "scalar_gguf_gbps": ("GB/s", "{:.1f}"),
    }
    shown = [key for key in columns if key in rows[0]]
    return table(
        [columns[key][0] for key in shown],
        [[columns[key][1].format(row[key]) for key in shown] for row in rows],
    )
