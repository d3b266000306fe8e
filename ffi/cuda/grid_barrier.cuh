// All blocks of a cooperative launch wait for each other once, as in cooperative_groups' grid.sync
// and at the same word, which the driver gives each launch: its highest bit changes when the last
// block has arrived, and the others are zeros then. What is saved is a way to L2 and back: an
// arrival returns nothing, for what the word was has been loaded before.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace jax_moe::cuda {

struct GridBarrier {
  static __device__ __forceinline__ uint32_t* Word() {
    return &cooperative_groups::details::get_grid_workspace()->barrier;
  }
  // By one thread of every block, once the block's threads have met.
  static __device__ __forceinline__ void Arrive(uint32_t* word) {
    const uint32_t step = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(step) : "memory");
  }
  // before: what the word was before this block had arrived.
  static __device__ __forceinline__ void Wait(uint32_t* word, uint32_t before) {
    uint32_t now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
    } while (((before ^ now) & 0x80000000u) == 0);
  }
};

}  // namespace jax_moe::cuda
