"""Starts llama.cpp once a session, collects errors, and writes them into the documentation.

`--write-table` does the last, from a whole run.
"""

import pytest
from client import LlamaCpp
from table import write_table


def pytest_addoption(parser):
    parser.addoption("--write-table", action="store_true", help="update docs/architectures.md")


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory):
    server = LlamaCpp(tmp_path_factory.mktemp("llamacpp"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def errors(request):
    """Relative errors by what was compared, (model, format), to be filled."""
    seen = {}
    yield seen
    if request.config.getoption("--write-table", default=False):
        write_table(seen)
