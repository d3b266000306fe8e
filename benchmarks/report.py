"""Rows as text, as a table for the docs, as a plot, and what they say together."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import targets

HEADER = (
    "model, format, layout",
    "T",
    "us/layer",
    "bound",
    "share",
    "ragged_dot",
    "tokamax",
    "llama.cpp",
    "target us",
    "share met",
    "lead met",
)
NOTE = (
    "bound: bytes of the experts really used over the read bandwidth, or operations over the bf16 "
    "rate, both of this run. ragged_dot, tokamax: their time on bf16 experts over ours, same "
    "process. llama.cpp: vs llama.cpp (scaled): its time on another card (one H100, 2026-11-22), "
    "scaled by both cards' ceilings, over ours. target: the time that the share of the bound asks "
    "for; lead: time <= max(half of llama.cpp's, bound / 0.8)."
)


def cells(row: dict) -> tuple[str, ...]:
    """The row's texts, one for each of HEADER."""
    seconds, target = row["seconds"], targets.share_seconds(row)
    lead = [targets.llama_cpp_target_seconds(row), targets.tokamax_target_seconds(row)]
    leads = [seconds <= limit for limit in lead if limit is not None]
    name = [row["model"], row["format"], row["layout"]]
    name += [row[k] for k, usual in _USUAL.items() if row[k] != usual]
    return (
        " ".join(name),
        str(row["tokens"]),
        _microseconds(seconds),
        _microseconds(targets.bound(row)),
        f"{targets.bound(row) / seconds:.2f}",
        _times(row.get("ragged_dot_seconds"), seconds, "ragged_dot_seconds" in row),
        _times(row.get("tokamax_seconds"), seconds, "tokamax_seconds" in row),
        _times(targets.llama_cpp_seconds(row), seconds),
        _microseconds(target),
        _yes(seconds <= target),
        _yes(all(leads)) if leads else "-",
    )


_USUAL = {"routing": "uniform", "dtype": "bfloat16", "variant": "default"}


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def _times(theirs: float | None, ours: float, tried: bool = False) -> str:
    if theirs is None:
        return "n/a" if tried else "-"
    return f"{theirs / ours:.1f}x" if theirs < 10 * ours else f"{theirs / ours:.0f}x"


def _yes(met: bool) -> str:
    return "yes" if met else "NO"


def line(texts: tuple[str, ...]) -> str:
    return f"{texts[0]:38}" + "".join(
        f"{text:>{max(len(head), 7) + 1}}" for head, text in zip(HEADER[1:], texts[1:], strict=True)
    )


def ceilings_text(limits: dict) -> str:
    rates = "/".join(f"{rate / 1e12:.3g}" for rate in limits["bf16_flop_per_s_of_each"])
    cold = ", ".join(
        f"{size / 2**20:.0f} MiB {seconds * 1e6:.1f} us" for size, seconds in limits["cold_reads"]
    )
    return (
        f"{limits['device']}: read {limits['read_bytes_per_s'] / 1e12:.3g} TB/s, bf16 products "
        f"{rates} TFLOP/s (their mean is the bound's), cold reads {cold}"
    )


def summary(rows: list[dict]) -> list[str]:
    """Means and counts by layout, variant, dtype and device, uniform and skewed routing apart."""
    lines = []
    for values in sorted({tuple(row[key] for key in _SETTING) for row in rows}):
        some = [row for row in rows if tuple(row[key] for key in _SETTING) == values]
        parts = [f"{len(some)} cells"]
        met = sum(row["seconds"] <= targets.share_seconds(row) for row in some)
        parts.append(f"share met in {met}")
        parts += _lead(some, "llama.cpp (scaled)", targets.llama_cpp_seconds)
        limits = [(row["seconds"], targets.llama_cpp_target_seconds(row)) for row in some]
        limits = [(ours, limit) for ours, limit in limits if limit]
        if limits:
            met = sum(ours <= limit for ours, limit in limits)
            parts.append(f"lead met in {met} of {len(limits)}")
        parts += _lead(some, "ragged_dot", lambda row: row.get("ragged_dot_seconds"))
        parts += _lead(some, "tokamax", lambda row: row.get("tokamax_seconds"))
        lines.append(" ".join(values) + ": " + "; ".join(parts))
    return lines + _skew(rows)


_SETTING = ("device", "layout", "variant", "dtype", "routing")


def _lead(rows: list[dict], name: str, theirs: Callable) -> list[str]:
    ratios = [theirs(row) / row["seconds"] for row in rows if theirs(row)]
    if not ratios:
        return []
    return [
        f"{name} / ours {np.exp(np.mean(np.log(ratios))):.2f} (geometric mean of {len(ratios)})"
    ]


def _skew(rows: list[dict]) -> list[str]:
    """How much farther from its bound Zipf routing is than uniform routing, at the worst."""
    found = {}
    for row in rows:
        cell = tuple(value for key, value in row["key"].items() if key != "routing")
        found.setdefault(cell, {})[row["routing"]] = row["seconds"] / targets.bound(row)
    both = [(cell, times) for cell, times in found.items() if len(times) == 2]
    skews = [(times["zipf"] / times["uniform"], cell) for cell, times in both]
    if not skews:
        return []
    worst, cell = max(skews)
    counts = f"<= 1.3 in {sum(skew <= 1.3 for skew, _ in skews)} of {len(skews)}"
    where = " ".join(map(str, cell))
    return [f"zipf against the bound's prediction: {counts}; worst {worst:.2f}, {where}"]


def markdown(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", NOTE])


def plot(rows: list[dict], path: Path) -> None:
    """The share of the bound over tokens, a panel a model."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    models = sorted({row["model"] for row in rows})
    figure, panels = plt.subplots(
        1, len(models), figsize=(5 * len(models), 5), sharey=True, squeeze=False
    )
    for panel, model in zip(panels[0], models, strict=True):
        lines: dict[str, list] = {}
        for row in rows:
            if row["model"] == model:
                label = cells(row)[0].removeprefix(model + " ")
                point = (row["tokens"], targets.bound(row) / row["seconds"])
                lines.setdefault(label, []).append(point)
        for label, points in sorted(lines.items()):
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        panel.set_xscale("log", base=4)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set(xlabel="tokens", ylim=(0, 1), title=model)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    panels[0][0].set_ylabel("share of the bound")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
