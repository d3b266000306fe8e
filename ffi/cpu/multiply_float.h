// Decoded weights times activation rows that are not rounded: float32 throughout.
#pragma once

#include "ffi/cpu/kernels.h"
#include "ffi/cpu/simd.h"

namespace jax_moe::cpu {
namespace {

// Four weight rows by one token. A group's scale multiplies its sum of products and its offset the
// sum of its activations, which is less work than dequantising. Four rows at once keep enough
// independent sums in flight to hide the latency of a multiply-add.
template <int kGroup, bool kOffset>
void DecodedRows(const MultiplyArgs& args, int first_row) {
  // Rows of the panel lie at constant distances from the first.
  const int8_t* q = args.panel->q[first_row];
  const float* scale = args.panel->scale[first_row];
  const float* offset = args.panel->offset[first_row];
  constexpr int kRows = 4, kGroupStride = kChunk / 16;
  const FloatRow row(args.x[0], args.k);
  const float* x = row.x + args.begin;
  Vec sum[kRows] = {};
  for (int i = 0; i < args.count; i += kGroup) {
    Vec part[kRows] = {};
#pragma GCC unroll 8
    for (int j = 0; j < kGroup; j += kLanes) {
      const Vec xs = Load(x + i + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) part[r] += LoadInt8(q + r * kChunk + i + j) * xs;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r] += part[r] * Broadcast(scale[r * kGroupStride]);
    ++scale;
  }
  if constexpr (kOffset) {
    const float* group_sum =
        kGroup == 16 ? row.sum16 + args.begin / 16 : row.sum32 + args.begin / 32;
    // Beyond the row both are zero.
    for (int g = 0; g < args.count / kGroup; g += kLanes) {
      const Vec sums = Load(group_sum + g);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r] += Load(offset + r * kGroupStride + g) * sums;
    }
  }
  AddSums(sum, args.sums + first_row);
}

// Four weight rows, dequantised in registers, by kTokens tokens.
template <int kGroup, bool kOffset, int kTokens>
void DecodedTile(const MultiplyArgs& args, int first_row, int first_token) {
  // Rows of the panel lie at constant distances from the first.
  const int8_t* q = args.panel->q[first_row];
  const float* scale = args.panel->scale[first_row];
  const float* offset = args.panel->offset[first_row];
  constexpr int kRows = 4, kGroupStride = kChunk / 16;
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    x[t] = static_cast<const float*>(args.x[first_token + t]) + args.begin;
  }
  Vec sum[kTokens][kRows] = {};
  for (int i = 0; i < args.count; i += kGroup) {
    Vec s[kRows], o[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      s[r] = Broadcast(scale[r * kGroupStride]);
      o[r] = kOffset ? Broadcast(offset[r * kGroupStride]) : Vec{};
    }
    ++scale, ++offset;
#pragma GCC unroll 8
    for (int j = 0; j < kGroup; j += kLanes) {
      Vec xs[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) xs[t] = Load(x[t] + i + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Vec w = LoadInt8(q + r * kChunk + i + j);
        w = kOffset ? w * s[r] + o[r] : w * s[r];
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) sum[t][r] += w * xs[t];
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    AddSums(sum[t], args.sums + (first_token + t) * kPanelRows + first_row);
  }
}

// Dequantises kFloatChunk weights of every row from `from` on.
template <int kGroup, bool kOffset>
void Dequantize(const MultiplyArgs& args, int from, int count) {
  for (int r = 0; r < args.rows; ++r) {
    const int8_t* q = args.panel->q[r] + from;
    const float* scale = args.panel->scale[r] + from / kGroup;
    const float* offset = args.panel->offset[r] + from / kGroup;
    float* values = args.panel->values[r];
    for (int i = 0; i < count; i += kGroup) {
      const Vec s = Broadcast(*scale++);
      const Vec o = kOffset ? Broadcast(*offset++) : Vec{};
#pragma GCC unroll 8
      for (int j = 0; j < kGroup; j += kLanes) {
        Vec w = LoadInt8(q + i + j);
        w = kOffset ? w * s + o : w * s;
        std::memcpy(values + i + j, &w, sizeof(w));
      }
    }
  }
}

// A tile of kRows weight rows by kTokens tokens in registers. The count is rounded up to whole
// vectors: both operands are zero there.
template <int kRows, int kTokens>
void FloatTile(const MultiplyArgs& args, int from, int count, int r, int t) {
  const float* w[kRows];
  const float* x[kTokens];
  for (int a = 0; a < kRows; ++a) w[a] = args.panel->values[r + a];
  for (int b = 0; b < kTokens; ++b) {
    x[b] = static_cast<const float*>(args.x[t + b]) + args.begin + from;
  }
  Vec sum[kRows][kTokens] = {};
  for (int i = 0; i < count; i += kLanes) {
    Vec xs[kTokens];
#pragma GCC unroll 8
    for (int b = 0; b < kTokens; ++b) xs[b] = Load(x[b] + i);
#pragma GCC unroll 8
    for (int a = 0; a < kRows; ++a) {
      const Vec ws = Load(w[a] + i);
#pragma GCC unroll 8
      for (int b = 0; b < kTokens; ++b) sum[a][b] += ws * xs[b];
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < kRows; ++a) {
#pragma GCC unroll 8
    for (int b = 0; b < kTokens; ++b) args.sums[(t + b) * kPanelRows + r + a] += Sum(sum[a][b]);
  }
}

// The whole panel of `count` dequantised weights from `from` on against all tokens.
inline void MultiplyValues(const MultiplyArgs& args, int from, int count) {
  constexpr int kRows = kLanes == 16 ? 4 : 2;
  for (int t = 0; t < args.tokens;) {
    const int left = args.tokens - t;
    for (int r = 0; r < args.rows; r += kRows) {
      if (left >= 4) {
        FloatTile<kRows, 4>(args, from, count, r, t);
      } else if (left >= 2) {
        FloatTile<kRows, 2>(args, from, count, r, t);
      } else {
        FloatTile<kRows, 1>(args, from, count, r, t);
      }
    }
    t += left >= 4 ? 4 : left >= 2 ? 2 : 1;
  }
}

template <int kGroup, bool kOffset>
void MultiplyFloatGroups(const MultiplyArgs& args) {
  // Rows beyond args.rows hold stale values; their sums are never read.
  if (args.tokens <= 3) {
    for (int r = 0; r < args.rows; r += 4) {
      if (args.tokens == 1) {
        DecodedRows<kGroup, kOffset>(args, r);
      } else if (args.tokens == 2) {
        DecodedTile<kGroup, kOffset, 2>(args, r, 0);
      } else {
        DecodedTile<kGroup, kOffset, 3>(args, r, 0);
      }
    }
    return;
  }
  for (int from = 0; from < args.count; from += kFloatChunk) {
    const int count = args.count - from < kFloatChunk ? args.count - from : kFloatChunk;
    Dequantize<kGroup, kOffset>(args, from, count);
    MultiplyValues(args, from, count);
  }
}

void MultiplyFloat(const MultiplyArgs& args) {
  const Format& format = *args.format;
  if (format.group == 0) {
    MultiplyValues(args, 0, args.count);
  } else if (format.group == 16) {
    format.has_offset ? MultiplyFloatGroups<16, true>(args) : MultiplyFloatGroups<16, false>(args);
  } else {
    format.has_offset ? MultiplyFloatGroups<32, true>(args) : MultiplyFloatGroups<32, false>(args);
  }
}

}  // namespace
}  // namespace jax_moe::cpu
