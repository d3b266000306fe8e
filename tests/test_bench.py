"""`bench` runs both contenders, and refuses to time results that differ."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("libggml")

from jax_moe import _bench

SMALL = [
    "--experts",
    "4",
    "--top-k",
    "2",
    "--d-model",
    "256",
    "--d-expert",
    "256",
    "--tokens",
    "1",
    "5",
    "--seconds",
    "0.01",
]


@pytest.mark.parametrize("format_name", ["Q4_K", "MXFP4"])
def test_rows(format_name, capsys):
    assert not _bench.main(["--formats", format_name, "--json", *SMALL])
    report = json.loads(capsys.readouterr().out)
    assert report["setting"]["experts"] == 4 and "libggml" in report["setting"]["ggml"]
    assert [(row["format"], row["tokens"]) for row in report["rows"]] == [
        (format_name, 1),
        (format_name, 5),
    ]
    for row in report["rows"]:
        assert row["scalar_gguf_ratio"] == row["scalar_gguf_ms"] / row["ggml_ms"]
        assert row["default_ms"] > 0 and row["repetitions"] >= 3


def test_table_without_ggml(capsys):
    assert not _bench.main(["--formats", "Q8_0", "--no-ggml", *SMALL])
    out = capsys.readouterr().out
    assert "not measured" in out and "Q8_0" in out and "/ ggml" not in out


def test_it_runs_on_the_cpu_whatever_the_default_device(monkeypatch):
    devices = []

    def measure(layer, *_):
        devices.extend([layer.experts.up.data.devices(), jax.config.jax_default_device])
        return {"instruction_set": ""}

    monkeypatch.setattr(_bench, "_measure", measure)
    with jax.default_device(jax.devices()[-1]):
        _bench.main(["--formats", "Q8_0", "--no-ggml", "--json", *SMALL, "--tokens", "1"])
    cpu = jax.devices("cpu")[0]
    assert devices == [{cpu}, cpu]


def test_results_that_differ_are_not_timed(monkeypatch):
    einsum = np.einsum
    monkeypatch.setattr(_bench.np, "einsum", lambda *args: einsum(*args) * 1.2)
    with pytest.raises(RuntimeError, match="differ"):
        _bench.main(["--formats", "Q8_0", *SMALL])
