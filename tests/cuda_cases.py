"""What the CUDA tests share: bounds on a GPU, problems that reach every kernel, poisoned memory."""

import jax.numpy as jnp
import numpy as np
import oracle

import jax_moe

# Tensor cores may serve float32 on a GPU.
BOUNDS = {"float32": 1e-3, "float16": 5e-4, "bfloat16": 2e-3}
DTYPES = tuple(BOUNDS)

# Experts, rows, least width, tokens, slots. By the mean number of pairs an expert they reach the
# kernels for one or two, few, some and many tokens; nothing is a multiple of a tile.
SHAPES = {
    "vector": (7, 19, 700, 5, 2),
    "narrow": (5, 19, 700, 7, 2),
    "medium": (3, 141, 96, 40, 1),
    "wide": (2, 150, 290, 130, 2),
}


def bound(*dtypes) -> float:
    return max(BOUNDS[jnp.dtype(dtype).name] for dtype in dtypes)


def poison(*arrays) -> None:
    """Fills device memory of these sizes with NaN and frees it, for the results that come next."""
    for array in arrays:
        for _ in range(4):
            jnp.full(array.size, jnp.nan, array.dtype).block_until_ready()


def random_blocks(format_name: str, shape: tuple[int, ...], seed: int = 0):
    """Packed experts [E, N, K] of random bytes: every bit pattern that a block can hold."""
    format = oracle.as_format(format_name)
    *leading, k = shape
    row_bytes = k // format.block_size * format.block_bytes
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (*leading, row_bytes), dtype=np.uint8)
    return jax_moe.PackedExperts(jnp.asarray(data), format)


def sane_blocks(format_name: str, shape: tuple[int, ...], seed: int = 0):
    """Packed experts [..., E, N, K] of random bytes, but for the scales: those are near 2^-10."""
    packed = random_blocks(format_name, shape, seed)
    format = packed.format
    blocks = np.array(packed.data).reshape(-1, format.block_bytes)
    halves = {"Q4_K": 2, "Q8_0": 1}[format_name]
    for i in range(halves):
        blocks[:, 2 * i + 1] = 0x14
    return jax_moe.PackedExperts(jnp.asarray(blocks.reshape(packed.data.shape)), format)


def gemm_problem(format_name: str, shape: tuple[int, int, int, int, int], seed: int = 0):
    """x, packed weight, its float64 values, dispatch and routing for one moe_gemm."""
    experts, n, k, tokens, top_k = shape
    weight, exact = oracle.packed(format_name, experts, n, oracle.width(format_name, k))
    rng = np.random.default_rng(seed)
    routing = oracle.random_routing(rng, tokens, experts, top_k)
    dispatch = jax_moe.sort_by_expert(routing.expert_ids, experts)
    return rng.standard_normal((tokens, exact.shape[2])), weight, exact, dispatch, routing


def same_bits(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
