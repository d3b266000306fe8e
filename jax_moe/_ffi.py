"""The one place that registers FFI targets and calls `jax.ffi`.

The C++ side of every name used here is `ffi/targets.h`. Targets are registered when the package is
imported, and only if the native library can work with the installed jaxlib: a registration that
jaxlib refuses would take the user's whole backend down. Where it cannot, the package still imports
and the first use of an op raises the `ImportError` that `unusable()` describes.
"""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.sharding import PartitionSpec

TARGETS = ("route", "sort", "gemm", "ffn", "dequantize", "repack", "unpack")

DISABLED_EXPORT_CHECKS = tuple(
    export.DisabledSafetyCheck.custom_call(f"jax_moe_{name}") for name in TARGETS
)
"""Safety checks to pass to `jax.export.export(..., disabled_checks=...)`: our custom calls keep
their names and signatures within a minor version."""

GRADIENT_MESSAGE = (
    'The kernels of jax_moe have no gradient; implementation="reference", which is pure JAX, has.'
)


def runtime_api_version() -> tuple[int, int]:
    """The XLA FFI API version (major, minor) of the installed jaxlib, read from its headers."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text()
    major, minor = (
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", text).group(1))  # type: ignore[union-attr]
        for part in ("MAJOR", "MINOR")
    )
    return major, minor


def _refusal(built: tuple[int, int]) -> str | None:
    """Why jaxlib would refuse a binary built against FFI API `built`; None if it accepts it."""
    import jaxlib

    runtime = runtime_api_version()
    if built[0] == runtime[0] and built[1] <= runtime[1]:
        return None
    return (
        f"jax_moe was built against XLA FFI API {built[0]}.{built[1]}, and the installed jaxlib "
        f"{jaxlib.__version__} provides {runtime[0]}.{runtime[1]}. Install a newer jaxlib, or "
        "build jax_moe from source against an older one."
    )


def _load() -> tuple[Any, str | None]:
    """The native module, or None, and why it cannot be used, or None."""
    if importlib.util.find_spec("jax_moe._native") is None:
        return None, (
            f"jax_moe's native library is not beside {Path(__file__).parent}; install the package "
            "(pip install .), and do not import it from its source folder."
        )
    try:
        from jax_moe import _native  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"jax_moe's native library cannot be loaded: {error}"
    reason = _refusal(tuple(_native.ffi_api_version()))
    if reason is None:
        for name, capsule in _native.cpu_handlers().items():
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return _native, reason


def _load_cuda() -> tuple[Any, str | None]:
    """The module with the CUDA kernels, or None, and why GPUs cannot be used, or None."""
    if importlib.util.find_spec("jax_moe._cuda") is None:
        return None, (
            "jax_moe was built without CUDA kernels; build it with JAX_MOE_CUDA=ON, or compute on "
            "the CPU under jax.default_device(jax.devices('cpu')[0])."
        )
    try:
        from jax_moe import _cuda  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"jax_moe's CUDA library cannot be loaded: {error}"
    reason = _refusal(tuple(_cuda.ffi_api_version())) or _driver_refusal(_cuda.build_info())
    if reason is None:
        for name, stages in _cuda.cuda_handlers().items():
            jax.ffi.register_ffi_target(name, stages, platform="CUDA")
    return _cuda, reason


def _driver_refusal(info: dict[str, Any]) -> str | None:
    """Why the NVIDIA driver cannot run what was built; None if it can or there is none."""
    built, driver = info["cuda_version"], info["driver_cuda_version"]
    if driver == 0 or driver // 1000 >= built // 1000:
        return None
    return (
        f"jax_moe was built with CUDA {cuda_version_name(built)}, and the installed NVIDIA driver "
        f"supports CUDA up to {cuda_version_name(driver)}. Install a newer driver, or build "
        f"jax_moe with CUDA {driver // 1000}."
    )


def cuda_version_name(version: int) -> str:
    """CUDA's version number, like 13000, as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


_native, _reason = _load()
_cuda, _cuda_reason = _load_cuda()


def unusable() -> str | None:
    """Why the FFI ops cannot run in this process, or None if they can."""
    return _reason


def unusable_on_gpu() -> str | None:
    """Why the FFI ops cannot run on NVIDIA GPUs in this process, or None if they can."""
    return _reason or _cuda_reason


def native() -> Any:
    """The native module. Raises ImportError where the ops cannot run."""
    if _reason is not None:
        raise ImportError(_reason)
    if _cuda_reason is not None and _runs_on_gpu():
        raise ImportError(_cuda_reason)
    return _native


