"""The command line: `inspect`, `demo`, `bench` and `info`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import jax
import jaxlib

import jax_moe
from jax_moe import _ffi
from jax_moe._gguf import GGUFError, GGUFFile, GGUFLayer
from jax_moe._table import binary_size, table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["bench"]:  # has a parser of its own
            from jax_moe import _bench

            return _bench.main(arguments[1:]) or 0
        options = _parser().parse_args(arguments)
        return options.run(options)
    except (GGUFError, OSError, ImportError) as error:
        print(f"jax_moe: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_moe", description="Mixture-of-Experts layers of GGUF files in JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="what each MoE layer of a GGUF file holds")
    command.add_argument("file", metavar="FILE", help="a GGUF file, or any part of a split one")
    command.set_defaults(run=_inspect)

    command = commands.add_parser(
        "demo", help="run the MoE layers of a GGUF file and check the results"
    )
    command.add_argument(
        "file", metavar="FILE", nargs="?", help="without it, a small model is made"
    )
    command.add_argument(
        "--tokens", type=positive, default=16, help="random tokens a layer (default 16)"
    )
    command.add_argument("--layers", type=positive, help="run only the first so many MoE layers")
    command.set_defaults(run=_demo)

    commands.add_parser("bench", help="time the kernels; see bench --help", add_help=False)

    command = commands.add_parser(
        "info", help="what this installation was built with, and what it sees"
    )
    command.set_defaults(run=_info)
    return parser


def positive(text: str) -> int:
    """The type of a command line option that is an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("it is at least 1")
    return value


def _demo(options: argparse.Namespace) -> int:
    from jax_moe import _demo

    return _demo.run(options.file, num_tokens=options.tokens, num_layers=options.layers)


def _inspect(options: argparse.Namespace) -> int:
    file = GGUFFile(options.file)
    layers = file.layers
    print(describe_file(file))
    if not layers:
        return 0
    print()
    print(layer_table(layers))
    for layer in layers:
        if layer.problem:
            print(f"\nlayer {layer.index} cannot be run: {layer.problem}")
    if reason := _ffi.unusable():
        print(f"\nNo layer can be run by this installation's kernels: {reason}")
    return 0


def describe_file(file: GGUFFile) -> str:
    """One line about the whole file."""
    layers = file.layers
    experts = sum(tensor.nbytes or 0 for layer in layers for tensor in layer.projections.values())
    name = file.metadata.get("general.name")
    parts = [
        f"{file.path}: {file.architecture}",
        *([name] if isinstance(name, str) else []),
        f"{len(layers)} MoE layers" if layers else "no MoE layers",
        *([f"routed experts {binary_size(experts)}"] if layers else []),
    ]
    return ", ".join(parts)


def layer_table(layers: Sequence[GGUFLayer]) -> str:
    """One row a MoE layer."""
    projections = [
        name
        for name in ("gate_up", "gate", "up", "down")
        if any(name in layer.projections for layer in layers)
    ]
    header = [
        "layer",
        "architecture",
        "experts",
        "top-k",
        "H",
        "F",
        *projections,
        "shared",
        "router",
        "runs",
    ]
    rows = [
        [
            str(layer.index),
            layer.architecture,
            str(layer.num_experts or "?"),
            str(layer.top_k or "?"),
            str(layer.d_model or "?"),
            str(layer.d_expert or "?"),
            *(_projection(layer, name) for name in projections),
            _shared(layer),
            layer.router or "?",
            "no" if layer.problem else "yes",
        ]
        for layer in layers
    ]
    return table(header, rows)


def _projection(layer: GGUFLayer, name: str) -> str:
    tensor = layer.projections.get(name)
    if tensor is None:
        return "-"
    size = "?" if tensor.nbytes is None else binary_size(tensor.nbytes)
    return f"{tensor.format} {size}"


def _shared(layer: GGUFLayer) -> str:
    """Formats of gate, up and down, once if they are all the same, and the bytes of all three."""
    if not layer.shared:
        return "-"
    formats = list(dict.fromkeys(tensor.format for tensor in layer.shared.values()))
    size = sum(tensor.nbytes or 0 for tensor in layer.shared.values())
    return f"{'/'.join(formats)} {binary_size(size)}"


def _info(options: argparse.Namespace) -> int:
    for name, value in info().items():
        print(f"{name:<22}{value}")
    return 0


def info() -> dict[str, str]:
    """What `python -m jax_moe info` prints. Works where the native library does not."""
    facts = {
        "jax_moe": jax_moe.__version__,
        "jax, jaxlib": f"{jax.__version__}, {jaxlib.__version__}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "XLA FFI API of jaxlib": ".".join(map(str, _ffi.runtime_api_version())),
    }
    for name, value in _ffi.build_info().items():
        facts[f"built: {name}"] = (
            ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        )
    facts["kernels"] = _usable(_ffi.unusable())
    if _has_gpu():
        facts["kernels on GPUs"] = _usable(_ffi.unusable_on_gpu())
    try:
        facts["devices"] = ", ".join(f"{device} ({device.device_kind})" for device in jax.devices())
    except RuntimeError as error:
        facts["devices"] = f"none: {error}"
    return facts


def _usable(reason: str | None) -> str:
    return "usable" if reason is None else f"unusable: {reason}"


def _has_gpu() -> bool:
    """Whether JAX sees a GPU, as its default or beside it."""
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False
