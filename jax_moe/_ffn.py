"""moe_ffn: the feed-forward block of all of a layer's routed experts, from routing to the sum."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_moe import _check as check
from jax_moe import _ffi
from jax_moe._activations import ACTIVATIONS, check_activation
from jax_moe._gemm import fold_experts, fold_ids
from jax_moe._operands import (
    WeightOperand,
    float_operand,
    for_each_platform,
    gguf_layout,
    weight_format,
    weight_operand,
)
from jax_moe._packed import PackedExperts
from jax_moe._reference import ffn_reference
from jax_moe._routing import Routing
from jax_moe._variants import MoEVariant, as_variant, check_variant

Weight = PackedExperts | Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Experts:
    """The weights of a layer's experts: a pytree.

    Weights are `PackedExperts` or dense float32, float16 or bfloat16 arrays, each with its own
    format. E experts, d_model H, d_expert F. Exactly one of these forms:

    - `gate` and `up` `[E, F, H]`;
    - `gate_up` `[E, 2F, H]`, gate rows first;
    - `up` alone, for activations without a gate;

    and `down` `[E, H, F]`. Biases are `[E, N]` for N output rows; scales, `[E]`, are factors of a
    projection's result before its bias. Both are floats. The constructor checks nothing; `moe_ffn`
    does.
    """

    down: Weight
    gate: Weight | None = None
    up: Weight | None = None
    gate_up: Weight | None = None
    gate_bias: Array | None = None
    up_bias: Array | None = None
    gate_up_bias: Array | None = None
    down_bias: Array | None = None
    gate_scale: Array | None = None
    up_scale: Array | None = None
    gate_up_scale: Array | None = None
    down_scale: Array | None = None

    def prepack(self, donate: bool = False) -> "Experts":
        """The same experts with every packed weight as its `PackedExperts.prepack` gives it."""
        return self._map_packed(lambda weight: weight.prepack(donate))

    def unpack(self, donate: bool = False) -> "Experts":
        """The inverse of `prepack`: every packed weight in GGUF's layout."""
        return self._map_packed(lambda weight: weight.unpack(donate))

    def _map_packed(self, f: Callable[[PackedExperts], PackedExperts]) -> "Experts":
        done: dict[Any, PackedExperts] = {}  # one array may be in two places
        changes: dict[str, Any] = {}
        for name in ("gate", "up", "gate_up", "down"):
            weight = getattr(self, name)
            if isinstance(weight, PackedExperts):
                key = (id(weight.data), weight.format, weight.layout)
                done[key] = changes[name] = done[key] if key in done else f(weight)
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class FfnProblem:
    """A moe_ffn whose arguments have been checked."""

    num_tokens: int
    top_k: int
    num_experts: int
    d_model: int
    d_expert: int
    x_dtype: np.dtype
    formats: tuple[int, int, int]
    merged: bool
    activation: str
    numbers: tuple[float, float, float]
    variant: MoEVariant | None
    biased: bool  # gate or up


