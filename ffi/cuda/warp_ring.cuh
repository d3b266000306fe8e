// A warp's ring in shared memory, through which the bytes of bands of tiled weights come.
#pragma once

#include <algorithm>

#include "ffi/cuda/few_tiles.cuh"
#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/ptx.cuh"
#include "ffi/cuda/tiled_unit.cuh"

namespace jax_moe::cuda {

template <typename Format>
struct TiledNarrowShape {
  static constexpr int kTokens = 8;
  static constexpr int kRows = 16;  // of a band
  static constexpr int kWarps = 8;
  static constexpr int kBlocks = 2;  // a multiprocessor of sm_90
  static constexpr int kStep = 256;  // columns of a ring's stage
  static constexpr int kStageBytes =
      kRows * kStep / Format::kBlock * tiled::Sizes<Format>::kBytes;
  static constexpr int kAuxBytes = kRows * 2 * 4;  // of a band
  // Sums of a warp's band of gate and of up, padded to spread a quad's tokens over the banks.
  static constexpr int kSumRows = kRows + 4;
  // Leaves some 90 KB of sm_90's to the L1 cache, for the activations.
  static constexpr int kStages =
      std::max(2, std::min(4, (70000 - kWarps * 2 * kTokens * kSumRows * 4) /
                               (kWarps * (kStageBytes + kAuxBytes))));

  // 256 columns of a band, and the band's rows of aux where they are its first.
  struct alignas(16) Stage {
    uint8_t weights[kStageBytes];
    float aux[kRows][2];
  };

  struct alignas(16) Memory {
    Stage ring[kWarps][kStages];
    uint64_t full[kWarps][kStages];
    float sums[kWarps][2][kTokens][kSumRows];
    FewTiles::Table tiles[kWarps];
  };
};

// A warp's ring: steps are fetched and waited for in order, at most kStages ahead.
template <typename Format>
class WarpRing {
 public:
  using Shape = TiledNarrowShape<Format>;
  using Stage = typename Shape::Stage;

  __device__ __forceinline__ WarpRing(Stage* ring, uint64_t* full) : ring_(ring), full_(full) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (threadIdx.x % 32 < Shape::kStages) InitBarrier(full_ + threadIdx.x % 32, 1);
    FenceBarrierInit();
    __syncwarp();
#endif
  }

  // bytes: a multiple of 16. aux: of the band's rows, null where they are not wanted.
  __device__ __forceinline__ void Fetch(const uint8_t* from, int bytes, const float* aux) {
    Stage& stage = ring_[fetched_];
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (threadIdx.x % 32 == 0) {
      uint64_t* full = full_ + fetched_;
      ArriveExpectBytes(full, aux == nullptr ? bytes : bytes + Shape::kAuxBytes);
      BulkCopy(stage.weights, from, bytes, full);
      if (aux != nullptr) BulkCopy(stage.aux, aux, Shape::kAuxBytes, full);
    }
#else
    const int at = 16 * (threadIdx.x % 32);
    for (int i = at; i < bytes; i += 16 * 32) CopyAsync16(stage.weights + i, from + i);
    if (aux != nullptr && at < Shape::kAuxBytes) CopyAsync16(stage.aux[0] + at / 4, aux + at / 4);
    CommitCopies();
#endif
    if (++fetched_ == Shape::kStages) fetched_ = 0;
    ++ahead_;
  }

  __device__ __forceinline__ bool HasPlace() const { return ahead_ < Shape::kStages; }

  // The oldest step that is still in the ring; it has to be read by all lanes before the next
  // Fetch.
  __device__ __forceinline__ const Stage& Wait() {
    const Stage& stage = ring_[read_];
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    WaitBarrier(full_ + read_, parity_);
    if (++read_ == Shape::kStages) read_ = 0, parity_ ^= 1;
#else
    if (HasPlace()) {
      WaitCopies<0>();
    } else {
      WaitCopies<Shape::kStages - 1>();
    }
    __syncwarp();
    if (++read_ == Shape::kStages) read_ = 0;
#endif
    --ahead_;
    return stage;
  }

 private:
  Stage* ring_;
  uint64_t* full_;
  int fetched_ = 0, read_ = 0, ahead_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace jax_moe::cuda
