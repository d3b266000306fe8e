// Decoded weights times activation rows that are not rounded: float32 throughout.
#pragma once

#include "ffi/cpu/kernels.h"
#include "ffi/cpu/simd.h"

namespace jax_moe::cpu {
namespace {

// kTokens rows of x against one weight row, dequantised in registers.
template <int kGroup, bool kOffset, int kTokens>
void DotDecoded(const MultiplyArgs& args, int r, int first_token) {
  const int8_t* q = args.panel->q[r];
  const float* scale = args.panel->scale[r];
  const float* offset = args.panel->offset[r];
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    x[t] = static_cast<const float*>(args.x[first_token + t]) + args.begin;
  }
  Vec sum[kTokens][2] = {};
  for (int i = 0; i < args.count; i += kGroup) {
    const Vec s = Broadcast(*scale++);
    const Vec o = kOffset ? Broadcast(*offset++) : Vec{};
#pragma GCC unroll 8
    for (int j = 0; j < kGroup; j += kLanes) {
      Vec w = LoadInt8(q + i + j);
      w = kOffset ? w * s + o : w * s;
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sum[t][j / kLanes % 2] += w * Load(x[t] + i + j);
    }
  }
  for (int t = 0; t < kTokens; ++t) args.sums[(first_token + t) * kPanelRows + r] += Sum(sum[t][0] + sum[t][1]);
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
    // Rows beyond args.rows hold stale values; their sums are never read.
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
  if (args.tokens <= 4) {
    for (int r = 0; r < args.rows; ++r) {
      switch (args.tokens) {
        case 1: DotDecoded<kGroup, kOffset, 1>(args, r, 0); break;
        case 2: DotDecoded<kGroup, kOffset, 2>(args, r, 0); break;
        case 3: DotDecoded<kGroup, kOffset, 3>(args, r, 0); break;
        case 4: DotDecoded<kGroup, kOffset, 4>(args, r, 0); break;
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
