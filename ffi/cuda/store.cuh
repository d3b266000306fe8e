// Writing a result of any of the three element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ffi/cuda/gemm.h"

namespace jax_moe::cuda {

__device__ __forceinline__ void Store(void* y, int64_t index, Element type, float value) {
  switch (type) {
    case Element::kF32:
      static_cast<float*>(y)[index] = value;
      break;
    case Element::kF16:
      static_cast<half*>(y)[index] = __float2half_rn(value);
      break;
    case Element::kBF16:
      static_cast<__nv_bfloat16*>(y)[index] = __float2bfloat16_rn(value);
      break;
  }
}

// The factor of a pair's results: what undoes the scaling of its row, and its weight.
__device__ __forceinline__ float PairFactor(const GemmArgs& args, int pair, bool scaled_rows) {
  const float weight = args.pair_weight ? args.pair_weight[pair] : 1.0f;
  return scaled_rows ? weight * args.x.scales[pair / args.pairs_a_row] : weight;
}

}  // namespace jax_moe::cuda
