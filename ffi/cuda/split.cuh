// Float32 factors for a bf16 product.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace jax_moe::cuda {

// A float32 as the sum of two bf16, the first one in the low half: 16 significand bits.
__device__ __forceinline__ uint32_t SplitBF16(float x) {
  const __nv_bfloat16 high = __float2bfloat16_rn(x);
  const __nv_bfloat162 both(high, __float2bfloat16_rn(x - __bfloat162float(high)));
  return *reinterpret_cast<const uint32_t*>(&both);
}

}  // namespace jax_moe::cuda
