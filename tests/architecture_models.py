"""The MoE blocks of a tiny model of every architecture."""

import gguf
import numpy as np
from llama_cpp_reference import Layer
from make_gguf import model_keys, write_gguf

E, K, H, F, VOCABULARY = 8, 2, 64, 32, 11


class Model:
    """A model of two layers in the making.

    Args:
      architecture: the architecture string.
      keys: metadata beyond that of every MoE model.
      moe_layers: which of the layers 0 and 1 have a MoE block.
      gate, merged: what the routed experts' tensors are.
      shared: whether there is a shared expert "ffn_{}_shexp".
      bias: name of the selection bias.
      latent: its tensors' common name, and the experts' width is then half of H.
      d_expert: F of each layer.
      gain: of the matrices, to reach the limit of an activation.
      form: format of the matrices.
    """

    def __init__(
        self,
        architecture,
        keys=(),
        *,
        moe_layers=(0, 1),
        gate=True,
        merged=False,
        shared=False,
        bias=None,
        latent=None,
        d_expert=(F, F),
        gain=2.0,
        form="Q8_0",
    ):
        self.architecture, self.moe_layers = architecture, moe_layers
        self.gain, self.form = gain, form
        self.keys = model_keys(experts=E, top_k=K, d_model=H, d_expert=F) | dict(keys)
        self.rng = np.random.default_rng(len(architecture) + E * len(self.keys))
        self.tensors = {}
        self.add("token_embd.weight", VOCABULARY, H)
        for layer in (0, 1):
            self.add(f"blk.{layer}.ffn_norm.weight", H)
        width = H // 2 if latent else H
        for i in moe_layers:
            name = f"blk.{i}.ffn"
            self.add(f"{name}_gate_inp.weight", E, H)
            if merged:
                self.matrix(f"{name}_gate_up_exps.weight", E, 2 * d_expert[i], width)
            else:
                if gate:
                    self.matrix(f"{name}_gate_exps.weight", E, d_expert[i], width)
                self.matrix(f"{name}_up_exps.weight", E, d_expert[i], width)
            self.matrix(f"{name}_down_exps.weight", E, width, d_expert[i])
            if latent:
                self.matrix(f"blk.{i}.{latent}_down.weight", width, H)
                self.matrix(f"blk.{i}.{latent}_up.weight", H, width)
        if shared:
            self.network("ffn_{}_shexp", gate)
        if bias:
            self.vectors(bias, E)

    def add(self, name, *shape, form=None):
        values = self.rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            values *= np.float32(self.gain * shape[-1] ** -0.5)
        self.tensors[name] = values if form is None else (values, form)
        return self

    def matrix(self, name, *shape):
        return self.add(name, *shape, form=None if self.form == "F32" else self.form)

    def network(self, name, gate=True):
        """A dense network in every MoE layer."""
        for i in self.moe_layers:
            for projection in ("gate", "up") if gate else ("up",):
                self.matrix(f"blk.{i}.{name.format(projection)}.weight", F, H)
            self.matrix(f"blk.{i}.{name.format('down')}.weight", H, F)
        return self

    def vectors(self, name, *shape):
        """A float32 tensor in every MoE layer."""
        for i in self.moe_layers:
            self.add(f"blk.{i}.{name}", *shape)
        return self

    def ids(self, layer):
        table = np.array([self.rng.permutation(E)[:K] for _ in range(VOCABULARY)], np.int32)
        self.tensors[f"blk.{layer}.ffn_gate_tid2eid.weight"] = table
        return self

    def write(self, path):
        return write_gguf(path, self.architecture, self.keys, self.tensors)

    def layer(self, index):
        """What the reference sees: exactly what the file holds."""
        prefix = f"blk.{index}."
        own = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        return Layer(self.architecture, self.keys, {k: exact(v) for k, v in own.items()}, index)


def exact(tensor):
    if isinstance(tensor, np.ndarray):
        return tensor.astype(np.float64)
    kind = gguf.GGMLQuantizationType[tensor[1]]
    return gguf.quants.dequantize(gguf.quants.quantize(tensor[0], kind), kind).astype(np.float64)


