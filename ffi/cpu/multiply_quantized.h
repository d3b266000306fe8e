// Decoded weights times q8_1 rows: integer dot products of a group, scaled and summed in float32.
#pragma once

#include "ffi/cpu/kernels.h"
#include "ffi/cpu/simd.h"

namespace jax_moe::cpu {
namespace {

#if defined(__AVX512VNNI__)

// Copies scales or offsets of 256 weights to the 16 lanes of a register.
template <int kGroup>
JM_HD __m512 LoadGroups(const float* p) {
  if constexpr (kGroup == 16) return _mm512_loadu_ps(p);
  return _mm512_castps256_ps512(_mm256_loadu_ps(p));
}

// kTokens quantised rows against one weight row, 64 weights a step.
template <int kGroup, bool kOffset, int kTokens>
void DotQuantized(const MultiplyArgs& args, int r, int first_token) {
  const int8_t* q = args.panel->q[r];
  const float* scales = args.panel->scale[r];
  const float* offsets = args.panel->offset[r];
  const __m512i flip = _mm512_set1_epi8(-128);
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  // Lane i of step j holds the products of weights 64 j + 4 i .. 64 j + 4 i + 3.
  __m512i lane_group = _mm512_srli_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), kGroup == 16 ? 2 : 3);
  __m512i step_group[4];
  for (int j = 0; j < 4; ++j) {
    step_group[j] = _mm512_add_epi32(lane_group, _mm512_set1_epi32(64 / kGroup * j));
  }
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
  __m512 sum[kTokens], offset_sum[kTokens];
  for (int t = 0; t < kTokens; ++t) sum[t] = offset_sum[t] = _mm512_setzero_ps();
  for (int i = 0; i < args.count; i += 256) {
    const __m512 scale = LoadGroups<kGroup>(scales + i / kGroup);
    __m512 scaled[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      __m512 dt = _mm512_castps256_ps512(_mm256_loadu_ps(d[t] + i / 32));
      if constexpr (kGroup == 16) dt = _mm512_permutexvar_ps(twice, dt);
      scaled[t] = _mm512_mul_ps(scale, dt);
    }
    if constexpr (kOffset) {
      const __m512 offset = LoadGroups<kGroup>(offsets + i / kGroup);
      for (int t = 0; t < kTokens; ++t) {
        offset_sum[t] = _mm512_fmadd_ps(
            offset, LoadGroups<kGroup>(group_sum[t] + i / kGroup), offset_sum[t]);
      }
    }
    const int steps = args.count - i >= 256 ? 4 : (args.count - i + 63) / 64;
#pragma GCC unroll 4
    for (int j = 0; j < steps; ++j) {
      const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(q + i + 64 * j), flip);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_loadu_si512(bias[t] + i / 4 + 16 * j), w,
                                                _mm512_loadu_si512(xq[t] + i + 64 * j));
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot),
                                 _mm512_permutexvar_ps(step_group[j], scaled[t]), sum[t]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    // With groups of 32 the upper half of offset_sum is what the cast left there.
    float total = _mm512_reduce_add_ps(sum[t]);
    if constexpr (kOffset) {
      total += kGroup == 16 ? _mm512_reduce_add_ps(offset_sum[t])
                            : _mm512_mask_reduce_add_ps(0x00ff, offset_sum[t]);
    }
    args.sums[(first_token + t) * kPanelRows + r] += total;
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

template <int kGroup, bool kOffset, int kTokens>
void DotQuantized(const MultiplyArgs& args, int r, int first_token) {
  const int8_t* q = args.panel->q[r];
  const float* scale = args.panel->scale[r];
  const float* offset = args.panel->offset[r];
  constexpr int kHalves = 32 / kGroup;
  for (int t = 0; t < kTokens; ++t) {
    const QuantizedRow row(args.x[first_token + t], args.k);
    const int8_t* xq = row.q + args.begin;
    const float* d = row.d + args.begin / 32;
    const float* group_sum =
        kGroup == 16 ? row.sum16 + args.begin / 16 : row.sum32 + args.begin / 32;
    float offset_sum = 0.0f;
#if defined(__AVX2__)
    Vec sum = {};
#else
    float sum = 0.0f;
#endif
    for (int u = 0; u < args.count / 32; ++u) {
      const float low = scale[kHalves * u] * d[u];
      const float high = scale[kHalves * u + kHalves - 1] * d[u];
#if defined(__AVX2__)
      sum += Dot32(q + 32 * u, xq + 32 * u) *
             Vec(_mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low)));
#else
      int dot[2] = {};
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 16; ++i) dot[h] += q[32 * u + 16 * h + i] * xq[32 * u + 16 * h + i];
      }
      sum += low * static_cast<float>(dot[0]) + high * static_cast<float>(dot[1]);
#endif
    }
    if constexpr (kOffset) {
      for (int g = 0; g < args.count / kGroup; ++g) offset_sum += offset[g] * group_sum[g];
    }
#if defined(__AVX2__)
    args.sums[(first_token + t) * kPanelRows + r] += Sum(sum) + offset_sum;
#else
    args.sums[(first_token + t) * kPanelRows + r] += sum + offset_sum;
#endif
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
  for (; t + 2 <= args.tokens; t += 2) {
    for (int r = 0; r < args.rows; ++r) DotQuantized<kGroup, kOffset, 2>(args, r, t);
  }
  for (; t < args.tokens; ++t) {
    for (int r = 0; r < args.rows; ++r) DotQuantized<kGroup, kOffset, 1>(args, r, t);
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
