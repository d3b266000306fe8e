// The tiles of multiply_quantized.h for AVX-512 with VNNI, which multiplies unsigned by signed
// bytes: weights are shifted by 128, and sums of activations take the shift out again.
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

// The activations' scales of 256 weights, one for every group of the weights.
template <int kGroup>
JM_HD __m512 LoadActivationScales(const float* d) {
  const __m512 scales = _mm512_zextps256_ps512(_mm256_loadu_ps(d));
  if constexpr (kGroup == 32) return scales;
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(twice, scales);
}

// Of 256 weights, lane i of step j holds the products of 64 j + 4 i .. 64 j + 4 i + 3: its group.
template <int kGroup>
JM_HD __m512i GroupOfLane(int j) {
  const __m512i lane =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i group = _mm512_srli_epi32(lane, kGroup == 16 ? 2 : 3);
  return _mm512_add_epi32(group, _mm512_set1_epi32(64 / kGroup * j));
}

// A tile of kRows weight rows by kTokens quantised rows, 64 weights a step. Several at once keep
// enough independent sums in flight to hide the latency of a multiply-add.
template <int kGroup, bool kOffset, int kRows, int kTokens>
void QuantizedTile(const MultiplyArgs& args, int first_row, int first_token) {
  const Panel& panel = *args.panel;
  const __m512i flip = _mm512_set1_epi8(-128);
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
      const __m512 dt = LoadActivationScales<kGroup>(d[t] + i / 32);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const float* scale = panel.scale[first_row + r] + i / kGroup;
        scaled[r][t] = _mm512_mul_ps(LoadGroups<kGroup>(scale), dt);
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
      const __m512i group = GroupOfLane<kGroup>(j);
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
  for (int t = 0; t < kTokens; ++t) {
    _mm512_storeu_ps(args.sums + (first_token + t) * kPanelRows, sum[t]);
  }
}

#endif  // __AVX512VNNI__

}  // namespace
}  // namespace jax_moe::cpu
