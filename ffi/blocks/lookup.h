// Nibbles as indices into a table of 16 int8.
#pragma once

#include "ffi/blocks/bits.h"
#include "ffi/blocks/decoder.h"

#if defined(__SSSE3__) && !defined(__CUDACC__)
#include <tmmintrin.h>
#elif defined(__aarch64__) && !defined(__CUDACC__)
#include <arm_neon.h>
#endif

namespace jax_moe {

// Sixteen int8, entry i in byte i % 4 of word i / 4.
struct NibbleTable {
  uint32_t word[4];
};

// The entries of four nibbles of a word, those of its low (half = 0) or its high half.
JM_HD uint32_t LookupFour(const NibbleTable& table, uint32_t word, int half) {
  // A byte permutation has three index bits: look up in both halves of the table, then choose by
  // the fourth. Selectors are made for both halves of the word at once: by Select, for the compiler
  // would shift first and then mask each half.
  const uint32_t index = Select(0x77777777u, word, 0) >> 16 * half;
  const uint32_t choice = Select(0x44444444u, word >> 1, 0x32103210u) >> 16 * half;
  const uint32_t lower = BytePerm(table.word[0], table.word[1], index);
  const uint32_t upper = BytePerm(table.word[2], table.word[3], index);
  return BytePerm(lower, upper, choice);
}

// Looks up the low and the high nibbles of 16 bytes, each in the order of the bytes.
template <int kAlign>
JM_HD void LookupNibbles(const NibbleTable& table, const uint8_t* nibbles, uint32_t (&low)[4],
                         uint32_t (&high)[4]) {
#if defined(__CUDA_ARCH__)
  for (int j = 0; j < 4; ++j) {
    const uint32_t word = LoadU32<kAlign>(nibbles + 4 * j);
    const uint32_t first = LookupFour(table, word, 0), second = LookupFour(table, word, 1);
    low[j] = BytePerm(first, second, 0x6420);
    high[j] = BytePerm(first, second, 0x7531);
  }
#elif defined(__SSSE3__) && !defined(__CUDACC__)
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.word));
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i first = _mm_shuffle_epi8(values, _mm_and_si128(bytes, mask));
  const __m128i second = _mm_shuffle_epi8(values, _mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), first);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), second);
#elif defined(__aarch64__) && !defined(__CUDACC__)
  const uint8x16_t values = vreinterpretq_u8_u32(vld1q_u32(table.word));
  const uint8x16_t bytes = vld1q_u8(nibbles);
  vst1q_u32(low, vreinterpretq_u32_u8(vqtbl1q_u8(values, vandq_u8(bytes, vdupq_n_u8(15)))));
  vst1q_u32(high, vreinterpretq_u32_u8(vqtbl1q_u8(values, vshrq_n_u8(bytes, 4))));
#else
  for (int j = 0; j < 4; ++j) {
    low[j] = high[j] = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t byte = nibbles[4 * j + i];
      low[j] |= (table.word[byte >> 2 & 3] >> 8 * (byte & 3) & 0xffu) << 8 * i;
      high[j] |= (table.word[byte >> 6] >> 8 * (byte >> 4 & 3) & 0xffu) << 8 * i;
    }
  }
#endif
}

}  // namespace jax_moe
