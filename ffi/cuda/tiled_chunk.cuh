// Steps of the products of the wide kernels for tiled weights: 16 columns each, decoded while the
// products of those before run.
#pragma once

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/tiled_unit.cuh"

namespace jax_moe::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The operands of steps kStep and on, of two tiles each.
template <int kStep, int kFirst = 0, typename Format, int kSteps>
__device__ __forceinline__ void DecodeSteps(const LaneUnit<Format> (&unit)[2][2],
                                            uint32_t (&operands)[kSteps][2][4]) {
  if constexpr (kFirst < kSteps) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t (&operand)[4] = operands[kFirst][tile];
      unit[tile][0].template Decode<kStep + kFirst>(operand[0], operand[2]);
      unit[tile][1].template Decode<kStep + kFirst>(operand[1], operand[3]);
    }
    DecodeSteps<kStep, kFirst + 1>(unit, operands);
  }
}

// Steps kStep .. kStep + kSteps - 1 of the 8 of a chunk, added to the sums of two tiles of 64 rows.
// unit: rows r and r + 8. tokens: the operand of kColumns tokens in shared memory, its second 64
// columns kHalfBytes behind. a: the decoded operands of these steps and of those before, whose
// products have ended afterwards.
template <int kColumns, int kHalfBytes, int kStep, typename Format, int kSteps, int kSums>
__device__ __forceinline__ void MultiplyDecoded(const LaneUnit<Format> (&unit)[2][2],
                                                uint64_t tokens, uint32_t (&a)[2][kSteps][2][4],
                                                float (&sum)[2][kSums]) {
  static_assert(kStep % kSteps == 0 && 4 % kSteps == 0);
  uint32_t (&operands)[kSteps][2][4] = a[kStep / kSteps % 2];
  DecodeSteps<kStep>(unit, operands);
  const uint64_t b = tokens + (kStep / 4 * kHalfBytes + kStep % 4 * 32) / 16;
  FenceWarpgroup();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      WarpgroupF16<kColumns>::Multiply(sum[tile], operands[i][tile], b + i * (32 / 16));
    }
  }
  CommitWarpgroup();
  WaitWarpgroup<1>();
}

#endif

}  // namespace jax_moe::cuda
