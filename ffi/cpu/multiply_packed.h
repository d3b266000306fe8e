// Packed weight rows times activation rows in one pass, for few tokens: the decoded weights never
// leave the registers. AVX-512 only, and only for the formats that models use most; all others go
// through a Panel, and so do these for many tokens. The integers, scales and offsets are the
// decoders'.
#pragma once

#include "ffi/cpu/decode_simd.h"
#include "ffi/cpu/decode_simd_k.h"
#include "ffi/cpu/kernels.h"
#include "ffi/cpu/multiply_quantized.h"
#include "ffi/cpu/simd.h"

namespace jax_moe::cpu {
namespace {

// A member of PackedBlock<F> works on 256 weights, kBytes bytes:
//   kBiased            Weights are shifted by 128; else they are not negative as they are.
//   Groups(p, s, o)    scales and offsets, 256 / kGroup lanes, zero above.
//   Weights(p, j)      weights 64 j .. 64 j + 63 as unsigned bytes.
template <typename F>
struct PackedBlock {
  static constexpr bool kAvailable = false;
};

#if defined(__AVX512VNNI__)

JM_HD __m512i Bytes512(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// 32-bit lanes: `low` in the lower half of a register, `high` in the upper.
JM_HD __m512i Halves(int low, int high) {
  return _mm512_inserti64x4(_mm512_set1_epi32(low), _mm256_set1_epi32(high), 1);
}

JM_HD __m512i BothHalves(const uint8_t* p) { return _mm512_broadcast_i64x4(LoadUnit(p)); }

JM_HD __m512i OrMasked(__m512i a, __m512i b, __m512i mask) {
  return _mm512_ternarylogic_epi32(a, b, mask, 0xf8);  // a | (b & mask)
}

template <>
struct PackedBlock<Q4_K> {
  static constexpr bool kAvailable = true, kBiased = false;
  static constexpr int kBytes = Q4_K::kBytes;
  static JM_HD void Groups(const uint8_t* block, __m512* scale, __m512* offset) {
    __m256 s, o;
    SixBitGroups(block, &s, &o);
    *scale = _mm512_zextps256_ps512(s);
    *offset = _mm512_zextps256_ps512(o);
  }
  static JM_HD __m512i Weights(const uint8_t* block, int j) {
    const __m512i nibbles = _mm512_srlv_epi32(BothHalves(block + 16 + 32 * j), Halves(0, 4));
    return _mm512_and_si512(nibbles, Bytes512(15));
  }
};

template <>
struct PackedBlock<Q5_K> {
  static constexpr bool kAvailable = true, kBiased = false;
  static constexpr int kBytes = Q5_K::kBytes;
  static JM_HD void Groups(const uint8_t* block, __m512* scale, __m512* offset) {
    PackedBlock<Q4_K>::Groups(block, scale, offset);
  }
  static JM_HD __m512i Weights(const uint8_t* block, int j) {
    const __m512i nibbles = _mm512_and_si512(
        _mm512_srlv_epi32(BothHalves(block + 48 + 32 * j), Halves(0, 4)), Bytes512(15));
    // Rotates bit 2 j and bit 2 j + 1 of every byte to bit 4.
    const __m512i fifths =
        _mm512_rolv_epi32(BothHalves(block + 16), Halves(4 - 2 * j, 3 - 2 * j));
    return OrMasked(nibbles, fifths, Bytes512(16));
  }
};

template <>
struct PackedBlock<Q6_K> {
  static constexpr bool kAvailable = true, kBiased = true;
  static constexpr int kBytes = Q6_K::kBytes;
  static JM_HD void Groups(const uint8_t* block, __m512* scale, __m512*) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 192));
    *scale = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)),
                           _mm512_set1_ps(HalfToFloat(LoadU16(block + 208))));
  }
  static JM_HD __m512i Weights(const uint8_t* block, int j) {
    const __m512i nibbles = _mm512_loadu_si512(block + 64 * (j / 2));
    const __m512i low =
        _mm512_and_si512(j % 2 == 0 ? nibbles : _mm512_srli_epi16(nibbles, 4), Bytes512(15));
    const __m512i top = _mm512_rolv_epi32(BothHalves(block + 128 + 32 * (j / 2)),
                                          j % 2 == 0 ? Halves(4, 2) : Halves(0, -2));
    return _mm512_add_epi8(OrMasked(low, top, Bytes512(0x30)), Bytes512(128 - 32));
  }
};