LEAD = {"leading_dense_block_count": 1}
SIGMOID = {"expert_gating_func": 2}
SCALED = {"expert_weights_scale": 2.5, "expert_weights_norm": True}
GROUPS = {"expert_group_count": 4, "expert_group_used_count": 2}
SHARED = {"expert_shared_count": 1}
CLAMPS = {"swiglu_clamp_exp": [0.0, 0.25], "swiglu_clamp_shexp": [0.4, 0.0]}
SITU = {"activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0}
BIAS = "exp_probs_b.bias"


def v3(architecture, keys=(), **options):
    """Sigmoid gate, bias, norm and factor, a shared expert, and a leading dense layer."""
    keys = LEAD | SIGMOID | SCALED | SHARED | dict(keys)
    return Model(architecture, keys, **{"moe_layers": (1,), "shared": True, "bias": BIAS} | options)


def gpt_oss():
    made = Model("gpt-oss", gain=5.0).vectors("ffn_gate_inp.bias", E)
    for name, width in (("gate", F), ("up", F), ("down", H)):
        made.vectors(f"ffn_{name}_exps.bias", E, width)
    return made


def gemma4(**options):
    made = Model("gemma4", **options).network("ffn_{}")
    for norm in ("post_ffw_norm_1.weight", "post_ffw_norm_2.weight", "pre_ffw_norm_2.weight"):
        made.vectors(norm, H)
    return made.vectors("ffn_gate_inp.scale", H).vectors("ffn_down_exps.scale", E)


def granite_swa():
    keys = {"expert_shared_feed_forward_length": F}
    made = Model("granite_swa", keys, merged=True)
    for i in (0, 1):
        made.matrix(f"blk.{i}.ffn_up_shexp.weight", 2 * F, H)
        made.matrix(f"blk.{i}.ffn_down_shexp.weight", H, F)
    return made


def grovemoe(per_group):
    keys = {"experts_per_group": per_group, "expert_group_scale": 0.5}
    made = Model("grovemoe", keys)
    for i in (0, 1):
        for name, shape in (("gate", (32, H)), ("up", (32, H)), ("down", (H, 32))):
            made.matrix(f"blk.{i}.ffn_{name}_chexps.weight", E // per_group, *shape)
    return made


def deepseek4():
    keys = SCALED | SHARED | {"expert_gating_func": 4, "hash_layer_count": 1}
    made = Model("deepseek4", keys | {"swiglu_clamp_exp": 0.5}, shared=True).ids(0)
    made.vectors("exp_probs_b_vl.bias", E)  # for image tokens: not read
    return made.add("blk.1.exp_probs_b.bias", E)


def scales(made, *names):
    """Factors of the experts' projections."""
    for name in names:
        made.vectors(f"{name}.scale", E if name.endswith("exps") else 1)
    return made


ROUTED = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
GATED_SHARED = {"shared": True}
SHARED_WIDTH = {"expert_shared_feed_forward_length": F}

MODELS = {
    **{
        name: Model(name)
        for name in (
            "llama",
            "llama-embed",
            "mistral3",
            "minicpm",
            "dbrx",
            "phimoe",
            "olmoe",
            "llada-moe",
            "qwen3moe",
            "qwen3vlmoe",
            "rnd1",
            "mellum",
            "arctic",
            "minimax-01",
        )
    },
    "llama without a gate": Model("llama", gate=False),
    "llama, F32": Model("llama", form="F32"),
    "llama, groups": Model("llama", {"expert_group_count": 2, "expert_group_used_count": 1}),
    "qwen3moe, scales": scales(Model("qwen3moe"), *ROUTED),
    "maple": Model("maple", {"swiglu_clamp_exp": 0.25}),
    "jamba": Model("jamba", moe_layers=(1,)),
    "nomic-bert-moe": Model(
        "nomic-bert-moe", {"moe_every_n_layers": 2}, moe_layers=(1,), gate=False
    ),
    "grok": Model("grok"),
    "grok with a dense network": Model("grok").network("ffn_{}"),
    "gemma4": gemma4(),
    "gemma4, merged": gemma4(merged=True, moe_layers=(1,), form="F32"),
    **{
        name: Model(name, **GATED_SHARED).vectors("ffn_gate_inp_shexp.weight", H)
        for name in ("qwen2moe", "qwen3next", "qwen35moe", "qwen4exp")
    },
    "qwen3next without a shared expert": Model("qwen3next", moe_layers=(1,)),
    "qwen35moe, merged": Model("qwen35moe", merged=True, form="F32", **GATED_SHARED).vectors(
        "ffn_gate_inp_shexp.weight", H
    ),
    "qwen35moe, scales": scales(
        Model("qwen35moe", **GATED_SHARED).vectors("ffn_gate_inp_shexp.weight", H),
        *ROUTED,
        "ffn_up_shexp",
        "ffn_down_shexp",
    ),
    "deepseek": Model(
        "deepseek", LEAD | SHARED | {"expert_weights_scale": 16.0}, moe_layers=(1,), shared=True
    ),
    "bailingmoe": Model("bailingmoe", SHARED | SCALED, shared=True),
    "granite": Model("granite", SHARED_WIDTH, shared=True),
    "granitemoe": Model("granitemoe", {"expert_shared_feed_forward_length": 0}),
    "granitehybrid": Model("granitehybrid", SHARED_WIDTH, shared=True),
    "granite_swa": granite_swa(),
    "hunyuan-moe": Model("hunyuan-moe", shared=True),
    "ernie4_5-moe": Model(
        "ernie4_5-moe",
        SHARED_WIDTH | {"interleave_moe_layer_step": 2},
        moe_layers=(1,),
        shared=True,
        bias=BIAS,
    ),
    "gpt-oss": gpt_oss(),
    "deepseek2 as V2": Model(
        "deepseek2",
        LEAD | SHARED | {"expert_weights_scale": 16.0},
        moe_layers=(1,),
        shared=True,
        form="F32",
    ),
    "deepseek2 as V3": v3("deepseek2", GROUPS),
    "deepseek2, merged": v3("deepseek2", merged=True),
    "deepseek2-ocr": Model("deepseek2-ocr", LEAD | SHARED, moe_layers=(1,), shared=True),
    **{
        name: v3(name)
        for name in (
            "mistral4",
            "deepseek32",
            "glm-dsa",
            "dots1",
            "dots3note",
            "bailingmoe2",
            "afmoe",
            "laguna",
            "exaone-moe",
            "kimi-linear",
        )
    },
    "glm4moe": v3("glm4moe", {"expert_gating_func": 0}),
    "glm5-next": v3("glm5-next", {"swiglu_clamp_exp": 0.25}),
    "bailingmoe3": v3("bailingmoe3", CLAMPS),
    "hy_v3": v3("hy_v3", bias="exp_probs_b", merged=True),
    "hy_v4": v3("hy_v4", CLAMPS),
    "step35": v3("step35", CLAMPS),
    "step35, the other layer": v3("step35", CLAMPS | {"swiglu_clamp_exp": 0.0}, moe_layers=(0,)),
    "minimax-m3": v3("minimax-m3", gain=5.0),
    "minimax-m2": Model("minimax-m2", SIGMOID, bias=BIAS),
    "mimo2": Model("mimo2", moe_layers=(1,), bias=BIAS),
    "lfm2moe": Model("lfm2moe", LEAD | SIGMOID, moe_layers=(1,), bias=BIAS),
    "cohere2moe": v3("cohere2moe", bias=None),
    "cohere2moe without a shared expert": v3(
        "cohere2moe", {"expert_shared_count": 0}, bias=None, shared=False
    ),
    "nemotron_h": Model("nemotron_h", SCALED, moe_layers=(1,), gate=False, shared=True, bias=BIAS),
    "nemotron_h_moe": Model(
        "nemotron_h_moe",
        SCALED | {"expert_used_count": [2, 3], "expert_feed_forward_length": [F, 2 * F]},
        gate=False,
        shared=True,
        bias=BIAS,
        latent="ffn_latent",
        d_expert=(F, 2 * F),
    ),
    "kimi-k3": v3("kimi-k3", SITU | {"expert_latent_length": H // 2}, latent="ffn_routed").vectors(
        "ffn_routed_norm.weight", H // 2
    ),
    "kimi-k3 at full width": v3("kimi-k3", SITU | {"activation.situ_linear_beta": 0.0}),
    "llama4": Model("llama4", {"interleave_moe_layer_step": 2}, moe_layers=(1,), shared=True),
    "smallthinker": Model("smallthinker", SIGMOID),
    "smallthinker, softmax": Model("smallthinker", {"expert_gating_func": 1}, form="F32"),
    "grovemoe": grovemoe(2),
    "grovemoe, more slots than chunks": grovemoe(8),
    "deepseek4": deepseek4(),
    "dflash": Model(
        "dflash",
        SCALED | SHARED | CLAMPS | {"expert_gating_func": 4},
        moe_layers=(1,),
        shared=True,
        bias=BIAS,
    ),
}
