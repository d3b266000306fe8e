// Block decoders written with AVX2 where the compiler's code for the portable one is slow. They give
// the same integers, scales and offsets to the bit. A format without one here runs the portable code.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "ffi/blocks/formats.h"
#include "ffi/cpu/simd.h"

namespace jax_moe::cpu {
namespace {

// A whole block of F by its own decoder. Unit and group numbers are constants here, so that what they
// select costs nothing at run time.
template <typename F>
struct Portable {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EachUnit(block, q, std::make_integer_sequence<int, F::kBlock / 32>());
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float* offset) {
    EachGroup(block, scale, offset, std::make_integer_sequence<int, F::kBlock / F::kGroup>());
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

// The values of IQ4_NL and IQ4_XS.
constexpr NibbleTable kIq4Values = {{0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u}};

template <>
struct Decoder<IQ4_NL> : Portable<IQ4_NL> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    StoreUnit(q, Lookup(kIq4Values.word, Nibbles(block + 2)));
  }
};

template <>
struct Decoder<IQ4_XS> : Portable<IQ4_XS> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EightTimes([&](int unit) {
      StoreUnit(q + 32 * unit, Lookup(kIq4Values.word, Nibbles(block + 8 + 16 * unit)));
    });
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    const uint64_t bits = _pdep_u64(LoadU32(block + 4), 0x0f0f0f0f0f0f0f0f) |
                          _pdep_u64(LoadU16(block + 2), 0x3030303030303030);
    const __m256i scales = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bits)));
    StoreScaled(scale, _mm256_sub_epi32(scales, _mm256_set1_epi32(32)),
                HalfToFloat(LoadU16(block)));
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
struct Decoder<TQ2_0> : Portable<TQ2_0> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    for (int half = 0; half < 2; ++half) {
      const __m256i pairs = LoadUnit(block + 32 * half);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i two = _mm256_and_si256(_mm256_srli_epi16(pairs, 2 * i), Bytes(3));
        StoreUnit(q + 128 * half + 32 * i, _mm256_sub_epi8(two, Bytes(1)));
      }
    }
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

// Scales of the sixteen groups of a block from bytes.
JM_HD void StoreScaled16(float* out, __m128i bytes, float factor) {
  StoreScaled(out, _mm256_cvtepi8_epi32(bytes), factor);
  StoreScaled(out + 8, _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)), factor);
}

template <>
struct Decoder<Q2_K> : Portable<Q2_K> {
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
    for (int half = 0; half < 2; ++half) {
      const __m256i pairs = LoadUnit(block + 32 + 32 * half);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int unit = 4 * half + i;
        // Four less where the third bit is clear.
        const __m256i clear = _mm256_andnot_si256(_mm256_srli_epi16(thirds, unit), Bytes(1));
        const __m256i low = _mm256_and_si256(_mm256_srli_epi16(pairs, 2 * i), Bytes(3));
        StoreUnit(q + 32 * unit, _mm256_sub_epi8(low, _mm256_slli_epi16(clear, 2)));
      }
    }
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

template <>
struct Decoder<Q4_K> : Portable<Q4_K> {
  static JM_HD void Groups(const uint8_t* block, float* scale, float* offset) {
    StoreSixBitGroups(block, scale, offset);
  }
};

template <>
struct Decoder<Q5_K> : Portable<Q5_K> {
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

// Sixteen scales d * (0.5 + nibble) / 4 from eight bytes.
JM_HD void Iq2Groups(const uint8_t* nibbles, float d, float* scale) {
  const __m128i pairs =
      _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(nibbles)));
  const __m128i bytes =
      _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
  for (int half = 0; half < 2; ++half) {
    const __m128i part = half == 0 ? bytes : _mm_srli_si128(bytes, 8);
    const __m256 s = _mm256_add_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(part)),
                                   _mm256_set1_ps(0.5f));
    _mm256_storeu_ps(scale + 8 * half,
                     _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(d), s), _mm256_set1_ps(0.25f)));
  }
}

template <>
struct Decoder<IQ2_XXS> : Portable<IQ2_XXS> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EightTimes([&](int unit) {
      const uint8_t* code = block + 2 + 8 * unit;
      const __m256i v = Words64(Iq2XxsCodeword(code[0]), Iq2XxsCodeword(code[1]),
                                Iq2XxsCodeword(code[2]), Iq2XxsCodeword(code[3]));
      const uint32_t sevens = _pdep_u32(LoadU32(code + 4), 0x7f7f7f7f);
      StoreUnit(q + 32 * unit, WithSigns(v, CompleteSigns(sevens)));
    });
  }
};

