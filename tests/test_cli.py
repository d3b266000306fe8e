"""`python -m jax_moe`: inspect, info, demo."""

import os
import pty
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from make_gguf import (
    Weights,
    expert_tensors,
    model_keys,
    shared_tensors,
    write_gguf,
    write_qwen3moe,
)

import jax_moe
from jax_moe import _cli, _demo, _ffi, _ggml_moe, _libggml
from jax_moe._gguf import progress
from jax_moe._gguf.split import Model
from jax_moe._table import binary_size, table

needs_kernels = pytest.mark.skipif(_ffi.unusable() is not None, reason=str(_ffi.unusable()))


def run(capsys, *arguments):
    status = _cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_inspect(capsys, tmp_path):
    status, out, err = run(capsys, "inspect", write_qwen3moe(tmp_path / "model.gguf"))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "qwen3moe" in lines[0]
    assert "2 MoE layers" in lines[0]
    header, *rows = lines[2:5]
    assert header.split()[:6] == ["layer", "architecture", "experts", "top-k", "H", "F"]
    for i, row in enumerate(rows):
        assert row.split()[:6] == [str(i), "qwen3moe", "4", "2", "64", "32"]
        for cell in ("Q8_0 8.5 KiB", "Q4_0 4.5 KiB", "Q5_1 6.0 KiB"):
            assert cell in row
        assert "softmax, top 2 of 4, normalized" in row
        assert row.endswith("yes")
        assert row.index("Q4_0") == header.index("up ")


def test_inspect_says_what_cannot_run(capsys, tmp_path):
    weights = Weights()
    tensors = expert_tensors(weights, 0) | expert_tensors(weights, 1)
    tensors |= shared_tensors(weights, 0) | shared_tensors(weights, 1)
    del tensors["blk.1.ffn_gate_exps.weight"]
    gates = {f"blk.{i}.ffn_gate_inp_shexp.weight": weights(64) for i in range(2)}
    path = write_gguf(tmp_path / "model.gguf", "qwen2moe", model_keys(), tensors | gates)
    status, out, _ = run(capsys, "inspect", path)
    assert status == 0
    rows = [line for line in out.splitlines() if "qwen2moe" in line][1:]
    assert rows[0].endswith("yes")
    assert "Q8_0 6.4 KiB" in rows[0]  # the shared expert
    assert rows[1].endswith("no")
    assert "layer 1 cannot be run" in out
    assert "'blk.1.ffn_gate_exps.weight' is missing" in out


def test_inspect_of_no_model(capsys, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(10))
    status, out, err = run(capsys, "inspect", path)
    assert (status, out) == (1, "")
    assert str(path) in err
    assert "Traceback" not in err
    assert run(capsys, "inspect", tmp_path / "absent.gguf")[0] == 1


def test_inspect_of_merged_projections(capsys, tmp_path):
    weights = Weights()
    tensors = expert_tensors(weights, 0)
    del tensors["blk.0.ffn_gate_exps.weight"], tensors["blk.0.ffn_up_exps.weight"]
    tensors["blk.0.ffn_gate_up_exps.weight"] = (weights(4, 64, 64), "Q8_0")
    path = write_gguf(tmp_path / "model.gguf", "deepseek2", model_keys(layers=1), tensors)
    _, out, _ = run(capsys, "inspect", path)
    header, row = out.splitlines()[2:4]
    assert header.split()[6:9] == ["gate_up", "down", "shared"]
    assert "Q8_0 17.0 KiB  Q5_1 6.0 KiB" in row
    assert "softmax, top 2 of 4  yes" in row


