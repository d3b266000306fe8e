"""benchmarks/moe_ffn.py runs end to end on a small layer, and judges its rows as the issue asks."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("clock"), "BATCH_SECONDS", 0.001)
    monkeypatch.setattr(importlib.import_module("clock"), "ROUNDS", 2)
    return importlib.import_module


def test_end_to_end_and_resumes(benchmark, tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--models", "tiny", "--formats", "Q4_K,IQ2_XXS,BF16", "--tokens", "65"]
    arguments += ["--peers", "ragged_dot", "--json", str(path), "--markdown"]
    run = benchmark("moe_ffn").main
    run(arguments)
    out = capsys.readouterr().out
    rows = json.loads(path.read_text())
    cells = [(row["format"], row["layout"]) for row in rows]
    packed = [(name, layout) for name in ("Q4_K", "IQ2_XXS") for layout in ("gguf", "tiled")]
    assert cells == [*packed, ("BF16", "dense")] and "n/a (" not in out
    assert rows[2]["bytes"] == rows[3]["bytes"]  # those of the file
    assert "| tiny Q4_K tiled | 65 |" in out
    for row in rows:
        assert row["seconds"] > 0 and row["ragged_dot_seconds"] > 0
        assert 0 < row["bytes"] <= 8 * 3 * 256 * 256 * 2 and row["calls"] == 4

    run([*arguments, "--formats", "Q4_K", "--layouts", "gguf", "--routing", "uniform,zipf"])
    again = json.loads(path.read_text())
    assert again[: len(rows)] == rows and len(again) == len(rows) + 1
    assert "zipf against the bound's prediction" in capsys.readouterr().out

    run(["--json", str(path), "--report"])
    assert json.loads(path.read_text()) == again
    assert "tiny Q4_K gguf zipf" in capsys.readouterr().out


def test_rows_of_no_whole_blocks_are_left_out(benchmark):
    fits, gpt_oss = benchmark("random_weights").fits, benchmark("shapes").MODELS["gpt-oss-120b"]
    assert fits("MXFP4/Q8_0", gpt_oss) and fits("BF16", gpt_oss)
    assert not fits("Q8_0/Q4_K", gpt_oss)


@pytest.mark.parametrize("name", ["Q3_K", "IQ1_M", "TQ1_0", "MXFP4", "NVFP4"])
def test_weights_are_sane(benchmark, name):
    numpy = benchmark("numpy")
    packed = benchmark("random_weights").weight(1, name, 2, 8, 512)
    values = numpy.asarray(packed.dequantize())
    assert numpy.isfinite(values).all() and 1e-5 < values.std() < 1e3
    assert len(numpy.unique(numpy.asarray(packed.data))) > 200


@pytest.mark.parametrize("argument", ["--models=none", "--formats=Q4_K/Q9", "--peers=torch"])
def test_unknown_names(benchmark, argument, capsys):
    with pytest.raises(SystemExit):
        benchmark("moe_ffn").parse_arguments([argument])
    assert "is none of" in capsys.readouterr().err


def row(**changes) -> dict:
    """A memory-bound row on a card of twice the bandwidth of the one that llama.cpp ran on."""
    usual = {"model": "mixtral-8x7b", "format": "Q4_K", "tokens": 4, "routing": "uniform"}
    ceilings = {"read_bytes_per_s": 6.18e12, "bf16_flop_per_s": 7.5e14}
    ceilings["cold_reads"] = [(7e6, 5e-6), (21e6, 9e-6)]
    return usual | ceilings | {"bytes": 6.18e8, "flop": 7.5e9, "seconds": 1e-3} | changes


def test_llama_cpp_is_scaled_by_the_ceiling_that_bounds_it(benchmark):
    targets = benchmark("targets")
    assert targets.llama_cpp_seconds(row()) == pytest.approx(297e-6 / 2)
    assert targets.llama_cpp_seconds(row(tokens=4096)) == pytest.approx(17353e-6)
    assert targets.llama_cpp_seconds(row(routing="zipf")) is None
    assert targets.llama_cpp_seconds(row(format="Q4_1")) is None
    assert targets.llama_cpp_target_seconds(row()) == pytest.approx(1e-4 / 0.8)
    assert targets.llama_cpp_target_seconds(row(bytes=1e6)) == pytest.approx(297e-6 / 4)


def test_llama_cpp_table_is_whole(benchmark):
    table = benchmark("targets").LLAMA_CPP
    assert len(table["rows"]) == 29
    for line in table["rows"]:
        assert len(line["us"]) == len(line["bound_us"]) == len(line["limit"]) == 7
        assert all(ours > bound for ours, bound in zip(line["us"], line["bound_us"], strict=True))


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 0.80),
        ({"tokens": 64, "format": "Q3_K"}, 0.65),
        ({"tokens": 1, "format": "IQ2_XXS"}, 0.45),
        ({"tokens": 256}, 0.60),
        ({"tokens": 256, "flop": 6e10}, 0.45),  # 80 us of arithmetic, 100 of memory
        ({"tokens": 1024, "format": "Q4_K/TQ1_0", "flop": 6e10}, 0.40),
        ({"tokens": 4096}, 0.60),
        ({"tokens": 4096, "model": "gpt-oss-120b"}, 0.50),
        ({"tokens": 1, "model": "qwen3-30b-a3b"}, None),
    ],
)
def test_share_targets(benchmark, changes, share):
    assert benchmark("targets").share_target(row(**changes)) == share


def test_decode_targets_of_qwen3(benchmark):
    seconds = benchmark("targets").share_seconds
    qwen3 = {"tokens": 1, "model": "qwen3-30b-a3b", "bytes": 14e6}
    assert seconds(row(**qwen3)) == 14e-6
    assert seconds(row(**qwen3, format="Q3_K")) == pytest.approx(1.6 * 7e-6)
    assert seconds(row(**qwen3, format="IQ1_S")) == pytest.approx(2 * 7e-6)


def test_zipf_prefers_some_experts(benchmark):
    shapes = benchmark("shapes")
    rng = benchmark("numpy").random.default_rng(0)
    model = shapes.Model(32, 4, 64, 64)
    counts = {
        routing: shapes.group_sizes(shapes.draw_ids(rng, model, 500, routing), model)
        for routing in ("uniform", "zipf")
    }
    assert counts["uniform"].sum() == counts["zipf"].sum() == 2000
    assert counts["uniform"].max() < 100 and counts["zipf"].max() > 300
