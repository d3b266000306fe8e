// Shared memory of the CUDA kernels that not every device or problem has it for, those for weights in GGUF's
// layout with 32 and 128 tokens a tile and that for a whole layer: known to the plan, and held against the
// kernels' own sizes where they are instantiated.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ffi/plan/cuda.h"

namespace jax_moe::plan {

// Bytes of a block of wide_gemm.cuh: of raw bytes, decoded weights, tokens, scales, offsets and sums two
// sets each, and the row of every token.
template <typename Format>
constexpr int64_t CudaWideSharedBytes(int64_t tokens) {
  constexpr int64_t kRows = 128;
  constexpr int64_t kChunk = Format::kBlock > 128 ? Format::kBlock : 128;
  constexpr int64_t kRaw = kChunk / Format::kBlock * Format::kBytes;
  // Blocks that are no multiple of 16 bytes are copied with what surrounds them.
  constexpr int64_t kSlot = Format::kBytes % 16 == 0 ? kRaw : (kRaw + 30) / 16 * 16;
  constexpr int64_t kDecoded = 64 + 32;
  const int64_t offsets = Format::kHasOffset ? kRows + tokens : 2;
  return 2 * (kRows * (kSlot + kDecoded) + tokens * 128 + 2 * kRows * 4 * (32 / Format::kGroup) +
              offsets * 16) +
         4 * tokens;
}

// Bytes of a block of tiled_layer.cuh, but for what depends on the problem: of each warp a ring of stages, a
// barrier a stage and the tiles, then maxima of x, of each thread a sum of squares and two biases, eight
// numbers a pair and what the blocks meet with. The arguments are the bytes of 256 columns of 16 rows of gate
// and up, and of down.
constexpr int64_t CudaLayerBytes(int64_t up_bytes, int64_t down_bytes) {
  constexpr int64_t kWarps = kCudaLayerWarps, kPairs = kCudaFewPairs;
  constexpr int64_t kAux = 16 * 2 * 4, kTiles = 8 * kPairs;
  constexpr int64_t kRings = 70000 - 8 * 2 * 8 * 20 * 4;  // of 8 warps (warp_ring.cuh)
  const auto align = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  const int64_t stage = std::max(up_bytes, down_bytes) + kAux;
  const int64_t stages = std::clamp<int64_t>(kRings / (8 * stage), 2, 4);
  return kWarps * align(stages * (align(stage) + 8) + kTiles) + kWarps * 4 + kWarps * 32 * 3 * 4 +
         kPairs * 8 * 4 + 16;
}

// The most that a block can have on a device of this compute capability, like 90 (CUDA C++ Programming
// Guide, table of technical specifications).
constexpr int64_t CudaSharedLimit(int capability) {
  switch (capability) {
    case 80:
    case 87:
      return 163 * 1024;
    case 90:
    case 100:
    case 103:
      return 227 * 1024;
    default:
      return 99 * 1024;
  }
}

}  // namespace jax_moe::plan
