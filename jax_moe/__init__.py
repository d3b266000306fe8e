"""Mixture-of-Experts in JAX on weights packed as GGUF files pack them."""

from jax_moe import _export as _export
from jax_moe._block import MoEConfig, MoEParams, moe_block
from jax_moe._ffi import DISABLED_EXPORT_CHECKS
from jax_moe._ffn import Experts, moe_ffn
from jax_moe._formats import BlockFormat
from jax_moe._gemm import moe_gemm
from jax_moe._gguf import GGUFError, GGUFFile, load_gguf
from jax_moe._packed import PackedExperts
from jax_moe._quantize import quantize
from jax_moe._routing import Dispatch, Routing, route, sort_by_expert
from jax_moe._select import KernelInfo, select_kernel
from jax_moe._variants import MoEVariant

__version__ = "0.1.0"

__all__ = [
    "DISABLED_EXPORT_CHECKS",
    "BlockFormat",
    "Dispatch",
    "Experts",
    "GGUFError",
    "GGUFFile",
    "KernelInfo",
    "MoEConfig",
    "MoEParams",
    "MoEVariant",
    "PackedExperts",
    "Routing",
    "load_gguf",
    "moe_block",
    "moe_ffn",
    "moe_gemm",
    "quantize",
    "route",
    "select_kernel",
    "sort_by_expert",
]
