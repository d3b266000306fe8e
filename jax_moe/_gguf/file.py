"""GGUFFile: a model file's MoE layers, looked at and loaded."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jax_moe._block_types import MoEConfig, MoEParams
from jax_moe._ffn import Experts
from jax_moe._gguf.entries import Entry
from jax_moe._gguf.header import GGUFError, TensorInfo
from jax_moe._gguf.keys import architecture_name
from jax_moe._gguf.layers import GGUFLayer, read_layers
from jax_moe._gguf.progress import read
from jax_moe._gguf.split import Model
from jax_moe._gguf.types import BLOCK_FORMATS, DENSE_DTYPES
from jax_moe._packed import PackedExperts


class GGUFFile:
    """A GGUF model file, opened for its MoE layers.

    The header is parsed once; weights stay in the memory map until `load` asks for them. The file
    must not be changed while it is open or while arrays loaded onto the CPU are in use, since they
    may be views of it. `close`, or the end of a `with` block, closes it.

    Args:
      path: the file; of a split model any of its parts, the others are found beside it.

    Raises:
      GGUFError (a ValueError): if the file is not a GGUF file or is damaged; it names the file and
        the key or tensor.
      OSError: if it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._model = Model(path)
        self.path = Path(path)
        self._closed = False

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; nothing more can be loaded then. It may be called again.

        Arrays that are views of the file stay valid, and keep its memory map until they are gone.
        """
        self._closed = True
        for part in self._model.parts:
            part.close()

    @property
    def architecture(self) -> str:
        """The key `general.architecture`, like "qwen3moe"."""
        return architecture_name(self._open_model())

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's key-value pairs, decoded on access; arrays of numbers are NumPy arrays."""
        return self._open_model().metadata

    @functools.cached_property
    def layers(self) -> tuple[GGUFLayer, ...]:
        """The model's MoE layers in order, with whether and why each can be run."""
        return read_layers(self._open_model())

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors of the model; a tensor has `name`, `format`, `shape` and `nbytes`."""
        return MappingProxyType(self._model.tensors)

    def load_tensor(
        self,
        name: str,
        device_or_sharding: jax.Device | jax.sharding.Sharding | None = None,
        *,
        prepack: bool = False,
        progress: bool | None = None,
    ) -> PackedExperts | Array:
        """Any tensor of the model, for what is not in a MoE layer: attention, norms, embeddings.

        A packed matrix `[N, K]` comes as one expert, PackedExperts uint8 `[1, N, row_bytes]`, which
        `moe_gemm` multiplies by; a dense tensor in its own shape and dtype, float32, float16 or
        bfloat16.

        Args:
          name: as in the file, like "blk.0.attn_q.weight"; a key of `tensors`.
          device_or_sharding: where to put it; JAX's default device if None. A NamedSharding's spec
            is for the axes of the result, `[1, N, row_bytes]` if that is packed.
          prepack, progress: as in `load`.

        Raises:
          GGUFError: if there is no such tensor, its type is not one of those, or the file is
            closed.
          ValueError: if the sharding does not fit the shape.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise self._model.error(f"tensor {name!r} is missing")
        if tensor.ggml_type not in BLOCK_FORMATS and tensor.ggml_type not in DENSE_DTYPES:
            raise self._model.error(
                f"tensor {name!r} has type {tensor.format}, which cannot be used"
            )
        packed = tensor.ggml_type in BLOCK_FORMATS
        leading = (1,) * (3 - len(tensor.shape)) if packed else ()
        entry = Entry(tensor, (*leading, *tensor.shape), weight=True)
        return self._stream({"": entry}, name, {"": device_or_sharding}, prepack, progress)[""]

    def load(
        self,
        layer: int,
        device_or_sharding: jax.Device | jax.sharding.Sharding | None = None,
        *,
        prepack: bool = False,
        progress: bool | None = None,
    ) -> tuple[MoEParams, MoEConfig]:
        """The parameters and the configuration of one MoE layer, for `moe_block`.

        Expert weights keep the file's format: PackedExperts uint8 `[E, N, row_bytes]`, or dense
        float32, float16 or bfloat16 `[E, N, K]`. Router, biases, scales and norms are float32,
        tables of experts int32.

        Weights are read in the file's order, and each is handed to the device and let go of before
        the next: the host never holds a whole layer more, whatever the size of the file. On a CPU
        arrays may be views of the file instead, and are then not copied at all.

        Args:
          layer: the layer's index in the model, as in `layers`; an int.
          device_or_sharding: where to put the arrays; JAX's default device if None. A NamedSharding
            is for the routed experts, `[E, N, row_bytes]`; of everything else each device of its
            mesh gets a copy. With `NamedSharding(mesh, P("expert"))` every device holds its share
            of the experts.
          prepack: whether to bring every packed weight into the layout that GPUs read fastest, as
            `PackedExperts.prepack` does, once it is on the device; some formats grow by that. No
            more than one weight is then there twice.
          progress: whether to show a progress bar on stderr when the load takes more than a second;
            None: if stderr is a terminal.

        Under a trace of `jax.eval_shape` or `jax.jit` the arrays are abstract, as `nnx.eval_shape`
        needs them, or constants of the program.

        Raises:
          GGUFError: if the model has no such MoE layer, it cannot be run, or the file is closed; it
            says which and why.
          TypeError: if `layer` is not an int.
        """
        info = self._layer(layer)
        targets = {
            leaf: _of_leaf(device_or_sharding, leaf, len(entry.shape))
            for leaf, entry in info.entries.items()
        }
        leaves = self._stream(info.entries, f"layer {layer}", targets, prepack, progress)
        assert info.config is not None
        return _assemble(leaves), info.config

    def _stream(
        self,
        entries: Mapping[str, Entry],
        label: str,
        targets: Mapping[str, jax.Device | jax.sharding.Sharding | None],
        prepack: bool,
        progress: bool | None,
    ) -> dict[str, Any]:
        """The leaves of these names, each where its target says."""
        self._check_size()
        leaves: dict[str, Any] = {}
        for leaf in read({k: entry.tensor for k, entry in entries.items()}, label, progress):
            placed = jax.device_put(self._host_array(entries[leaf]), targets[leaf])
            if prepack and isinstance(placed, PackedExperts):
                placed = placed.prepack(donate=not isinstance(placed.data, jax.core.Tracer))
            # Waiting costs no reading: the kernel goes on with the next tensors meanwhile.
            leaves[leaf] = jax.block_until_ready(placed)
            tensor = entries[leaf].tensor
            if not _is_view(placed, tensor.bytes()):
                tensor.release()
        return leaves

    def _open_model(self) -> Model:
        if self._closed:
            raise self._model.error("the file has been closed")
        return self._model

    def _check_size(self) -> None:
        # A map of a file that has shrunk kills the process at the first touch.
        for part in self._open_model().parts:
            if os.stat(part.path).st_size < part.size:
                raise part.error("the file has become shorter since it was opened")

    def _layer(self, index: int) -> GGUFLayer:
        if isinstance(index, bool) or not isinstance(index, int | np.integer):
            raise TypeError(f"layer is an int, not {index!r}.")
        for info in self.layers:
            if info.index == index:
                if info.problem is not None:
                    raise GGUFError(info.problem)
                return info
        indices = [info.index for info in self.layers]
        have = f"its MoE layers are {_ranges(indices)}" if indices else "it has no MoE layers"
        raise self._model.error(f"layer {index} is not a MoE layer; {have}")

    def _host_array(self, entry: Entry) -> np.ndarray | PackedExperts:
        """A leaf as a view of the memory map; small ones as float32 or int32."""
        tensor, raw = entry.tensor, entry.tensor.bytes()
        if tensor.ggml_type in BLOCK_FORMATS:
            return PackedExperts(
                raw.reshape(*entry.shape[:-1], -1),  # type: ignore[arg-type]
                BLOCK_FORMATS[tensor.ggml_type],
            )
        if entry.num_ids is not None:
            ids = raw.view("<i4").reshape(entry.shape)
            if ids.min() < 0 or ids.max() >= entry.num_ids:
                raise self._model.error(
                    f"tensor {tensor.name!r} holds numbers that are not from 0 to "
                    f"{entry.num_ids - 1}"
                )
            return ids
        values = raw.view(DENSE_DTYPES[tensor.ggml_type]).reshape(entry.shape)
        return values if entry.weight else values.astype(np.float32)


