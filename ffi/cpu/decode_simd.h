// How a whole block is decoded, and what the AVX2 decoders in decode_simd_*.h are written with.
// Those give the same integers, scales and offsets as the portable ones to the bit; what of a format
// is missing there, the portable decoder does.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "ffi/blocks/formats.h"
#include "ffi/cpu/simd.h"

namespace jax_moe::cpu {
namespace {

// A whole block of F by its own decoder. Unit and group numbers are constants here, so that what
// they select costs nothing at run time.
template <typename F>
struct Portable {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EachUnit(block, q, std::make_integer_sequence<int, F::kBlock / 32>());
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float* offset) {
    // By way of arrays of its own, which the compiler knows not to be the block: what groups share
    // is then loaded once.
    constexpr int kGroups = F::kBlock / F::kGroup;
    float s[kGroups], o[kGroups];
    EachGroup(block, s, o, std::make_integer_sequence<int, kGroups>());
    std::memcpy(scale, s, sizeof(s));
    if constexpr (F::kHasOffset) std::memcpy(offset, o, sizeof(o));
  }

 private:
  template <int... kUnits>
  static JM_HD void EachUnit(const uint8_t* block, int8_t* q,
                             std::integer_sequence<int, kUnits...>) {
    (OneUnit<kUnits>(block, q), ...);
  }
  template <int kUnit>
  static JM_HD void OneUnit(const uint8_t* block, int8_t* q) {
    uint32_t words[8];
    F::Unit(block, kUnit, words);
    std::memcpy(q + 32 * kUnit, words, 32);
  }
  template <int... kGroups>
  static JM_HD void EachGroup(const uint8_t* block, float* scale, float* offset,
                              std::integer_sequence<int, kGroups...>) {
    (OneGroup<kGroups>(block, scale, offset), ...);
  }
  template <int kIndex>
  static JM_HD void OneGroup(const uint8_t* block, float* scale, float* offset) {
    const Affine affine = F::Group(block, kIndex);
    scale[kIndex] = affine.scale;
    if constexpr (F::kHasOffset) offset[kIndex] = affine.offset;
  }
};

template <typename F>
struct Decoder : Portable<F> {};

#if defined(__AVX2__)

JM_HD uint64_t LoadU64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

JM_HD __m256i Bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }

JM_HD __m256i LoadUnit(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

JM_HD void StoreUnit(int8_t* q, __m256i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), v);
}

JM_HD void StoreScaled(float* out, __m256i integers, float factor) {
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(integers), _mm256_set1_ps(factor)));
}

// Scales of the sixteen groups of a block from bytes.
JM_HD void StoreScaled16(float* out, __m128i bytes, float factor) {
  StoreScaled(out, _mm256_cvtepi8_epi32(bytes), factor);
  StoreScaled(out + 8, _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)), factor);
}

// The low nibbles of 16 bytes, then the high ones.
JM_HD __m256i Nibbles(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i both =
      _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1);
  return _mm256_and_si256(both, Bytes(15));
}

JM_HD __m256i Lookup(const uint32_t (&table)[4], __m256i index) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), index);
}

// 32 bits to bytes 0x00 or 0xff.
JM_HD __m256i BitBytes(uint32_t bits) {
#if defined(__AVX512BW__)
  return _mm256_movm_epi8(bits);
#else
  const __m256i spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(static_cast<int>(bits)),
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
#endif
}

// Changes the sign of the bytes whose bit is set.
JM_HD __m256i WithSigns(__m256i v, uint32_t bits) {
#if defined(__AVX512BW__)
  return _mm256_mask_sub_epi8(v, bits, _mm256_setzero_si256(), v);
#else
  const __m256i mask = BitBytes(bits);
  return _mm256_sub_epi8(_mm256_xor_si256(v, mask), mask);
#endif
}

JM_HD __m256i Words64(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  return _mm256_setr_epi64x(static_cast<int64_t>(a), static_cast<int64_t>(b),
                            static_cast<int64_t>(c), static_cast<int64_t>(d));
}

// Calls f(0) .. f(7), unrolled.
template <typename Function>
JM_HD void EightTimes(Function f) {
#pragma GCC unroll 8
  for (int unit = 0; unit < 8; ++unit) f(unit);
}

// The units of 64 bytes of bit pairs, each 32 bytes four units: f(unit, weights).
template <typename Function>
JM_HD void EachOfBitPairs(const uint8_t* pairs, Function f) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i four = LoadUnit(pairs + 32 * half);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      f(4 * half + i, _mm256_and_si256(_mm256_srli_epi16(four, 2 * i), Bytes(3)));
    }
  }
}

#endif  // __AVX2__

}  // namespace
}  // namespace jax_moe::cpu
