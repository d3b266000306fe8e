// Packed rows to float32, a unit a thread, with the same two roundings as ggml's dequantiser.
#pragma once

#include "ffi/blocks/decoder.h"

namespace jax_moe::cuda {

template <typename Format>
__global__ void __launch_bounds__(256) Dequantize(const uint8_t* data, int64_t units, float* out) {
  constexpr int kUnitsABlock = Format::kBlock / 32;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < units;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const uint8_t* block = data + i / kUnitsABlock * Format::kBytes;
    const int unit = static_cast<int>(i % kUnitsABlock);
    uint32_t q[8];
    Format::Unit(block, unit, q);
#pragma unroll
    for (int group = 0; group < 32 / Format::kGroup; ++group) {
      const Affine affine = Format::Group(block, unit * (32 / Format::kGroup) + group);
#pragma unroll
      for (int j = group * Format::kGroup / 4; j < (group + 1) * Format::kGroup / 4; ++j) {
        float w[4];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          w[b] = __fmul_rn(affine.scale, static_cast<float>(static_cast<int8_t>(q[j] >> 8 * b)));
          if constexpr (Format::kHasOffset) w[b] = __fadd_rn(w[b], affine.offset);
        }
        reinterpret_cast<float4*>(out + i * 32)[j] = make_float4(w[0], w[1], w[2], w[3]);
      }
    }
  }
}

}  // namespace jax_moe::cuda
