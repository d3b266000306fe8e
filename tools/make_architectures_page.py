"""Writes the tables of docs/architectures.md from the package's own tables.

    python tools/make_architectures_page.py [--check]

A table stands between two comments in the page, `<!-- table NAME -->` and `<!-- end -->`; all else
there is written by hand. With --check nothing is written, and the exit status is 1 if the page is
not up to date.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax_moe._formats import DENSE_TYPES, FORMATS
from jax_moe._gguf.architectures import ARCHITECTURES
from jax_moe._gguf.schema import REQUIRED, Architecture, Key

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
_TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def routing_table() -> str:
    """How each architecture chooses experts."""
    rows = [
        [
            f"`{name}`",
            _layers(row),
            _gate(row),
            _selection_bias(row),
            _yes_or_key(row.normalize),
            "-" if row.scale == 1.0 else _rule(row.scale),
        ]
        for name, row in ARCHITECTURES.items()
    ]
    return _markdown(
        ["architecture", "MoE layers", "gate", "selection bias", "norm", "scale"], rows
    )


def experts_table() -> str:
    """What each architecture's experts are."""
    rows = [
        [
            f"`{name}`",
            _projections(row),
            _activation(row.activation, row.limit, row.betas),
            _shared(row),
            _shared_activation(row),
        ]
        for name, row in ARCHITECTURES.items()
    ]
    return _markdown(
        ["architecture", "routed experts", "activation", "shared experts", "their activation"], rows
    )


def boundary_table() -> str:
    """Where each block begins and ends; architectures of one kind share a row."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, row in ARCHITECTURES.items():
        extra = []
        if row.router_reads != "x":
            extra.append("`router_input`")
        if isinstance(row.hash_layers, Key):
            extra.append(f"`token_ids` in layers below `{row.hash_layers.name}`")
        kind = (
            f"`{row.x}`",
            {"x": "x", "layer_input": "the layer's input", "unnormed": "x before its norm"}[
                row.router_reads
            ],
            ", ".join(extra) or "-",
            row.note or "-",
        )
        kinds.setdefault(kind, []).append(f"`{name}`")
    rows = [[", ".join(names), *kind] for kind, names in kinds.items()]
    header = ["architecture", "x is the result of", "router reads", "extra inputs", "also"]
    return _markdown(header, rows)


def formats_table() -> str:
    """The formats that experts may have."""
    rows = [
        [
            f"`{form.name}`",
            str(form.ggml_type),
            str(form.block_size),
            str(form.block_bytes),
            f"{8 * form.block_bytes / form.block_size:g}",
            f"{8 * form.tiled_bytes / form.block_size:g}",
        ]
        for form in FORMATS.values()
    ]
    short = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
    for dtype, number in DENSE_TYPES.items():
        name, size = short[dtype]
        rows.append([f"`{name}`", str(number), "1", str(size), str(8 * size), "-"])
    header = ["format", "ggml type", "weights a block", "bytes", "bits a weight", "tiled"]
    return _markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "routing": routing_table,
    "experts": experts_table,
    "boundary": boundary_table,
    "formats": formats_table,
}


def render(page: str) -> str:
    """The page with its tables as they must be."""
    return _TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", page)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rule(rule: Any) -> str:
    """A constant, or a key with what holds where the file does not have it."""
    if not isinstance(rule, Key):
        return f"{rule:g}" if isinstance(rule, float) else str(rule)
    if rule.default is REQUIRED:
        return f"`{rule.name}`, required"
    if not rule.default:
        return f"`{rule.name}`"
    return f"`{rule.name}`, else {_rule(rule.default)}"


def _yes_or_key(rule: bool | Key) -> str:
    return ("yes" if rule else "no") if isinstance(rule, bool) else _rule(rule)


def _layers(row: Architecture) -> str:
    match row.layers:
        case "tensors":
            return "those with a router"
        case "seconds":
            return f"second of every {_rule(row.step)}"
        case "interleaved":
            lead = isinstance(row.leading_dense, Key) and f"from {_rule(row.leading_dense)} on"
            step = isinstance(row.step, Key) and f"last of every {_rule(row.step)}"
            return ", ".join(filter(None, [lead or "", step or ""]))
    return "all"


def _gate(row: Architecture) -> str:
    parts = [_rule(row.gating)]
    if len(row.gatings) == 1:
        parts.append(f"only {row.gatings[0]}")
    parts += [
        f"{gating} in models of {blocks} layers and {vocabulary} tokens"
        for (blocks, vocabulary), gating in row.gating_by_size
    ]
    if row.router_bias != "absent":
        parts.append("bias on the logits")
    return "; ".join(parts)


def _selection_bias(row: Architecture) -> str:
    if row.selection_bias == "absent":
        return "-"
    parts: list[str] = [row.selection_bias]
    if row.selection_bias_tensor != "exp_probs_b.bias":
        parts.append(f"named `{row.selection_bias_tensor}`")
    if isinstance(row.hash_layers, Key):
        parts.append(f"none in layers below `{row.hash_layers.name}`")
    return ", ".join(parts)


def _projections(row: Architecture) -> str:
    parts = [{"required": "gate, up", "optional": "up, perhaps gate", "absent": "up"}[row.gate]]
    if row.merged:
        parts[0] += " or merged"
    if row.biases != "absent":
        parts.append("with biases")
    if row.weights_before:
        parts.append("weighted inputs")
    if row.latent:
        names = " and ".join(f"`{name}`" for name in row.latent[:2])
        parts.append(f"between {names} if there")
    if row.experts_per_group is not None:
        parts.append("then `ffn_*_chexps` on their result")
    return "; ".join(parts)


def _activation(name: str, limit: Any, betas: Any) -> str:
    if name == "swiglu_oai":
        return f"{name}, limit 7"
    if limit is not None:
        return f"{name}, limit {_rule(limit)}"
    if betas is not None:
        return f"{name}, {' and '.join(map(_rule, betas))}"
    return name


def _shared(row: Architecture) -> str:
    if row.shared == "absent":
        return "-"
    names = row.shared_tensors.format("*")
    presence = f"if {_rule(row.shared)}" if isinstance(row.shared, Key) else row.shared
    parts = [f"`{names}`, {presence}"]
    if row.shared_merged:
        parts.append("gate and up merged in `ffn_up_shexp`")
    if row.shared_gate != "absent":
        parts.append("times a sigmoid gate")
    if row.sum_scale != 1.0:
        parts.append(f"the sum times {row.sum_scale:.4g}")
    return ", ".join(parts)


def _shared_activation(row: Architecture) -> str:
    if row.shared == "absent":
        return "-"
    activation = row.activation
    if row.shared_limit is None and activation.startswith("swiglu_clamp"):
        activation = "swiglu"
    return _activation(activation, row.shared_limit, None)


def main(arguments: Sequence[str]) -> int:
    old = PAGE.read_text()
    new = render(old)
    if arguments == ["--check"]:
        return int(new != old)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
