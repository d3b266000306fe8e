"""What llama.cpp wants to know of a model beyond its MoE blocks: metadata keys."""

from architecture_models import VOCABULARY, F, H

HEADS, HEAD_DIM = 4, 16

EVERY_MODEL = {
    "x:tokenizer.ggml.model": "no_vocab",
    "vocab_size": VOCABULARY,
    "context_length": 64,
    "attention.head_count": HEADS,
    "attention.head_count_kv": HEADS,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "rope.dimension_count": HEAD_DIM,
}

_RANKS = {"attention.q_lora_rank": 32, "attention.kv_lora_rank": 32}
_MLA = _RANKS | {
    "attention.key_length": 32 + 8,
    "attention.value_length": 32,
    "attention.key_length_mla": 16 + 8,
    "attention.value_length_mla": 16,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 8,
}
_INDEXER = {
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 4,
}
_SSM = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": H,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
}
_KDA = {"ssm.conv_kernel": 4, "kda.head_dim": 16}
_HYPER = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 3,
    "hyper_connection.epsilon": 1e-6,
}
_SECTIONS = {"rope.dimension_sections": [4, 2, 2, 0]}
_SHARED_WIDTH = {"expert_shared_feed_forward_length": F}
# One layer with a window and one without.
_WINDOW = {
    "attention.sliding_window": 4,
    "attention.sliding_window_pattern": [True, False],
    "attention.key_length_swa": HEAD_DIM,
    "attention.value_length_swa": HEAD_DIM,
    "rope.dimension_count_swa": HEAD_DIM,
}
# The second layer is an attention layer, the first one something recurrent.
_SECOND = {"full_attention_interval": 2}
_SECOND_BY_HEADS = {"attention.head_count_kv": [0, HEADS]}
_LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}
_LOGIT_SCALE = {"logit_scale": 1.0}
# Two MoE layers, an attention layer and a Mamba layer.
_NEMOTRON = (
    _SSM
    | _LAYER_NORM
    | _SHARED_WIDTH
    | {
        "block_count": 4,
        "feed_forward_length": [F, F, 0, 0],
        "attention.head_count_kv": [0, 0, HEADS, 0],
    }
)

