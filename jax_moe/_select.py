"""select_kernel: what an op would run, and what that guarantees."""

from dataclasses import dataclass
from typing import Any

import jax

from jax_moe import _ffi
from jax_moe._ffn import ffn_problem
from jax_moe._gemm import gemm_problem
from jax_moe._operands import gguf_format
from jax_moe._variants import MoEVariant


@dataclass(frozen=True)
class KernelInfo:
    """What runs for an op with given arguments on a platform.

    Attributes:
      variant: the variant asked for, None for the default.
      kernel: the kernel's name.
      platform: "cpu" or "cuda".
      architecture: the instruction set that it is compiled for, like "avx512" or "sm_90a".
      tile: rows of the weight and tokens that one task multiplies.
      workspace_bytes: size of the scratch buffer that XLA allocates for the call.
      accumulator: dtype of the sums.
      deterministic: whether two runs of one program on one device give the same bits.
      error_bound: relative L2 error against float64 on exactly dequantised weights, for independent
        normal activations and weights.
    """

    variant: MoEVariant | None
    kernel: str
    platform: str
    architecture: str
    tile: tuple[int, int]
    workspace_bytes: int
    accumulator: str
    deterministic: bool
    error_bound: float


def select_kernel(op: str, *args: Any, platform: str | None = None, **kwargs: Any) -> KernelInfo:
    """Tells what `op` would run for these arguments, and raises exactly what the op would raise.

    Args:
      op: "moe_gemm" or "moe_ffn".
      *args, **kwargs: the op's arguments, arrays or `jax.ShapeDtypeStruct`s.
      platform: "cpu" or "cuda"; None is that of JAX's default backend.

    Raises:
      ValueError, TypeError, ImportError: as the op.
    """
    if platform is None:
        platform = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if platform not in ("cpu", "cuda"):
        raise ValueError(f"platform is 'cpu' or 'cuda', not {platform!r}.")
    if op == "moe_gemm":
        gemm = gemm_problem(*args, **kwargs)
        variant = gemm.variant
        described = _ffi.native().describe_gemm(
            platform=platform,
            tokens=gemm.num_pairs // gemm.top_k,
            top_k=gemm.top_k,
            experts=gemm.num_experts,
            n=gemm.n,
            k=gemm.k,
            rows_are_pairs=gemm.rows_are_pairs,
            format=_format_on(platform, gemm.format),
            variant=0 if variant is None else variant.value,
            x_dtype=gemm.x_dtype.name,
            y_dtype=gemm.y_dtype.name,
            capability=_compute_capability(),
        )
    elif op == "moe_ffn":
        ffn = ffn_problem(*args, **kwargs)
        variant = ffn.variant
        described = _ffi.native().describe_ffn(
            platform=platform,
            tokens=ffn.num_tokens,
            top_k=ffn.top_k,
            experts=ffn.num_experts,
            d_model=ffn.d_model,
            d_expert=ffn.d_expert,
            down_format=_format_on(platform, ffn.formats[2]),
            variant=0 if variant is None else variant.value,
            x_dtype=ffn.x_dtype.name,
            capability=_compute_capability(),
        )
    else:
        raise ValueError(f"op is 'moe_gemm' or 'moe_ffn', not {op!r}.")
    return KernelInfo(variant=variant, platform=platform, **described)


def _compute_capability() -> int:
    """Of the default GPU, like 90; that of Hopper where there is none."""
    if jax.default_backend() != "gpu":
        return 90
    major, _, minor = getattr(jax.devices()[0], "compute_capability", "9.0").partition(".")
    return 10 * int(major) + int(minor or 0)


def _format_on(platform: str, format: int) -> int:
    """The format that the platform's kernel is given: only CUDA's take tiled weights."""
    return format if platform == "cuda" else gguf_format(format)
