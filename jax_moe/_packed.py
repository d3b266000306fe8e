"""Expert weights as a GGUF file packs them, and as GPUs read them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_moe._dequantize import dequantize
from jax_moe._formats import BlockFormat, as_format
from jax_moe._repack import BAND_ROWS, can_be_tiled, repack, unpack

TILED = "tiled"

Tree = TypeVar("Tree")


class EqualByLeaves:
    """A pytree that equals another of its structure with the very same arrays.

    Other leaves, like `jax.ShapeDtypeStruct`, are compared. There is a hash where the leaves have
    one, so not with concrete arrays.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        if jax.tree.structure(self) != jax.tree.structure(other):  # type: ignore[operator]
            return False
        return all(map(_same_leaf, jax.tree.leaves(self), jax.tree.leaves(other)))

    def __hash__(self) -> int:
        leaves, structure = jax.tree.flatten(self)
        return hash((structure, *leaves))


def _same_leaf(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Array | np.ndarray) and bool(a == b))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PackedExperts(EqualByLeaves):
    """Matrices of experts in a GGUF block format: a pytree whose leaf is the bytes.

    E, N and K always follow from `data`, so stacked layers, slices and shards are PackedExperts
    too. The constructor checks nothing but the format and the name of the layout, since transforms
    build pytrees of placeholders; the ops check shapes and dtypes when they are traced.

    Attributes:
      data: uint8 `[..., E, N, row_bytes]`. Row n of expert e multiplies an input to give output n;
        it is packed along K exactly as in a GGUF file. Leading axes are stacked layers.
      format: a `BlockFormat`; its name ("Q4_K") or a `gguf.GGMLQuantizationType` may be given.
        Static.
      layout: None for GGUF's, or "tiled": what `prepack` makes. The same weights in another order
        within every 16 rows, so that `data` may be sliced and sharded along its leading axes and E
        only (along N in multiples of 16). A block of it has `format.tiled_bytes` bytes. Static.
      aux: with the tiled layout only: float32 `[..., E, N, 2]`, a power of two near the inverse of
        each row's largest scale, and a bound on the norms of its expert's rows.
    """

    data: Array
    format: BlockFormat = field(metadata={"static": True})
    layout: str | None = field(default=None, metadata={"static": True})
    aux: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", as_format(self.format))
        if self.layout not in (None, TILED):
            raise ValueError(f"layout is None or {TILED!r}, not {self.layout!r}.")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `(..., E, N, K)` of the weights."""
        *leading, row_bytes = self.data.shape
        return (*leading, row_bytes // _block_bytes(self) * self.format.block_size)

    @property
    def ndim(self) -> int:
        """The number of axes of the weights, 3 for one layer's experts."""
        return len(self.shape)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The weights `[..., E, N, K]` as an array of `dtype`, rounded once from exact float32.

        Works inside and outside `jax.jit`, on any platform (the tiled layout: where the ops run).
        Values whose magnitude is below 1e-36 may come out as zero, because XLA flushes subnormal
        numbers on the CPU.
        """
        return dequantize(self.unpack().data, self.format).astype(dtype)

    def prepack(self, donate: bool = False) -> "PackedExperts":
        """The same weights in the tiled layout, which the CUDA kernels read fastest.

        Every op takes either layout, with results within the same bounds. On a CPU the ops first
        undo the layout, at every call: prepack for GPUs. Works inside and outside `jax.jit`, and
        outside shard by shard where `data` is sharded.

        Most formats keep their size. Those whose weights share code words get a code for each
        weight and grow, which costs memory; bytes a block of 256 weights:

            format   GGUF  tiled        format   GGUF  tiled
            IQ1_S      50     70        IQ2_S      82    106
            IQ1_M      56     76        IQ3_XXS    98    134
            IQ2_XXS    66    102        IQ3_S     110    134
            IQ2_XS     74    106        TQ1_0      54     74

        Args:
          donate: deletes `data` when it has been read, so that no more than one weight is held
            twice. Outside `jax.jit` only.

        Returns:
          `PackedExperts` with the layout "tiled", for which `unpack` gives the exact bytes back; or
          self where N is no multiple of 16, where N or K is 0, or where it is tiled already.

        Raises:
          TypeError: `data` is no array of uint8. `jax.eval_shape` takes shapes instead.
          ValueError: the shape is not that of whole blocks, a sharding splits rows or bands of 16
            rows, or `donate` is asked of a traced array.
          ImportError: the native library cannot work with the installed jaxlib.
        """
        _check_bytes(self.data)
        check_layout("self", self)
        if self.layout == TILED or not can_be_tiled(self.data.shape):
            return self
        _check_donation(self.data, donate)
        data, aux = repack(self.data, self.format)
        _delete(self.data, donate)
        return dataclasses.replace(self, data=data, layout=TILED, aux=aux)

    def unpack(self, donate: bool = False) -> "PackedExperts":
        """The inverse of `prepack`: the same weights in GGUF's layout; self where it is that.

        Args, raises: as `prepack`.
        """
        if self.layout is None:
            return self
        _check_bytes(self.data)
        check_layout("self", self)
        _check_donation(self.data, donate)
        data = unpack(self.data, self.format)
        _delete(self.data, donate)
        return PackedExperts(data, self.format)


def map_packed(f: Callable[[PackedExperts], PackedExperts], tree: Tree) -> Tree:
    """`tree` with `f` of its packed weights; an array that is in two places is still one."""
    done: dict[Any, PackedExperts] = {}

    def each(node: Any) -> Any:
        if not isinstance(node, PackedExperts):
            return node
        key = (id(node.data), node.format, node.layout)
        if key not in done:
            done[key] = f(node)
        return done[key]

    return jax.tree.map(each, tree, is_leaf=lambda node: isinstance(node, PackedExperts))


def check_layout(name: str, weight: PackedExperts) -> None:
    """Checks that the shapes of `weight`, of any rank, and its aux fit its layout.

    Raises: ValueError or TypeError naming the argument as `name`.
    """
    shape, block_bytes = weight.data.shape, _block_bytes(weight)
    if shape[-1] % block_bytes:
        tiled = "" if weight.layout is None else "tiled "
        raise ValueError(
            f"{name}.data has rows of {shape[-1]} bytes, which is not a multiple of the "
            f"{block_bytes} bytes of a {tiled}{weight.format.name} block."
        )
    aux = weight.aux
    if weight.layout is None:
        if aux is not None:
            raise ValueError(f"{name}.aux is for the tiled layout, but {name}.layout is None.")
        return
    if len(shape) < 2 or shape[-2] % BAND_ROWS:
        raise ValueError(
            f"{name} is tiled, so that N is a multiple of {BAND_ROWS}, but {name}.data has shape "
            f"{tuple(shape)}."
        )
    if aux is None:
        raise ValueError(f"{name} is tiled but has no aux; PackedExperts.prepack makes both.")
    if not hasattr(aux, "shape") or aux.dtype != jnp.float32:
        raise TypeError(f"{name}.aux has dtype float32, not {getattr(aux, 'dtype', type(aux))}.")
    expected = (*shape[:-1], 2)
    if tuple(aux.shape) != expected:
        raise ValueError(
            f"{name}.aux has shape [..., E, N, 2] = {expected}, not {tuple(aux.shape)}."
        )


def _block_bytes(weight: PackedExperts) -> int:
    return weight.format.block_bytes if weight.layout is None else weight.format.tiled_bytes


def _check_bytes(data: Any) -> None:
    if not isinstance(data, Array | np.ndarray) or data.dtype != jnp.uint8 or data.ndim < 2:
        given = f"{data.dtype} {data.shape}" if isinstance(data, Array | np.ndarray) else data
        raise TypeError(f"self.data is an array of uint8 [..., E, N, row_bytes], not {given}.")


def _check_donation(data: Array, donate: bool) -> None:
    if donate and isinstance(data, jax.core.Tracer):
        raise ValueError("donate: inside jax.jit the caller of the compiled function donates.")


def _delete(data: Array, donate: bool) -> None:
    if donate and isinstance(data, jax.Array):
        data.delete()
