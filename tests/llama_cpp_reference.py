"""llama.cpp's MoE blocks in float64 NumPy, step by step as its graphs are built.

`build_moe_ffn` and `build_ffn` follow the functions of the same names; `BLOCKS` has for every
architecture what its graph does with them, from the block's x to what goes to the residual sum.
Nothing here comes from the package: the tensors are those that a test writes into a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

Array = np.ndarray
GATING_FUNCTIONS = {1: "softmax", 2: "sigmoid", 4: "sqrt_softplus"}
CLAMP_BEFORE_SILU = {"maple", "deepseek4", "glm5-next", "dflash", "hy_v4"}
CLAMP_BEFORE_SILU_SHARED = {"deepseek4", "glm5-next", "dflash"}


class Layer:
    """A layer's tensors in float64 and its metadata.

    Args:
      architecture: the architecture string.
      keys: metadata without the architecture's prefix.
      tensors: by name without "blk.N.".
      index: of the layer.
    """

    def __init__(
        self, architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, Array], index: int
    ):
        self.architecture, self.keys, self.tensors, self.index = architecture, keys, tensors, index

    def __getitem__(self, name: str) -> Array:
        return self.tensors[f"{name}.weight"]

    def get(self, name: str) -> Array | None:
        return self.tensors.get(name)

    def key(self, name: str, default: Any = None) -> Any:
        value = self.keys.get(name, default)
        return value[self.index] if isinstance(value, list) else value

    @property
    def gating(self) -> str:
        """The function that the key names."""
        return GATING_FUNCTIONS[self.key("expert_gating_func")]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def rms_norm(layer: Layer, x: Array, weight: Array) -> Array:
    eps = layer.key("attention.layer_norm_rms_epsilon")
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def activate(layer: Layer, op: str, g: Array | None, u: Array, limit: float, before: bool) -> Array:
    """g is None where there is no gate tensor."""
    if op == "silu" and g is not None and limit > 1e-6:
        bounded = np.clip(u, -limit, limit)
        return (silu(np.minimum(g, limit)) if before else np.minimum(silu(g), limit)) * bounded
    if op in ("silu", "gelu"):
        f = silu if op == "silu" else gelu
        return f(u) if g is None else f(g) * u
    if op == "relu_sqr":
        assert g is None
        return np.maximum(u, 0) ** 2
    assert g is not None
    if op == "relu":
        return np.maximum(g, 0) * u
    if op == "swiglu_oai":
        g, u = np.minimum(g, 7.0), np.clip(u, -7.0, 7.0)
        return g * sigmoid(1.702 * g) * (u + 1)
    assert op == "situ"
    beta = layer.key("activation.situ_beta")
    linear = layer.key("activation.situ_linear_beta")
    if linear > 0:
        u = linear * np.tanh(u / linear)
    return beta * np.tanh(g / beta) * sigmoid(g) * u


def build_moe_ffn(
    layer: Layer,
    cur: Array,
    *,
    gating: str = "softmax",
    norm: bool = True,
    scale: float = 0.0,
    op: str = "silu",
    logits: Array | None = None,
    bias: Array | None = None,
    selected: Array | None = None,
    suffix: str = "exps",
    num_experts: int | None = None,
    top_k: int | None = None,
) -> Array:
    """The routed experts' result for cur [T, H], token by token. Numbers are those of the steps."""
    if logits is None:
        logits = cur @ layer["ffn_gate_inp"].T  # 1
    total = layer.key("expert_count")
    num_experts, top_k = num_experts or total, top_k or layer.key("expert_used_count")
    rows = []
    for t, x in enumerate(cur):
        z = logits[t]
        if (router_bias := layer.get("ffn_gate_inp.bias")) is not None:
            z = z + router_bias  # 2
        probs = {  # 3
            "softmax": softmax,
            "sigmoid": sigmoid,
            "softmax_weight": lambda z: z,
            "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
        }[gating](z)
        selection = probs if bias is None else probs + bias  # 4
        if layer.architecture == "llama4":
            selection = z
        if layer.architecture == "grovemoe":
            selection = sigmoid(z)
        groups = layer.key("expert_group_count", 0)
        if groups > 1:  # 5
            members = selection.reshape(groups, -1)
            best = np.argsort(-np.sort(members)[:, -2:].sum(1))
            members = members.copy()
            members[best[layer.key("expert_group_used_count") :]] = -np.inf
            selection = members.reshape(-1)
        ids = np.argsort(-selection)[:top_k] if selected is None else selected[t]  # 6
        if layer.architecture == "grovemoe" and num_experts != total:
            ids = ids // layer.key("experts_per_group")  # 7
        w = probs[ids]  # 8
        if gating == "softmax_weight":
            w = softmax(w)  # 9
        if norm:
            w = w / max(w.sum(), 6.103515625e-5)  # 10
        if scale not in (0.0, 1.0):
            w = w * scale  # 11
        y = np.zeros_like(x)
        for e, weight in zip(ids, w, strict=True):
            before = layer.architecture == "llama4"  # 12
            h = expert(layer, x * weight if before else x, e, op, suffix)
            y = y + (h if before else h * weight)  # 18, 19
        rows.append(y)
    return np.array(rows)


