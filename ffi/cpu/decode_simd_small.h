// AVX2 decoders of the formats with small blocks and of the ternary ones.
#pragma once

#include "ffi/cpu/decode_simd.h"

namespace jax_moe::cpu {
namespace {

#if defined(__AVX2__)

template <>
struct Decoder<Q4_0> : Portable<Q4_0> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    StoreUnit(q, _mm256_sub_epi8(Nibbles(block + 2), Bytes(8)));
  }
};

template <>
struct Decoder<Q4_1> : Portable<Q4_1> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) { StoreUnit(q, Nibbles(block + 4)); }
};

template <>
struct Decoder<Q5_0> : Portable<Q5_0> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    const __m256i high = _mm256_and_si256(BitBytes(~LoadU32(block + 2)), Bytes(0xf0));
    StoreUnit(q, _mm256_or_si256(Nibbles(block + 6), high));
  }
};

template <>
struct Decoder<Q5_1> : Portable<Q5_1> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    const __m256i high = _mm256_and_si256(BitBytes(LoadU32(block + 4)), Bytes(0x10));
    StoreUnit(q, _mm256_or_si256(Nibbles(block + 8), high));
  }
};

template <>
struct Decoder<Q8_0> : Portable<Q8_0> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) { StoreUnit(q, LoadUnit(block + 2)); }
};

template <>
struct Decoder<MXFP4> : Portable<MXFP4> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    StoreUnit(q, Lookup(DoubledE2M1().word, Nibbles(block + 1)));
  }
};

template <>
struct Decoder<NVFP4> : Portable<NVFP4> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    for (int unit = 0; unit < 2; ++unit) {
      const __m256i v = Lookup(DoubledE2M1().word, Nibbles(block + 4 + 16 * unit));
      StoreUnit(q + 32 * unit, _mm256_permute4x64_epi64(v, 0xd8));
    }
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    const __m128i code = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(static_cast<int>(LoadU32(block))));
    const __m128i magnitude = _mm_and_si128(code, _mm_set1_epi32(0x7f));
    const __m128i normal =
        _mm_add_epi32(_mm_slli_epi32(magnitude, 20), _mm_set1_epi32(119 << 23));
    const __m128 subnormal = _mm_mul_ps(_mm_cvtepi32_ps(magnitude), _mm_set1_ps(0x1p-10f));
    const __m128 is_normal = _mm_castsi128_ps(_mm_cmpgt_epi32(magnitude, _mm_set1_epi32(7)));
    const __m128 is_nan = _mm_castsi128_ps(_mm_cmpeq_epi32(code, _mm_set1_epi32(0x7f)));
    const __m128 value = _mm_blendv_ps(subnormal, _mm_castsi128_ps(normal), is_normal);
    _mm_storeu_ps(scale, _mm_andnot_ps(is_nan, value));
  }
};

template <>
struct Decoder<Q1_0> : Portable<Q1_0> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    for (int unit = 0; unit < 4; ++unit) {
      const __m256i clear = BitBytes(~LoadU32(block + 2 + 4 * unit));
      StoreUnit(q + 32 * unit, _mm256_or_si256(clear, Bytes(1)));
    }
  }
};

template <>
struct Decoder<Q2_0> : Portable<Q2_0> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    for (int unit = 0; unit < 2; ++unit) {
      // A byte a word: bit pair n to its byte n.
      const __m256i four = _mm256_cvtepu8_epi32(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(block + 2 + 8 * unit)));
      const __m256i two = _mm256_or_si256(four, _mm256_slli_epi32(four, 12));
      const __m256i spread = _mm256_or_si256(two, _mm256_slli_epi32(two, 6));
      StoreUnit(q + 32 * unit, _mm256_sub_epi8(_mm256_and_si256(spread, Bytes(3)), Bytes(1)));
    }
  }
};

template <>
struct Decoder<TQ2_0> : Portable<TQ2_0> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EachOfBitPairs(block, [&](int unit, __m256i v) __attribute__((always_inline)) {
      StoreUnit(q + 32 * unit, _mm256_sub_epi8(v, Bytes(1)));
    });
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    _mm256_storeu_ps(scale, _mm256_set1_ps(HalfToFloat(LoadU16(block + 64))));
  }
};

// A byte times 3^n, modulo 256, holds digit n in its top: floor(3 p / 256), here less one.
JM_HD __m256i TernaryDigits(__m256i p) {
  const auto at_least = [&](int bound) __attribute__((always_inline)) {
    return _mm256_cmpeq_epi8(_mm256_max_epu8(p, Bytes(bound)), p);
  };
  return _mm256_sub_epi8(_mm256_sub_epi8(Bytes(-1), at_least(86)), at_least(171));
}

JM_HD __m256i Tripled(__m256i p) { return _mm256_add_epi8(_mm256_add_epi8(p, p), p); }

template <>
struct Decoder<TQ1_0> : Portable<TQ1_0> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    __m256i first = LoadUnit(block);
    // 16 bytes with five digits, then 4 bytes with four.
    __m256i second = _mm256_setr_m128i(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 32)),
        _mm_cvtsi32_si128(static_cast<int>(LoadU32(block + 48))));
#pragma GCC unroll 5
    for (int n = 0; n < 5; ++n) {
      StoreUnit(q + 32 * n, TernaryDigits(first));
      const __m256i digits = TernaryDigits(second);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 160 + 16 * n),
                       _mm256_castsi256_si128(digits));
      if (n < 4) {
        const int word = _mm_cvtsi128_si32(_mm256_extracti128_si256(digits, 1));
        std::memcpy(q + 240 + 4 * n, &word, 4);
      }
      first = Tripled(first);
      second = Tripled(second);
    }
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    _mm256_storeu_ps(scale, _mm256_set1_ps(HalfToFloat(LoadU16(block + 52))));
  }
};

#endif  // __AVX2__

}  // namespace
}  // namespace jax_moe::cpu
