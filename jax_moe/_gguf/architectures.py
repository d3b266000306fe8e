"""What each GGUF architecture means: one row of data per architecture string.

A row says which metadata keys and tensors make up the architecture's MoE block and by which rule
they combine; `layers.py` reads the rows. Sizes are not in the rows: E comes from `expert_count`, H
from `embedding_length`, and the widths of routed and shared experts from the tensors, which must
agree with one another. Facts: llama.cpp, src/models/*.cpp and src/llama-graph.cpp
(`build_moe_ffn`).
"""

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


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The MoE block of one architecture.

    Attributes:
      layers: which layers are MoE layers. "all"; "tensors": those that have expert tensors;
        "interleaved": those from `leading_dense` on with (layer + 1) % `step` == 0.
      gating, normalize, scale: of `route`, fixed or read from a key.
      gating_by_size: overrides a missing gating key, for (block_count, vocabulary size).
      router_bias: presence of `ffn_gate_inp.bias`, added to the logits.
      selection_bias: presence of `selection_bias_tensor`, added for the selection only.
      gate: whether experts have a gate projection.
      merged: whether one tensor `ffn_gate_up_exps` may stand for gate and up.
      biases: presence of a bias of every expert projection.
      activation: of routed experts. The clamped ones need `limit`; without one they become
        "swiglu".
      limit, betas: constants of the activation.
      weights_before: routing weights multiply the experts' input.
      shared: presence of the shared expert, or a key that is positive where there is one.
      shared_gate: presence of `ffn_gate_inp_shexp`, whose sigmoid weights the shared expert.
      shared_merged: `ffn_up_shexp` holds gate rows, then up rows.
      shared_limit: as `limit`, for the shared expert. None: its activation is never clamped.
      shared_average: the block's result is the mean of routed and shared result.
      latent: tensors that project the routed experts' input down and their result up, where they
        work at a width of their own, and optionally the norm of what they give.
      latent_presence: of those tensors.
      ignored: tensors that files may have and that no computation reads.
    """

    layers: Literal["all", "tensors", "interleaved"] = "all"
    leading_dense: int | Key = 0
    step: int | Key = 1
    gating: str | Key = "softmax"
    gating_by_size: tuple[tuple[tuple[int, int], str], ...] = ()
    normalize: bool | Key = True
    scale: float | Key = 1.0
    router_bias: Presence = "absent"
    selection_bias: Presence = "absent"
    selection_bias_tensor: str = "exp_probs_b.bias"
    gate: bool = True
    merged: bool = False
    biases: Presence = "absent"
    activation: str = "swiglu"
    limit: float | Key | None = None
    betas: tuple[float | Key, float | Key] | None = None
    weights_before: bool = False
    shared: Presence | Key = "absent"
    shared_gate: Presence = "absent"
    shared_merged: bool = False
    shared_limit: float | Key | None = None
    shared_average: bool = False
    latent: tuple[str, ...] = ()
    latent_presence: Presence = "absent"
    ignored: tuple[str, ...] = ()


LEADING_DENSE = Key("leading_dense_block_count", 0)
SCALE = Key("expert_weights_scale", 0.0)  # 0 stands for "not scaled"
NORMALIZE = Key("expert_weights_norm", False)
GATING = Key("expert_gating_func")
SHARED_COUNT = Key("expert_shared_count", 0)
SHARED_WIDTH = Key("expert_shared_feed_forward_length", 0)

# In llama.cpp llama's gate tensor is optional. No published model lacks it, and requiring it here
# keeps a damaged file from being read as an ungated model.
_SOFTMAX = Architecture()
_SOFTMAX_UNNORMALIZED = Architecture(normalize=False)
_QWEN_SHARED = Architecture(shared="required", shared_gate="required", normalize=False)
_DEEPSEEK: dict[str, Any] = {
    "layers": "interleaved",
    "leading_dense": LEADING_DENSE,
    "gating": GATING,
    "normalize": NORMALIZE,
    "scale": SCALE,
    "selection_bias": "optional",
    "shared": SHARED_COUNT,
}
_GATING_OR_SOFTMAX = Key("expert_gating_func", "softmax")
_GATING_OR_SIGMOID = Key("expert_gating_func", "sigmoid")
_DEEPSEEK2 = Architecture(
    **_DEEPSEEK
    | {
        "gating": _GATING_OR_SOFTMAX,
        # GLM-4.7-Flash files without the key.
        "gating_by_size": (((47, 154880), "sigmoid"), ((48, 154880), "sigmoid")),
        "merged": True,
    }
)
_NEMOTRON = Architecture(
    layers="tensors",
    gating="sigmoid",
    normalize=NORMALIZE,
    scale=SCALE,
    selection_bias="required",
    gate=False,
    activation="relu2",
    shared="required",
    latent=("ffn_latent_down", "ffn_latent_up"),
    latent_presence="optional",
)
_UNUSED_SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")

ARCHITECTURES: dict[str, Architecture] = {
    # Softmax routers without a shared expert.
    "llama": Architecture(ignored=_UNUSED_SHARED),
    "llama-embed": Architecture(ignored=_UNUSED_SHARED),
    "mistral3": _SOFTMAX,
    "dbrx": _SOFTMAX,
    "phimoe": _SOFTMAX,
    "olmoe": _SOFTMAX_UNNORMALIZED,
    "llada-moe": _SOFTMAX_UNNORMALIZED,
    "qwen3moe": _SOFTMAX,
    "qwen3vlmoe": _SOFTMAX,
    "rnd1": _SOFTMAX,
    "mellum": _SOFTMAX,
    "maple": Architecture(activation="swiglu_clamp", limit=Key("swiglu_clamp_exp")),
    "minimax-01": _SOFTMAX,
    "arctic": _SOFTMAX,
    "jamba": Architecture(layers="tensors", normalize=False),
    # Softmax routers with a shared expert.
    "qwen2moe": _QWEN_SHARED,
    "qwen3next": Architecture(
        layers="tensors", merged=True, shared="optional", shared_gate="optional"
    ),
    "qwen35moe": Architecture(merged=True, shared="required", shared_gate="required"),
    "qwen4exp": Architecture(merged=True, shared="required", shared_gate="required"),
    "deepseek": Architecture(
        layers="interleaved",
        leading_dense=LEADING_DENSE,
        normalize=False,
        scale=SCALE,
        shared=SHARED_COUNT,
    ),
    "bailingmoe": Architecture(normalize=NORMALIZE, scale=SCALE, shared=SHARED_COUNT),
    "granite": Architecture(shared=SHARED_WIDTH),
    "granitemoe": Architecture(shared=SHARED_WIDTH),
    "granitehybrid": Architecture(shared=SHARED_WIDTH),
    "granite_swa": Architecture(merged=True, shared=SHARED_WIDTH, shared_merged=True),
    "hunyuan-moe": Architecture(shared="required"),
    "ernie4_5-moe": Architecture(
        layers="interleaved",
        leading_dense=LEADING_DENSE,
        step=Key("interleave_moe_layer_step", 1),
        selection_bias="optional",
        shared=SHARED_WIDTH,
    ),
    # Softmax over the selected experts.
    "gpt-oss": Architecture(
        gating="softmax_after_topk",
        normalize=False,
        router_bias="required",
        biases="required",
        activation="swiglu_oai",
        limit=7.0,
    ),
    # Routers in the manner of DeepSeek-V3.
    "deepseek2": _DEEPSEEK2,
    "deepseek2-ocr": Architecture(**_DEEPSEEK | {"gating": _GATING_OR_SOFTMAX, "merged": True}),
    "mistral4": _DEEPSEEK2,
    "deepseek32": Architecture(**_DEEPSEEK),
    "glm-dsa": Architecture(**_DEEPSEEK | {"gating": _GATING_OR_SIGMOID}),
    "glm4moe": Architecture(
        **_DEEPSEEK | {"gating": _GATING_OR_SIGMOID, "selection_bias": "required"}
    ),
    "glm5-next": Architecture(
        **_DEEPSEEK
        | {
            "gating": _GATING_OR_SIGMOID,
            "selection_bias": "required",
            "activation": "swiglu_clamp",
            "limit": Key("swiglu_clamp_exp", 0.0),
            "shared_limit": Key("swiglu_clamp_shexp", Key("swiglu_clamp_exp", 0.0)),
        }
    ),
    "dots1": Architecture(**_DEEPSEEK),
    "dots3note": Architecture(**_DEEPSEEK | {"selection_bias": "required"}),
    "bailingmoe2": Architecture(**_DEEPSEEK),
    "bailingmoe3": Architecture(
        **_DEEPSEEK
        | {
            "selection_bias": "required",
            "shared": "required",
            "activation": "swiglu_clamp_after",
            "limit": Key("swiglu_clamp_exp", 0.0),
            "shared_limit": Key("swiglu_clamp_shexp", 0.0),
        }
    ),
    "exaone-moe": Architecture(**_DEEPSEEK | {"layers": "tensors", "shared": "required"}),
    "afmoe": Architecture(
        **_DEEPSEEK | {"gating": _GATING_OR_SIGMOID, "selection_bias": "required"}
    ),
    "laguna": Architecture(
        **_DEEPSEEK
        | {"gating": _GATING_OR_SIGMOID, "selection_bias": "required", "shared": "required"}
    ),
    "hy_v3": Architecture(
        **_DEEPSEEK
        | {
            "layers": "tensors",
            "gating": _GATING_OR_SIGMOID,
            "selection_bias_tensor": "exp_probs_b",
            "merged": True,
            "shared": "required",
        }
    ),
    "hy_v4": Architecture(
        **_DEEPSEEK | {"activation": "swiglu_clamp", "limit": Key("swiglu_clamp_exp", 0.0)}
    ),
    "step35": Architecture(
        **_DEEPSEEK
        | {
            "layers": "tensors",
            "gating": _GATING_OR_SIGMOID,
            "shared": "required",
            "activation": "swiglu_clamp_after",
            "limit": Key("swiglu_clamp_exp", 0.0),
            "shared_limit": Key("swiglu_clamp_shexp", 0.0),
        }
    ),
    "minimax-m2": Architecture(gating=GATING, selection_bias="required"),
    "minimax-m3": Architecture(
        **_DEEPSEEK
        | {
            "selection_bias": "required",
            "activation": "swiglu_oai",
            "limit": 7.0,
            "shared_limit": 7.0,
        }
    ),
    "mimo2": Architecture(layers="tensors", gating="sigmoid", selection_bias="optional"),
    "lfm2moe": Architecture(
        layers="interleaved",
        leading_dense=LEADING_DENSE,
        gating=GATING,
        selection_bias="required",
    ),
    "kimi-linear": Architecture(
        layers="interleaved",
        leading_dense=LEADING_DENSE,
        gating=GATING,
        scale=SCALE,
        selection_bias="required",
        shared="required",
    ),
    "cohere2moe": Architecture(
        layers="interleaved",
        leading_dense=LEADING_DENSE,
        gating=_GATING_OR_SIGMOID,
        normalize=NORMALIZE,
        scale=SCALE,
        merged=True,
        shared="required",
        shared_average=True,
    ),
    # Experts without a gate, in later models at a width of their own.
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "nomic-bert-moe": Architecture(
        layers="tensors", normalize=False, gate=False, activation="gelu"
    ),
    "kimi-k3": Architecture(
        **_DEEPSEEK
        | {
            "selection_bias": "required",
            "activation": "situ",
            "betas": (Key("activation.situ_beta"), Key("activation.situ_linear_beta", 0.0)),
            "latent": ("ffn_routed_down", "ffn_routed_up", "ffn_routed_norm"),
            "latent_presence": "required",
        }
    ),
    # The routing weight, a sigmoid, multiplies the experts' input.
    "llama4": Architecture(
        layers="interleaved",
        step=Key("interleave_moe_layer_step", 1),
        gating="sigmoid",
        normalize=False,
        weights_before=True,
        shared="required",
    ),
}
