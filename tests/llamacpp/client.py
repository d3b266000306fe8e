"""The tests' side of `server.py`, and models made whole with its help."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from make_gguf import Tensor, Weights, write_gguf

PYTHON = os.environ.get("JAX_MOE_LLAMACPP_PYTHON")  # one that has llama-cpp-python

_MISSING = re.compile(r"tensor '([^']+)' not found")
_SHAPE = re.compile(r"tensor '([^']+)' has wrong shape; expected ([\d, ]+), got")


class LlamaCppError(Exception):
    """llama.cpp refused a model, or died of it."""


class LlamaCpp:
    """A running server."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _ask(self, request: Mapping[str, object]) -> None:
        log = self._directory / "stderr.txt"
        if self._process is None:
            assert PYTHON
            with log.open("w") as stderr:
                self._process = subprocess.Popen(
                    [PYTHON, Path(__file__).with_name("server.py")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    env=os.environ | {"GGML_NO_BACKTRACE": "1"},
                )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise LlamaCppError("llama.cpp died\n" + log.read_text()[-2000:])
        if error := json.loads(line).get("error"):
            raise LlamaCppError(error)

    def load(self, model: Path) -> None:
        """Raises LlamaCppError if llama.cpp cannot load the model."""
        self._ask({"model": str(model)})

    def run(self, model: Path, tokens: list[int]) -> dict[str, np.ndarray]:
        """What the nodes of the graph computed, as `server.Recorder` names them."""
        save = self._directory / "nodes.npz"
        self._ask({"model": str(model), "tokens": tokens, "save": str(save)})
        with np.load(save) as arrays:
            return dict(arrays)

    def write_whole(
        self,
        path: Path,
        architecture: str,
        keys: Mapping[str, object],
        tensors: Mapping[str, Tensor],
        optional: Mapping[str, tuple[int, ...]] = {},
    ) -> dict[str, Tensor]:
        """Writes a model with all tensors that llama.cpp wants, and returns them.

        Those that are missing are random, of the shapes that llama.cpp's messages ask for. So are
        those of `optional`, which it would do without, until its graph needs them.
        """
        weights, whole = Weights(seed=5), dict(tensors)
        whole |= {name: weights(*shape) for name, shape in optional.items()}
        while True:
            write_gguf(path, architecture, keys, whole)
            try:
                self.load(path)
                return whole
            except LlamaCppError as error:
                text = str(error)
            if (found := _SHAPE.search(text)) and found[1] not in tensors:
                name, shape = found[1], tuple(int(n) for n in found[2].split(","))[::-1]
                while len(shape) > 1 and shape[0] == 1:
                    shape = shape[1:]
                if whole[name].shape == shape:
                    raise LlamaCppError(text)
                whole[name] = _random(weights, name, shape)
            elif (found := _MISSING.search(text)) and found[1] not in whole:
                whole[found[1]] = np.ones(1, np.float32)  # to be told its shape
            else:
                raise LlamaCppError(text)


def _random(weights: Weights, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of the kind that the tensor has in a trained model."""
    if len(shape) > 1:
        return weights(*shape)
    values = weights(*shape) * np.float32(shape[0] ** 0.5)
    if "norm" in name and name.endswith(".weight"):
        return 1 + np.float32(0.2) * values
    if "ssm_a" in name:  # a decay
        return -np.exp(values)
    return np.float32(0.1) * values
