// AVX2 decoders of the K-quants.
#pragma once

#include "ffi/cpu/decode_simd.h"

namespace jax_moe::cpu {
namespace {

#if defined(__AVX2__)

template <>
struct Decoder<Q2_K> : Portable<Q2_K> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EachOfBitPairs(block + 16, [&](int unit, __m256i v) __attribute__((always_inline)) {
      StoreUnit(q + 32 * unit, v);
    });
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float* offset) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block));
    const __m128i mask = _mm_set1_epi8(15);
    StoreScaled16(scale, _mm_and_si128(packed, mask), HalfToFloat(LoadU16(block + 80)));
    StoreScaled16(offset, _mm_and_si128(_mm_srli_epi16(packed, 4), mask),
                  -HalfToFloat(LoadU16(block + 82)));
  }
};

template <>
struct Decoder<Q3_K> : Portable<Q3_K> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    const __m256i thirds = LoadUnit(block);
    EachOfBitPairs(block + 32, [&](int unit, __m256i low) __attribute__((always_inline)) {
      // Four less where the third bit is clear.
      const __m256i clear = _mm256_andnot_si256(_mm256_srli_epi16(thirds, unit), Bytes(1));
      StoreUnit(q + 32 * unit, _mm256_sub_epi8(low, _mm256_slli_epi16(clear, 2)));
    });
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(block + 96));
    const __m128i low = _mm_and_si128(_mm_unpacklo_epi64(packed, _mm_srli_epi16(packed, 4)),
                                      _mm_set1_epi8(15));
    const __m128i top = _mm_set1_epi32(static_cast<int>(LoadU32(block + 104)));
    const __m128i high = _mm_and_si128(_mm_srlv_epi32(top, _mm_setr_epi32(0, 2, 4, 6)),
                                       _mm_set1_epi8(3));
    const __m128i scales = _mm_or_si128(low, _mm_slli_epi16(high, 4));
    StoreScaled16(scale, _mm_sub_epi8(scales, _mm_set1_epi8(32)),
                  HalfToFloat(LoadU16(block + 108)));
  }
};

// Eight 6-bit scales and minima of Q4_K and Q5_K, times d and -dmin.
JM_HD void SixBitGroups(const uint8_t* block, __m256* scale, __m256* offset) {
  const uint64_t first = LoadU64(block + 4);  // six bits of the first four of each; the rest's top
  const uint64_t last = LoadU32(block + 12);
  const uint64_t top = first >> 2 & 0x3030303030303030;
  const uint64_t six = first & 0x3f3f3f3f3f3f3f3f;
  const uint64_t scales = (six & 0xffffffff) | ((last & 0x0f0f0f0f) | (top & 0xffffffff)) << 32;
  const uint64_t minima =
      six >> 32 | ((last >> 4 & 0x0f0f0f0f) << 32 | (top & 0xffffffff00000000));
  const auto scaled = [](uint64_t bytes, float factor) __attribute__((always_inline)) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(factor));
  };
  *scale = scaled(scales, HalfToFloat(LoadU16(block)));
  *offset = scaled(minima, -HalfToFloat(LoadU16(block + 2)));
}

JM_HD void StoreSixBitGroups(const uint8_t* block, float* scale, float* offset) {
  __m256 s, o;
  SixBitGroups(block, &s, &o);
  _mm256_storeu_ps(scale, s);
  _mm256_storeu_ps(offset, o);
}

// Eight units of nibbles, each 32 bytes two of them: f(unit, weights).
template <typename Function>
JM_HD void EachOfNibbles(const uint8_t* nibbles, Function f) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i two = LoadUnit(nibbles + 32 * i);
    f(2 * i, _mm256_and_si256(two, Bytes(15)));
    f(2 * i + 1, _mm256_and_si256(_mm256_srli_epi16(two, 4), Bytes(15)));
  }
}

template <>
struct Decoder<Q4_K> : Portable<Q4_K> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EachOfNibbles(block + 16, [&](int unit, __m256i v) __attribute__((always_inline)) {
      StoreUnit(q + 32 * unit, v);
    });
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float* offset) {
    StoreSixBitGroups(block, scale, offset);
  }
};

template <>
struct Decoder<Q5_K> : Portable<Q5_K> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    const __m256i fifths = LoadUnit(block + 16);
    EachOfNibbles(block + 48, [&](int unit, __m256i low) __attribute__((always_inline)) {
      // Bit `unit` of every byte at bit 4.
      const __m256i moved = unit < 4 ? _mm256_slli_epi16(fifths, 4 - unit)
                                     : _mm256_srli_epi16(fifths, unit - 4);
      StoreUnit(q + 32 * unit, _mm256_or_si256(low, _mm256_and_si256(moved, Bytes(16))));
    });
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float* offset) {
    StoreSixBitGroups(block, scale, offset);
  }
};

template <>
struct Decoder<Q6_K> : Portable<Q6_K> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    for (int half = 0; half < 2; ++half, q += 128) {
      const __m256i first = LoadUnit(block + 64 * half);
      const __m256i second = LoadUnit(block + 64 * half + 32);
      const __m256i top = LoadUnit(block + 128 + 32 * half);
      const auto store = [&](int unit, __m256i low, __m256i high) __attribute__((always_inline)) {
        const __m256i six = _mm256_or_si256(_mm256_and_si256(low, Bytes(0x0f)),
                                            _mm256_and_si256(high, Bytes(0x30)));
        StoreUnit(q + 32 * unit, _mm256_sub_epi8(six, Bytes(32)));
      };
      store(0, first, _mm256_slli_epi16(top, 4));
      store(1, second, _mm256_slli_epi16(top, 2));
      store(2, _mm256_srli_epi16(first, 4), top);
      store(3, _mm256_srli_epi16(second, 4), _mm256_srli_epi16(top, 2));
    }
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    StoreScaled16(scale, _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 192)),
                  HalfToFloat(LoadU16(block + 208)));
  }
};

#endif  // __AVX2__

}  // namespace
}  // namespace jax_moe::cpu
