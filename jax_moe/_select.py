"""select_kernel: what an op would run, and what that guarantees."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_moe import _ffi
from jax_moe._activations import ACTIVATIONS
from jax_moe._ffn import FfnProblem, ffn_problem
from jax_moe._gemm import GemmProblem, gemm_problem
from jax_moe._operands import gguf_format
from jax_moe._reference import accumulator
from jax_moe._variants import MoEVariant

# Relative L2 error that dtypes of x and y allow, and q8_1's rounding in moe_gemm; docs/design.md.
# That of float64 is for sums in float64 of weights that are exact float32.
_DTYPE_BOUNDS = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-4, "bfloat16": 2e-3}
_Q8_1_BOUND = 1.2e-2


@dataclass(frozen=True)
class KernelInfo:
    """What runs for an op with given arguments on a platform.

    Attributes:
      variant: the variant asked for, None for the default.
      kernel: the kernel's name, or "reference" with `implementation="reference"`.
      platform: "cpu" or "cuda".
      architecture: the instruction set that it is compiled for, like "avx512" or "sm_90a"; "xla" of
        the reference.
      tile: rows of the weight and tokens that one task multiplies; of the reference, which XLA
        tiles, all.
      workspace_bytes: size of the scratch buffer that XLA allocates for the call; 0 of the
        reference, whose buffers are XLA's own.
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
    checked: GemmProblem | FfnProblem
    if op == "moe_gemm":
        checked = gemm = gemm_problem(*args, **kwargs)
        format = _format_on(platform, gemm.format)
        tokens, x_dtype, y_dtype = gemm.num_pairs // gemm.top_k, gemm.x_dtype, gemm.y_dtype
        rows, k, num_experts = gemm.n, gemm.k, gemm.num_experts
        if kwargs.get("implementation") == "reference":
            return _reference(platform, gemm.variant, (rows, tokens), x_dtype, y_dtype, False)
        problem = _ffi.native().GemmProblem(
            top_k=gemm.top_k,
            experts=num_experts,
            n=rows,
            k=k,
            rows_are_pairs=gemm.rows_are_pairs,
            format=format,
        )
    elif op == "moe_ffn":
        checked = ffn = ffn_problem(*args, **kwargs)
        experts = ffn.experts
        gate_format, up_format, format = (_format_on(platform, f) for f in experts.formats)
        tokens, x_dtype, y_dtype = ffn.num_tokens, ffn.x_dtype, ffn.x_dtype
        rows, k, num_experts = experts.d_model, experts.d_expert, experts.num_experts
        if kwargs.get("implementation") == "reference":
            return _reference(platform, ffn.variant, (rows, tokens), x_dtype, y_dtype, True)
        problem = _ffi.native().FfnProblem(
            top_k=ffn.top_k,
            experts=num_experts,
            d_model=rows,
            d_expert=k,
            gate_format=gate_format,
            up_format=up_format,
            down_format=format,
            variant=_code(ffn.variant),
            activation=ACTIVATIONS[ffn.activation].code,
            limit=ffn.numbers[0],
            biased=experts.biased,
        )
    else:
        raise ValueError(f"op is 'moe_gemm' or 'moe_ffn', not {op!r}.")
    capability = _compute_capability()
    in_one_launch = (
        platform == "cuda" and op == "moe_ffn" and problem.in_one_launch(tokens, capability)
    )
    described = _ffi.native().describe(
        platform=platform,
        is_ffn=op == "moe_ffn",
        variant=_code(checked.variant),
        format=format,
        x_dtype=x_dtype.name,
        y_dtype=y_dtype.name,
        rows=rows,
        k=k,
        pairs=tokens * checked.top_k,
        experts=num_experts,
        capability=capability,
        workspace_bytes=_ffi.workspace_bytes(problem, tokens),
        layer_tokens=tokens if in_one_launch else None,
    )
    return KernelInfo(variant=checked.variant, platform=platform, **described)


def _reference(
    platform: str,
    variant: MoEVariant | None,
    tile: tuple[int, int],
    x_dtype: np.dtype,
    y_dtype: np.dtype,
    is_ffn: bool,
) -> KernelInfo:
    bound = max(_DTYPE_BOUNDS[x_dtype.name], _DTYPE_BOUNDS[y_dtype.name])
    if variant is MoEVariant.SCALAR_GGUF:
        bound = max(bound, _Q8_1_BOUND * (2 if is_ffn else 1))
    return KernelInfo(
        variant=variant,
        kernel="reference",
        platform=platform,
        architecture="xla",
        tile=tile,
        workspace_bytes=0,
        accumulator=accumulator().name,
        deterministic=True,
        error_bound=bound,
    )


def _code(variant: MoEVariant | None) -> int:
    return 0 if variant is None else variant.value


def _compute_capability() -> int:
    """Of the default GPU, like 90; that of Hopper where there is none."""
    if jax.default_backend() != "gpu":
        return 90
    major, _, minor = getattr(jax.devices()[0], "compute_capability", "9.0").partition(".")
    return 10 * int(major) + int(minor or 0)


def _format_on(platform: str, format: int) -> int:
    """The format that the platform's kernel is given: only CUDA's take tiled weights."""
    return format if platform == "cuda" else gguf_format(format)
