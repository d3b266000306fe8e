"""What a row of the table of architectures can say: the vocabulary of `architectures.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

REQUIRED: Any = object()


@dataclass(frozen=True)
class Key:
    """The value of metadata key `{architecture}.{name}`; where an array, its element of the layer.

    `default` is the value where the file has no such key; REQUIRED makes that an error.
    """

    name: str
    default: Any = REQUIRED


Presence = Literal["absent", "optional", "required"]

# Values of the key `expert_gating_func`. In a file 0 is the same as no value.
GATINGS = {1: "softmax", 2: "sigmoid", 3: "softmax_after_topk", 4: "sqrt_softplus"}

# A swiglu limit up to this stands for "no limit".
NO_LIMIT = 1e-6

# What an activation becomes where the gate projection is left out.
UNGATED = {"swiglu": "silu", "swiglu_clamp": "silu", "swiglu_clamp_after": "silu", "geglu": "gelu"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The MoE block of one architecture.

    Attributes:
      layers: which layers are MoE layers. "all"; "tensors": those that have a router or experts;
        "interleaved": those from `leading_dense` on with (layer + 1) % `step` == 0; "seconds":
        those with layer % `step` == 1, or, without a step, as "tensors".
      gating, normalize, scale: of `route`, fixed or read from a key.
      gating_by_size: overrides a missing gating key, for (block_count, vocabulary size).
      gatings: the gating functions that the key may name.
      groups: whether experts may be chosen by groups. Not so where llama.cpp ranks them by
        something else than gate values, whose sums `route` would then not compute.
      router_reads: of MoEConfig.
      router_bias: presence of `ffn_gate_inp.bias`, added to the logits.
      selection_bias: presence of `selection_bias_tensor`, added for the selection only.
      hash_layers: the layers below this one take a token's experts from the table
        `ffn_gate_tid2eid`, and have no selection bias.
      gate: presence of the gate projection of routed experts. One that is optional and left out
        turns the activation into its form without a gate.
      merged: whether one tensor `ffn_gate_up_exps` may stand for gate and up.
      biases: presence of a bias of every expert projection.
      activation: of routed experts. The clamped ones need `limit`; without one they become
        "swiglu".
      limit, betas: constants of the activation.
      weights_before: routing weights multiply the experts' input.
      shared: presence of the shared expert, or a key that is positive where there is one.
      shared_tensors: the shared expert's tensors, like "ffn_{}_shexp".
      shared_gate: presence of `ffn_gate_inp_shexp`, whose sigmoid weights the shared expert.
      shared_merged: `ffn_up_shexp` holds gate rows, then up rows.
      shared_limit: as `limit`, for the shared expert. None: its activation is never clamped.
      sum_scale: factor of the sum of routed and shared experts.
      latent: tensors that project the routed experts' input down and their result up, where they
        work at a width of their own, and optionally the norm of what they give.
      latent_presence: of those tensors; a key makes them required where it is positive.
      vectors: pairs of a field of MoEParams of shape [H] and the tensor that it is.
      experts_per_group: as in MoEConfig, where there are chunk experts `ffn_*_chexps`.
      chunk_scale: as in MoEConfig.
      ignored: tensors that files may have and that no computation reads.
      x: the norm whose result the block's x is, by the name of its tensor.
      note: what else belongs to the block's boundary, for the reader of the documentation.
    """

    layers: Literal["all", "tensors", "interleaved", "seconds"] = "all"
    leading_dense: int | Key = 0
    step: int | Key = 1
    gating: str | Key = "softmax"
    gating_by_size: tuple[tuple[tuple[int, int], str], ...] = ()
    gatings: tuple[str, ...] = tuple(GATINGS.values())
    normalize: bool | Key = True
    scale: float | Key = 1.0
    groups: bool = True
    router_reads: str = "x"
    router_bias: Presence = "absent"
    selection_bias: Presence = "absent"
    selection_bias_tensor: str = "exp_probs_b.bias"
    hash_layers: int | Key = 0
    gate: Presence = "required"
    merged: bool = False
    biases: Presence = "absent"
    activation: str = "swiglu"
    limit: float | Key | None = None
    betas: tuple[float | Key, float | Key] | None = None
    weights_before: bool = False
    shared: Presence | Key = "absent"
    shared_tensors: str = "ffn_{}_shexp"
    shared_gate: Presence = "absent"
    shared_merged: bool = False
    shared_limit: float | Key | None = None
    sum_scale: float = 1.0
    latent: tuple[str, ...] = ()
    latent_presence: Presence | Key = "absent"
    vectors: tuple[tuple[str, str], ...] = ()
    experts_per_group: Key | None = None
    chunk_scale: Key | None = None
    ignored: tuple[str, ...] = ()
    x: str = "ffn_norm"
    note: str = ""
