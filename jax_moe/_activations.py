"""The activations between the experts' projections, as llama.cpp defines them.

Source: notes on `build_moe_ffn` of llama.cpp and the operators it calls; formulas in `activate`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_moe import _check as check


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
    arguments: tuple[str, str, str] = ("activation", "activation_limit", "activation_betas"),
) -> tuple[float, float, float]:
    """The numbers (limit, beta, linear_beta) of an activation, 0 where it has none.

    `arguments` are the names, in errors, of the first three.
    """
    its_name, its_limit, its_betas = arguments
    check.choice(its_name, name, tuple(ACTIVATIONS))
    activation = ACTIVATIONS[name]
    if activation.gated != has_gate:
        given = "have a gate" if has_gate else "have no gate"
        raise ValueError(
            f"{its_name} {name!r} is {'gated' if activation.gated else 'without a gate'}, but the "
            f"experts {given}."
        )
    if activation.needs_limit and limit is None:
        raise ValueError(f"{its_name} {name!r} needs an {its_limit}.")
    if limit is not None and not activation.needs_limit and name != "swiglu_oai":
        raise ValueError(f"{its_name} {name!r} takes no {its_limit}.")
    if limit is not None and not check.number(its_limit, limit) > 0:
        raise ValueError(f"{its_limit} is positive, not {limit}.")
    if (betas is None) != (name != "situ"):
        raise ValueError(
            f"{its_betas} is the pair (beta, linear_beta) of activation 'situ' and None for "
            f"the others, not {betas!r} for {name!r}."
        )
    if name == "swiglu_oai" and limit is None:
        limit = OAI_LIMIT
    return float(limit or 0), *((0.0, 0.0) if betas is None else _pair(its_betas, betas))


def _pair(argument: str, betas: Any) -> tuple[float, float]:
    """(beta, linear_beta) of "situ"."""
    try:
        beta, linear_beta = betas
    except (TypeError, ValueError):
        raise TypeError(f"{argument} is a pair (beta, linear_beta), not {betas!r}.") from None
    beta = check.number(f"{argument}[0]", beta)
    linear_beta = check.number(f"{argument}[1]", linear_beta)
    if not beta > 0:
        raise ValueError(f"{argument}[0], beta, is positive, not {beta}.")
    if not linear_beta >= 0:
        raise ValueError(f"{argument}[1], linear_beta, is positive or 0, not {linear_beta}.")
    return beta, linear_beta


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