def expert(layer: Layer, x: Array, e: int, op: str, suffix: str) -> Array:
    """Steps 13 to 17 for one token and one expert."""

    def project(name: str, x: Array) -> Array:
        y = layer[f"ffn_{name}_{suffix}"][e] @ x
        if (scale := layer.get(f"ffn_{name}_{suffix}.scale")) is not None:
            y = y * scale[e]  # 14
        if (bias := layer.get(f"ffn_{name}_{suffix}.bias")) is not None:
            y = y + bias[e]  # 17
        return y

    limit = layer.key("swiglu_clamp_exp", 0.0)
    if f"ffn_gate_up_{suffix}.weight" in layer.tensors:  # 13a
        g, u = np.split(project("gate_up", x), 2)
        limit = 0.0
    else:  # 13b
        u = project("up", x)
        g = project("gate", x) if f"ffn_gate_{suffix}.weight" in layer.tensors else None
    h = activate(layer, op, g, u, limit, layer.architecture in CLAMP_BEFORE_SILU)  # 15
    return project("down", h)  # 16


def build_ffn(
    layer: Layer, x: Array, name: str, op: str = "silu", limit: float | None = None
) -> Array:
    """A dense network: `name` is like "ffn_{}_shexp"."""

    def project(projection: str, x: Array) -> Array:
        y = x @ layer[name.format(projection)].T
        scale = layer.get(f"{name.format(projection)}.scale")
        return y if scale is None else y * scale

    if limit is None:
        limit = layer.key("swiglu_clamp_shexp", 0.0)
    gate = f"{name.format('gate')}.weight" in layer.tensors
    g = project("gate", x) if gate else None
    before = layer.architecture in CLAMP_BEFORE_SILU_SHARED
    return project("down", activate(layer, op, g, project("up", x), limit, before))


SHARED = "ffn_{}_shexp"


def softmax_block(layer: Layer, x: Array, *, norm: bool = True, **options: Any) -> Array:
    return build_moe_ffn(layer, x, norm=norm, **options)


def grok(layer: Layer, x: Array) -> Array:
    y = build_moe_ffn(layer, x, op="gelu")
    if "ffn_up.weight" in layer.tensors:
        y = (y + build_ffn(layer, x, "ffn_{}", "gelu")) * np.sqrt(2) / 2
    return y


def gemma4(layer: Layer, x: Array, *, router_input: Array) -> Array:
    read = router_input / np.sqrt(
        (router_input**2).mean(-1, keepdims=True) + layer.key("attention.layer_norm_rms_epsilon")
    )
    read = read / np.sqrt(x.shape[1]) * layer.tensors["ffn_gate_inp.scale"]
    routed = build_moe_ffn(layer, x, op="gelu", logits=read @ layer["ffn_gate_inp"].T, scale=1.0)
    dense = build_ffn(
        layer, rms_norm(layer, router_input, layer["ffn_norm"]), "ffn_{}", "gelu", limit=0.0
    )
    return rms_norm(layer, dense, layer["post_ffw_norm_1"]) + rms_norm(
        layer, routed, layer["post_ffw_norm_2"]
    )


