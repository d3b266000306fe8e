// The activations between the projections, elementwise in float32.
#pragma once

#include "ffi/targets.h"

namespace jax_moe::cuda {

__device__ __forceinline__ float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float Silu(float x) { return x * Sigmoid(x); }

__device__ __forceinline__ float Gelu(float x) {
  const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + tanhf(inner));
}

// Minimum, maximum and clamp that keep a NaN in x.
__device__ __forceinline__ float AtMost(float x, float limit) { return x > limit ? limit : x; }

__device__ __forceinline__ float AtLeast(float x, float limit) { return x < limit ? limit : x; }

__device__ __forceinline__ float Clamp(float x, float limit) {
  return AtLeast(AtMost(x, limit), -limit);
}

__device__ __forceinline__ float Activate(Activation activation, float g, float u, float limit,
                                          float beta, float linear_beta) {
  switch (activation) {
    case Activation::kSwiglu:
      return Silu(g) * u;
    case Activation::kSwigluClamp:
      return Silu(AtMost(g, limit)) * Clamp(u, limit);
    case Activation::kSwigluClampAfter:
      return AtMost(Silu(g), limit) * Clamp(u, limit);
    case Activation::kGeglu:
      return Gelu(g) * u;
    case Activation::kReglu:
      return AtLeast(g, 0.0f) * u;
    case Activation::kSwigluOai: {
      const float a = AtMost(g, limit);
      return a * Sigmoid(1.702f * a) * (Clamp(u, limit) + 1.0f);
    }
    case Activation::kSitu: {
      const float bounded = linear_beta > 0 ? linear_beta * tanhf(u / linear_beta) : u;
      return beta * tanhf(g / beta) * Sigmoid(g) * bounded;
    }
    case Activation::kSilu:
      return Silu(u);
    case Activation::kGelu:
      return Gelu(u);
    case Activation::kRelu2: {
      const float positive = AtLeast(u, 0.0f);
      return positive * positive;
    }
  }
  return 0.0f;
}

}  // namespace jax_moe::cuda
