// Decoded weights times q8_1 rows by AVX2. The portable kernels are in multiply_quantized.h.
#pragma once

#include "ffi/cpu/kernels.h"
#include "ffi/cpu/rows.h"
#include "ffi/cpu/simd.h"

namespace jax_moe::cpu {
namespace {

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

// The products of 32 weights with 32 activations, summed by fours: exact.
JM_HD __m256 Dot32(__m256i w, __m256i x) {
  // |w| <= 128 and |x| <= 127: two products fit 16 bits.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// The activations' scales of 256 weights for eight groups of the weights, the 8 half-th ones.
template <int kGroup>
JM_HD __m256 LoadActivationScales(const float* d, int half) {
  const __m256 scales = _mm256_loadu_ps(d);
  if constexpr (kGroup == 32) return scales;
  const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return _mm256_permutevar8x32_ps(scales, _mm256_add_epi32(twice, _mm256_set1_epi32(4 * half)));
}

// What the lanes of Dot32 of unit u take of the scales of 256 weights.
template <int kGroup>
JM_HD __m256 ScalesOfUnit(const float* scaled, int u) {
  if constexpr (kGroup == 32) return _mm256_broadcast_ss(scaled + u);
  const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return _mm256_permutevar8x32_ps(_mm256_load_ps(scaled + 8 * (u / 4)),
                                  _mm256_add_epi32(lanes, _mm256_set1_epi32(2 * (u % 4))));
}

// A tile of kRows weight rows by kTokens quantised rows, 256 weights at a time.
template <int kGroup, bool kOffset, int kRows, int kTokens>
void QuantizedTile(const MultiplyArgs& args, int first_row, int first_token) {
  const Panel& panel = *args.panel;
  constexpr int kScales = 256 / kGroup;
  const QuantizedColumns<kGroup, kTokens> x(args, first_token);
  __m256 sum[kRows][kTokens], offset_sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) sum[r][t] = offset_sum[r][t] = _mm256_setzero_ps();
  }
  for (int i = 0; i < args.count; i += 256) {
    alignas(32) float scaled[kRows][kTokens][kScales];
#pragma GCC unroll 2
    for (int g = 0; g < kScales; g += 8) {
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m256 dt = LoadActivationScales<kGroup>(x.d[t] + i / 32, g / 8);
        const __m256 sums = _mm256_loadu_ps(x.sum[t] + i / kGroup + g);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const int at = i / kGroup + g;
          _mm256_store_ps(scaled[r][t] + g,
                          _mm256_mul_ps(_mm256_loadu_ps(panel.scale[first_row + r] + at), dt));
          if constexpr (kOffset) {
            offset_sum[r][t] = _mm256_fmadd_ps(
                _mm256_loadu_ps(panel.offset[first_row + r] + at), sums, offset_sum[r][t]);
          }
        }
      }
    }
    const auto unit = [&](int u) __attribute__((always_inline)) {
      __m256i xs[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        xs[t] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.q[t] + i + 32 * u));
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256i w = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(panel.q[first_row + r] + i + 32 * u));
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          sum[r][t] = _mm256_fmadd_ps(Dot32(w, xs[t]), ScalesOfUnit<kGroup>(scaled[r][t], u),
                                      sum[r][t]);
        }
      }
    };
    if (args.count - i >= 256) {
#pragma GCC unroll 8
      for (int u = 0; u < 8; ++u) unit(u);
    } else {
      for (int u = 0; u < (args.count - i) / 32; ++u) unit(u);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float* sums = args.sums + (first_token + t) * kPanelRows + first_row;
    for (int r = 0; r < kRows; ++r) {
      sums[r] += Sum(Vec(_mm256_add_ps(sum[r][t], offset_sum[r][t])));
    }
  }
}

#endif  // __AVX2__ && !__AVX512VNNI__

}  // namespace
}  // namespace jax_moe::cpu
