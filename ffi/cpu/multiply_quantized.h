// Decoded weights times q8_1 rows: integer dot products of a group, scaled and summed in float32.
#pragma once

#include "ffi/cpu/kernels.h"
#include "ffi/cpu/simd.h"

namespace jax_moe::cpu {
namespace {

#if defined(__AVX512VNNI__)

// The scales or offsets of 256 weights; with groups of 32 the upper lanes are zero.
template <int kGroup>
JM_HD __m512 LoadGroups(const float* p) {
  if constexpr (kGroup == 16) return _mm512_loadu_ps(p);
  return _mm512_zextps256_ps512(_mm256_loadu_ps(p));
}

// A tile of kRows weight rows by kTokens quantised rows, 64 weights a step. Several at once keep enough
// independent sums in flight to hide the latency of a multiply-add.
template <int kGroup, bool kOffset, int kRows, int kTokens>
void QuantizedTile(const MultiplyArgs& args, int first_row, int first_token) {
  const Panel& panel = *args.panel;
  const __m512i flip = _mm512_set1_epi8(-128);
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  // Lane i of step j holds the products of weights 64 j + 4 i .. 64 j + 4 i + 3.
  const __m512i lane_group = _mm512_srli_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), kGroup == 16 ? 2 : 3);
  const int8_t* xq[kTokens];
  const int32_t* bias[kTokens];
  const float *d[kTokens], *group_sum[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    const QuantizedRow row(args.x[first_token + t], args.k);
    xq[t] = row.q + args.begin;
    bias[t] = row.bias4 + args.begin / 4;
    d[t] = row.d + args.begin / 32;
    group_sum[t] = kGroup == 16 ? row.sum16 + args.begin / 16 : row.sum32 + args.begin / 32;
  }
  __m512 sum[kRows][kTokens], offset_sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) sum[r][t] = offset_sum[r][t] = _mm512_setzero_ps();
  }
  for (int i = 0; i < args.count; i += 256) {
    __m512 scaled[kRows][kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      __m512 dt = _mm512_castps256_ps512(_mm256_loadu_ps(d[t] + i / 32));
      if constexpr (kGroup == 16) dt = _mm512_permutexvar_ps(twice, dt);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        scaled[r][t] = _mm512_mul_ps(LoadGroups<kGroup>(panel.scale[first_row + r] + i / kGroup), dt);
      }
      if constexpr (kOffset) {
        const __m512 sums = LoadGroups<kGroup>(group_sum[t] + i / kGroup);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          offset_sum[r][t] =
              _mm512_fmadd_ps(LoadGroups<kGroup>(panel.offset[first_row + r] + i / kGroup), sums,
                              offset_sum[r][t]);
        }
      }
    }
    const auto step = [&](int j) __attribute__((always_inline)) {
      const __m512i group = _mm512_add_epi32(lane_group, _mm512_set1_epi32(64 / kGroup * j));
      __m512i w[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        w[r] = _mm512_xor_si512(_mm512_loadu_si512(panel.q[first_row + r] + i + 64 * j), flip);
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m512i x = _mm512_loadu_si512(xq[t] + i + 64 * j);
        const __m512i start = _mm512_loadu_si512(bias[t] + i / 4 + 16 * j);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i dot = _mm512_dpbusd_epi32(start, w[r], x);
          sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot),
                                      _mm512_permutexvar_ps(group, scaled[r][t]), sum[r][t]);
        }
      }
    };
    if (args.count - i >= 256) {
      step(0), step(1), step(2), step(3);
    } else {
      for (int j = 0; j < (args.count - i + 63) / 64; ++j) step(j);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    Vec total[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      total[r] = Vec(kOffset ? _mm512_add_ps(sum[r][t], offset_sum[r][t]) : sum[r][t]);
    }
    float* out = args.sums + (first_token + t) * kPanelRows + first_row;
    if constexpr (kRows == 4) {
      AddSums(total, out);
    } else {
      for (int r = 0; r < kRows; ++r) out[r] += Sum(total[r]);
    }
  }
}

// 16 x 16 words, transposed: to[j][i] = from[i][j], shifted to unsigned bytes.
inline void TransposeFlipped(const int8_t (*from)[kChunk], int column,
                             int32_t (*to)[kPanelRows]) {
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    a[i] = _mm512_xor_si512(_mm512_loadu_si512(from[i] + column), flip);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Now lane l of a[4 m + c] holds column 4 l + c of rows 4 m .. 4 m + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    b[c] = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
    b[4 + c] = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    b[8 + c] = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    b[12 + c] = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm512_storeu_si512(to[c], _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88));
    _mm512_storeu_si512(to[8 + c], _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd));
    _mm512_storeu_si512(to[4 + c], _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88));
    _mm512_storeu_si512(to[12 + c], _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd));
  }
}

template <int kGroup, bool kOffset>
void PackColumns(const MultiplyArgs& args) {
  Panel& panel = *args.panel;
  for (int i = 0; i < args.count; i += 64) TransposeFlipped(panel.q, i, panel.columns + i / 4);
  for (int g = 0; g < args.count / kGroup; ++g) {
    for (int r = 0; r < kPanelRows; ++r) {
      panel.column_scale[g][r] = panel.scale[r][g];
      if constexpr (kOffset) panel.column_offset[g][r] = panel.offset[r][g];
    }
  }
}

