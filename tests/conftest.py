"""Four CPU devices for the sharding tests, and the `gpu` marker's skip."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import pytest


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU that JAX sees")
        for item in gpu:
            item.add_marker(skip)
