"""What each GGUF architecture means: one row of data per architecture string.

A row says which metadata keys and tensors make up the architecture's MoE block and by which rule
they combine; `schema.py` says what can be said, `layers.py` reads the rows. Sizes are not in the
rows: E comes from `expert_count`, H from `embedding_length`, and the widths of routed and shared
experts from the tensors, which must agree with one another. Facts: llama.cpp, src/models/*.cpp and
src/llama-graph.cpp (`build_moe_ffn`).
"""

from __future__ import annotations

from dataclasses import replace

from jax_moe._gguf.schema import Architecture, Key

LEADING_DENSE = Key("leading_dense_block_count", 0)
STEP = Key("interleave_moe_layer_step", 1)
SCALE = Key("expert_weights_scale", 0.0)  # 0 stands for "not scaled"
NORMALIZE = Key("expert_weights_norm", False)
GATING = Key("expert_gating_func")
GATING_OR_SOFTMAX = Key("expert_gating_func", "softmax")
GATING_OR_SIGMOID = Key("expert_gating_func", "sigmoid")
SHARED_COUNT = Key("expert_shared_count", 0)
SHARED_WIDTH = Key("expert_shared_feed_forward_length", 0)
LIMIT = Key("swiglu_clamp_exp", 0.0)
NEEDED_LIMIT = Key("swiglu_clamp_exp")
SHARED_LIMIT = Key("swiglu_clamp_shexp", 0.0)

_UNUSED_SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
_HYPER = "What is normed is the mix of the hyper-connections' streams."
_RESIDUAL_SCALE = "Outside: the factor `residual_scale` of the result."
_POST_NORM = "Outside: the norm `post_ffw_norm` of the result."

_SOFTMAX = Architecture()
_SOFTMAX_UNNORMALIZED = Architecture(normalize=False)
_LLAMA = Architecture(gate="optional", ignored=_UNUSED_SHARED)
_QWEN = Architecture(shared="required", shared_gate="required")
_GRANITE = Architecture(gate="optional", shared=SHARED_WIDTH, note=_RESIDUAL_SCALE)
_DEEPSEEK = Architecture(
    layers="interleaved",
    leading_dense=LEADING_DENSE,
    gating=GATING,
    normalize=NORMALIZE,
    scale=SCALE,
    selection_bias="optional",
    shared=SHARED_COUNT,
)
_DEEPSEEK2 = replace(
    _DEEPSEEK,
    gating=GATING_OR_SOFTMAX,
    # GLM-4.7-Flash files without the key.
    gating_by_size=(((47, 154880), "sigmoid"), ((48, 154880), "sigmoid")),
    merged=True,
)
_BIASED = replace(_DEEPSEEK, selection_bias="required")
_BIASED_SIGMOID = replace(_BIASED, gating=GATING_OR_SIGMOID)
_DEEPSEEK4 = Architecture(
    gating=GATING,
    gatings=("sqrt_softplus",),
    normalize=NORMALIZE,
    scale=SCALE,
    selection_bias="required",
    activation="swiglu_clamp",
    limit=NEEDED_LIMIT,
    shared="required",
    shared_limit=Key("swiglu_clamp_shexp", NEEDED_LIMIT),
    note=_HYPER,
)
_NEMOTRON = Architecture(
    layers="tensors",
    gating="sigmoid",
    normalize=NORMALIZE,
    scale=SCALE,
    selection_bias="required",
    gate="absent",
    activation="relu2",
    shared="required",
    latent=("ffn_latent_down", "ffn_latent_up"),
    latent_presence="optional",
    x="attn_norm",
    note="A MoE layer has no attention: x is the norm of the layer's input. In layers for "
    "multi-token prediction it is that of `post_attention_norm`.",
)

