// 32 bits to 32 bytes.
#pragma once

#include "ffi/blocks/decoder.h"

#if defined(__AVX2__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace jax_moe {

// Byte i of the eight words becomes 0xff where bit i is set and 0x00 where it is clear.
JM_HD void BitsToByteMasks(uint32_t bits, uint32_t (&mask)[8]) {
#if defined(__AVX2__) && !defined(__CUDACC__)
  const __m256i byte_of = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101,
                                             0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(bits));
  const __m256i picked = _mm256_and_si256(_mm256_shuffle_epi8(all, byte_of), bit_of);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask), _mm256_cmpeq_epi8(picked, bit_of));
#else
  for (int j = 0; j < 8; ++j) mask[j] = BitsToByteMask(bits >> 4 * j);
#endif
}

}  // namespace jax_moe
