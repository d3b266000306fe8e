"""Runs a GGUF model in llama.cpp, for the tests, which start this as a process of its own.

llama-cpp-python and libggml-python each bring a ggml library, and one process can't hold both.

    python llama_logits.py MODEL.gguf TOKENS.npy LOGITS.npy [--greedy N]

Writes the logits after each of the tokens, float32 [T, vocabulary]. With --greedy, N of the
likeliest tokens are appended first and their logits are there too, but for the last one's.
Keys, values and attention are in float32, and everything is on the CPU.
"""

import argparse

import llama_cpp
import numpy as np


class Model:
    """A loaded model and its context."""

    def __init__(self, path: str, capacity: int):
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise SystemExit(f"llama.cpp can't load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = capacity
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.position = 0

    def run(self, tokens: list[int]) -> np.ndarray:
        """Logits `[T, vocabulary]` after each token of the next `T`."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        self.position += len(tokens)
        logits = llama_cpp.llama_get_logits(self.context)
        shape = (len(tokens), self.vocabulary_size)
        copy = np.ctypeslib.as_array(logits, shape=shape).copy()
        llama_cpp.llama_batch_free(batch)
        return copy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("logits")
    parser.add_argument("--greedy", type=int, default=0)
    options = parser.parse_args()
    tokens = np.load(options.tokens).tolist()
    model = Model(options.model, len(tokens) + options.greedy)
    rows = [model.run(tokens)]
    for _ in range(options.greedy - 1):
        rows.append(model.run([int(rows[-1][-1].argmax())]))
    np.save(options.logits, np.concatenate(rows))


if __name__ == "__main__":
    main()
