"""Which tensor of a layer becomes which leaf of MoEParams, by an architecture's row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jax_moe._gguf.architectures import Architecture, Key
from jax_moe._gguf.header import TensorInfo
from jax_moe._gguf.keys import Keys
from jax_moe._gguf.rules import Sizes
from jax_moe._gguf.types import BLOCK_FORMATS, DENSE_DTYPES

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
      weight: the leaf keeps the tensor's format; otherwise it is float32.
    """

    tensor: TensorInfo
    shape: tuple[int, ...]
    weight: bool


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
        self._take("selection_bias", row.selection_bias_tensor, experts, row.selection_bias)
        width = self._read_latent(row)
        self._read_ffn("experts", "exps", experts, width, row.gate, row.merged, row.biases)
        self.d_expert = self.entries["experts.down"].shape[-1]
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
        error, tensor = self._keys.model.error, self._tensors.get(name)
        if tensor is None:
            raise error(f"tensor 'blk.{self._keys.layer}.{name}' is missing")
        usable = tensor.ggml_type in DENSE_DTYPES or (weight and tensor.ggml_type in BLOCK_FORMATS)
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
        self.entries[leaf] = Entry(tensor, given, weight)

    def _read_latent(self, row: Architecture) -> int:
        """The projections around the routed experts. Returns the width these work at."""
        width = self._sizes.d_model
        if not row.latent:
            return width
        down, up, *norm = (f"{name}.weight" for name in row.latent)
        if row.latent_presence == "optional" and down not in self._tensors:
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
        suffix: str,
        experts: tuple[int, ...],
        width: int,
        gate: bool,
        merged: bool,
        biases: str,
    ) -> None:
        """The projections of one set of experts, their biases and scales."""
        down = f"ffn_down_{suffix}.weight"
        self._take(f"{group}.down", down, (*experts, width, None), weight=True)
        inner = self.entries[f"{group}.down"].shape[-1]
        if merged and f"ffn_gate_up_{suffix}.weight" in self._tensors:
            rows = {"gate_up": 2 * inner}
        else:
            rows = {"gate": inner, "up": inner} if gate else {"up": inner}
        for projection, count in rows.items():
            name = f"ffn_{projection}_{suffix}.weight"
            self._take(f"{group}.{projection}", name, (*experts, count, width), weight=True)
        for projection, count in (rows | {"down": width}).items():
            leaf, name = f"{group}.{projection}", f"ffn_{projection}_{suffix}"
            self._take(f"{leaf}_bias", f"{name}.bias", (*experts, count), biases)
            # llama.cpp loads scales for every architecture, and forgets to apply them in some.
            self._take(f"{leaf}_scale", f"{name}.scale", experts, "optional")

    def _read_shared(self, row: Architecture) -> None:
        width = self._sizes.d_model
        if isinstance(row.shared, Key):
            wanted = self._keys.integer(row.shared) > 0
        else:
            down = "ffn_down_shexp.weight" in self._tensors
            wanted = row.shared == "required" or (row.shared == "optional" and down)
        if not wanted:
            return
        if row.shared_merged:  # the tensor called "up" holds gate rows, then up rows
            self._take("shared.down", "ffn_down_shexp.weight", (1, width, None), weight=True)
            rows = 2 * self.entries["shared.down"].shape[-1]
            self._take("shared.gate_up", "ffn_up_shexp.weight", (1, rows, width), weight=True)
        else:
            self._read_ffn("shared", "shexp", (1,), width, row.gate, False, "absent")
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
