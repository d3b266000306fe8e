// The down projection, the routing weights and the sum over slots in one kernel, for up to 32
// pairs.
//
// A block, or a cluster of two, owns 16 columns of y for all tokens. The steps of all tiles (up to
// 8 pairs of one expert), one tile after another, are shared out evenly among the 4, 8 or 16 warps,
// so that there are enough warps and none waits for another whatever the number of tiles. A warp's
// bytes come through one ring across all of its tiles. What the warps found of a pair goes to the
// block that adds it up, in the order of the warps and then of the slots.
#pragma once

#include "ffi/cuda/cluster.cuh"
#include "ffi/cuda/few_tiles.cuh"
#include "ffi/cuda/tiled_epilogue.cuh"
#include "ffi/cuda/tiled_step.cuh"
#include "ffi/cuda/warp_ring.cuh"

namespace jax_moe::cuda {

template <typename Format>
struct TiledDownShape {
  using Narrow = TiledNarrowShape<Format>;
  static constexpr int kPairs = FewTiles::kPairs;
  // A sum of every pair from each warp with a part of its tile: the pairs of a warp's tiles follow
  // those of the tiles before, and each warp leaves a tile's places free, for it may share one with
  // the next.
  static constexpr int kSums = kPairs + Narrow::kTokens * kMostDownBlocks * kMostDownWarps;

  struct alignas(16) Warp {
    typename Narrow::Stage ring[Narrow::kStages];
    uint64_t full[Narrow::kStages];
    FewTiles::Table tiles;
  };
  struct alignas(16) Memory {
    float sums[kSums][Narrow::kRows + 1];
    Warp warp[kMostDownWarps];  // no more of them than there are
  };
};

template <typename Format>
class DownWarp {
 public:
  using Down = TiledDownShape<Format>;
  using Shape = TiledNarrowShape<Format>;
  using Memory = typename Down::Memory;

  __device__ __forceinline__ DownWarp(const TiledDownArgs& args, Memory& memory)
      : args_(args),
        m_(memory),
        ring_(memory.warp[threadIdx.x / 32].ring, memory.warp[threadIdx.x / 32].full),
        table_(memory.warp[threadIdx.x / 32].tiles),
        few_(args.expert_ids, nullptr, args.tokens * args.top_k, args.experts, table_),
        rank_(blockIdx.x % args.splits),
        warp_(threadIdx.x / 32 * args.splits + rank_),
        row0_(blockIdx.x / args.splits * Shape::kRows),
        tile_steps_((args.columns + Shape::kStep - 1) / Shape::kStep),
        band_bytes_(TiledRow<Format>::BandBytes(args.columns)) {
    if (args.splits > 1) ArriveInCluster();
    steps_ = few_.Number() * tile_steps_;
    warps_ = min(static_cast<int>(blockDim.x) / 32 * args.splits, steps_);
  }

  __device__ __forceinline__ void Run() {
    // Weights and tiles from the ids, both older than the kernel before this one.
    if (warp_ < warps_) {
      const int begin = warp_ * steps_ / warps_;
      left_ = (warp_ + 1) * steps_ / warps_ - begin;
      tile_ = begin / tile_steps_;
      step_ = begin - tile_ * tile_steps_;
      fetch_left_ = left_;
      fetch_tile_ = tile_;
      fetch_step_ = step_;
      while (ring_.HasPlace() && fetch_left_ > 0) FetchStep();
    }
    FindPair();
    WaitForStart();
    WaitForEarlierKernels();
    if (parts_ > 0) h_scale_ = args_.h_scales[threadIdx.x % 32];
    if (left_ > 0) MultiplyTiles();
    WaitForSums();
    Finish();
  }

 private:
  // What is to be known of pair lane at the end: where its sums are and from how many warps.
  __device__ __forceinline__ void FindPair() {
    const int lane = threadIdx.x % 32;
    const FewTiles::Ranked ranked = few_.Rank();
    expert_ = -1;
    owner_ = lane / args_.top_k % args_.splits;
    if (ranked.tile < 0) return;
    expert_ = args_.expert_ids[lane];
    if (args_.weights != nullptr) weight_ = args_.weights[lane];
    const int begin = ranked.tile * tile_steps_;
    const int first = ((begin + 1) * warps_ - 1) / steps_;
    const int last = ((begin + tile_steps_) * warps_ - 1) / steps_;
    sums_ = ranked.place + Shape::kTokens * first;
    parts_ = last - first + 1;
  }

  // Nothing can be stored to a block that has not begun.
  __device__ __forceinline__ void WaitForStart() {
    if (args_.splits == 1) return;
    WaitInCluster();
  }
  __device__ __forceinline__ void StoreSum(float* to, int owner, float sum) {
    if (args_.splits > 1) return StoreToCluster(to, owner, sum);
    *to = sum;
  }
  __device__ __forceinline__ void WaitForSums() {
    if (args_.splits > 1) {
      ArriveInCluster();
      return WaitInCluster();
    }
    __syncthreads();
  }

