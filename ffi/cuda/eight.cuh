// Eight consecutive values of an array in two steps, so that something else can be done while they
// are on their way.
#pragma once

#include <cuda_fp16.h>

#include "ffi/cuda/gemm.h"

namespace jax_moe::cuda {

// As they are in memory; high: float32's alone.
struct EightBits {
  uint4 low, high;
};

// From a multiple of 8 on.
__device__ __forceinline__ EightBits LoadEight(const void* x, Element type, int64_t index) {
  const auto* from = reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(x) +
                                                    index * (type == Element::kF32 ? 4 : 2));
  EightBits bits = {from[0]};
  if (type == Element::kF32) bits.high = from[1];
  return bits;
}

// 16 bytes: eight values, or four of float32.
template <Element kType>
__device__ __forceinline__ void ToFloats(const uint4& bits, float* to) {
  const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == Element::kF32) {
      to[i] = __uint_as_float(words[i]);
    } else if constexpr (kType == Element::kF16) {
      const float2 two = __half22float2(*reinterpret_cast<const half2*>(&words[i]));
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    } else {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}
__device__ __forceinline__ void ToFloats(const EightBits& bits, Element type, float (&to)[8]) {
  switch (type) {
    case Element::kF32:
      ToFloats<Element::kF32>(bits.low, to);
      ToFloats<Element::kF32>(bits.high, to + 4);
      break;
    case Element::kF16:
      ToFloats<Element::kF16>(bits.low, to);
      break;
    case Element::kBF16:
      ToFloats<Element::kBF16>(bits.low, to);
      break;
  }
}

}  // namespace jax_moe::cuda
