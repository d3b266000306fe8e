// From the sums of the gate and up projections to the hidden activations. Branch-free where it can
// be, so that loops over weight rows vectorise. Comparisons are written so that a NaN passes
// through.
#pragma once



#include "ffi/cpu/convert.h"
#include "ffi/cpu/kernels.h"

namespace jax_moe::cpu {
namespace {

JM_HD float AtMost(float a, float limit) { return a > limit ? limit : a; }
JM_HD float Clamp(float a, float limit) { return a < -limit ? -limit : AtMost(a, limit); }
JM_HD float Relu(float a) { return a < 0.0f ? 0.0f : a; }

// e^x to about 2 ulp: 2^n times a polynomial on [-ln(2)/2, ln(2)/2] (its Taylor coefficients).
JM_HD float Exp(float x) {
  x = x < -104.0f ? -104.0f : AtMost(x, 89.0f);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors: n reaches from -150 to 128.
  const int32_t exponent = static_cast<int32_t>(FloatToBits(shifted) - FloatToBits(kRound));
  const int32_t half = exponent >> 1;
  const float low = BitsToFloat(static_cast<uint32_t>(half + 127) << 23);
  const float high = BitsToFloat(static_cast<uint32_t>(exponent - half + 127) << 23);
  return p * low * high;
}

JM_HD float Sigmoid(float a) { return 1.0f / (1.0f + Exp(-a)); }
JM_HD float Silu(float a) { return a / (1.0f + Exp(-a)); }

// 0.5 a (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3))), by 0.5 (1 + tanh(z)) = sigmoid(2 z).
JM_HD float Gelu(float a) {
  return a * Sigmoid(1.59576912f * (a + 0.044715f * a * a * a));
}

template <Activation kActivation>
JM_HD float Activate(float g, float u, const ActivateArgs& args) {
  const float limit = args.limit;
  switch (kActivation) {
    case Activation::kSwiglu: return Silu(g) * u;
    case Activation::kSwigluClamp: return Silu(AtMost(g, limit)) * Clamp(u, limit);
    case Activation::kSwigluClampAfter: return AtMost(Silu(g), limit) * Clamp(u, limit);
    case Activation::kGeglu: return Gelu(g) * u;
    case Activation::kReglu: return Relu(g) * u;
    case Activation::kSwigluOai: {
      const float a = AtMost(g, limit);
      return a * Sigmoid(1.702f * a) * (Clamp(u, limit) + 1.0f);
    }
    case Activation::kSitu: {
      const float linear = args.linear_beta > 0.0f
                               ? args.linear_beta * __builtin_tanhf(u / args.linear_beta)
                               : u;
      return args.beta * __builtin_tanhf(g / args.beta) * Sigmoid(g) * linear;
    }
    case Activation::kSilu: return Silu(u);
    case Activation::kGelu: return Gelu(u);
    case Activation::kRelu2: return Relu(u) * Relu(u);
  }
  return 0.0f;
}

template <Activation kActivation>
void ActivateTile(const ActivateArgs& args) {
  constexpr bool kGated = kActivation < Activation::kSilu;
  float gate_bias[kPanelRows] = {}, up_bias[kPanelRows] = {};
  for (int r = 0; r < args.rows; ++r) {
    if (kGated && args.gate_bias != nullptr) gate_bias[r] = args.gate_bias[r];
    if (args.up_bias != nullptr) up_bias[r] = args.up_bias[r];
  }
  for (int t = 0; t < args.tokens; ++t) {
    float h[kPanelRows];
    const float factor = args.token_factor[t];
    for (int r = 0; r < kPanelRows; ++r) {
      const int i = t * kPanelRows + r;
      const float g = kGated ? args.gate[i] * factor * args.gate_scale + gate_bias[r] : 0.0f;
      const float u = args.up[i] * factor * args.up_scale + up_bias[r];
      h[r] = Activate<kActivation>(g, u, args);
    }
    std::memcpy(args.h[t], h, sizeof(float) * static_cast<size_t>(args.rows));
  }
}

void ActivateAny(const ActivateArgs& args) {
  switch (args.activation) {
#define JAX_MOE_ACTIVATION(NAME) \
  case Activation::NAME:         \
    return ActivateTile<Activation::NAME>(args);
    JAX_MOE_ACTIVATIONS(JAX_MOE_ACTIVATION)
#undef JAX_MOE_ACTIVATION
  }
}

}  // namespace
}  // namespace jax_moe::cpu
