// A warp's ring in shared memory, through which the bytes of bands of tiled weights come.
#pragma once

#include <algorithm>

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
  // Of rings of a block that has so many bytes of shared memory for them and the sums.
  static constexpr int Stages(int bytes) {
    return std::max(2, std::min(4, (bytes - kWarps * 2 * kTokens * kSumRows * 4) /
                                       (kWarps * (kStageBytes + kAuxBytes))));
  }
  static constexpr int kStages = Stages(70000);

  // 256 columns of a band, and the band's rows of aux where they are its first.
  struct alignas(16) Stage {
    uint8_t weights[kStageBytes];
    float aux[kRows][2];
  };
};

// A warp's ring: steps are fetched and waited for in order, at most kStages ahead.
template <typename Format, int kStages = TiledNarrowShape<Format>::kStages>
class WarpRing {
 public:
  using Shape = TiledNarrowShape<Format>;
  using Stage = typename Shape::Stage;

  __device__ __forceinline__ WarpRing(Stage* ring, uint64_t* full)
      : ring_(SharedAddress(ring)), full_(SharedAddress(full)) {
    // Kept in registers: else they are computed anew in every step.
    asm volatile("" : "+r"(ring_), "+r"(full_));
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (ElectLane()) {
      for (int i = 0; i < kStages; ++i) InitBarrier(Full(i), 1);
    }
    FenceBarrierInit();
    __syncwarp();
#endif
  }

  // bytes: a multiple of 16. aux: of the band's rows.
  __device__ __forceinline__ void Fetch(const uint8_t* from, int bytes, const float* aux) {
    Stage& stage = At(fetched_);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (ElectLane()) {
      ArriveExpectBytes(Full(fetched_), bytes + Shape::kAuxBytes);
      BulkCopy(stage.weights, from, bytes, Full(fetched_));
      BulkCopy(stage.aux[0], aux, Shape::kAuxBytes, Full(fetched_));
    }
#else
    CopyPieces(stage.weights, from, bytes);
    CopyPieces(stage.aux[0], aux, Shape::kAuxBytes);
    CommitCopies();
#endif
    CountFetch();
  }
  __device__ __forceinline__ void Fetch(const uint8_t* from, int bytes) {
    Stage& stage = At(fetched_);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (ElectLane()) {
      ArriveExpectBytes(Full(fetched_), bytes);
      BulkCopy(stage.weights, from, bytes, Full(fetched_));
    }
#else
    CopyPieces(stage.weights, from, bytes);
    CommitCopies();
#endif
    CountFetch();
  }

  __device__ __forceinline__ bool HasPlace() const { return ahead_ < kStages; }

  // The oldest step that is still in the ring; it has to be read by all lanes before the next
  // Fetch.
  __device__ __forceinline__ const Stage& Wait() {
    const Stage& stage = Front();
    if constexpr (kStages == 2) {  // in fewer instructions
      parity_ ^= read_;
      read_ ^= 1;
    } else if (++read_ == kStages) {
      read_ = 0, parity_ ^= 1;
    }
    --ahead_;
    return stage;
  }

  // The same, which remains.
  __device__ __forceinline__ const Stage& Front() const {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    WaitBarrier(Full(read_), parity_);
#else
    if (HasPlace()) {
      WaitCopies<0>();
    } else {
      WaitCopies<kStages - 1>();
    }
    __syncwarp();
#endif
    return At(read_);
  }

 private:
  __device__ __forceinline__ Stage& At(int stage) const {
    const uint32_t at = ring_ + stage * static_cast<uint32_t>(sizeof(Stage));
    return *static_cast<Stage*>(__cvta_shared_to_generic(at));
  }
  __device__ __forceinline__ uint64_t* Full(int stage) const {
    return static_cast<uint64_t*>(__cvta_shared_to_generic(full_ + stage * 8u));
  }
  __device__ __forceinline__ void CountFetch() {
    if constexpr (kStages == 2) {
      fetched_ ^= 1;
    } else if (++fetched_ == kStages) {
      fetched_ = 0;
    }
    ++ahead_;
  }
  template <typename T>
  static __device__ __forceinline__ void CopyPieces(T* to, const T* from, int bytes) {
    auto* target = reinterpret_cast<uint8_t*>(to);
    const auto* source = reinterpret_cast<const uint8_t*>(from);
    for (int i = 16 * (threadIdx.x % 32); i < bytes; i += 16 * 32) {
      CopyAsync16(target + i, source + i);
    }
  }

  uint32_t ring_, full_;  // addresses in shared memory
  int fetched_ = 0, read_ = 0, ahead_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace jax_moe::cuda