def qwen_block(layer: Layer, x: Array, *, norm: bool = True) -> Array:
    y = build_moe_ffn(layer, x, norm=norm)
    if "ffn_up_shexp.weight" in layer.tensors:
        gate = sigmoid(x @ layer["ffn_gate_inp_shexp"])[:, None]
        y = y + gate * build_ffn(layer, x, SHARED)
    return y


def softmax_shared(layer: Layer, x: Array, *, norm: bool | None = True) -> Array:
    """norm None: as the key says, as the factor of the weights."""
    y = build_moe_ffn(
        layer,
        x,
        norm=layer.key("expert_weights_norm", False) if norm is None else norm,
        scale=layer.key("expert_weights_scale", 0.0),
        bias=layer.get("exp_probs_b.bias"),
    )
    return y + build_ffn(layer, x, SHARED) if "ffn_up_shexp.weight" in layer.tensors else y


def granite_swa(layer: Layer, x: Array) -> Array:
    g, u = np.split(x @ layer["ffn_up_shexp"].T, 2, axis=1)
    return build_moe_ffn(layer, x) + (silu(g) * u) @ layer["ffn_down_shexp"].T


def gpt_oss(layer: Layer, x: Array) -> Array:
    return build_moe_ffn(layer, x, gating="softmax_weight", norm=False, op="swiglu_oai")


def deepseek_block(
    layer: Layer,
    x: Array,
    *,
    default: str | None = None,
    op: str = "silu",
    bias: str = "exp_probs_b.bias",
    clamp_shared: bool = True,
    factor: float = 1.0,
) -> Array:
    """Gate, norm and factor as the keys say, and a shared expert. default: without a gating key."""
    keyed = layer.key("expert_gating_func", 0)
    y = build_moe_ffn(
        layer,
        x,
        gating=layer.gating if keyed else default,
        norm=layer.key("expert_weights_norm", False),
        scale=layer.key("expert_weights_scale", 0.0),
        op=op,
        bias=layer.get(bias),
    )
    if "ffn_up_shexp.weight" not in layer.tensors:
        return y
    return (y + build_ffn(layer, x, SHARED, op, None if clamp_shared else 0.0)) * factor


def glm5_next(layer: Layer, x: Array) -> Array:
    """The shared expert's limit is that of the routed ones where it has no key of its own."""
    if "swiglu_clamp_shexp" not in layer.keys:
        keys = dict(layer.keys) | {"swiglu_clamp_shexp": layer.keys["swiglu_clamp_exp"]}
        layer = Layer(layer.architecture, keys, layer.tensors, layer.index)
    return deepseek_block(layer, x, default="sigmoid")


def sigmoid_block(layer: Layer, x: Array, *, gating: str | None = None) -> Array:
    """mimo2, lfm2moe, minimax-m2: always normed, never scaled, no shared expert."""
    gating, bias = gating or layer.gating, layer.get("exp_probs_b.bias")
    return build_moe_ffn(layer, x, gating=gating, bias=bias)


def kimi_linear(layer: Layer, x: Array) -> Array:
    y = build_moe_ffn(
        layer,
        x,
        gating=layer.gating,
        scale=layer.key("expert_weights_scale"),
        bias=layer.get("exp_probs_b.bias"),
    )
    return y + build_ffn(layer, x, SHARED)


def latent_block(layer: Layer, x: Array, *, gating: str | None, op: str, names: str) -> Array:
    """nemotron_h, kimi-k3: experts at a width of their own, beside a shared one at full width."""
    inner, latent = x, f"{names}_down.weight" in layer.tensors
    if latent:
        inner = x @ layer[f"{names}_down"].T
    y = build_moe_ffn(
        layer,
        inner,
        gating=gating or layer.gating,
        norm=layer.key("expert_weights_norm", False),
        scale=layer.key("expert_weights_scale", 0.0),
        op=op,
        logits=x @ layer["ffn_gate_inp"].T,
        bias=layer.get("exp_probs_b.bias"),
    )
    if (norm := layer.get(f"{names}_norm.weight")) is not None:
        y = rms_norm(layer, y, norm)
    if latent:
        y = y @ layer[f"{names}_up"].T
    return y + build_ffn(layer, x, SHARED, op)


def llama4(layer: Layer, x: Array) -> Array:
    y = build_moe_ffn(layer, x, gating="sigmoid", norm=False)
    return y + build_ffn(layer, x, SHARED)