ARCHITECTURES: dict[str, Architecture] = {
    # Softmax routers without a shared expert.
    "llama": _LLAMA,
    "llama-embed": _LLAMA,
    "mistral3": _LLAMA,
    "minicpm": Architecture(gate="optional", note=_RESIDUAL_SCALE),
    "dbrx": Architecture(x="attn_output_norm", note="The norm is a LayerNorm."),
    "phimoe": replace(_SOFTMAX, note="The norm has a bias."),
    "olmoe": _SOFTMAX_UNNORMALIZED,
    "llada-moe": _SOFTMAX_UNNORMALIZED,
    "qwen3moe": _SOFTMAX,
    "qwen3vlmoe": _SOFTMAX,
    "rnd1": _SOFTMAX,
    "mellum": _SOFTMAX,
    "maple": Architecture(activation="swiglu_clamp", limit=NEEDED_LIMIT),
    "jamba": Architecture(layers="tensors", normalize=False),
    "arctic": Architecture(
        x="ffn_norm_exps",
        note="What is normed is the layer's input, from before attention. Outside: the dense "
        "network and its own norm `ffn_norm`; its result and this block's are both added.",
    ),
    "minimax-01": Architecture(
        gate="optional", note="Outside: the residual is x itself, times `residual_scale`."
    ),
    "nomic-bert-moe": Architecture(
        layers="seconds",
        step=Key("moe_every_n_layers", 0),
        normalize=False,
        gate="absent",
        activation="gelu",
        x="attn_output_norm",
        note="An encoder: x is the LayerNorm of the stream, and the residual is x itself. Outside: "
        "the norm `layer_output_norm` of the residual sum.",
    ),
    # The dense network beside the experts counts as a shared expert.
    "grok": Architecture(
        gate="optional",
        activation="geglu",
        shared="optional",
        shared_tensors="ffn_{}",
        sum_scale=0.5**0.5,
        note="Outside: the norm `layer_output_norm` or `post_ffw_norm` of the result.",
    ),
    "gemma4": Architecture(
        layers="tensors",
        router_reads="unnormed",
        merged=True,
        activation="geglu",
        shared="required",
        shared_tensors="ffn_{}",
        vectors=(
            ("router_scale", "ffn_gate_inp.scale"),
            ("shared_pre_norm", "ffn_norm.weight"),
            ("routed_post_norm", "post_ffw_norm_2.weight"),
            ("shared_post_norm", "post_ffw_norm_1.weight"),
        ),
        x="pre_ffw_norm_2",
        note="Inside: the router's own norm, the shared expert's input norm `ffn_norm`, and the "
        "norms `post_ffw_norm_2` of the routed and `post_ffw_norm_1` of the shared result. "
        + _POST_NORM,
    ),
    # Softmax routers with a shared expert.
    "qwen2moe": replace(_QWEN, normalize=False),
    "qwen3next": Architecture(
        layers="tensors",
        merged=True,
        shared="optional",
        shared_gate="optional",
        x="post_attention_norm",
    ),
    "qwen35moe": replace(_QWEN, merged=True, x="post_attention_norm"),
    "qwen4exp": replace(
        _QWEN,
        merged=True,
        x="hc_ffn_norm",
        note="x is the mix of the hyper-connections' streams, of which the norm is a part.",
    ),
    "deepseek": Architecture(
        layers="interleaved",
        leading_dense=LEADING_DENSE,
        normalize=False,
        scale=SCALE,
        shared=SHARED_COUNT,
    ),
    "bailingmoe": Architecture(normalize=NORMALIZE, scale=SCALE, shared=SHARED_COUNT),
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitehybrid": _GRANITE,
    "granite_swa": replace(_GRANITE, gate="required", merged=True, shared_merged=True),
    "hunyuan-moe": Architecture(shared="required"),
    "ernie4_5-moe": Architecture(
        layers="interleaved",
        leading_dense=LEADING_DENSE,
        step=STEP,
        selection_bias="optional",
        gate="optional",
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
        x="post_attention_norm",
    ),
    # Routers in the manner of DeepSeek-V3.
    "deepseek2": _DEEPSEEK2,
    "deepseek2-ocr": replace(_DEEPSEEK2, gating_by_size=()),
    "mistral4": _DEEPSEEK2,
    "deepseek32": _DEEPSEEK,
    "glm-dsa": replace(_DEEPSEEK, gating=GATING_OR_SIGMOID),
    "glm4moe": replace(_BIASED_SIGMOID, x="post_attention_norm"),
    "glm5-next": replace(
        _BIASED_SIGMOID,
        activation="swiglu_clamp",
        limit=LIMIT,
        shared_limit=Key("swiglu_clamp_shexp", LIMIT),
        note=_HYPER,
    ),
    "dots1": _DEEPSEEK,
    "dots3note": _BIASED,
    "bailingmoe2": _DEEPSEEK,
    "bailingmoe3": replace(
        _BIASED,
        shared="required",
        activation="swiglu_clamp_after",
        limit=LIMIT,
        shared_limit=SHARED_LIMIT,
    ),
    "exaone-moe": replace(_DEEPSEEK, layers="tensors", shared="required"),
    "afmoe": replace(_BIASED_SIGMOID, note=_POST_NORM),
    "laguna": replace(_BIASED_SIGMOID, shared="required"),
    "hy_v3": replace(
        _DEEPSEEK,
        layers="tensors",
        gating=GATING_OR_SIGMOID,
        selection_bias_tensor="exp_probs_b",
        merged=True,
        shared="optional",
    ),
    "hy_v4": replace(_DEEPSEEK, activation="swiglu_clamp", limit=LIMIT, note=_HYPER),
    "step35": replace(
        _DEEPSEEK,
        layers="tensors",
        gating=GATING_OR_SIGMOID,
        gate="optional",
        shared="optional",
        activation="swiglu_clamp_after",
        limit=LIMIT,
        shared_limit=SHARED_LIMIT,
    ),
    "minimax-m2": Architecture(gating=GATING, selection_bias="required"),
    "minimax-m3": replace(_BIASED, activation="swiglu_oai", limit=7.0, shared_limit=7.0),
    "mimo2": Architecture(
        layers="tensors", gating="sigmoid", selection_bias="optional", gate="optional"
    ),
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
        shared="optional",
    ),
    "cohere2moe": Architecture(
        layers="interleaved",
        leading_dense=LEADING_DENSE,
        gating=GATING_OR_SIGMOID,
        normalize=NORMALIZE,
        scale=SCALE,
        merged=True,
        shared=SHARED_COUNT,
        sum_scale=0.5,
        x="attn_norm",
        note="Attention and experts are parallel: x is the norm of the layer's input.",
    ),
    # Experts without a gate, or at a width of their own.
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "kimi-k3": replace(
        _BIASED,
        activation="situ",
        betas=(Key("activation.situ_beta"), Key("activation.situ_linear_beta", 0.0)),
        shared="optional",
        latent=("ffn_routed_down", "ffn_routed_up", "ffn_routed_norm"),
        latent_presence=Key("expert_latent_length", 0),
        note="Inside: the norm `ffn_routed_norm` of the routed result. What is normed to x is the "
        "mix of the layers' results so far.",
    ),
    # The routing weight, a sigmoid, multiplies the experts' input.
    "llama4": Architecture(
        layers="interleaved",
        step=STEP,
        gating="sigmoid",
        normalize=False,
        groups=False,
        weights_before=True,
        shared="required",
    ),
    # The router reads something else than the experts.
    "smallthinker": Architecture(gating=GATING, router_reads="layer_input", activation="reglu"),
    # A second pass of chunk experts over the first one's result.
    "grovemoe": Architecture(
        groups=False,
        experts_per_group=Key("experts_per_group"),
        chunk_scale=Key("expert_group_scale"),
    ),
    # Some layers choose experts by token id.
    "deepseek4": replace(
        _DEEPSEEK4,
        hash_layers=Key("hash_layer_count", 0),
        ignored=("exp_probs_b_vl",),
        note=_HYPER + " Outside: other selection biases for image tokens, `exp_probs_b_vl`.",
    ),
    "dflash": replace(_DEEPSEEK4, layers="tensors"),
}
