"""What each MoE layer of a model holds, and whether and how it can be run.

What is wrong with a layer, like a missing tensor or a key that says what no code knows, is kept as
that layer's `problem`: the file can still be looked at, and its other layers run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from jax_moe._block_types import MoEConfig
from jax_moe._gguf.architectures import ARCHITECTURES
from jax_moe._gguf.entries import Entry, EntryReader
from jax_moe._gguf.header import GGUFError, TensorInfo
from jax_moe._gguf.keys import Keys, architecture_name
from jax_moe._gguf.rules import Sizes, read_config, read_sizes
from jax_moe._gguf.schema import Architecture, Key
from jax_moe._gguf.split import Model

MAX_LAYERS = 512  # llama.cpp's own limit

_LAYER_TENSOR = re.compile(r"blk\.(\d{1,6})\.(.+)")
_EXPERTS_TENSOR = re.compile(r"ffn_((gate|up|down|gate_up)_exps\..*|gate_inp\.weight)")
_PROJECTIONS = ("gate_up", "gate", "up", "down")


@dataclass(frozen=True)
class GGUFLayer:
    """What one MoE layer of a file holds.

    Attributes:
      index: the layer's number in the model.
      architecture: of the file.
      num_experts, top_k, d_model, d_expert: E, k, H and F; 0 where the file does not tell.
      projections: the routed experts' tensors by "gate", "up", "down" or "gate_up"; a tensor has
        `name`, `format`, `shape` and `nbytes`.
      shared: the shared expert's tensors, likewise; empty if there is none.
      router: the routing rule in words.
      config: for `moe_block`; None if the layer cannot be run.
      problem: why it cannot be run, or None.
    """

    index: int
    architecture: str
    num_experts: int
    top_k: int
    d_model: int
    d_expert: int
    projections: Mapping[str, TensorInfo]
    shared: Mapping[str, TensorInfo]
    router: str
    config: MoEConfig | None
    problem: str | None
    entries: Mapping[str, Entry] = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that `load` reads."""
        return sum(entry.tensor.nbytes or 0 for entry in self.entries.values())


def read_layers(model: Model) -> tuple[GGUFLayer, ...]:
    """The MoE layers of a model in order.

    Raises:
      GGUFError: if the keys that say which layers there are cannot be understood.
    """
    tensors: dict[int, dict[str, TensorInfo]] = {}
    for name, tensor in model.tensors.items():
        if match := _LAYER_TENSOR.fullmatch(name):
            tensors.setdefault(int(match[1]), {})[match[2]] = tensor
    row = ARCHITECTURES.get(architecture_name(model))
    if row is None:
        indices = [i for i in sorted(tensors) if _has_experts(tensors[i])]
    else:
        indices = _moe_layers(Keys(model), row, tensors)
    return tuple(_read_layer(Keys(model, i), row, tensors.get(i, {})) for i in indices)


def _has_experts(tensors: Mapping[str, TensorInfo]) -> bool:
    return any(map(_EXPERTS_TENSOR.fullmatch, tensors))


def _moe_layers(
    keys: Keys, row: Architecture, tensors: Mapping[int, Mapping[str, TensorInfo]]
) -> list[int]:
    if not keys.integer(Key("expert_count", 0)):
        return []
    block_count = Key("block_count")
    count = keys.integer(block_count)
    if count > MAX_LAYERS:
        raise keys.model.error(f"{keys.name(block_count)} is {count}, more than {MAX_LAYERS}")
    has_experts = {i for i, names in tensors.items() if i < count and _has_experts(names)}
    leading, step = keys.integer(row.leading_dense), keys.integer(row.step)
    if row.layers == "tensors" or (row.layers == "seconds" and step == 0):
        return sorted(has_experts)
    if row.layers == "seconds":
        return [i for i in range(count) if i % step == 1]
    if step < 1:
        raise keys.model.error(f"{keys.name(row.step)} is {step}, not a positive number")
    # Layers for multi-token prediction follow the model's own; some architectures' are dense.
    own = count - keys.integer(Key("nextn_predict_layers", 0))
    return [
        i
        for i in range(count)
        if (i >= leading and (i + 1) % step == 0 if i < own else i in has_experts)
    ]


def _read_layer(
    keys: Keys, row: Architecture | None, tensors: Mapping[str, TensorInfo]
) -> GGUFLayer:
    assert keys.layer is not None
    architecture = architecture_name(keys.model)
    sizes, d_expert = Sizes(0, 0, 0), 0
    config, entries, problem = None, {}, None
    try:
        if row is None:
            raise keys.model.error(f"architecture {architecture!r} is not known")
        sizes = read_sizes(keys)
        reader = EntryReader(keys, sizes, tensors)
        reader.read(row)
        config = read_config(keys, row, sizes, reader.entries)
        entries, d_expert = reader.entries, reader.d_expert
    except GGUFError as error:
        problem = str(error)
    shared = "ffn_{}_shexp" if row is None else row.shared_tensors
    if row is not None and row.shared == "absent":
        shared = ""
    return GGUFLayer(
        index=keys.layer,
        architecture=architecture,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        d_model=sizes.d_model,
        d_expert=d_expert,
        projections=_present(tensors, "ffn_{}_exps"),
        shared=_present(tensors, shared),
        router="" if config is None else describe_router(config, sizes.num_experts, entries),
        config=config,
        problem=problem,
        entries=MappingProxyType(entries),
    )


def _present(tensors: Mapping[str, TensorInfo], name: str) -> Mapping[str, TensorInfo]:
    names = {projection: f"{name.format(projection)}.weight" for projection in _PROJECTIONS}
    return MappingProxyType(
        {projection: tensors[name] for projection, name in names.items() if name in tensors}
    )


def describe_router(config: MoEConfig, num_experts: int, entries: Mapping[str, Any]) -> str:
    """The routing rule in words, like "sigmoid, top 8 of 256, groups 4/8, normalized, x2.5"."""
    by_token = "token_to_experts" in entries
    chosen = f"{config.top_k} of {num_experts}"
    parts = [config.gating, f"{chosen} by token_ids" if by_token else f"top {chosen}"]
    if "router_bias" in entries:
        parts.append("router bias")
    if "selection_bias" in entries:
        parts.append("selection bias")
    if config.num_groups > 1:
        parts.append(f"groups {config.num_groups_used}/{config.num_groups}")
    if config.normalize:
        parts.append("normalized")
    if config.scale != 1.0:
        parts.append(f"x{config.scale:g}")
    if config.weights_before:
        parts.append("weights before experts")
    if config.experts_per_group > 1:
        parts.append(f"then {num_experts // config.experts_per_group} chunk experts")
    if config.router_reads != "x":
        parts.append(f"reads router_input ({config.router_reads})")
    return ", ".join(parts)