def smallthinker(layer: Layer, x: Array, *, router_input: Array) -> Array:
    logits = router_input @ layer["ffn_gate_inp"].T
    return build_moe_ffn(layer, x, gating=layer.gating, op="relu", logits=logits)


def grovemoe(layer: Layer, x: Array) -> Array:
    logits = x @ layer["ffn_gate_inp"].T
    first = build_moe_ffn(layer, x, logits=logits)
    chunks = layer.key("expert_count") // layer.key("experts_per_group")
    second = build_moe_ffn(
        layer,
        first,
        logits=logits,
        suffix="chexps",
        num_experts=chunks,
        top_k=min(layer.key("expert_used_count"), chunks),
    )
    return first + layer.key("expert_group_scale") * second


def deepseek4(layer: Layer, x: Array, *, token_ids: Array | None = None) -> Array:
    hashed = layer.index < layer.key("hash_layer_count", 0)
    y = build_moe_ffn(
        layer,
        x,
        gating="sqrt_softplus",
        norm=layer.key("expert_weights_norm", False),
        scale=layer.key("expert_weights_scale", 0.0),
        bias=None if hashed else layer.tensors["exp_probs_b.bias"],
        selected=layer["ffn_gate_tid2eid"].astype(int)[token_ids] if hashed else None,
    )
    limit = layer.key("swiglu_clamp_shexp", layer.key("swiglu_clamp_exp"))
    return y + build_ffn(layer, x, SHARED, limit=limit)


BLOCKS: dict[str, Callable[..., Array]] = {
    **dict.fromkeys(
        (
            "llama",
            "llama-embed",
            "mistral3",
            "minicpm",
            "dbrx",
            "phimoe",
            "qwen3moe",
            "qwen3vlmoe",
            "rnd1",
            "mellum",
            "maple",
            "arctic",
            "minimax-01",
        ),
        softmax_block,
    ),
    **dict.fromkeys(("olmoe", "llada-moe", "jamba"), partial(softmax_block, norm=False)),
    "nomic-bert-moe": partial(softmax_block, norm=False, op="gelu"),
    "grok": grok,
    "gemma4": gemma4,
    "qwen2moe": partial(qwen_block, norm=False),
    **dict.fromkeys(("qwen3next", "qwen35moe", "qwen4exp"), qwen_block),
    "deepseek": partial(softmax_shared, norm=False),
    "bailingmoe": partial(softmax_shared, norm=None),
    **dict.fromkeys(
        ("granite", "granitemoe", "granitehybrid", "hunyuan-moe", "ernie4_5-moe"), softmax_shared
    ),
    "granite_swa": granite_swa,
    "gpt-oss": gpt_oss,
    **dict.fromkeys(
        ("deepseek2", "mistral4", "deepseek2-ocr"), partial(deepseek_block, default="softmax")
    ),
    **dict.fromkeys(
        ("deepseek32", "dots1", "dots3note", "bailingmoe2", "bailingmoe3", "exaone-moe"),
        deepseek_block,
    ),
    **dict.fromkeys(
        ("glm-dsa", "glm4moe", "afmoe", "laguna", "step35"),
        partial(deepseek_block, default="sigmoid"),
    ),
    "glm5-next": glm5_next,
    "hy_v3": partial(deepseek_block, default="sigmoid", bias="exp_probs_b"),
    "hy_v4": partial(deepseek_block, clamp_shared=False),
    "minimax-m2": sigmoid_block,
    "minimax-m3": partial(deepseek_block, op="swiglu_oai"),
    "mimo2": partial(sigmoid_block, gating="sigmoid"),
    "lfm2moe": sigmoid_block,
    "kimi-linear": kimi_linear,
    "cohere2moe": partial(deepseek_block, default="sigmoid", factor=0.5),
    **dict.fromkeys(
        ("nemotron_h", "nemotron_h_moe"),
        partial(latent_block, gating="sigmoid", op="relu_sqr", names="ffn_latent"),
    ),
    "kimi-k3": partial(latent_block, gating=None, op="situ", names="ffn_routed"),
    "llama4": llama4,
    "smallthinker": smallthinker,
    "grovemoe": grovemoe,
    "deepseek4": deepseek4,
    "dflash": deepseek4,
}