def moe_ffn(
    x: Array,
    routing: Routing,
    experts: Experts,
    *,
    activation: str = "swiglu",
    activation_limit: float | None = None,
    activation_betas: tuple[float, float] | None = None,
    weights_before: bool = False,
    variant: MoEVariant | None = None,
    implementation: str | None = None,
) -> Array:
    """The experts' feed-forward network for every token, summed over its slots.

    `h = act(gate_e x, up_e x)` and `y[t] = sum over slots s of weights[t, s] * (down_e h)` with
    `e = expert_ids[t, s]`, in slot order. A projection's result is multiplied by its expert's
    scale, then its bias is added, then the routing weight multiplies. An id outside [0, E) adds
    nothing, which is what expert parallelism under `jax.shard_map` rests on. Limits on a GPU are as
    in `moe_gemm`.

    Args:
      x: float32, float16 or bfloat16 `[T, H]`.
      routing: `Routing(expert_ids int32 [T, k], weights [T, k])`.
      experts: `Experts`.
      activation: gated "swiglu", "swiglu_clamp" (limit before silu), "swiglu_clamp_after", "geglu"
        (tanh form), "reglu", "swiglu_oai", "situ"; without a gate "silu", "gelu", "relu2".
      activation_limit: the limit of the clamped ones; "swiglu_oai" has 7 where it is None.
      activation_betas: (beta, linear_beta) of "situ"; linear_beta 0 leaves `up` unbounded.
      weights_before: the routing weight multiplies the expert's input instead of its output
        (Llama 4).
      variant: a `MoEVariant`, or None for the fastest kernel that rounds no activations.
      implementation: None for the platform's kernel, "reference" for pure JAX, which is
        differentiable.

    Returns:
      `[T, H]` of x's dtype, accumulated in float32.

    Raises:
      TypeError, ValueError: when traced; the message names the argument.
      ImportError: the native library cannot work with the installed jaxlib.
    """
    problem = ffn_problem(
        x,
        routing,
        experts,
        activation=activation,
        activation_limit=activation_limit,
        activation_betas=activation_betas,
        variant=variant,
        implementation=implementation,
    )
    biases: tuple[Array | None, ...]
    scales: tuple[Array | None, ...]
    if problem.merged:
        gate, up = experts.gate_up, None
        biases = (experts.gate_up_bias, None, experts.down_bias)
        scales = (experts.gate_up_scale, None, experts.down_scale)
    else:
        gate, up = experts.gate, experts.up
        biases = (experts.gate_bias, experts.up_bias, experts.down_bias)
        scales = (experts.gate_scale, experts.up_scale, experts.down_scale)
    if implementation == "reference":
        return ffn_reference(
            x,
            routing.expert_ids,
            routing.weights,
            gguf_layout(gate),
            gguf_layout(up),
            gguf_layout(experts.down),
            biases,
            scales,
            activation=activation,
            numbers=problem.numbers,
            weights_before=weights_before,
            round_activations=variant is MoEVariant.SCALAR_GGUF,
        ).astype(x.dtype)
    static = _Static(
        problem.formats,
        problem.merged,
        ACTIVATIONS[activation].code,
        problem.numbers,
        bool(weights_before),
        0 if variant is None else variant.value,
        problem.d_expert,
        problem.biased,
    )
    operands = [weight_operand(w) for w in (gate, up, experts.down)]
    (y,) = _ffn_op(
        static,
        x,
        routing.expert_ids,
        float_operand(routing.weights),
        *(operand.data for operand in operands),
        *map(float_operand, biases),
        *map(float_operand, scales),
        *(operand.aux for operand in operands),
    )
    return y


def ffn_problem(
    x: Any,
    routing: Routing,
    experts: Experts,
    *,
    activation: str = "swiglu",
    activation_limit: float | None = None,
    activation_betas: tuple[float, float] | None = None,
    weights_before: bool = False,
    variant: MoEVariant | None = None,
    implementation: str | None = None,
) -> FfnProblem:
    """Checks the arguments of `moe_ffn`, arrays or ShapeDtypeStructs."""
    check.implementation(implementation)
    variant = as_variant(variant)
    x_dtypes = check.float_dtypes(implementation)
    check.array("x", x, rank=2, dtypes=x_dtypes)
    tokens, d_model = x.shape
    check.array("routing.expert_ids", routing.expert_ids, rank=2, dtypes=(jnp.int32,))
    top_k = check.positive("top_k, the slots of routing.expert_ids,", routing.expert_ids.shape[1])
    check.shape("routing.expert_ids", routing.expert_ids, (tokens, top_k), "[T, k]")
    check.array("routing.weights", routing.weights, rank=2, dtypes=x_dtypes)
    check.shape("routing.weights", routing.weights, (tokens, top_k), "[T, k]")

    if not isinstance(experts, Experts):
        raise TypeError(f"experts is jax_moe.Experts, not {type(experts).__name__}.")
    merged = experts.gate_up is not None
    given = {
        name: getattr(experts, name)
        for name in ("gate", "up", "gate_up", "down")
        if getattr(experts, name) is not None
    }
    if set(given) not in ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"}):
        raise ValueError(
            "experts has gate, up and down, or gate_up and down, or up and down, not "
            f"{' and '.join(given) or 'nothing'}."
        )
    shapes = {name: check.weight(f"experts.{name}", w) for name, w in given.items()}
    num_experts, d_model_out, d_expert = shapes["down"]
    if d_model_out != d_model:
        raise ValueError(f"experts.down has [E, H, F] = {shapes['down']}, but x has H = {d_model}.")
    for name in shapes.keys() - {"down"}:
        rows = 2 * d_expert if name == "gate_up" else d_expert
        if shapes[name] != (num_experts, rows, d_model):
            raise ValueError(
                f"experts.{name} has [E, {'2F' if name == 'gate_up' else 'F'}, H] = "
                f"{(num_experts, rows, d_model)} to match x and experts.down, not {shapes[name]}."
            )
    for name in ("gate", "up", "gate_up", "down"):
        for kind, expected in (("bias", shapes.get(name, (0, 0))[:2]), ("scale", (num_experts,))):
            extra = getattr(experts, f"{name}_{kind}")
            if extra is None:
                continue
            if name not in given:
                raise ValueError(f"experts.{name}_{kind} is given without experts.{name}.")
            check.array(f"experts.{name}_{kind}", extra, rank=len(expected), dtypes=x_dtypes)
            check.shape(
                f"experts.{name}_{kind}", extra, expected, "[E, N]" if kind == "bias" else "[E]"
            )
    check_variant(variant, x.dtype, {f"experts.{name}": w for name, w in given.items()})
    numbers = check_activation(
        activation, activation_limit, activation_betas, has_gate=merged or "gate" in given
    )
    gate, up = (experts.gate_up, None) if merged else (experts.gate, experts.up)
    return FfnProblem(
        num_tokens=tokens,
        top_k=top_k,
        num_experts=num_experts,
        d_model=d_model,
        d_expert=d_expert,
        x_dtype=x.dtype,
        formats=tuple(weight_format(w) for w in (gate, up, experts.down)),  # type: ignore[arg-type]
        merged=merged,
        activation=activation,
        numbers=numbers,
        variant=variant,
        biased=any(
            bias is not None for bias in (experts.gate_bias, experts.up_bias, experts.gate_up_bias)
        ),
    )


