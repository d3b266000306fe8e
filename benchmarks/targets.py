"""What each cell of the table is to reach: a share of the bound, and a lead over llama.cpp."""

import json
from pathlib import Path

import numpy as np

# Formats whose decoding costs little, more, and most.
GROUP_A = {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "MXFP4", "BF16", "F16", "F32"}
GROUP_B = {"Q2_K", "Q3_K", "Q4_1", "Q5_0", "Q5_1", "IQ4_XS", "IQ4_NL", "NVFP4"}
LLAMA_CPP = json.loads((Path(__file__).parent / "llama_cpp_h100.json").read_text())
QWEN3 = "qwen3-30b-a3b"
QWEN3_Q4_K_SECONDS = 14e-6  # at one token


def group_of(format_name: str) -> str:
    """A, B or C; of two formats the harder one."""
    groups = ["A" if f in GROUP_A else "B" if f in GROUP_B else "C" for f in format_name.split("/")]
    return max(groups)


def bounds(row: dict) -> tuple[float, float]:
    """Seconds that memory and arithmetic take at least, by the ceilings of the row's own run."""
    return row["bytes"] / row["read_bytes_per_s"], row["flop"] / row["bf16_flop_per_s"]


def bound(row: dict) -> float:
    return max(bounds(row))


def share_target(row: dict) -> float | None:
    """The share of the bound to reach; None where the target is a time."""
    group, tokens = "ABC".index(group_of(row["format"])), row["tokens"]
    if tokens < 4:
        return None if row["model"] == QWEN3 else (0.80, 0.65, 0.45)[group]
    if tokens <= 64:
        return (0.80, 0.65, 0.45)[group]
    if tokens <= 1024:
        share = (0.60, 0.55, 0.40)[group]
        memory, arithmetic = bounds(row)
        return min(share, 0.45) if 2 / 3 < memory / arithmetic < 3 / 2 else share
    if row["model"] in ("mixtral-8x7b", "deepseek-v3"):
        return (0.60, 0.55, 0.50)[group]
    return (0.50, 0.45, 0.40)[group]


def share_seconds(row: dict) -> float:
    """The time that the row's group and regime ask for."""
    share = share_target(row)
    if share is not None:
        return bound(row) / share
    if row["format"] == "Q4_K":
        return QWEN3_Q4_K_SECONDS
    return (2.0 if group_of(row["format"]) == "C" else 1.6) * cold_read_seconds(row)


def cold_read_seconds(row: dict) -> float:
    """Of the row's bytes, between the sizes measured in its run."""
    sizes, seconds = zip(*row["cold_reads"], strict=True)
    if row["bytes"] > sizes[-1]:
        return seconds[-1] + (row["bytes"] - sizes[-1]) / row["read_bytes_per_s"]
    return float(np.interp(row["bytes"], sizes, seconds))


def llama_cpp_seconds(row: dict) -> float | None:
    """llama.cpp's time for the row on another card, scaled by the ceilings of this one."""
    if row["routing"] != "uniform" or row["tokens"] not in LLAMA_CPP["tokens"]:
        return None
    column = LLAMA_CPP["tokens"].index(row["tokens"])
    for theirs in LLAMA_CPP["rows"]:
        if (theirs["model"], theirs["format"]) == (row["model"], row["format"]):
            ceiling = {"m": "read_bytes_per_s", "c": "bf16_flop_per_s"}[theirs["limit"][column]]
            return theirs["us"][column] * 1e-6 * LLAMA_CPP[ceiling] / row[ceiling]
    return None


def llama_cpp_target_seconds(row: dict) -> float | None:
    """max(half of llama.cpp's time, bound / 0.8)."""
    theirs = llama_cpp_seconds(row)
    return None if theirs is None else max(theirs / 2, bound(row) / 0.8)


def tokamax_target_seconds(row: dict) -> float | None:
    """Dense bf16 experts of many tokens: tokamax.ragged_dot's time over 1.5."""
    if row["format"] != "BF16" or row["tokens"] < 1024 or not row.get("tokamax_seconds"):
        return None
    return row["tokamax_seconds"] / 1.5
