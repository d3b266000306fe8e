"""benchmarks/load_gguf.py runs; what it measures is not looked at."""

import sys
from pathlib import Path

import pytest
from make_gguf import write_qwen3moe

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import load_gguf


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("flags", [(), ("--cold", "--keep"), ("--prepack",)])
@pytest.mark.parametrize("alignment", [32, 64])
def test_it_runs(tmp_path, capsys, flags, alignment):
    path = write_qwen3moe(tmp_path / "model.gguf", keys={"x:general.alignment": alignment})
    load_gguf.main([str(path), "--rounds", "2", *flags])
    first, *more = capsys.readouterr().out.splitlines()
    assert "2 layers" in first and ("cold" if "--cold" in flags else "warm") in first
    plain, ours, ratio = more[-3:]
    assert plain.startswith("plain read") and ours.startswith("GGUFFile.load")
    assert "layers" in ours and "times as fast" in ratio
