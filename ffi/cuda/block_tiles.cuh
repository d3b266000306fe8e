// Tiles of tokens that every block finds for itself from the ids of some hundred pairs: no sort
// comes first, and weights are on their way while x is prepared.
#pragma once

#include <cstdint>

#include "ffi/cuda/gemm.h"

namespace jax_moe::cuda {

// A tile is up to 8 pairs of one expert. Tiles are in the order of experts. The pairs of an expert
// with several tiles are in their own order, so that all blocks agree on them; those of an only
// tile in any.
class BlockTiles {
 public:
  static constexpr int kPairs = plan::kCudaBlockPairs, kExperts = plan::kCudaBlockExperts;
  static constexpr int kTokens = 8, kThreads = 256, kWarps = kThreads / 32;

  // Of each tile its expert, where its pairs begin and how many they are; the pairs.
  struct Table {
    uint32_t tile[kPairs];
    uint16_t pair[kPairs];
    int32_t number;
  };
  struct Tile {
    int expert, begin, count;
  };

  // Shared. scratch, of kScratchBytes, is free again once tiles have been found.
  static constexpr int kScratchBytes = sizeof(int32_t) * (kExperts + kWarps);
  struct Memory {
    Table& table;
    int32_t* scratch;
  };

  // By all threads of a block. ids: [pairs], s32; an id that is no expert's is in no tile.
  __device__ __forceinline__ BlockTiles(const int32_t* ids, const int32_t* /*entries*/, int pairs,
                                        int experts, Memory memory)
      : table_(memory.table) {
    Table& table = table_;
    auto* sums = reinterpret_cast<uint32_t*>(memory.scratch);  // of warps
    int32_t* counts = memory.scratch + kWarps;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int id[kEach], place[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int pair = thread + i * kThreads;
      id[i] = pair < pairs ? ids[pair] : -1;
    }
#pragma unroll 1
    for (int i = thread; i < experts; i += kThreads) counts[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (id[i] >= experts) id[i] = -1;
      if (id[i] >= 0) place[i] = atomicAdd(counts + id[i], 1);
    }
    __syncthreads();
    // Tiles in the upper half, pairs in the lower one.
    uint32_t before = 0;
    bool several = false;  // tiles of an expert
#pragma unroll 1
    for (int base = 0; base < experts; base += kThreads) {
      const int expert = base + thread;
      const int number = expert < experts ? counts[expert] : 0;
      const int tiles = (number + kTokens - 1) / kTokens;
      const uint32_t mine = static_cast<uint32_t>(tiles) << 16 | static_cast<uint32_t>(number);
      uint32_t sum = mine;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, sum, d);
        if (lane >= d) sum += other;
      }
      if (base > 0) __syncthreads();  // sums have been read
      if (lane == 31) sums[warp] = sum;
      __syncthreads();
      uint32_t begin = before + sum - mine;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const uint32_t other = sums[w];
        before += other;
        if (w < warp) begin += other;
      }
      const uint32_t first = begin & 0xffff;
      if (expert < experts) counts[expert] = static_cast<int32_t>(first << 16 | number);
      several |= tiles > 1;
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) {
        const int count = min(number - i * kTokens, kTokens);
        table.tile[(begin >> 16) + i] =
            static_cast<uint32_t>(expert) << 16 | (first + i * kTokens) << 4 | count;
      }
    }
    if (thread == 0) table.number = static_cast<int32_t>(before >> 16);
    several = __syncthreads_or(several);
    int first[kEach], number[kEach];  // of a pair's expert
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int count = id[i] < 0 ? 0 : counts[id[i]];
      first[i] = count >> 16, number[i] = count & 0xffff;
      if (id[i] >= 0) table.pair[first[i] + place[i]] = thread + i * kThreads;
    }
    __syncthreads();
    if (!several) return;
    // Blocks have to agree on who is in each of an expert's tiles.
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (number[i] <= kTokens) continue;
      place[i] = 0;
#pragma unroll 1
      for (int j = 0; j < number[i]; ++j) {
        place[i] += table.pair[first[i] + j] < thread + i * kThreads;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (number[i] > kTokens) table.pair[first[i] + place[i]] = thread + i * kThreads;
    }
    __syncthreads();
  }

  __device__ __forceinline__ int Number() const { return table_.number; }
  __device__ __forceinline__ Tile At(int index) const {
    const uint32_t tile = table_.tile[index];
    return {static_cast<int>(tile >> 16), static_cast<int>(tile >> 4 & 0xfff),
            static_cast<int>(tile & 15)};
  }

 private:
  static constexpr int kEach = kPairs / kThreads;  // pairs a thread
  static_assert(kPairs % kThreads == 0 && kPairs < 1 << 12 && kExperts <= 1 << 16);

  Table& table_;
};

}  // namespace jax_moe::cuda