  __device__ __forceinline__ void FetchStep() {
    const int64_t expert = few_.Expert(fetch_tile_);
    const TiledMatrix& matrix = args_.matrix;
    const int at = fetch_step_ * Shape::kStageBytes;
    const bool first = fetch_left_ == left_ || fetch_step_ == 0;
    const uint8_t* from =
        matrix.data + expert * matrix.expert_bytes + row0_ * args_.row_bytes + at;
    const int bytes = min(Shape::kStageBytes, band_bytes_ - at);
    if (first) {
      ring_.Fetch(from, bytes, matrix.aux + (expert * matrix.expert_rows + row0_) * 2);
    } else {
      ring_.Fetch(from, bytes);
    }
    --fetch_left_;
    if (++fetch_step_ == tile_steps_) {
      fetch_step_ = 0;
      ++fetch_tile_;
    }
  }

  // h of the pair of lane / 4 of the tile at hand, or of another where there is none.
  __device__ __forceinline__ const half* RowOfH(int count) const {
    const int g = threadIdx.x % 32 / 4;
    return args_.h + table_.pair[g < count ? g : 0] * args_.h_pitch;
  }

  __device__ __forceinline__ void MultiplyTiles() {
    const int t = threadIdx.x % 4;
    int count = few_.Take(tile_);
    StepOfX x(args_.columns);
    x.MoveTo(RowOfH(count));
    x.Load(step_ * Shape::kStep);
    int left = left_;
    while (left > 0) {
      const int end = min(step_ + left, tile_steps_);
      const int here = count;
      int owners[2];  // of tokens 2 t and 2 t + 1
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        owners[i] = __shfl_sync(0xffffffffu, owner_, table_.pair[2 * t + i] % Down::kPairs);
      }
      BandSums sums;
      left -= end - step_;
      for (int step = step_; step < end; ++step) {
        int next = step + 1;
        if (next == end) {
          next = 0;
          if (left > 0) {
            __syncwarp();
            count = few_.Take(tile_ + 1);
            x.MoveTo(RowOfH(count));
          }
        }
        MultiplyStep<Format>(ring_, x, step == step_, step * Shape::kStep, next * Shape::kStep,
                             args_.columns, sums);
        if (fetch_left_ > 0) FetchStep();
      }
      Deliver(sums, here, owners);
      step_ = 0;
      ++tile_;
    }
  }

  // To the blocks that the tokens belong to.
  __device__ __forceinline__ void Deliver(const BandSums& sums, int count, const int (&owners)[2]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int place = few_.Before(tile_) + Shape::kTokens * warp_;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 2 * t + i % 2;
      if (token >= count) continue;
      StoreSum(&m_.sums[place + token][g + 8 * (i / 2)], owners[i % 2], sums.Sum(i));
    }
  }

  // A lane has one column of a token at a time.
  __device__ __forceinline__ void Finish() const {
    const int lane = threadIdx.x % 32, row = lane % Shape::kRows;
    for (int base = threadIdx.x / 32 * 2; rank_ + base * args_.splits < args_.tokens;
         base += blockDim.x / Shape::kRows) {
      const int token = rank_ + (base + lane / Shape::kRows) * args_.splits;
      float y = 0;
      for (int slot = 0; slot < args_.top_k; ++slot) {
        const int pair = min(token * args_.top_k + slot, Down::kPairs - 1);
        const int parts = __shfl_sync(0xffffffffu, parts_, pair);
        const int first = __shfl_sync(0xffffffffu, sums_, pair);
        const float scale = __shfl_sync(0xffffffffu, h_scale_, pair);
        const float weight = __shfl_sync(0xffffffffu, weight_, pair);
        const int expert = __shfl_sync(0xffffffffu, expert_, pair);
        if (parts == 0) continue;
        float value = 0;
        for (int i = 0; i < parts; ++i) value += m_.sums[first + Shape::kTokens * i][row];
        y += FinishProjection(args_.projection, value * scale, expert, row0_ + row) * weight;
      }
      if (token < args_.tokens) {
        Store(args_.y, token * args_.y_pitch + row0_ + row, args_.y_type, y);
      }
    }
  }

  const TiledDownArgs& args_;
  Memory& m_;
  WarpRing<Format> ring_;
  FewTiles::Table& table_;
  FewTiles few_;
  const int rank_, warp_;  // of the block and the warp in the cluster
  const int row0_, tile_steps_, band_bytes_;
  int steps_, warps_;             // all of the cluster's, and the warps that have some
  int left_ = 0, tile_, step_;    // this warp's steps, and where they begin
  int fetch_left_ = 0, fetch_tile_, fetch_step_;
  // Of pair lane.
  int expert_, owner_, sums_ = 0, parts_ = 0;  // owner: of its token
  float h_scale_ = 0, weight_ = 1;
};

template <typename Format>
__global__ void __launch_bounds__(32 * kMostDownWarps, 2)
    TiledDown(const __grid_constant__ TiledDownArgs args) {
  extern __shared__ __align__(128) uint8_t shared[];
  LetNextKernelStart();
  DownWarp<Format>(args, *reinterpret_cast<typename TiledDownShape<Format>::Memory*>(shared)).Run();
}

}  // namespace jax_moe::cuda
