"""Starts llama.cpp once a session; without it everything here is skipped."""

import subprocess

import pytest
from client import PYTHON, LlamaCpp


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory):
    try:
        subprocess.run([PYTHON, "-c", "import llama_cpp"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a Python with llama-cpp-python, see `make test-llamacpp`")
    server = LlamaCpp(tmp_path_factory.mktemp("llamacpp"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def errors():
    """The relative errors seen, by model and format; printed at the end."""
    seen = {}
    yield seen
    for (name, form), error in seen.items():
        print(f"{name:40} {form:6} {error:.1e}")
