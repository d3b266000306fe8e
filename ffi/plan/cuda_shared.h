// Shared memory of the CUDA kernels for weights in GGUF's layout with 32 and 128 tokens a tile, which not every
// device has: known to the plan, and held against the kernels' own sizes where they are instantiated.
#pragma once

#include <cstdint>

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
