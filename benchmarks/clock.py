"""Wall time of device work, and what the device allows at most."""

import time

import jax
import jax.numpy as jnp
import numpy as np

BATCH_SECONDS = 0.025  # of back-to-back calls between two readings of the clock, or four times that
REPEATS = 5
FEW_TOKENS = 1024
ROUNDS = 8  # of a chain of few tokens in one program
SLOW_SECONDS = 0.25  # a call that takes longer is timed once


def median_time(call) -> float:
    """Seconds of one call(), from medians over batches of back-to-back calls.

    That is what the calls take by which long batches are longer than short ones: to start the first
    call and to learn of the end of the last one takes milliseconds where a program has many arrays.
    """
    for _ in range(2):  # compiles; a command buffer is recorded on the second execution
        jax.block_until_ready(call())
    once = _seconds(call, 1)
    if once > SLOW_SECONDS:
        return once
    batch = int(np.ceil(3 * BATCH_SECONDS / max(_seconds(call, 3), 1e-6)))
    counts = (batch, 4 * batch)
    short, long = np.median([[_seconds(call, n) for n in counts] for _ in range(REPEATS)], axis=0)
    # The second one is larger only where other work disturbs very short batches.
    return float(max(long - short, long / 4) / (3 * batch))


def chain_seconds(chain, x, *arguments, tokens: int) -> float:
    """Seconds of one chain(x, *arguments), an array like x, under jit.

    The host takes up to a millisecond to start a program of many arrays, longer than a chain of few
    tokens: through such a one the device goes several times.
    """
    rounds = ROUNDS if tokens <= FEW_TOKENS else 1

    @jax.jit
    def chains(x, *arguments):
        # Each begins with x again, which XLA does not know.
        return jax.lax.fori_loop(0, rounds, lambda _, y: chain(x + 0 * y, *arguments), x)

    return median_time(lambda: chains(x, *arguments)) / rounds


def _seconds(call, count: int) -> float:
    """Of `count` calls together."""
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - start


def ceilings() -> dict:
    """Read bandwidth, the mean rate of two bf16 products, and the times of small cold reads."""
    small = jax.default_backend() == "cpu"
    large_read = 1 << (24 if small else 32)
    rates = []
    for n in (128, 256) if small else (4096, 8192):
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
        product = jax.jit(jnp.matmul)
        rates.append(2 * n**3 / median_time(lambda a=a, b=b, product=product: product(a, b)))
    sizes = (1 << 20, 2 << 20) if small else (7 << 20, 21 << 20, 64 << 20)
    return {
        "read_bytes_per_s": large_read / _read_seconds(large_read, 1),
        "bf16_flop_per_s": float(np.mean(rates)),
        "bf16_flop_per_s_of_each": rates,
        "cold_reads": [(size, _read_seconds(size, (256 << 20) // size + 4)) for size in sizes],
    }


def _read_seconds(size: int, count: int) -> float:
    """Seconds of a kernel that reads `size` bytes, one of `count` in a row, each its own bytes."""
    row = 4096
    arrays = [jnp.full((size // row // 4, row), i, jnp.int32) for i in range(count)]

    @jax.jit
    def sums(arrays):
        total = jnp.zeros(len(arrays[0]), jnp.int32)
        for array in arrays:  # each waits for the one before
            total = jnp.sum(array + total[:, None], axis=1)
        return total

    return median_time(lambda: sums(arrays)) / count
