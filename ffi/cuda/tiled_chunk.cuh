// A step of the products of the wide kernels for tiled weights: 16 columns, decoded while the products of
// the step before run.
#pragma once

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/tiled_unit.cuh"

namespace jax_moe::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Step kStep of the 8 of a chunk, added to the sums of two tiles of 64 rows. unit: rows r and r + 8.
// tokens: the operand of kColumns tokens in shared memory, its second 64 columns kHalfBytes behind.
// a: the decoded operands of this step and of the one before, whose products have ended afterwards.
template <int kColumns, int kHalfBytes, int kStep, typename Format, int kSums>
__device__ __forceinline__ void MultiplyDecoded(const LaneUnit<Format> (&unit)[2][2],
                                                uint64_t tokens, uint32_t (&a)[2][2][4],
                                                float (&sum)[2][kSums]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    uint32_t (&operand)[4] = a[kStep % 2][tile];
    unit[tile][0].template Decode<kStep>(operand[0], operand[2]);
    unit[tile][1].template Decode<kStep>(operand[1], operand[3]);
  }
  const uint64_t b = tokens + (kStep / 4 * kHalfBytes + kStep % 4 * 32) / 16;
  FenceWarpgroup();
  WarpgroupF16<kColumns>::Multiply(sum[0], a[kStep % 2][0], b);
  WarpgroupF16<kColumns>::Multiply(sum[1], a[kStep % 2][1], b);
  CommitWarpgroup();
  WaitWarpgroup<1>();
}

#endif

}  // namespace jax_moe::cuda
