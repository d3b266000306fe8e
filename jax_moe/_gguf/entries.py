"""Which tensor of a layer becomes which leaf of MoEParams, by an architecture's row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jax_moe._gguf.header import TensorInfo
from jax_moe._gguf.keys import Keys
from jax_moe._gguf.rules import Sizes, read_group_size
from jax_moe._gguf.schema import Architecture, Key
from jax_moe._gguf.types import BLOCK_FORMATS, DENSE_DTYPES, INT32

# Tensors of a MoE block. One that a layer has and its row does not use means that the row is not
# the whole truth about the file, and that what would be computed by it is wrong.
_MOE_TENSOR = re.compile(
    r"(ffn_(gate|up|down|gate_up)_(exps|shexp|chexps)|ffn_gate_inp(_shexp)?|ffn_gate_tid2eid"
    r"|ffn_(latent|routed)_\w+|exp_probs_b(_vl)?)(\..*)?"
)


@dataclass(frozen=True)
class Entry:
    """A tensor that is to become a leaf of MoEParams.

    Attributes:
      tensor: of the file.
      shape: the leaf's, which may have axes of length 1 that the file leaves out.
      weight: the leaf keeps the tensor's format; otherwise it is float32 or int32.
      num_ids: where the leaf is int32, its elements are from 0 to this number, exclusive.
    """

    tensor: TensorInfo
    shape: tuple[int, ...]
    weight: bool
    num_ids: int | None = None


class EntryReader:
    """Collects a layer's entries.

    Args:
      keys: of the layer.
      sizes: that its tensors must have.
      tensors: the layer's tensors, by name without "blk.N.".

    Attributes:
      entries: by leaf, like "router" or "experts.gate_bias". Filled by `read`.
      d_expert: the experts' inner width, known after `read`.
    """

    def __init__(self, keys: Keys, sizes: Sizes, tensors: Mapping[str, TensorInfo]):
        self._keys = keys
        self._sizes = sizes
        self._tensors = tensors
        self.entries: dict[str, Entry] = {}
        self.d_expert = 0

    def read(self, row: Architecture) -> None:
        """Finds and checks every tensor of the row; GGUFError names the first that is not right."""
        experts, width = (self._sizes.num_experts,), self._sizes.d_model
        self._take("router", "ffn_gate_inp.weight", (*experts, width))
        self._take("router_bias", "ffn_gate_inp.bias", experts, row.router_bias)
        layer = self._keys.layer
        assert layer is not None
        if layer < self._keys.integer(row.hash_layers):
            self._take_ids("token_to_experts", "ffn_gate_tid2eid.weight")
        else:
            self._take("selection_bias", row.selection_bias_tensor, experts, row.selection_bias)
        for leaf, name in row.vectors:
            self._take(leaf, name, (width,))
        width = self._read_latent(row)
        gate = row.gate
        if gate == "optional" and "ffn_gate_exps.weight" not in self._tensors:
            gate = "absent"
        names, merged = "ffn_{}_exps", row.merged
        self._read_ffn("experts", names, experts, width, gate != "absent", merged, row.biases)
        self.d_expert = self.entries["experts.down"].shape[-1]
        if row.experts_per_group is not None:
            chunks = experts[0] // read_group_size(self._keys, row, self._sizes)
            self._read_ffn("chunk_experts", "ffn_{}_chexps", (chunks,), width)
        self._read_shared(row)
        self._refuse_unread(row)

    def _take(
        self,
        leaf: str,
        name: str,
        shape: tuple[int | None, ...],
        presence: str = "required",
        *,
        weight: bool = False,
    ) -> None:
        """Makes tensor `name` the leaf. None in `shape` stands for any length."""
        if presence == "absent" or (presence == "optional" and name not in self._tensors):
            return
        tensor = self._tensor(name)
        usable = tensor.ggml_type in DENSE_DTYPES or (weight and tensor.ggml_type in BLOCK_FORMATS)
        self.entries[leaf] = Entry(tensor, self._shape(tensor, shape, usable), weight)

    def _take_ids(self, leaf: str, name: str) -> None:
        """Makes tensor `name`, a row of k experts for any number of tokens, the leaf."""
        tensor = self._tensor(name)
        shape = self._shape(tensor, (None, self._sizes.top_k), tensor.ggml_type == INT32)
        self.entries[leaf] = Entry(tensor, shape, False, self._sizes.num_experts)

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise self._keys.model.error(f"tensor 'blk.{self._keys.layer}.{name}' is missing")
        return self._tensors[name]

    def _shape(
        self, tensor: TensorInfo, shape: tuple[int | None, ...], usable: bool
    ) -> tuple[int, ...]:
        """The tensor's shape as the leaf's, if it fits and the type is usable."""
        error = self._keys.model.error
        if not usable:
            raise error(f"tensor {tensor.name!r} has type {tensor.format}, which cannot be used")
        given = (1,) * (len(shape) - len(tensor.shape)) + tensor.shape
        if len(given) != len(shape) or not all(
            have > 0 and want in (None, have) for want, have in zip(shape, given, strict=True)
        ):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise error(
                f"tensor {tensor.name!r} has shape {list(tensor.shape)}, expected [{expected}]"
            )
        return given

    def _read_latent(self, row: Architecture) -> int:
        """The projections around the routed experts. Returns the width these work at."""
        width = self._sizes.d_model
        if not row.latent:
            return width
        down, up, *norm = (f"{name}.weight" for name in row.latent)
        needed = row.latent_presence
        if isinstance(needed, Key):
            needed = "required" if self._keys.integer(needed) else "optional"
        if needed == "optional" and down not in self._tensors:
            return width
        self._take("latent_down", down, (1, None, width), weight=True)
        latent = self.entries["latent_down"].shape[1]
        self._take("latent_up", up, (1, width, latent), weight=True)
        for name in norm:
            self._take("latent_norm", name, (latent,), "optional")
        return latent

    def _read_ffn(
        self,
        group: str,
        names: str,
        experts: tuple[int, ...],
        width: int,
        gate: bool = True,
        merged: bool = False,
        biases: str = "absent",
        merged_as: str = "gate_up",
    ) -> None:
        """The projections of one set of experts, their biases and scales.

        `names` has a place for the projection's. With `merged`, one tensor may hold gate rows and
        then up rows: the one with `merged_as` in that place, always so if that is "up".
        """
        projections = {"gate_up": merged_as, "gate": "gate", "up": "up", "down": "down"}
        tensors = {leaf: names.format(name) for leaf, name in projections.items()}
        down = f"{tensors['down']}.weight"
        self._take(f"{group}.down", down, (*experts, width, None), weight=True)
        inner = self.entries[f"{group}.down"].shape[-1]
        if merged and (merged_as == "up" or f"{tensors['gate_up']}.weight" in self._tensors):
            rows = {"gate_up": 2 * inner}
        else:
            rows = {"gate": inner, "up": inner} if gate else {"up": inner}
        for projection, count in rows.items():
            name = f"{tensors[projection]}.weight"
            self._take(f"{group}.{projection}", name, (*experts, count, width), weight=True)
        for projection, count in (rows | {"down": width}).items():
            leaf, name = f"{group}.{projection}", tensors[projection]
            self._take(f"{leaf}_bias", f"{name}.bias", (*experts, count), biases)
            # llama.cpp loads scales for every architecture, and forgets to apply them in some.
            self._take(f"{leaf}_scale", f"{name}.scale", experts, "optional")

    def _read_shared(self, row: Architecture) -> None:
        width, names = self._sizes.d_model, row.shared_tensors
        if isinstance(row.shared, Key):
            wanted = self._keys.integer(row.shared) > 0
        else:
            present = any(
                f"{names.format(projection)}.weight" in self._tensors
                for projection in ("gate", "up", "down")
            )
            wanted = row.shared == "required" or (row.shared == "optional" and present)
        if not wanted:
            return
        self._read_ffn(
            "shared",
            names,
            (1,),
            width,
            row.gate != "absent",
            row.shared_merged,
            merged_as="up" if row.shared_merged else "gate_up",
        )
        self._take("shared_gate", "ffn_gate_inp_shexp.weight", (width,), row.shared_gate)

    def _refuse_unread(self, row: Architecture) -> None:
        read = {entry.tensor.name for entry in self.entries.values()}
        for name, tensor in self._tensors.items():
            base, _, kind = name.partition(".")
            harmless = kind == "input_scale" or base in row.ignored
            if _MOE_TENSOR.fullmatch(name) and not harmless and tensor.name not in read:
                raise self._keys.model.error(
                    f"tensor {tensor.name!r} has no known meaning in this architecture"
                )