KEYS: dict[str, dict[str, object]] = {
    "dbrx": _LAYER_NORM | {"attention.clamp_kqv": 8.0},
    "mellum": _WINDOW,
    "maple": _WINDOW,
    "jamba": _SSM | _SECOND_BY_HEADS | {"ssm.inner_size": 2 * H},
    "minimax-01": _SECOND | {"residual_scale": 3.5},
    "nomic-bert-moe": _LAYER_NORM
    | {"attention.causal": False, "x:tokenizer.ggml.token_type_count": 1},
    "gemma4": _WINDOW | {"embedding_length_per_layer_input": 0},
    "qwen2moe": _SHARED_WIDTH,
    "qwen3next": _SSM | _SHARED_WIDTH | _SECOND,
    "qwen35moe": _SSM | _SHARED_WIDTH | _SECTIONS | _SECOND,
    "qwen4exp": _SSM
    | _SHARED_WIDTH
    | _SECTIONS
    | _SECOND
    | _INDEXER
    | _HYPER
    | {"hyper_connection.low_rank": 8},
    "qwen3vlmoe": _SECTIONS,
    "granite": _LOGIT_SCALE,
    "granitemoe": _LOGIT_SCALE,
    "granitehybrid": _SSM | _LOGIT_SCALE | _SECOND_BY_HEADS | {"ssm.inner_size": 2 * H},
    "granite_swa": _WINDOW | _LOGIT_SCALE,
    "gpt-oss": _WINDOW,
    "deepseek2": _MLA,
    "mistral4": _MLA,
    "deepseek32": _MLA | _INDEXER,
    "glm-dsa": _MLA | _INDEXER,
    "glm5-next": _MLA
    | _KDA
    | _INDEXER
    | _HYPER
    | {
        "attention.indexer.kpool": 2,
        "rope.dimension_count": 0,
        "attention.head_count_kv": [0, 1],
        "attention.key_length": 32,
        "attention.key_length_mla": 16,
    },
    "dots3note": _MLA
    | _INDEXER
    | _WINDOW
    | {
        "attention.kv_lora_rank": 64,
        "attention.key_length": 64 + 8,
        "attention.value_length": 64,
        "attention.kv_lora_rank_swa": 32,
        "attention.key_length_mla_swa": 16 + 8,
        "attention.value_length_mla_swa": 16,
        "attention.key_length_swa": 40,
        "attention.value_length_swa": 32,
        "rope.dimension_count_swa": 8,
        "rope.freq_base_swa": 10000.0,
        "attention.indexer.types": [False, True],
    },
    "hy_v4": _MLA
    | _INDEXER
    | _HYPER
    | {"hyper_connection.magnitude": 2.0, "attention.indexer.types": [True, True]},
    "bailingmoe3": _MLA
    | _KDA
    | {"attention.head_count_kv": [0, 1], "kda.safe_gate": True, "kda.gate_lower_bound": -5.0},
    "exaone-moe": _WINDOW,
    "afmoe": _WINDOW,
    "laguna": _WINDOW,
    "step35": _WINDOW | _SHARED_WIDTH,
    "mimo2": _WINDOW,
    "minimax-m3": _INDEXER
    | {"attention.indexer.block_size": 4, "attention.indexer.local_blocks": 1},
    "lfm2moe": {"shortconv.l_cache": 3} | _SECOND_BY_HEADS,
    "kimi-linear": _MLA | _KDA | {"attention.head_count_kv": [0, 1]},
    "kimi-k3": _MLA | _KDA | {"attention.head_count_kv": [0, 1], "attn_res.block_size": 2},
    "cohere2moe": _WINDOW | _LOGIT_SCALE,
    "nemotron_h": _NEMOTRON
    | {"feed_forward_length": [0, F, 0, 0], "attention.head_count_kv": [0, 0, HEADS, 0]},
    "nemotron_h_moe": _NEMOTRON
    | {
        "moe_latent_size": H // 2,
        "expert_used_count": [2, 3, 2, 2],
        "expert_feed_forward_length": [F, 2 * F, F, F],
    },
    "llama4": {"block_count": 4},  # every fourth layer has full attention, and no rotation
    "grovemoe": {"expert_chunk_feed_forward_length": 32},
    "deepseek4": _MLA
    | _INDEXER
    | _HYPER
    | _WINDOW
    | {
        "attention.output_group_count": 2,
        "attention.output_lora_rank": 16,
        "attention.compress_rope_freq_base": 10000.0,
        "attention.compress_ratios": [4, 128],
    },
    "dflash": _MLA
    | _HYPER
    | _WINDOW
    | {
        "target_layers": [0, 1],
        "attention.output_group_count": 2,
        "attention.output_lora_rank": 16,
        "attention.compress_ratios": [0, 0],
    },
}


def _unknown(*names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (1,))


_QWEN_LINEAR = _unknown("blk.0.attn_qkv.weight", "blk.0.attn_gate.weight")
_INDEXER_TENSORS = _unknown(
    *(
        f"blk.{i}.indexer.{name}"
        for i in (0, 1)
        for name in (
            "k_norm.weight",
            "k_norm.bias",
            "proj.weight",
            "attn_k.weight",
            "attn_q_b.weight",
        )
    )
)
# Tensors that the loader calls optional and the graph needs; of shape (1,) those for which it says
# what shape it expects.
OPTIONAL: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen3next": _QWEN_LINEAR,
    "qwen35moe": _QWEN_LINEAR,
    "granitehybrid": _unknown("blk.0.ssm_conv1d.bias"),
    "jamba": _unknown("blk.0.ssm_conv1d.bias"),
    "nemotron_h": _unknown("blk.0.ssm_conv1d.bias", "blk.3.ssm_conv1d.bias"),
    "nemotron_h_moe": _unknown("blk.3.ssm_conv1d.bias"),
    "glm-dsa": _INDEXER_TENSORS,
    "laguna": {f"blk.{i}.attn_gate.weight": (HEADS, H) for i in (0, 1)},
}