template <>
struct PackedBlock<Q8_0> {
  static constexpr bool kAvailable = true, kBiased = true;
  static constexpr int kBytes = 8 * Q8_0::kBytes;
  static JM_HD void Groups(const uint8_t* blocks, __m512* scale, __m512*) {
    __m128i halves = _mm_setzero_si128();
    halves = _mm_insert_epi16(halves, static_cast<int>(LoadU16(blocks)), 0);
    halves = _mm_insert_epi16(halves, static_cast<int>(LoadU16(blocks + 34)), 1);
    halves = _mm_insert_epi16(halves, static_cast<int>(LoadU16(blocks + 68)), 2);
    halves = _mm_insert_epi16(halves, static_cast<int>(LoadU16(blocks + 102)), 3);
    halves = _mm_insert_epi16(halves, static_cast<int>(LoadU16(blocks + 136)), 4);
    halves = _mm_insert_epi16(halves, static_cast<int>(LoadU16(blocks + 170)), 5);
    halves = _mm_insert_epi16(halves, static_cast<int>(LoadU16(blocks + 204)), 6);
    halves = _mm_insert_epi16(halves, static_cast<int>(LoadU16(blocks + 238)), 7);
    *scale = _mm512_zextps256_ps512(_mm256_cvtph_ps(halves));
  }
  static JM_HD __m512i Weights(const uint8_t* blocks, int j) {
    const uint8_t* p = blocks + 68 * j + 2;
    const __m512i both =
        _mm512_inserti64x4(_mm512_castsi256_si512(LoadUnit(p)), LoadUnit(p + 34), 1);
    return _mm512_xor_si512(both, Bytes512(128));
  }
};

template <>
struct PackedBlock<MXFP4> {
  static constexpr bool kAvailable = true, kBiased = true;
  static constexpr int kBytes = 8 * MXFP4::kBytes;
  static JM_HD void Groups(const uint8_t* blocks, __m512* scale, __m512*) {
    uint64_t exponents = 0;
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) exponents |= static_cast<uint64_t>(blocks[17 * b]) << 8 * b;
    const __m256i e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(exponents)));
    const __m256i one = _mm256_set1_epi32(1);
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, one), 23);
    const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    const __m256i bits = _mm256_blendv_epi8(subnormal, normal, _mm256_cmpgt_epi32(e, one));
    *scale = _mm512_zextps256_ps512(_mm256_castsi256_ps(bits));
  }
  static JM_HD __m512i Weights(const uint8_t* blocks, int j) {
    const uint8_t* p = blocks + 34 * j + 1;
    const __m512i index =
        _mm512_inserti64x4(_mm512_castsi256_si512(Nibbles(p)), Nibbles(p + 17), 1);
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(DoubledE2M1().word));
    return _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(_mm_xor_si128(table, _mm_set1_epi8(-128))), index);
  }
};

// kTokens quantised rows by at most four packed rows, row_bytes apart.
template <typename F, int kTokens>
void PackedTile(const uint8_t* data, int64_t row_bytes, const MultiplyArgs& args, int first_row) {
  using Block = PackedBlock<F>;
  constexpr int kGroup = F::kGroup;
  const int64_t blocks = args.k / 256;
  Vec total[kTokens][4] = {};
  for (int r = 0; r < 4 && first_row + r < args.rows; ++r) {
    const uint8_t* block = data + (first_row + r) * row_bytes;
    __m512 sum[kTokens][2], offset_sum[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      sum[t][0] = sum[t][1] = offset_sum[t] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < blocks; ++b, block += Block::kBytes) {
#pragma GCC unroll 5
      for (int line = 0; line < Block::kBytes; line += 64) __builtin_prefetch(block + 4096 + line);
      __m512 scale, offset;
      Block::Groups(block, &scale, &offset);
      __m512 scaled[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const QuantizedRow row(args.x[t], args.k);
        scaled[t] = _mm512_mul_ps(scale, LoadActivationScales<kGroup>(row.d + 8 * b));
        if constexpr (F::kHasOffset) {
          const float* sums = kGroup == 16 ? row.sum16 + 16 * b : row.sum32 + 8 * b;
          offset_sum[t] = _mm512_fmadd_ps(offset, LoadGroups<kGroup>(sums), offset_sum[t]);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i w = Block::Weights(block, j);
        const __m512i group = GroupOfLane<kGroup>(j);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const QuantizedRow row(args.x[t], args.k);
          const __m512i start = Block::kBiased ? _mm512_loadu_si512(row.bias4 + 64 * b + 16 * j)
                                               : _mm512_setzero_si512();
          const __m512i dot =
              _mm512_dpbusd_epi32(start, w, _mm512_loadu_si512(row.q + 256 * b + 64 * j));
          sum[t][j % 2] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot),
                                          _mm512_permutexvar_ps(group, scaled[t]), sum[t][j % 2]);
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      total[t][r] = Vec(_mm512_add_ps(_mm512_add_ps(sum[t][0], sum[t][1]), offset_sum[t]));
    }
  }
  for (int t = 0; t < kTokens; ++t) AddSums(total[t], args.sums + t * kPanelRows + first_row);
}