class _Static(NamedTuple):
    formats: tuple[int, int, int]
    merged: bool
    activation: int
    numbers: tuple[float, float, float]
    weights_before: bool
    variant: int
    d_expert: int
    biased: bool


def _run(static: _Static, x, expert_ids, weights, gate, up, down, *others):
    tokens, d_model = x.shape
    check.pair_count(tokens * expert_ids.shape[1])
    limit, beta, linear_beta = static.numbers

    def call(projections, operands):
        routed, biases_and_scales = operands[:3], operands[3:]
        problem = _ffi.native().FfnProblem(
            top_k=expert_ids.shape[1],
            experts=down.shape[0],
            d_model=d_model,
            d_expert=static.d_expert,
            gate_format=projections[0].format,
            up_format=projections[1].format,
            down_format=projections[2].format,
            variant=static.variant,
            activation=static.activation,
            limit=limit,
            biased=static.biased,
        )
        workspace = _ffi.workspace_bytes(problem, tokens)
        y, _ = _ffi.call(
            "jax_moe_ffn",
            (
                jax.ShapeDtypeStruct((tokens, d_model), x.dtype),
                jax.ShapeDtypeStruct((workspace,), jnp.uint8),
            ),
            *routed,
            *(projection.data for projection in projections),
            *biases_and_scales,
            *(projection.aux for projection in projections),
            gate_format=projections[0].format,
            up_format=projections[1].format,
            down_format=projections[2].format,
            merged=static.merged,
            activation=static.activation,
            limit=limit,
            beta=beta,
            linear_beta=linear_beta,
            weights_before=static.weights_before,
            variant=static.variant,
        )
        return y

    *biases_and_scales, gate_aux, up_aux, down_aux = others
    projections = [
        WeightOperand(gate, gate_aux, static.formats[0]),
        WeightOperand(up, up_aux, static.formats[1]),
        WeightOperand(down, down_aux, static.formats[2]),
    ]
    return (for_each_platform(call, projections, [x, expert_ids, weights, *biases_and_scales]),)


def _fold(op, static: _Static, size, batched, x, expert_ids, weights, *experts):
    """Folds a batch into the token axis; a batch of an expert operand also into the expert axis."""
    x, expert_ids, weights = (
        _ffi.broadcast_batch(operand, is_batched, size)
        for operand, is_batched in zip((x, expert_ids, weights), batched[:3], strict=True)
    )
    tokens = x.shape[1]
    if any(batched[3:]):
        experts = tuple(
            _ffi.broadcast_batch(operand, is_batched, size)
            for operand, is_batched in zip(experts, batched[3:], strict=True)
        )
        num_experts = experts[2].shape[1]
        element = jnp.arange(size, dtype=jnp.int32)[:, None, None]
        expert_ids = fold_ids(expert_ids, element, num_experts)
        experts = tuple(map(fold_experts, experts))
    (y,) = op(
        static,
        x.reshape(size * tokens, x.shape[2]),
        expert_ids.reshape(size * tokens, expert_ids.shape[2]),
        weights.reshape(size * tokens, weights.shape[2]),
        *experts,
    )
    return (y.reshape(size, *x.shape[1:]),)


_ffn_op = _ffi.op(_run, _fold)
