"""Time of moe_ffn on one GPU against what its memory and tensor cores allow, and against peers.

    python benchmarks/moe_ffn.py --models qwen3-30b-a3b --formats Q4_K,Q6_K --tokens 1,16,256

A measured program is one jitted chain of layers with different weights, so that the L2 cache does
not serve them. A row's bound is the larger of the bytes of the experts that its routing really uses
over the read bandwidth, and the operations over the rate of large bf16 products, both measured in
the same run. Rows that the JSON file already holds are not measured again, so that a table can be
made in several commands. Peers are compiled and measured before the rows that are compared with
them, some ten seconds a number of tokens: give few of those a command.
"""

import argparse
import gc
import json
import os
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import chain
import clock
import jax
import peers
import report
from random_weights import DENSE, fits
from shapes import MODELS, model_of

import jax_moe

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


class Table:
    """The rows of a run, and of the JSON file that they are added to."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict] = json.loads(path.read_text()) if path and path.exists() else []
        self.limits: dict = {}  # of this run

    def missing(self, key: dict, peer_names: list[str]) -> bool:
        """Whether a row has yet to be measured, or measured with these peers in one process."""
        return not any(
            row["key"] == key and all(f"{name}_seconds" in row for name in peer_names)
            for row in self.rows
        )

    def add(self, key: dict, row: dict) -> None:
        row = key | self.limits | row | {"key": key}
        self.rows = [other for other in self.rows if other["key"] != key] + [row]
        print(report.line(report.cells(row)), flush=True)
        if self.path:
            self.path.write_text(json.dumps(self.rows, indent=1))


def measure_model(name: str, args: argparse.Namespace, table: Table) -> None:
    """Every missing row of a model: first the peers, whose weights need the memory, then ours."""

    def key(format_name: str, layout: str, tokens: int, routing: str) -> dict:
        return {
            "model": name,
            "format": format_name,
            "layout": layout,
            "variant": args.variant or "default",
            "dtype": args.dtype,
            "routing": routing,
            "tokens": tokens,
            "device": table.limits["device"],
        }

    cells = [(tokens, routing) for tokens in args.tokens for routing in args.routing]
    wanted = {
        (format_name, layout): todo
        for format_name in args.formats
        if fits(format_name, model_of(name))
        for layout in (["dense"] if format_name in DENSE else args.layouts)
        if (todo := [c for c in cells if table.missing(key(format_name, layout, *c), args.peers)])
    }
    them = peers.Peers(model_of(name), args.peers)
    peer_times = {
        cell: them.seconds(*cell)
        for cell in cells
        if args.peers and any(cell in todo for todo in wanted.values())
    }
    del them
    for format_name in args.formats:
        if not fits(format_name, model_of(name)):
            print(f"{name} {format_name}: n/a, its rows are no whole blocks")
        layers = None
        for layout in ("gguf", "dense", "tiled"):
            todo = wanted.get((format_name, layout), [])
            if not todo:
                continue
            try:
                layers = layers or new_layers(name, format_name, args)
                if layout == "tiled":
                    layers = chain.prepack(layers)
                    if not layers:
                        print(f"{name} {format_name}: no tiled layout")
                        break
            except (jax.errors.JaxRuntimeError, ValueError, TypeError) as error:
                print(f"{name} {format_name} {layout}: n/a ({peers.one_line(error)})", flush=True)
                break
            for cell in todo:
                try:
                    row = chain.measure(model_of(name), layers, *cell, args.dtype, variant(args))
                    table.add(key(format_name, layout, *cell), row | peer_times.get(cell, {}))
                except (jax.errors.JaxRuntimeError, ValueError, TypeError) as error:
                    text = f"{name} {format_name} {layout} {cell}: n/a ({peers.one_line(error)})"
                    print(text, flush=True)
        del layers
        gc.collect()


def new_layers(name: str, format_name: str, args: argparse.Namespace) -> list[jax_moe.Experts]:
    formats = tuple((format_name.split("/") * 2)[:2])
    return chain.make_layers(model_of(name), formats, max(args.tokens), args.dtype, variant(args))


def variant(args: argparse.Namespace) -> jax_moe.MoEVariant | None:
    return jax_moe.MoEVariant[args.variant] if args.variant else None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    add("--models", type=names, default="qwen3-30b-a3b", help="all, tiny, " + ", ".join(MODELS))
    add("--formats", type=names, default="Q4_K", help="all; A/B is gate and up in A, down in B")
    add("--layouts", type=names, default="gguf,tiled")
    tokens = ",".join(map(str, TOKENS))
    add("--tokens", type=lambda text: [int(t) for t in text.split(",")], default=tokens)
    add("--routing", type=names, default="uniform", help="uniform, zipf")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    add("--variant", choices=[variant.name for variant in jax_moe.MoEVariant])
    add("--peers", type=names, default="", help="all, " + ", ".join(peers.NAMES))
    add("--json", type=Path, help="file that rows are added to and taken from")
    add("--report", action="store_true", help="measure nothing, tell what the JSON file holds")
    add("--markdown", action="store_true", help="also print all rows as a table for the docs")
    add("--plot", type=Path, help="image of the shares of the bound; needs matplotlib")
    args = parser.parse_args(argv)
    block_formats = list(jax_moe._formats.FORMATS)
    everything = {"models": list(MODELS), "formats": [*block_formats, "BF16"], "peers": peers.NAMES}
    allowed = {
        "models": [*MODELS, "tiny"],
        "formats": [*block_formats, *DENSE],
        "layouts": ["gguf", "tiled"],
        "routing": ["uniform", "zipf"],
        "peers": peers.NAMES,
    }
    for option, choices in allowed.items():
        values = getattr(args, option)
        if values == ["all"] and option in everything:
            setattr(args, option, everything[option])
        elif unknown := {part for value in values for part in value.split("/")} - set(choices):
            parser.error(
                f"--{option}: {', '.join(sorted(unknown))} is none of {', '.join(choices)}"
            )
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    table = Table(args.json)
    print(report.line(report.HEADER), flush=True)
    if args.report:
        print("\n".join(report.line(report.cells(row)) for row in table.rows))
    else:
        table.limits = {"device": jax.devices()[0].device_kind} | clock.ceilings()
        print(report.ceilings_text(table.limits), flush=True)
        for name in args.models:
            measure_model(name, args, table)
    print(report.NOTE)
    print("\n".join(report.summary(table.rows)))
    if args.markdown:
        print(report.markdown(table.rows))
    if args.plot:
        report.plot(table.rows, args.plot)


if __name__ == "__main__":
    main()
