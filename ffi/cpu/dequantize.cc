// Compiled without contraction to FMA: scale * q + offset rounds twice, as in ggml.
#include <algorithm>
#include <cstring>

#include "ffi/blocks/formats.h"
#include "ffi/cpu/convert.h"
#include "ffi/cpu/moe.h"

namespace jax_moe::cpu {
namespace {

template <typename F>
void DequantizeBlocks(const uint8_t* data, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, data += F::kBytes, out += F::kBlock) {
    for (int unit = 0; unit < F::kBlock / 32; ++unit) {
      uint32_t words[8];
      int8_t q[32];
      F::Unit(data, unit, words);
      std::memcpy(q, words, 32);
      for (int part = 0; part < 32; part += F::kGroup) {
        const Affine affine = F::Group(data, (32 * unit + part) / F::kGroup);
        for (int i = part; i < part + F::kGroup; ++i) {
          const float scaled = affine.scale * static_cast<float>(q[i]);
          out[32 * unit + i] = F::kHasOffset ? scaled + affine.offset : scaled;
        }
      }
    }
  }
}

}  // namespace

void RunDequantize(int format, const uint8_t* data, int64_t rows, int64_t k, float* out,
                   const Executor& executor) {
  VisitFormat(format, [&](auto decoder) {
    using F = decltype(decoder);
    const int64_t blocks = rows * (k / F::kBlock);
    const int64_t blocks_per_task = std::max<int64_t>(1, 65536 / F::kBlock);
    RunPhases(executor,
              {{(blocks + blocks_per_task - 1) / blocks_per_task,
                [&](int64_t task) {
                  const int64_t first = task * blocks_per_task;
                  DequantizeBlocks<F>(data + first * F::kBytes,
                                      std::min(blocks_per_task, blocks - first),
                                      out + first * F::kBlock);
                }}},
              rows * k >= 1 << 18);
  });
}

}  // namespace jax_moe::cpu
