// One tile of a projection: up to 16 weight rows of an expert by up to 128 of its tokens.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "ffi/cpu/kernels.h"

namespace jax_moe::cpu {

// What a thread works in; kept from call to call, never read before it is written.
struct Scratch {
  Panel panel;
  float gate[kTokenTile * kPanelRows];
  float up[kTokenTile * kPanelRows];
  void* x[kTokenTile];
  float factor[kTokenTile];
  float* h[kTokenTile];

  static Scratch& OfThread() {
    // Value-initialised: lanes beyond a panel's rows are computed and dropped, but must be defined.
    thread_local std::unique_ptr<Scratch> scratch(new Scratch());
    return *scratch;
  }
};

// sums[t * kPanelRows + r] = weight[expert, row + r, :] . x[t] for `rows` rows and `tokens` tokens.
inline void Project(const Kernels& kernels, const Format& format, const Weights& weight,
                    int64_t expert, int64_t row, int rows, int tokens, void* const* x, bool round,
                    Panel* panel, float* sums) {
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(tokens) * kPanelRows);
  MultiplyPackedFn packed = nullptr;
  if (weight.k % 256 == 0) {
    if (round && tokens <= kernels.few_tokens) packed = format.multiply_packed_quantized;
    if (!round && tokens == 1) packed = format.multiply_packed_float;
  }
  const int step = tokens <= kernels.few_tokens && packed == nullptr ? 4 : kPanelRows;
  const int chunk = format.group == 0 ? kFloatChunk : kChunk;
  for (int r = 0; r < rows; r += step) {
    const uint8_t* data = weight.Row(expert, row + r);
    const int count = std::min(step, rows - r);
    MultiplyArgs args{panel, &format, count, tokens, x, weight.k, 0, 0, sums + r};
    if (packed != nullptr) {
      packed(data, weight.row_bytes, args);
      continue;
    }
    for (; args.begin < weight.k; args.begin += chunk) {
      args.count = static_cast<int>(std::min<int64_t>(chunk, weight.k - args.begin));
      format.decode(data + args.begin / format.block * format.bytes, weight.row_bytes, args.rows,
                    args.count, panel);
      (round ? kernels.multiply_quantized : kernels.multiply_float)(args);
    }
  }
}

// Rows of a task: enough work to be worth a thread's visit, few enough to balance. It depends on
// the shape alone and no result depends on it.
inline int64_t BandRows(int64_t k) {
  const int64_t rows = std::clamp<int64_t>(65536 / std::max<int64_t>(k, 1), 16, 256);
  return rows / kPanelRows * kPanelRows;
}

// Below this many multiplications a call stays on its thread.
inline constexpr int64_t kParallelWork = 1 << 18;

}  // namespace jax_moe::cpu
