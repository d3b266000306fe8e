"""The activations between the experts' projections, as llama.cpp defines them.

Source: notes on `build_moe_ffn` of llama.cpp and the operators it calls; formulas in `activate`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Activation(NamedTuple):
    """`code` is the activation's number on the C++ side (`ffi/targets.h`)."""

    code: int
    gated: bool
    needs_limit: bool = False


ACTIVATIONS = {
    "swiglu": Activation(0, gated=True),
    "swiglu_clamp": Activation(1, gated=True, needs_limit=True),
    "swiglu_clamp_after": Activation(2, gated=True, needs_limit=True),
    "geglu": Activation(3, gated=True),
    "reglu": Activation(4, gated=True),
    "swiglu_oai": Activation(5, gated=True),
    "situ": Activation(6, gated=True),
    "silu": Activation(7, gated=False),
    "gelu": Activation(8, gated=False),
    "relu2": Activation(9, gated=False),
}

OAI_LIMIT = 7.0
"""gpt-oss's clamp where `activation_limit` is None."""


def check_activation(
    name: str,
    limit: float | None,
    betas: tuple[float, float] | None,
    has_gate: bool,
) -> tuple[float, float, float]:
    """The numbers (limit, beta, linear_beta) of an activation, 0 where it has none."""
    if name not in ACTIVATIONS:
        allowed = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation is one of {allowed}, not {name!r}.")
    activation = ACTIVATIONS[name]
    if activation.gated != has_gate:
        given = "have a gate" if has_gate else "have no gate"
        raise ValueError(
            f"activation {name!r} is {'gated' if activation.gated else 'without a gate'}, but the "
            f"experts {given}."
        )
    if activation.needs_limit and limit is None:
        raise ValueError(f"activation {name!r} needs an activation_limit.")
    if limit is not None and not activation.needs_limit and name != "swiglu_oai":
        raise ValueError(f"activation {name!r} takes no activation_limit.")
    if limit is not None and not limit > 0:
        raise ValueError(f"activation_limit is positive, not {limit}.")
    if (betas is None) != (name != "situ"):
        raise ValueError(
            "activation_betas is the pair (beta, linear_beta) of activation 'situ' and None for "
            f"the others, not {betas!r} for {name!r}."
        )
    if betas is not None and not betas[0] > 0:
        raise ValueError(f"activation_betas[0] is positive, not {betas[0]}.")
    if name == "swiglu_oai" and limit is None:
        limit = OAI_LIMIT
    beta, linear_beta = (0.0, 0.0) if betas is None else betas
    return float(limit or 0), float(beta), float(linear_beta)


def activate(
    name: str, gate: Array | None, up: Array, numbers: tuple[float, float, float]
) -> Array:
    """act(gate, up) elementwise, in their dtype; `numbers` as from `check_activation`."""
    limit, beta, linear_beta = numbers
    match name:
        case "silu":
            return jax.nn.silu(up)
        case "gelu":
            return jax.nn.gelu(up, approximate=True)
        case "relu2":
            return jnp.square(jax.nn.relu(up))
    assert gate is not None
    match name:
        case "swiglu":
            return jax.nn.silu(gate) * up
        case "swiglu_clamp":
            return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)
        case "swiglu_clamp_after":
            return jnp.minimum(jax.nn.silu(gate), limit) * jnp.clip(up, -limit, limit)
        case "geglu":
            return jax.nn.gelu(gate, approximate=True) * up
        case "reglu":
            return jax.nn.relu(gate) * up
        case "swiglu_oai":
            a, b = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            return a * jax.nn.sigmoid(1.702 * a) * (b + 1)
        case "situ":
            bounded = beta * jnp.tanh(gate / beta) * jax.nn.sigmoid(gate)
            return bounded * (linear_beta * jnp.tanh(up / linear_beta) if linear_beta > 0 else up)
    raise AssertionError(name)
