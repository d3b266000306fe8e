"""Generation: the prompt in large pieces, then token by token in a loop inside `jax.jit`.

The loop runs on the device for some tokens and hands them over together. While the host prints them
the device is already at the next ones, and neither waits for the other.
"""

import collections
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from attention import KVCache
from jax import Array
from transformer import Transformer, forward, logits


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: choose among so many likeliest tokens; 0: among all.
      top_p: of these, choose among the fewest whose probabilities reach this sum.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, scores: Array, key: Array) -> Array:
        """A token, int32 `[]`, by its logits `[vocabulary]`."""
        if self.temperature == 0:
            return jnp.argmax(scores).astype(jnp.int32)
        count = min(self.top_k or scores.shape[0], scores.shape[0])
        scores, tokens = jax.lax.top_k(scores / self.temperature, count)
        probabilities = jax.nn.softmax(scores)
        before = jnp.cumsum(probabilities) - probabilities
        scores = jnp.where(before < self.top_p, scores, -jnp.inf)
        return tokens[jax.random.categorical(key, scores)].astype(jnp.int32)


class State(NamedTuple):
    """Where a generation stands.

    Attributes:
      token: int32 `[]`, the newest token, which has not been run yet.
      position: int32 `[]`, its place in the sequence.
      stopped: bool `[]`, whether it is one that ends a text.
      key: of `jax.random`, for the tokens to come.
      caches: of the positions before it.
    """

    token: Array
    position: Array
    stopped: Array
    key: Array
    caches: list[KVCache]


class Generator:
    """Generates texts of one prompt length; compiles when it is made.

    Args:
      model: see `weights.load_transformer`.
      sampling: how tokens are chosen.
      prompt_length: tokens of the prompt, at least 1.
      max_tokens: tokens to generate at most, at least 1.
      stop_tokens: ids of tokens that end a text.
      piece: tokens of a prompt that are run together. For each piece a layer's attention scores
        take `4 * piece * num_heads * (prompt_length + max_tokens)` bytes.
      stream: tokens that the device generates before the host sees them. More of them hide the time
        that it takes to start a program on the device.
    """

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        *,
        prompt_length: int,
        max_tokens: int,
        stop_tokens: Sequence[int] = (),
        piece: int = 512,
        stream: int = 16,
    ):
        self.model = model
        self.prompt_length = prompt_length
        self.max_tokens = max_tokens
        self.stop_tokens = np.array(stop_tokens, np.int32)
        self.stream = stream
        self.pieces = [
            slice(start, min(start + piece, prompt_length))
            for start in range(0, prompt_length, piece)
        ]
        prefill = jax.jit(_prefill, static_argnames="sampling", donate_argnames="caches")
        decode = jax.jit(_decode, static_argnames=("sampling", "count"), donate_argnames="state")

        # Compiled ahead of the first call, for the shapes alone.
        empty = jax.jit(lambda: model.new_cache(prompt_length + max_tokens)).lower()
        self._new_caches = empty.compile()
        number = jax.ShapeDtypeStruct((), jnp.int32)
        inputs = (empty.out_info, number, number, self.stop_tokens)
        self._prefill = {}
        for length in {part.stop - part.start for part in self.pieces}:
            tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
            lowered = prefill.lower(model, tokens, *inputs, sampling=sampling)
            self._prefill[length] = lowered.compile()
        state = lowered.out_info
        lowered = decode.lower(
            model, state, number, self.stop_tokens, sampling=sampling, count=stream
        )
        self._decode = lowered.compile()

    def start(self, prompt: Sequence[int], seed: int = 0) -> State:
        """Runs a prompt and chooses the first token."""
        tokens = np.asarray(prompt, np.int32)
        caches = self._new_caches()
        for part in self.pieces:
            run = self._prefill[part.stop - part.start]
            numbers = np.int32(part.start), np.int32(seed)
            state = run(self.model, tokens[part], caches, *numbers, self.stop_tokens)
            caches = state.caches
        return state

    def tokens(self, state: State) -> Iterator[np.ndarray]:
        """The generated tokens as they come, int32 `[n]` at a time, without the stop token.

        Uses `state` up: its arrays are overwritten.
        """
        end = np.int32(self.prompt_length + self.max_tokens - 1)  # the last token is never run
        yield np.atleast_1d(state.token)[: int(not state.stopped)]
        running: collections.deque[tuple[Array, Array]] = collections.deque()
        for _ in range(math.ceil((self.max_tokens - 1) / self.stream)):
            # This returns at once. A loop that has stopped does nothing when it is started again.
            state, tokens, count = self._decode(self.model, state, end, self.stop_tokens)
            running.append((tokens, count))
            if len(running) == 2:
                tokens, count = jax.device_get(running.popleft())
                yield tokens[:count]
                if count < self.stream:
                    return
        for tokens, count in jax.device_get(list(running)):
            yield tokens[:count]


def _prefill(
    model: Transformer,
    tokens: Array,
    caches: list[KVCache],
    start: Array,
    seed: Array,
    stop_tokens: Array,
    *,
    sampling: Sampling,
) -> State:
    """Runs tokens `[T]` at positions from `start` on and chooses the next."""
    key = jax.random.key(seed)
    x, caches = forward(model, tokens, caches, start)
    position = start + jnp.int32(tokens.shape[0])
    return _next(model, x[-1:], position, key, caches, stop_tokens, sampling)


def _decode(
    model: Transformer,
    state: State,
    end: Array,
    stop_tokens: Array,
    *,
    sampling: Sampling,
    count: int,
) -> tuple[State, Array, Array]:
    """Generates until there are `count` tokens, the state's position is `end`, or a stop token.

    Returns:
      the new state, the tokens int32 `[count]`, and how many of them are real, int32 `[]`.
    """

    def unfinished(carry: tuple[State, Array, Array]) -> Array:
        state, _, done = carry
        return (done < count) & ~state.stopped & (state.position < end)

    def step(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        state, tokens, done = carry
        x, caches = forward(model, state.token[None], state.caches, state.position)
        state = _next(model, x, state.position + 1, state.key, caches, stop_tokens, sampling)
        return state, tokens.at[done].set(state.token), done + ~state.stopped

    tokens = jnp.zeros(count, jnp.int32)
    return jax.lax.while_loop(unfinished, step, (state, tokens, jnp.int32(0)))


def _next(
    model: Transformer,
    x: Array,
    position: Array,
    key: Array,
    caches: list[KVCache],
    stop_tokens: Array,
    sampling: Sampling,
) -> State:
    """Chooses the token after x `[1, d_model]`."""
    key, now = jax.random.split(key)
    token = sampling.choose(logits(model, x)[0], now)
    return State(token, position, jnp.any(token == stop_tokens), key, caches)
