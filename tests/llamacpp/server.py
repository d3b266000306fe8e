"""llama.cpp in a process of its own: loads models, runs tokens, writes what every node computed.

It runs under a Python that has llama-cpp-python and NumPy, and needs nothing else of this
repository. Its ggml library and libggml-python's cannot share a process. A request is a line of
JSON on standard input, {"model": path, "tokens": [...], "save": path}, the last two optional; the
answer is a line on standard output: {}, or {"error": message} with llama.cpp's own words.
"""

import ctypes
import json
import os
import sys

import llama_cpp
import numpy as np


class Tensor(ctypes.Structure):
    """ggml_tensor, of ggml.h."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def values(tensor: Tensor) -> np.ndarray | None:
    """A copy of float32 values in NumPy's order of axes, without leading ones."""
    if tensor.type != llama_cpp.GGML_TYPE_F32 or not tensor.data or 0 in tensor.ne:
        return None
    shape = tuple(tensor.ne)[::-1]
    strides = tuple(tensor.nb)[::-1]
    size = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 4
    raw = (ctypes.c_char * size).from_address(tensor.data)
    array = np.ndarray(shape, np.float32, raw, strides=strides).copy()
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    return array


class Recorder:
    """The evaluation callback: keeps nodes by name, and by the weights that they read.

    A node that reads the weight "w" is kept as "w", and its other operand as "w:input". Of equal
    names the second becomes "name#2".
    """

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def __call__(self, address: int, ask: bool, _: object) -> bool:
        if not ask:
            node = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
            self._keep(node.name.decode(), node)
            sources = [s.contents for s in node.src[:2] if s]
            for weight, other in zip(sources, sources[::-1], strict=True):
                name = weight.name.decode()
                if name.startswith("blk.") and " " not in name:
                    self._keep(name, node)
                    self._keep(f"{name}:input", other)
        return True

    def _keep(self, name: str, tensor: Tensor) -> None:
        key, count = name, 1
        while key in self.arrays:
            count += 1
            key = f"{name}#{count}"
        if (array := values(tensor)) is not None:
            self.arrays[key] = array


class Log:
    """llama.cpp's error messages since `text` was last emptied."""

    def __init__(self) -> None:
        self.text = ""
        self._callback = llama_cpp.llama_log_callback(self._append)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _append(self, level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            self.text += text.decode()


def load(path: str):
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.use_mmap = False
    parameters.use_extra_bufts = False
    return llama_cpp.llama_model_load_from_file(path.encode(), parameters)


def run(model, tokens: list[int]) -> dict[str, np.ndarray]:
    """Evaluates the tokens as one batch, every one of them with an output."""
    recorder = Recorder()
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 64
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    callback = llama_cpp.ggml_backend_sched_eval_callback(recorder)
    parameters.cb_eval = callback
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise RuntimeError("no context")
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    status = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    if status:
        raise RuntimeError(f"llama_decode returned {status}")
    return recorder.arrays


def answer(request: dict, log: Log) -> dict[str, str]:
    log.text = ""
    model = load(request["model"])
    if not model:
        return {"error": log.text}
    try:
        if "tokens" in request:
            np.savez(request["save"], **run(model, request["tokens"]))
    except RuntimeError as error:
        return {"error": f"{error}\n{log.text}"}
    finally:
        llama_cpp.llama_model_free(model)
    return {}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp itself prints is no answer
    log = Log()
    llama_cpp.llama_backend_init()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), log)), file=answers, flush=True)


if __name__ == "__main__":
    main()