def workspace_bytes(problem: Any, tokens: Any) -> Any:
    """Bytes that a call allocates for `problem`, a GemmProblem or FfnProblem of the native module.

    `tokens` may be a symbolic dimension, and so may the result.
    """
    fixed, per_token = native().workspace(problem)
    return fixed + per_token * tokens


def _runs_on_gpu() -> bool:
    """Whether JAX runs on a GPU unless it is told otherwise."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend() == "gpu"
    return getattr(device, "platform", device) in ("gpu", "cuda")


def build_info() -> dict[str, Any]:
    """What the native library was built with; empty if it cannot be loaded."""
    info = {} if _native is None else dict(_native.build_info())
    if _cuda is None:
        return info | {"cuda": "not built"}
    cuda = _cuda.build_info()
    driver = cuda["driver_cuda_version"]
    supports = f"the driver supports {cuda_version_name(driver)}" if driver else "no driver"
    return info | {"cuda": f"{cuda_version_name(cuda['cuda_version'])} ({supports})"}


def _attribute(value: Any) -> np.generic:
    """The one type that each kind of attribute has on the C++ side."""
    if isinstance(value, bool | int | np.integer):
        return np.int32(value)
    if isinstance(value, float | np.floating):
        return np.float32(value)
    raise TypeError(f"an FFI attribute is an int or a float, not {type(value).__name__}")


def varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes of the enclosing shard_map over which x varies."""
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", frozenset()))


def cast_varying(x: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - varying_axes(x)))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    return jax.lax.pvary(x, missing)  # type: ignore[attr-defined]


def _refuse_explicit_sharding(target: str, x: Array) -> None:
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is not None and any(axis is not None for axis in sharding.spec):
        raise ValueError(
            f"{target}: an operand has the explicit sharding {sharding.spec}, which a custom call "
            "cannot follow; call the op inside jax.shard_map."
        )


def call(
    target: str, results: Sequence[jax.ShapeDtypeStruct], *operands: Array, **attributes: Any
) -> list[Array]:
    """Calls FFI target `target` on `operands`.

    Under `jax.shard_map` the operands are cast to the union of their varying mesh axes and the
    results vary over the same axes; otherwise a replicated x with sharded experts would be typed as
    replicated.
    """
    native()
    for operand in operands:
        _refuse_explicit_sharding(target, operand)
    varying = frozenset().union(*map(varying_axes, operands))
    types: Sequence[Any] = results
    if varying:
        operands = tuple(cast_varying(operand, varying) for operand in operands)
        aval = jax.typeof(operands[0])
        types = [
            aval.update(
                shape=result.shape,
                dtype=result.dtype,
                weak_type=False,
                sharding=aval.sharding.update(spec=PartitionSpec(*[None] * len(result.shape))),
            )
            for result in results
        ]
    attributes = {name: _attribute(value) for name, value in attributes.items()}
    return list(jax.ffi.ffi_call(target, list(types))(*operands, **attributes))


def op(run: Callable, fold: Callable) -> Callable:
    """Makes `run(static, *operands) -> tuple of arrays` an op that transforms understand.

    `static` is a hashable description, every operand is an array. Under `jax.vmap`,
    `fold(op, static, size, batched, *operands)` gets operands of which those with `batched` have a
    leading axis of `size`, and returns results that all have it; it reaches the op again with the
    batch folded into another axis. Differentiating raises NotImplementedError.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def call_op(static, *operands):
        @jax.custom_batching.custom_vmap
        def batchable(*operands):
            return tuple(run(static, *operands))

        @batchable.def_vmap
        def rule(size, batched, *operands):
            results = tuple(fold(call_op, static, size, batched, *operands))
            return results, (True,) * len(results)

        return batchable(*operands)

    @call_op.defjvp
    def jvp(static, primals, tangents):
        raise NotImplementedError(GRADIENT_MESSAGE)

    return call_op


def cached(run: Callable) -> Callable:
    """`run(static, *operands)`, traced once for equal types and not at every call.

    So a model's layers are traced once, and calls outside of jit are as quick as those of a jitted
    function. `static` is hashable, operands are pytrees of arrays.
    """
    jitted = jax.jit(run, static_argnums=0, inline=True)

    @functools.wraps(run)
    def call(static, *operands):
        native()  # what it raises may depend on the device, which traces do not
        return jitted(static, *operands)

    return call


def broadcast_batch(x: Array, batched: bool, size: int) -> Array:
    """x with a leading batch axis of `size`."""
    return x if batched else jnp.broadcast_to(x, (size, *x.shape))
