"""From an architecture's row and a file's metadata to the MoEConfig of one layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from jax_moe._block_types import MoEConfig
from jax_moe._gguf.keys import Keys
from jax_moe._gguf.schema import GATINGS, NO_LIMIT, REQUIRED, UNGATED, Architecture, Key

MAX_EXPERTS = 1024  # llama.cpp's own limit

_EXPERT_COUNT = Key("expert_count")
_TOP_K = Key("expert_used_count")
_GROUPS = Key("expert_group_count", 0)
_GROUPS_USED = Key("expert_group_used_count", 0)
_NORM_EPS = Key("attention.layer_norm_rms_epsilon", 1e-6)
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class Sizes:
    """E, k and H as the metadata give them."""

    num_experts: int
    top_k: int
    d_model: int


def read_sizes(keys: Keys) -> Sizes:
    experts, top_k = keys.integer(_EXPERT_COUNT), keys.integer(_TOP_K)
    if not 1 <= experts <= MAX_EXPERTS:
        raise keys.model.error(
            f"{keys.name(_EXPERT_COUNT)} is {experts}, not from 1 to {MAX_EXPERTS}"
        )
    if not 1 <= top_k <= experts:
        raise keys.model.error(
            f"{keys.name(_TOP_K)} is {top_k}, not from 1 to the number of experts, {experts}"
        )
    return Sizes(experts, top_k, keys.integer(Key("embedding_length")))


def read_config(keys: Keys, row: Architecture, sizes: Sizes, leaves: Collection[str]) -> MoEConfig:
    """The configuration of a layer that has these leaves of MoEParams, like "experts.gate"."""
    groups, groups_used = _read_groups(keys, row, sizes)
    activation, limit = _read_activation(keys, row.activation, row.limit)
    if row.gate == "optional" and not {"experts.gate", "experts.gate_up"} & set(leaves):
        activation, limit = UNGATED[activation], None
    shared_activation, shared_limit = _read_activation(keys, row.activation, row.shared_limit)
    betas = None
    if row.betas is not None:
        betas = (keys.number(row.betas[0]), keys.number(row.betas[1]))
    return MoEConfig(
        top_k=sizes.top_k,
        gating=_read_gating(keys, row),
        normalize=keys.flag(row.normalize),
        scale=keys.number(row.scale) or 1.0,
        num_groups=groups,
        num_groups_used=groups_used,
        router_reads=row.router_reads,
        activation=activation,
        activation_limit=limit,
        activation_betas=betas,
        weights_before=row.weights_before,
        shared_activation=shared_activation,
        shared_activation_limit=shared_limit,
        sum_scale=row.sum_scale if "shared.down" in leaves else 1.0,
        experts_per_group=1 if row.experts_per_group is None else read_group_size(keys, row, sizes),
        chunk_scale=1.0 if row.chunk_scale is None else keys.number(row.chunk_scale),
        norm_eps=keys.number(_NORM_EPS),
    )


def _read_gating(keys: Keys, row: Architecture) -> str:
    if not isinstance(row.gating, Key):
        return row.gating
    number = keys.integer(Key(row.gating.name, 0))
    if GATINGS.get(number) in row.gatings:
        return GATINGS[number]
    if number in GATINGS:
        raise keys.model.error(
            f"{keys.name(row.gating)} is {number} ({GATINGS[number]}), and this architecture knows "
            f"only {', '.join(row.gatings)}"
        )
    if number:
        raise keys.model.error(f"{keys.name(row.gating)} is {number}, no known gating function")
    for size, gating in row.gating_by_size:
        if size == (keys.integer(Key("block_count")), _vocabulary_size(keys)):
            return gating
    if row.gating.default is REQUIRED:
        raise keys.model.error(f"{keys.name(row.gating)} is missing")
    return row.gating.default


def _vocabulary_size(keys: Keys) -> int:
    metadata = keys.model.metadata
    if _TOKENS in metadata:
        return metadata.array_length(_TOKENS) or 0
    return keys.integer(Key("vocab_size", 0))


def read_group_size(keys: Keys, row: Architecture, sizes: Sizes) -> int:
    """Routed experts for one chunk expert, where the architecture has chunk experts."""
    size = keys.integer(row.experts_per_group)
    if size < 1 or sizes.num_experts % size:
        raise keys.model.error(
            f"{keys.name(row.experts_per_group)} is {size}, not a divisor of the "
            f"{sizes.num_experts} experts"
        )
    return size


def _read_groups(keys: Keys, row: Architecture, sizes: Sizes) -> tuple[int, int]:
    """Groups of experts, and how many of them a token's experts may come from."""
    groups, experts = keys.integer(_GROUPS), sizes.num_experts
    if groups <= 1:
        return 1, 1
    if not row.groups:
        raise keys.model.error(
            f"{keys.name(_GROUPS)} is {groups}, and this architecture's experts have no groups"
        )
    used = keys.integer(_GROUPS_USED)
    if experts % groups or groups >= experts:
        raise keys.model.error(
            f"{keys.name(_GROUPS)} is {groups}, not a proper divisor of the {experts} experts"
        )
    if not 0 < used < groups:
        raise keys.model.error(f"{keys.name(_GROUPS_USED)} is {used}, not from 1 to {groups - 1}")
    if used * (experts // groups) < sizes.top_k:
        raise keys.model.error(
            f"{keys.name(_TOP_K)} is {sizes.top_k}, more experts than {used} groups hold"
        )
    return groups, used


def _read_activation(keys: Keys, activation: str, rule: Any) -> tuple[str, float | None]:
    """The activation and its limit; a clamped one without a limit is plain swiglu."""
    limit = None if rule is None else keys.number(rule)
    if limit is not None and limit <= NO_LIMIT:
        limit = None
    if limit is None and activation.startswith("swiglu_clamp"):
        activation = "swiglu"
    return activation, limit