template <typename F>
void MultiplyPacked(const uint8_t* data, int64_t row_bytes, const MultiplyArgs& args) {
  for (int r = 0; r < args.rows; r += 4) {
    switch (args.tokens) {
      case 1: PackedTile<F, 1>(data, row_bytes, args, r); break;
      case 2: PackedTile<F, 2>(data, row_bytes, args, r); break;
      default: PackedTile<F, 3>(data, row_bytes, args, r); break;
    }
  }
}

// Byte n of word i of 64 weights is weight 4 i + n. It is cheapest to make a float where it stands,
// as a multiple of 256^n: out[n][i] = x[4 i + n] / 256^n takes that out again, exactly. The last
// byte is shifted down, because its place holds the sign.
inline void SpreadForBytes(const float* x, int64_t count, float* out) {
  const __m512i in_order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t i = 0; i < count; i += 64) {
    __m512 a[4], b[4];
    for (int m = 0; m < 4; ++m) a[m] = _mm512_loadu_ps(x + i + 16 * m);
    // Four by four transpositions in every 128-bit lane.
    b[0] = _mm512_unpacklo_ps(a[0], a[1]);
    b[1] = _mm512_unpackhi_ps(a[0], a[1]);
    b[2] = _mm512_unpacklo_ps(a[2], a[3]);
    b[3] = _mm512_unpackhi_ps(a[2], a[3]);
    a[0] = _mm512_shuffle_ps(b[0], b[2], 0x44);
    a[1] = _mm512_shuffle_ps(b[0], b[2], 0xee);
    a[2] = _mm512_shuffle_ps(b[1], b[3], 0x44);
    a[3] = _mm512_shuffle_ps(b[1], b[3], 0xee);
    const float unit[4] = {1.0f, 0x1p-8f, 0x1p-16f, 1.0f};
    for (int n = 0; n < 4; ++n) {
      _mm512_storeu_ps(out + i + 16 * n, _mm512_mul_ps(_mm512_permutexvar_ps(in_order, a[n]),
                                                       _mm512_set1_ps(unit[n])));
    }
  }
}

// One float row by packed rows.
template <typename F>
void MultiplyPackedFloat(const uint8_t* data, int64_t row_bytes, const MultiplyArgs& args) {
  using Block = PackedBlock<F>;
  constexpr int kGroup = F::kGroup;
  constexpr int64_t kMost = kPanelRows * kFloatChunk;
  float* spread = args.panel->values[0];
  const FloatRow row(args.x[0], args.k);
  const float* group_sum = kGroup == 16 ? row.sum16 : row.sum32;
  for (int64_t begin = 0; begin < args.k; begin += kMost) {
    const int64_t count = args.k - begin < kMost ? args.k - begin : kMost;
    SpreadForBytes(row.x + begin, count, spread);
    for (int first = 0; first < args.rows; first += 4) {
      Vec total[4] = {};
      for (int r = 0; r < 4 && first + r < args.rows; ++r) {
        const uint8_t* block = data + (first + r) * row_bytes + begin / 256 * Block::kBytes;
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        __m512 offset_sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 256, block += Block::kBytes) {
#pragma GCC unroll 5
          for (int line = 0; line < Block::kBytes; line += 64) {
            __builtin_prefetch(block + 4096 + line);
          }
          __m512 scale, offset;
          Block::Groups(block, &scale, &offset);
          if constexpr (F::kHasOffset) {
            const __m512 sums = LoadGroups<kGroup>(group_sum + (begin + i) / kGroup);
            offset_sum = _mm512_fmadd_ps(offset, sums, offset_sum);
          }
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const __m512i w = Block::Weights(block, j);
            __m512 part = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) {
              const __m512i byte = n == 3 ? _mm512_srli_epi32(w, 24)
                                          : _mm512_and_si512(w, _mm512_set1_epi32(255 << 8 * n));
              __m512 value = _mm512_cvtepi32_ps(byte);
              if constexpr (Block::kBiased) {
                value = _mm512_sub_ps(value, _mm512_set1_ps(n == 3 ? 128.0f : 128 << 8 * n));
              }
              part = _mm512_fmadd_ps(value, _mm512_loadu_ps(spread + i + 64 * j + 16 * n), part);
            }
            sum[j % 2] = _mm512_fmadd_ps(
                part, _mm512_permutexvar_ps(GroupOfLane<kGroup>(j), scale), sum[j % 2]);
          }
        }
        total[r] = Vec(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), offset_sum));
      }
      AddSums(total, args.sums + first);
    }
  }
}

#endif  // __AVX512VNNI__

// The functions for a format, or null.
template <typename F>
constexpr MultiplyPackedFn PackedFunction([[maybe_unused]] bool round) {
#if defined(__AVX512VNNI__)
  if constexpr (PackedBlock<F>::kAvailable) {
    return round ? MultiplyPacked<F> : MultiplyPackedFloat<F>;
  }
#endif
  return nullptr;
}

}  // namespace
}  // namespace jax_moe::cpu
