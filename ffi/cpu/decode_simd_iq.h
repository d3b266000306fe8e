// AVX2 decoders of the formats with codebooks. Bit deposit and extract gather the indices.
#pragma once

#include "ffi/cpu/decode_simd.h"

namespace jax_moe::cpu {
namespace {

#if defined(__AVX2__)

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

// Scales (2 n + 1) * factor of eight integers n.
JM_HD void StoreOddScales(float* out, __m256i n, float factor) {
  StoreScaled(out, _mm256_add_epi32(_mm256_add_epi32(n, n), _mm256_set1_epi32(1)), factor);
}

// Sixteen scales d * (0.5 + nibble) / 4 from eight bytes.
JM_HD void Iq2Groups(const uint8_t* nibbles, float d, float* scale) {
  const __m128i pairs =
      _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(nibbles)));
  const __m128i bytes =
      _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
  const __m128i odd = _mm_add_epi8(_mm_add_epi8(bytes, bytes), _mm_set1_epi8(1));
  StoreScaled16(scale, odd, d * 0.125f);
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
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    // The second word of every unit has the scale on top.
    const __m256i seconds = _mm256_castps_si256(
        _mm256_shuffle_ps(_mm256_castsi256_ps(LoadUnit(block + 2)),
                          _mm256_castsi256_ps(LoadUnit(block + 34)), 0xdd));
    const __m256i words = _mm256_permute4x64_epi64(seconds, 0xd8);
    StoreOddScales(scale, _mm256_srli_epi32(words, 28), HalfToFloat(LoadU16(block)) * 0.125f);
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
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    StoreOddScales(scale, _mm256_srli_epi32(LoadUnit(block + 66), 28),
                   HalfToFloat(LoadU16(block)) * 0.25f);
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
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    const uint64_t nibbles = _pdep_u64(LoadU32(block + 106), 0x0f0f0f0f0f0f0f0f);
    StoreOddScales(scale, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(nibbles))),
                   HalfToFloat(LoadU16(block)));
  }
};

// Four codewords of eight weights, two bits in a nibble each; less: 7 or 9 in every byte.
JM_HD __m256i Iq1Unit(uint64_t index, __m256i less) {
  const auto word = [&](int i) {
    return static_cast<int>(Iq1Codeword(static_cast<uint32_t>(index >> 16 * i & 2047)));
  };
  const __m128i words = _mm_setr_epi32(word(0), word(1), word(2), word(3));
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
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    const __m256i high = _mm256_cvtepu16_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 34)));
    const __m256i three = _mm256_and_si256(_mm256_srli_epi32(high, 12), _mm256_set1_epi32(7));
    StoreOddScales(scale, three, HalfToFloat(LoadU16(block)) * 0.125f);
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
  static JM_HD void Groups(const uint8_t* block, float* scale, float*) {
    const uint64_t words = LoadU64(block + 48);
    const uint32_t d = static_cast<uint32_t>(_pext_u64(words, 0xf000f000f000f000));
    const auto odd = [](uint32_t two) __attribute__((always_inline)) {
      const uint32_t fields = _pext_u32(two, 0x0fff0fff);
      return static_cast<int64_t>(_pdep_u64(fields, 0x0e0e0e0e0e0e0e0e) | 0x0101010101010101);
    };
    const __m128i bytes = _mm_set_epi64x(odd(static_cast<uint32_t>(words >> 32)),
                                         odd(static_cast<uint32_t>(words)));
    StoreScaled16(scale, bytes, HalfToFloat(d) * 0.125f);
  }
};

#endif  // __AVX2__

}  // namespace
}  // namespace jax_moe::cpu