template <>
struct Decoder<IQ2_XS> : Portable<IQ2_XS> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EightTimes([&](int unit) {
      const uint64_t codes = LoadU64(block + 2 + 8 * unit);
      const __m256i v = Words64(Iq2XsCodeword(codes & 511), Iq2XsCodeword(codes >> 16 & 511),
                                Iq2XsCodeword(codes >> 32 & 511), Iq2XsCodeword(codes >> 48 & 511));
      const uint32_t packed = static_cast<uint32_t>(_pext_u64(codes, 0xfe00fe00fe00fe00));
      StoreUnit(q + 32 * unit, WithSigns(v, CompleteSigns(_pdep_u32(packed, 0x7f7f7f7f))));
    });
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    Iq2Groups(block + 66, HalfToFloat(LoadU16(block)), scale);
  }
};

template <>
struct Decoder<IQ2_S> : Portable<IQ2_S> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EightTimes([&](int unit) {
      const uint64_t index = _pdep_u64(LoadU32(block + 2 + 4 * unit), 0x00ff00ff00ff00ff) |
                             _pdep_u64(block[66 + unit], 0x0300030003000300);
      const __m256i v = Words64(Iq2SCodeword(index & 1023), Iq2SCodeword(index >> 16 & 1023),
                                Iq2SCodeword(index >> 32 & 1023), Iq2SCodeword(index >> 48));
      StoreUnit(q + 32 * unit, WithSigns(v, LoadU32(block + 34 + 4 * unit)));
    });
  }
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    Iq2Groups(block + 74, HalfToFloat(LoadU16(block)), scale);
  }
};

template <>
struct Decoder<IQ3_XXS> : Portable<IQ3_XXS> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EightTimes([&](int unit) {
      const uint8_t* c = block + 2 + 8 * unit;
      const auto word = [&](int j) { return static_cast<int>(Iq3XxsCodeword(c[j])); };
      const __m256i v = _mm256_setr_epi32(word(0), word(1), word(2), word(3), word(4), word(5),
                                          word(6), word(7));
      const uint32_t sevens = _pdep_u32(LoadU32(block + 66 + 4 * unit), 0x7f7f7f7f);
      StoreUnit(q + 32 * unit, WithSigns(v, CompleteSigns(sevens)));
    });
  }
};

template <>
struct Decoder<IQ3_S> : Portable<IQ3_S> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EightTimes([&](int unit) {
      const uint8_t* c = block + 2 + 8 * unit;
      const uint64_t ninth = _pdep_u64(block[66 + unit], 0x0101010101010101);
      const auto word = [&](int j) {
        return static_cast<int>(Iq3SCodeword(c[j] | (ninth >> 8 * j & 1) << 8));
      };
      const __m256i v = _mm256_setr_epi32(word(0), word(1), word(2), word(3), word(4), word(5),
                                          word(6), word(7));
      StoreUnit(q + 32 * unit, WithSigns(v, LoadU32(block + 74 + 4 * unit)));
    });
  }
};

// Four codewords of eight weights, two bits in a nibble each; less: 7 or 9 in every byte.
JM_HD __m256i Iq1Unit(uint64_t index, __m256i less) {
  const __m128i words = _mm_setr_epi32(
      static_cast<int>(Iq1Codeword(index & 2047)), static_cast<int>(Iq1Codeword(index >> 16 & 2047)),
      static_cast<int>(Iq1Codeword(index >> 32 & 2047)), static_cast<int>(Iq1Codeword(index >> 48)));
  const __m256i wide = _mm256_cvtepu32_epi64(words);
  // Low nibbles times 8 in the lower word, high nibbles times 8 in the upper one.
  const __m256i both = _mm256_or_si256(_mm256_slli_epi64(wide, 3), _mm256_slli_epi64(wide, 31));
  return _mm256_sub_epi8(_mm256_and_si256(both, Bytes(0x18)), less);
}

template <>
struct Decoder<IQ1_S> : Portable<IQ1_S> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EightTimes([&](int unit) {
      const uint32_t high = LoadU16(block + 34 + 2 * unit);
      const uint64_t index = _pdep_u64(LoadU32(block + 2 + 4 * unit), 0x00ff00ff00ff00ff) |
                             _pdep_u64(high, 0x0700070007000700);
      StoreUnit(q + 32 * unit, Iq1Unit(index, Bytes(high >> 15 ? 9 : 7)));
    });
  }
};

template <>
struct Decoder<IQ1_M> : Portable<IQ1_M> {
  static JM_HD void Units(const uint8_t* block, int8_t* q) {
    EightTimes([&](int unit) {
      const uint32_t high = LoadU16(block + 32 + 2 * unit);
      const uint64_t index =
          _pdep_u64(LoadU32(block + 4 * unit), 0x00ff00ff00ff00ff) |
          (_pdep_u64(high, 0x0f000f000f000f00) & 0x0700070007000700);
      const __m256i bit = _mm256_setr_epi64x(0x8, 0x80, 0x800, 0x8000);
      const __m256i set =
          _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(high), bit), bit);
      const __m256i less = _mm256_xor_si256(_mm256_and_si256(set, Bytes(9 ^ 7)), Bytes(7));
      StoreUnit(q + 32 * unit, Iq1Unit(index, less));
    });
  }
};

#endif  // __AVX2__

}  // namespace
}  // namespace jax_moe::cpu
