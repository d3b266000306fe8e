// The activations of the kernels that apply them to their sums: exponentials of reduced precision
// (about 2^-20, against h in f16).
#pragma once

#include <type_traits>

#include "ffi/cuda/activation.cuh"
#include "ffi/cuda/prepare.h"

namespace jax_moe::cuda {

__device__ __forceinline__ float FastSigmoid(float x) {
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

template <Activation kActivation>
__device__ __forceinline__ float FastActivate(float g, float u, float limit, float beta,
                                              float linear_beta) {
  switch (kActivation) {
    case Activation::kSwiglu:
      return g * FastSigmoid(g) * u;
    case Activation::kSwigluClamp: {
      const float a = AtMost(g, limit);
      return a * FastSigmoid(a) * Clamp(u, limit);
    }
    case Activation::kSwigluClampAfter:
      return AtMost(g * FastSigmoid(g), limit) * Clamp(u, limit);
    case Activation::kSwigluOai: {
      const float a = AtMost(g, limit);
      return a * FastSigmoid(1.702f * a) * (Clamp(u, limit) + 1.0f);
    }
    case Activation::kSilu:
      return u * FastSigmoid(u);
    default:
      return Activate(kActivation, g, u, limit, beta, linear_beta);
  }
}

// Calls f(std::integral_constant<Activation, A>) for the activation A at hand.
template <typename F>
__device__ __forceinline__ void WithActivation(Activation activation, F f) {
  switch (activation) {
#define JAX_MOE_ACTIVATION(NAME) \
  case Activation::NAME:         \
    return f(std::integral_constant<Activation, Activation::NAME>{});
    JAX_MOE_ACTIVATIONS(JAX_MOE_ACTIVATION)
#undef JAX_MOE_ACTIVATION
  }
}

// What gate and up of an expert's row become before the activation: factor * sum + bias. Args: those of a
// kernel, with projections and the activation's parameters.
struct RowFinish {
  float factor[2], bias[2];

  // Else sums remain as they are.
  template <typename Args>
  static __device__ __forceinline__ bool IsWanted(const Args& args) {
    const Projection(&p)[2] = args.projection;
    return p[0].scale != nullptr || p[0].bias != nullptr || p[1].scale != nullptr ||
           p[1].bias != nullptr;
  }

  template <typename Args>
  __device__ __forceinline__ RowFinish(const Args& args, int expert, int row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Projection& p = args.projection[i];
      factor[i] = p.scale == nullptr ? 1.0f : p.scale[expert];
      bias[i] = p.bias == nullptr ? 0.0f : p.bias[expert * p.bias_pitch + row];
    }
  }

  __device__ __forceinline__ float Gate(float sum) const { return fmaf(sum, factor[0], bias[0]); }
  __device__ __forceinline__ float Up(float sum) const { return fmaf(sum, factor[1], bias[1]); }

  template <Activation kActivation, typename Args>
  __device__ __forceinline__ float Activate(const Args& args, float gate, float up) const {
    return FastActivate<kActivation>(Gate(gate), Up(up), args.limit, args.beta, args.linear_beta);
  }
};

}  // namespace jax_moe::cuda