def test_bench_gets_its_arguments(monkeypatch):
    given = []
    bench = types.ModuleType("jax_moe._bench")
    bench.main = lambda arguments: given.extend(arguments)
    monkeypatch.setitem(sys.modules, "jax_moe._bench", bench)
    monkeypatch.setattr(jax_moe, "_bench", bench, raising=False)
    assert _cli.main(["bench", "--formats", "Q4_K"]) == 0
    assert given == ["--formats", "Q4_K"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "FOO"], "argument --formats: format 'FOO' is not a block format"),
        (["--tokens", "0"], "argument --tokens: it is at least 1"),
        (["--experts", "4"], "--top-k is at most --experts, 4, not 8"),
        (["--d-model", "300"], "--d-model is a multiple of the 256 weights of a Q4_K block"),
    ],
)
def test_bench_refuses_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        _cli.main(["bench", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_bench_without_ggml_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "libggml", None)
    _libggml.load.cache_clear()
    _ggml_moe._libraries.cache_clear()
    sizes = ["--experts", "2", "--top-k", "1", "--d-model", "64", "--d-expert", "32"]
    status, out, err = run(capsys, "bench", "--formats", "Q8_0", *sizes)
    assert (status, out) == (1, "")
    assert err.startswith("jax_moe: this needs ggml's libraries")


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert status == 0
    assert facts["jax_moe"] == jax_moe.__version__
    assert jax.__version__ in out
    assert all(str(device) in facts["devices"] for device in jax.devices())
    for name in _ffi.build_info():
        assert f"built: {name}" in out


def test_info_works_without_the_kernels(capsys, monkeypatch):
    monkeypatch.setattr(_ffi, "unusable", lambda: "built against FFI API 9.9")
    monkeypatch.setattr(_ffi, "build_info", dict)
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert "unusable: built against FFI API 9.9" in out


@pytest.mark.parametrize("reason", [None, "the driver is too old"])
def test_info_tells_whether_gpus_can_be_used(capsys, monkeypatch, reason):
    """Only where JAX sees one; the CPU's kernels say nothing of it."""
    row = "kernels on GPUs       "
    gpus = _cli._has_gpu()
    assert (row in run(capsys, "info")[1]) == gpus
    monkeypatch.setattr(_cli, "_has_gpu", lambda: not gpus)
    monkeypatch.setattr(_ffi, "unusable_on_gpu", lambda: reason)
    _, out, _ = run(capsys, "info")
    assert (row in out) != gpus
    if not gpus:
        assert row + ("usable" if reason is None else f"unusable: {reason}") in out


def test_it_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "jax_moe", "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in done.stdout for command in ("inspect", "demo", "bench", "info"))


@needs_kernels
def test_demo(capsys):
    status, out, _ = run(capsys, "demo", "--tokens", 5, "--layers", 2)
    assert status == 0
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if "relative error" in line)
    rows = [line for line in lines[start + 1 :] if "gate:" in line]
    assert len(rows) == 2
    for row in rows:
        assert float(row.split()[-1]) <= _demo.TOLERANCE[jax.default_backend()]
        assert "48.0 MiB" in row  # 3 projections of 32 experts of 512 x 256 in float32


@needs_kernels
def test_demo_of_a_file_without_moe_layers(capsys, tmp_path):
    tensors = {"output_norm.weight": np.ones(64, np.float32)}
    path = write_gguf(tmp_path / "model.gguf", "llama", {}, tensors)
    status, out, err = run(capsys, "demo", path)
    assert (status, err) == (1, "")
    assert out.splitlines()[-1] == "It has no MoE layers, so there is nothing to run."


@needs_kernels
def test_demo_fails_where_the_result_is_wrong(capsys, monkeypatch, tmp_path):
    block = _demo.reference.block
    monkeypatch.setattr(_demo.reference, "block", lambda layer, x: 1.01 * block(layer, x))
    status, out, _ = run(capsys, "demo", write_qwen3moe(tmp_path / "model.gguf"))
    assert status == 1
    assert "ABOVE" in out


def test_the_demo_writes_the_mix_of_formats(tmp_path):
    pytest.importorskip("libggml")
    _demo.write_model(tmp_path / "demo.gguf")
    layers = jax_moe.GGUFFile(tmp_path / "demo.gguf").layers
    assert [layer.problem for layer in layers] == [None] * 4
    formats = [[tensor.format for tensor in layer.projections.values()] for layer in layers]
    plain, more = ["Q4_K", "Q4_K", "Q4_K"], ["Q4_K", "Q4_K", "Q6_K"]
    assert formats == [plain, plain, more, more]


def test_table():
    text = table(["a", "name", "n"], [["1", "x", "-"], ["200", "long", "7"]])
    assert text == "  a  name  n\n  1  x     -\n200  long  7"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 10, "1.5 MiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_binary_size(nbytes, text):
    assert binary_size(nbytes) == text


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_a_progress_bar_for_a_load_that_takes_long(tmp_path, capsys, monkeypatch, patience, shown):
    pytest.importorskip("rich")
    monkeypatch.setattr(progress, "PATIENCE", patience)
    model = Model(write_qwen3moe(tmp_path / "model.gguf"))
    list(progress.read(model.tensors, "layer 7", progress=True))
    output = capsys.readouterr()
    assert output.out == ""
    assert ("layer 7" in output.err) == shown


def test_no_progress_bar_without_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    jax_moe.GGUFFile(write_qwen3moe(tmp_path / "model.gguf")).load(0)
    assert capsys.readouterr().err == ""


def test_a_progress_bar_on_a_terminal(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    main, terminal = pty.openpty()
    file = jax_moe.GGUFFile(write_qwen3moe(tmp_path / "model.gguf"))
    with os.fdopen(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        params, _ = file.load(1)
        stderr.flush()
        assert b"layer 1" in os.read(main, 1 << 16)
    os.close(main)
    assert np.asarray(params.router).shape == (4, 64)
