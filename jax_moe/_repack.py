"""Between GGUF's layout of packed weights and the tiled one, which the CUDA kernels read fastest.

`ffi/blocks/tiled.h` states the layout.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jax_moe import _ffi
from jax_moe._formats import BlockFormat, format_of_type

BAND_ROWS = 16


def can_be_tiled(shape: tuple[int, ...]) -> bool:
    """Whether weights of shape [..., N, K or row_bytes] have a tiled layout."""
    return len(shape) > 1 and shape[-2] % BAND_ROWS == 0 and 0 not in shape[-2:]


def repack(data: Array, format: BlockFormat) -> tuple[Array, Array]:
    """Tiled data of `data` [..., E, N, row_bytes], and aux float32 [..., E, N, 2]."""
    return _placed(_repack, _repack_shards, data, format)


def unpack(data: Array, format: BlockFormat) -> Array:
    """The bytes that `repack` was given."""
    return _placed(_unpack, _unpack_shards, data, format)


def _placed(whole: Any, shards: Any, data: Array, format: BlockFormat) -> Any:
    """`whole` of data on one device or traced; `shards`, shard by shard, of a sharded array."""
    sharding = None if isinstance(data, jax.core.Tracer) else getattr(data, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return whole(format, data)
    spec = (*sharding.spec, *[None] * (data.ndim - len(sharding.spec)))
    rows = sharding.shard_shape(data.shape)[-2]
    if spec[-1] is not None or rows % BAND_ROWS:
        raise ValueError(
            f"data of shape {data.shape} has the sharding {sharding.spec}: between GGUF's layout "
            f"and the tiled one a shard has whole rows, and a multiple of {BAND_ROWS} of them."
        )
    return shards(data, format, sharding.mesh, spec)


@_ffi.cached
def _repack(format: BlockFormat, data: Array) -> tuple[Array, Array]:
    tiled, aux = _repack_op(format.ggml_type, _experts_joined(data))
    leading = data.shape[:-1]
    return tiled.reshape(*leading, tiled.shape[-1]), aux.reshape(*leading, 2)


@_ffi.cached
def _unpack(format: BlockFormat, data: Array) -> Array:
    (unpacked,) = _unpack_op(format.ggml_type, _experts_joined(data))
    return unpacked.reshape(*data.shape[:-1], unpacked.shape[-1])


def _experts_joined(data: Array) -> Array:
    """[..., E, N, row_bytes], of which any may be 0, with one axis of experts."""
    return data.reshape(math.prod(data.shape[:-2]), *data.shape[-2:])


@functools.partial(jax.jit, static_argnames=("format", "mesh", "spec"))
def _repack_shards(data: Array, format: BlockFormat, mesh: Any, spec: tuple) -> Any:
    def local(data: Array) -> tuple[Array, Array]:
        tiled, aux = _repack(format, data)
        if spec[-2] is not None:  # an expert's rows are on several devices
            bound = jax.lax.pmax(aux[..., 1], spec[-2])
            aux = jnp.stack([aux[..., 0], bound], axis=-1)
        return tiled, aux

    axes = PartitionSpec(*spec)
    return jax.shard_map(local, mesh=mesh, in_specs=axes, out_specs=(axes, axes))(data)


@functools.partial(jax.jit, static_argnames=("format", "mesh", "spec"))
def _unpack_shards(data: Array, format: BlockFormat, mesh: Any, spec: tuple) -> Array:
    axes = PartitionSpec(*spec)
    local = functools.partial(_unpack, format)
    return jax.shard_map(local, mesh=mesh, in_specs=axes, out_specs=axes)(data)


def _format(ggml_type: int) -> BlockFormat:
    format = format_of_type(ggml_type)
    assert format is not None
    return format


def _run_repack(ggml_type: int, data: Array) -> list[Array]:
    *leading, row_bytes = data.shape
    format = _format(ggml_type)
    row_bytes = row_bytes // format.block_bytes * format.tiled_bytes
    results = (
        jax.ShapeDtypeStruct((*leading, row_bytes), jnp.uint8),
        jax.ShapeDtypeStruct((*leading, 2), jnp.float32),
    )
    return _ffi.call("jax_moe_repack", results, data, format=ggml_type)


def _run_unpack(ggml_type: int, data: Array) -> list[Array]:
    *leading, row_bytes = data.shape
    format = _format(ggml_type)
    row_bytes = row_bytes // format.tiled_bytes * format.block_bytes
    results = (jax.ShapeDtypeStruct((*leading, row_bytes), jnp.uint8),)
    return _ffi.call("jax_moe_unpack", results, data, format=ggml_type)


def _fold(op: Any, ggml_type: int, size: int, batched: Any, data: Array) -> list[Array]:
    """Folds a batch into the expert axis."""
    results = op(ggml_type, data.reshape(size * data.shape[1], *data.shape[2:]))
    return [result.reshape(*data.shape[:3], result.shape[-1]) for result in results]


_repack_op = _ffi.op(_run_repack, _fold)
_unpack_op = _ffi.op(_run_unpack, _fold)
