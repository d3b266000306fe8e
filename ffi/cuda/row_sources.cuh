// What rows are prepared from: an array, or the results of gate and up.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ffi/cuda/activation.cuh"
#include "ffi/cuda/prepare.h"

namespace jax_moe::cuda {

// Four consecutive values.
struct Four {
  float v[4];
};

__device__ __forceinline__ Four Load4(const float* x) {
  const float4 f = *reinterpret_cast<const float4*>(x);
  return {{f.x, f.y, f.z, f.w}};
}

template <typename T2, typename T>
__device__ __forceinline__ Four Load4As(const T* x) {
  const uint2 bits = *reinterpret_cast<const uint2*>(x);
  const T2 low = *reinterpret_cast<const T2*>(&bits.x),
           high = *reinterpret_cast<const T2*>(&bits.y);
  return {{static_cast<float>(low.x), static_cast<float>(low.y), static_cast<float>(high.x),
           static_cast<float>(high.y)}};
}
__device__ __forceinline__ Four Load4(const half* x) { return Load4As<half2>(x); }
__device__ __forceinline__ Four Load4(const __nv_bfloat16* x) { return Load4As<__nv_bfloat162>(x); }

// Rows as the kernel reads them: Has(row); At(row, column); and At4 of four columns from a multiple
// of 4 on, where the number of columns is a multiple of 4.
template <typename T>
struct Dense {
  const T* x;
  int64_t columns;
  __device__ bool Has(int64_t) const { return true; }
  __device__ float At(int64_t row, int64_t column) const {
    return static_cast<float>(x[row * columns + column]);
  }
  __device__ Four At4(int64_t row, int64_t column) const {
    return Load4(x + row * columns + column);
  }
};

template <Activation kActivation>
struct Activated {
  static constexpr bool kGated = IsGated(kActivation);
  ActivateArgs args;

  __device__ bool Has(int64_t row) const {
    return args.expert_ids[row] >= 0 && args.expert_ids[row] < args.experts;
  }
  __device__ float Finish(float value, const Projection& projection, int64_t row,
                          int64_t column) const {
    const int64_t expert = args.expert_ids[row];
    if (args.pair_weight != nullptr) value *= args.pair_weight[row];
    if (projection.scale != nullptr) value *= projection.scale[expert];
    if (projection.bias != nullptr)
      value += projection.bias[expert * projection.bias_pitch + column];
    return value;
  }
  __device__ float Act(float gate, float up, int64_t row, int64_t column) const {
    if constexpr (kGated) gate = Finish(gate, args.gate_projection, row, column);
    up = Finish(up, args.up_projection, row, column);
    return Activate(kActivation, gate, up, args.limit, args.beta, args.linear_beta);
  }
  __device__ float At(int64_t row, int64_t column) const {
    const int64_t at = row * args.pitch + column;
    return Act(kGated ? args.gate[at] : 0.0f, args.up[at], row, column);
  }
  __device__ Four At4(int64_t row, int64_t column) const {
    const int64_t at = row * args.pitch + column;
    Four gate = {};
    if constexpr (kGated) gate = Load4(args.gate + at);
    const Four up = Load4(args.up + at);
    Four result;
#pragma unroll
    for (int i = 0; i < 4; ++i) result.v[i] = Act(gate.v[i], up.v[i], row, column + i);
    return result;
  }
};

}  // namespace jax_moe::cuda
