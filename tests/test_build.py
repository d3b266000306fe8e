"""What is built and packed: the explicit CUDA switch, the marker of a typed package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_type_checkers_read_the_annotations():
    """PEP 561's marker lies beside the sources, so that wheel and sdist have it too."""
    assert (ROOT / "jax_moe" / "py.typed").exists()


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("needs cmake")
    command = [cmake, "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *options]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_cuda_on_without_a_compiler_says_what_to_install(tmp_path):
    done = configure(tmp_path, "-DJAX_MOE_CUDA=ON", CUDACXX=str(tmp_path / "no-nvcc"))
    message = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "JAX_MOE_CUDA=ON needs the CUDA compiler" in message
    assert "install the CUDA toolkit" in message and "nvidia-cuda-nvcc" in message


def test_cuda_off_never_looks_for_a_compiler(tmp_path):
    done = configure(tmp_path, "-DJAX_MOE_CUDA=OFF", CUDACXX=str(tmp_path / "no-nvcc"))
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels: OFF" in done.stdout
