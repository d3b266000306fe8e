"""The CUDA kernels' view of tiled units against the blocks' decoders, compiled for this machine."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jax_moe._formats import FORMATS

ROOT = Path(__file__).parents[1]


def test_fields_are_the_decoders_integers(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "tiled_fields"
    source = ROOT / "tests" / "tiled_fields.cc"
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{ROOT}", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert set(done.stdout.split()) == set(FORMATS)