def load_gguf(path: str | os.PathLike[str], layer: int) -> tuple[MoEParams, MoEConfig]:
    """The parameters and the configuration of one MoE layer of a GGUF file.

    The same as `GGUFFile(path).load(layer)`, which see; to load several layers, keep the GGUFFile.
    """
    return GGUFFile(path).load(layer)


def _of_leaf(
    target: jax.Device | jax.sharding.Sharding | None, leaf: str, rank: int
) -> jax.Device | jax.sharding.Sharding | None:
    """Where a leaf of a layer goes: the spec is for the routed experts, their biases and scales."""
    if not isinstance(target, NamedSharding):
        return target
    spec = target.spec[:rank] if leaf.startswith("experts.") else ()
    return NamedSharding(target.mesh, PartitionSpec(*spec), memory_kind=target.memory_kind)


def _is_view(leaf: Any, raw: np.ndarray) -> bool:
    """Whether a leaf's data are, or under a trace may become, the file's memory, as on a CPU."""
    arrays = jax.tree.leaves(leaf)
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return True
    start = raw.__array_interface__["data"][0]
    return any(
        shard.device.platform == "cpu"
        and start <= shard.data.unsafe_buffer_pointer() < start + raw.nbytes
        for array in arrays
        for shard in array.addressable_shards
    )


def _assemble(leaves: Mapping[str, Any]) -> MoEParams:
    """MoEParams from leaves by name; "experts.up" is a leaf of the field `experts`."""
    fields: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for leaf, value in leaves.items():
        group, _, name = leaf.rpartition(".")
        (groups.setdefault(group, {}) if group else fields)[name] = value
    for group, values in groups.items():
        fields[group] = Experts(**values)
    return MoEParams(**fields)


def _ranges(indices: list[int]) -> str:
    """Ascending integers as "1-3, 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
