// Decoded weights times q8_1 rows: integer dot products of a group, scaled and summed in float32.
#pragma once

#include "ffi/cpu/kernels.h"
#include "ffi/cpu/multiply_quantized_avx2.h"
#include "ffi/cpu/multiply_quantized_avx512.h"
#include "ffi/cpu/rows.h"

namespace jax_moe::cpu {
namespace {

#if !defined(__AVX2__)

template <int kGroup, bool kOffset, int kRows, int kTokens>
void QuantizedTile(const MultiplyArgs& args, int first_row, int first_token) {
  const Panel& panel = *args.panel;
  constexpr int kHalves = 32 / kGroup;
  const QuantizedColumns<kGroup, kTokens> x(args, first_token);
  float sum[kRows][kTokens] = {}, offset_sum[kRows][kTokens] = {};
  for (int u = 0; u < args.count / 32; ++u) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int8_t* q = panel.q[first_row + r] + 32 * u;
      const float* scale = panel.scale[first_row + r] + kHalves * u;
      const float* offset = panel.offset[first_row + r] + kHalves * u;
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        int dot[2] = {};
        for (int h = 0; h < 2; ++h) {
          for (int i = 16 * h; i < 16 * h + 16; ++i) dot[h] += q[i] * x.q[t][32 * u + i];
        }
        const float low = scale[0] * x.d[t][u], high = scale[kHalves - 1] * x.d[t][u];
        sum[r][t] += low * static_cast<float>(dot[0]) + high * static_cast<float>(dot[1]);
        if constexpr (kOffset) {
          for (int h = 0; h < kHalves; ++h) {
            offset_sum[r][t] += offset[h] * x.sum[t][kHalves * u + h];
          }
        }
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float* sums = args.sums + (first_token + t) * kPanelRows + first_row;
    for (int r = 0; r < kRows; ++r) sums[r] += sum[r][t] + offset_sum[r][t];
  }
}

#endif  // !__AVX2__

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
