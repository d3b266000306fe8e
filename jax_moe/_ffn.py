"""moe_ffn: the feed-forward block of all of a layer's routed experts, from routing to the sum."""

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
from jax_moe._packed import EqualByLeaves, PackedExperts, map_packed
from jax_moe._reference import ffn_reference
from jax_moe._routing import Routing
from jax_moe._variants import MoEVariant, as_variant, check_variant

Weight = PackedExperts | Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Experts(EqualByLeaves):
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
        return map_packed(lambda weight: weight.prepack(donate), self)

    def unpack(self, donate: bool = False) -> "Experts":
        """The inverse of `prepack`: every packed weight in GGUF's layout."""
        return map_packed(lambda weight: weight.unpack(donate), self)

    @property
    def weights(self) -> dict[str, Weight]:
        """The weights that are given, by the names of their fields."""
        named = {name: getattr(self, name) for name in ("gate", "up", "gate_up", "down")}
        return {name: weight for name, weight in named.items() if weight is not None}


@dataclass(frozen=True)
class ExpertsProblem:
    """Experts that have been checked."""

    num_experts: int
    d_model: int
    d_expert: int
    formats: tuple[int, int, int]
    gated: bool
    merged: bool
    biased: bool  # gate or up


@dataclass(frozen=True)
class FfnProblem:
    """A moe_ffn whose arguments have been checked."""

    num_tokens: int
    top_k: int
    x_dtype: np.dtype
    experts: ExpertsProblem
    activation: str
    numbers: tuple[float, float, float]
    variant: MoEVariant | None


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
      variant: a `MoEVariant`, or None for the fastest kernel that keeps x as it is. Inside, h may
        be rounded to float16 or, between dense bfloat16 experts, to bfloat16: `select_kernel` tells
        the bound of the error.
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
    if implementation == "reference":
        operands = _Operands.of(experts)
        gate, up, down = map(gguf_layout, operands.weights)
        return ffn_reference(
            x,
            routing.expert_ids,
            routing.weights,
            gate,
            up,
            down,
            operands.biases,
            operands.scales,
            activation=activation,
            numbers=problem.numbers,
            weights_before=weights_before,
            round_activations=variant is MoEVariant.SCALAR_GGUF,
        ).astype(x.dtype)
    static = _Static(
        problem.experts.formats,
        problem.experts.merged,
        ACTIVATIONS[activation].code,
        problem.numbers,
        bool(weights_before),
        0 if variant is None else variant.value,
        problem.experts.d_expert,
        problem.experts.biased,
    )
    return _moe_ffn(static, x, routing, experts)


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
    if not isinstance(routing, Routing):
        raise TypeError(f"routing is jax_moe.Routing, not {type(routing).__name__}.")
    check.array("routing.expert_ids", routing.expert_ids, rank=2, dtypes=(jnp.int32,))
    top_k = check.positive("top_k, the slots of routing.expert_ids,", routing.expert_ids.shape[1])
    check.shape("routing.expert_ids", routing.expert_ids, (tokens, top_k), "[T, k]")
    check.array("routing.weights", routing.weights, rank=2, dtypes=x_dtypes)
    check.shape("routing.weights", routing.weights, (tokens, top_k), "[T, k]")
    check.pair_count(tokens * top_k)
    checked = experts_problem("experts", experts, "x", d_model, x_dtypes)
    check_variant(variant, x.dtype, {f"experts.{name}": w for name, w in experts.weights.items()})
    numbers = check_activation(activation, activation_limit, activation_betas, checked.gated)
    return FfnProblem(tokens, top_k, x.dtype, checked, activation, numbers, variant)


def experts_problem(
    path: str, experts: Experts, reads: str, d_model: int, dtypes: tuple
) -> ExpertsProblem:
    """Checks experts that are an argument or a field of one.

    Args:
      path: what they are called in errors, like "params.shared".
      reads, d_model: what they read and its width H.
      dtypes: of biases and scales.
    """
    if not isinstance(experts, Experts):
        raise TypeError(f"{path} is jax_moe.Experts, not {type(experts).__name__}.")
    merged, given = experts.gate_up is not None, experts.weights
    if set(given) not in ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"}):
        raise ValueError(
            f"{path} has gate, up and down, or gate_up and down, or up and down, not "
            f"{' and '.join(given) or 'nothing'}."
        )
    shapes = {name: check.weight(f"{path}.{name}", w) for name, w in given.items()}
    num_experts, d_model_out, d_expert = shapes["down"]
    if d_model_out != d_model:
        raise ValueError(
            f"{path}.down has [E, H, F] = {shapes['down']}, but {reads} has H = {d_model}."
        )
    for name in shapes.keys() - {"down"}:
        rows = 2 * d_expert if name == "gate_up" else d_expert
        if shapes[name] != (num_experts, rows, d_model):
            raise ValueError(
                f"{path}.{name} has [E, {'2F' if name == 'gate_up' else 'F'}, H] = "
                f"{(num_experts, rows, d_model)} to match {reads} and {path}.down, not "
                f"{shapes[name]}."
            )
    for name in ("gate", "up", "gate_up", "down"):
        for kind, expected in (("bias", shapes.get(name, (0, 0))[:2]), ("scale", (num_experts,))):
            extra = getattr(experts, f"{name}_{kind}")
            if extra is None:
                continue
            if name not in given:
                raise ValueError(f"{path}.{name}_{kind} is given without {path}.{name}.")
            check.array(f"{path}.{name}_{kind}", extra, rank=len(expected), dtypes=dtypes)
            check.shape(
                f"{path}.{name}_{kind}", extra, expected, "[E, N]" if kind == "bias" else "[E]"
            )
    gate, up = (experts.gate_up, None) if merged else (experts.gate, experts.up)
    return ExpertsProblem(
        num_experts=num_experts,
        d_model=d_model,
        d_expert=d_expert,
        formats=tuple(weight_format(w) for w in (gate, up, experts.down)),  # type: ignore[arg-type]
        gated=gate is not None,
        merged=merged,
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


class _Operands(NamedTuple):
    """Of gate, or gate and up merged, of up, and of down."""

    weights: tuple[Weight | None, ...]
    biases: tuple[Array | None, ...]
    scales: tuple[Array | None, ...]

    @classmethod
    def of(cls, experts: Experts) -> "_Operands":
        names = ("gate", "up") if experts.gate_up is None else ("gate_up", None)
        fields = [
            tuple(name and getattr(experts, name + kind) for name in (*names, "down"))
            for kind in ("", "_bias", "_scale")
        ]
        return cls(*fields)


@_ffi.cached
def _moe_ffn(static: _Static, x: Array, routing: Routing, experts: Experts) -> Array:
    operands = _Operands.of(experts)
    weights = [weight_operand(weight) for weight in operands.weights]
    (y,) = _ffn_op(
        static,
        x,
        routing.expert_ids,
        float_operand(routing.weights),
        *(weight.data for weight in weights),
        *map(float_operand, operands.biases),
        *map(float_operand, operands.scales),
        *(weight.aux for weight in weights),
    )
    return y


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
