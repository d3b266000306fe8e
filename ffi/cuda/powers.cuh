// Powers of two that bring rows into f16's range, in few instructions: those of a short kernel come
// from memory too.
#pragma once

#include <cstdint>

namespace jax_moe::cuda {

// The exponent of the power that brings a row's largest magnitude, of which these are the bits, to
// 2^14 .. 2^15. The power and its inverse are normal float32. Rows that are not finite stay as they
// are, so that it shows in the result.
__device__ __forceinline__ int ExponentOfBits(uint32_t max) {
  const int biased = static_cast<int>(max >> 23);
  return max == 0 || biased == 255 ? 0 : min(127 + 14 - biased, 126);
}
__device__ __forceinline__ float PowerOfTwo(int exponent) {  // -126 .. 127
  return __int_as_float((127 + exponent) << 23);
}

// 2^24 over a row's normaliser, a power of two, and the other way round; of NaN, which a normaliser
// may be, a number of which this is NaN again.
__device__ __forceinline__ float InverseNormaliser(float x) {
  return __uint_as_float((278u << 23) - __float_as_uint(x));
}

}  // namespace jax_moe::cuda