// kTokens quantised rows against the packed panel: a lane is a weight row.
template <int kGroup, bool kOffset, int kTokens>
void ColumnTile(const MultiplyArgs& args, int first_token) {
  const Panel& panel = *args.panel;
  const int8_t* xq[kTokens];
  const int32_t* bias[kTokens];
  const float *d[kTokens], *group_sum[kTokens];
  __m512 sum[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    const QuantizedRow row(args.x[first_token + t], args.k);
    xq[t] = row.q + args.begin;
    bias[t] = kGroup == 16 ? row.bias16 + args.begin / 16 : row.bias32 + args.begin / 32;
    d[t] = row.d + args.begin / 32;
    group_sum[t] = kGroup == 16 ? row.sum16 + args.begin / 16 : row.sum32 + args.begin / 32;
    sum[t] = _mm512_loadu_ps(args.sums + (first_token + t) * kPanelRows);
  }
  for (int g = 0; g < args.count / kGroup; ++g) {
    __m512i dot[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) dot[t] = _mm512_set1_epi32(bias[t][g]);
#pragma GCC unroll 8
    for (int j = 0; j < kGroup / 4; ++j) {
      const __m512i w = _mm512_load_si512(panel.columns[g * kGroup / 4 + j]);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        int32_t x;
        std::memcpy(&x, xq[t] + g * kGroup + 4 * j, 4);
        dot[t] = _mm512_dpbusd_epi32(dot[t], w, _mm512_set1_epi32(x));
      }
    }
    const __m512 scale = _mm512_load_ps(panel.column_scale[g]);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const __m512 scaled = _mm512_mul_ps(scale, _mm512_set1_ps(d[t][g * kGroup / 32]));
      sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t]), scaled, sum[t]);
    }
    if constexpr (kOffset) {
      const __m512 offset = _mm512_load_ps(panel.column_offset[g]);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        sum[t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(group_sum[t][g]), sum[t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) _mm512_storeu_ps(args.sums + (first_token + t) * kPanelRows, sum[t]);
}

#else

// The products of 32 weights with 32 activations, summed by fours: exact.
#if defined(__AVX2__)
JM_HD Vec Dot32(const int8_t* w, const int8_t* x) {
  const __m256i wv = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m256i xv = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  // |w| <= 128 and |x| <= 127: two products fit 16 bits.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(wv), _mm256_sign_epi8(xv, wv));
  return Vec(_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}
#endif

template <int kGroup, bool kOffset, int kRows, int kTokens>
void QuantizedTile(const MultiplyArgs& args, int first_row, int first_token) {
  const Panel& panel = *args.panel;
  constexpr int kHalves = 32 / kGroup;
  const int8_t* xq[kTokens];
  const float *d[kTokens], *group_sum[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    const QuantizedRow row(args.x[first_token + t], args.k);
    xq[t] = row.q + args.begin;
    d[t] = row.d + args.begin / 32;
    group_sum[t] = kGroup == 16 ? row.sum16 + args.begin / 16 : row.sum32 + args.begin / 32;
  }
#if defined(__AVX2__)
  Vec sum[kRows][kTokens] = {};
#else
  float sum[kRows][kTokens] = {};
#endif
  float offset_sum[kRows][kTokens] = {};
  for (int u = 0; u < args.count / 32; ++u) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int8_t* q = panel.q[first_row + r] + 32 * u;
      const float* scale = panel.scale[first_row + r] + kHalves * u;
      const float* offset = panel.offset[first_row + r] + kHalves * u;
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const float low = scale[0] * d[t][u];
        const float high = scale[kHalves - 1] * d[t][u];
#if defined(__AVX2__)
        sum[r][t] += Dot32(q, xq[t] + 32 * u) *
                     Vec(_mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low)));
#else
        int dot[2] = {};
        for (int h = 0; h < 2; ++h) {
          for (int i = 16 * h; i < 16 * h + 16; ++i) dot[h] += q[i] * xq[t][32 * u + i];
        }
        sum[r][t] += low * static_cast<float>(dot[0]) + high * static_cast<float>(dot[1]);
#endif
        if constexpr (kOffset) {
          for (int h = 0; h < kHalves; ++h) {
            offset_sum[r][t] += offset[h] * group_sum[t][kHalves * u + h];
          }
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) {
#if defined(__AVX2__)
      const float total = Sum(sum[r][t]);
#else
      const float total = sum[r][t];
#endif
      args.sums[(first_token + t) * kPanelRows + first_row + r] += total + offset_sum[r][t];
    }
  }
}

#endif

template <int kGroup, bool kOffset>
void MultiplyQuantizedGroups(const MultiplyArgs& args) {
  int t = 0;
#if defined(__AVX512VNNI__)
  if (args.tokens >= 4) {
    PackColumns<kGroup, kOffset>(args);
    for (; t + 8 <= args.tokens; t += 8) ColumnTile<kGroup, kOffset, 8>(args, t);
    for (; t + 4 <= args.tokens; t += 4) ColumnTile<kGroup, kOffset, 4>(args, t);
    for (; t < args.tokens; ++t) ColumnTile<kGroup, kOffset, 1>(args, t);
    return;
  }
#endif
  // Rows beyond args.rows hold stale values; their sums are never read.
  for (; t + 2 <= args.tokens; t += 2) {
    for (int r = 0; r < args.rows; r += 2) QuantizedTile<kGroup, kOffset, 2, 2>(args, r, t);
  }
  for (; t < args.tokens; ++t) {
    for (int r = 0; r < args.rows; r += 4) QuantizedTile<kGroup, kOffset, 4, 1>(args, r, t);
  }
}

void MultiplyQuantized(const MultiplyArgs& args) {
  const Format& format = *args.format;
  if (format.group == 16) {
    format.has_offset ? MultiplyQuantizedGroups<16, true>(args)
                      : MultiplyQuantizedGroups<16, false>(args);
  } else {
    format.has_offset ? MultiplyQuantizedGroups<32, true>(args)
                      : MultiplyQuantizedGroups<32, false>(args);
  }
}

}  // namespace
}  // namespace jax_moe::cpu
