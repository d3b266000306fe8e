"""Where a MoE block begins and ends among the nodes of llama.cpp's graph.

The input is found by the norm that docs/architectures.md names, the output by the name that
llama.cpp gives it: "ffn_out", or "ffn_moe_out" without a shared expert, if not said otherwise here.
"""

from collections.abc import Mapping

import numpy as np

from jax_moe._gguf.architectures import ARCHITECTURES

Nodes = Mapping[str, np.ndarray]  # as `server.Recorder` names them

# "#2" is the second node of a name; "{}" stands for the layer.
OUTPUTS = {
    "arctic": ("ffn_moe_out",),  # "ffn_out" is the dense network's
    "bailingmoe3": ("ffn_moe_out", "blk.{}.ffn_down_shexp.weight"),  # the sum has no name
    "gemma4": ("ffn_moe_combined",),
    "grovemoe": ("ffn_final_moe_out",),
    "llama4": ("ffn_moe_out_merged",),
    "nemotron_h": ("l_out",),
    "nemotron_h_moe": ("l_out",),
}


def block_input(nodes: Nodes, architecture: str, layer: int) -> np.ndarray:
    """The block's x, [T, H]."""
    norm = f"blk.{layer}.{ARCHITECTURES[architecture].x}"
    if architecture == "qwen4exp":  # the norm is not the last step
        return nodes[f"blk.{layer}.ffn_gate_inp.weight:input"]
    return nodes.get(f"{norm}.bias", nodes[f"{norm}.weight"])


def router_input(nodes: Nodes, architecture: str, layer: int) -> np.ndarray:
    """What the router reads where that is not x, [T, H]."""
    if architecture == "gemma4":  # the stream before the router's own norm
        return nodes[f"attn_out-{layer}"]
    return nodes[f"blk.{layer}.ffn_gate_inp.weight:input"]


def block_output(nodes: Nodes, architecture: str, layer: int) -> np.ndarray:
    """What `moe_block` should return, [T, H]."""
    if architecture in OUTPUTS:
        return sum((nodes[_key(name, layer)] for name in OUTPUTS[architecture]), np.float32(0))
    # grok's first "ffn_out" is the dense network's, its second the sum.
    names = ("ffn_out#2", "ffn_out", "ffn_moe_out")
    return next(nodes[key] for name in names if (key := _key(name, layer)) in nodes)


def _key(name: str, layer: int) -> str:
    if "{}" in name:
        return name.format(layer)
    name, mark, count = name.partition("#")
    return f"{name}-{layer}{mark}{count}"
