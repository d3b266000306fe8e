// Tiled weights times up to 8 tokens of an expert: bound by the bytes of the weights.
//
// A persistent grid. An item is a tile of tokens and a band of 16 rows, of gate and up both where
// both are there. A team of 1, 2, 4 or 8 warps has an item, each warp every 1st, 2nd, ... 256
// columns of it. Items go out in rounds to teams of one size, and those that are left over to
// larger teams, so that the last round is short (NarrowSchedule). A warp streams the bytes of its
// items, one after another, through a ring in shared memory of its own, several hundred cycles
// ahead, and decodes them straight into tensor-core operands. Warps wait for their team only, once
// an item, to add their sums in warp order.
#pragma once

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/tiled_epilogue.cuh"
#include "ffi/cuda/tiled_step.cuh"
#include "ffi/cuda/warp_ring.cuh"

namespace jax_moe::cuda {

// A tile, and the pair of token lane / 4 (-1: none).
struct WarpTile {
  int expert, count, pair;
};

// The first `whole` items go to teams of 2^log_splits warps in rounds without idle teams, the
// others to teams of 2^rest_log_splits.
struct NarrowSchedule {
  int whole, log_splits, rest_log_splits;

  // The schedule that takes least, by a whole warp: a round takes the steps of 256 columns of a
  // warp of its teams, and about a step and a half for what an item costs besides.
  static __device__ __forceinline__ NarrowSchedule Choose(unsigned items, unsigned warps, int steps,
                                                          int matrices) {
    constexpr unsigned kMostLogSplits = 3, kItemQuarters = 6;
    const unsigned lane = threadIdx.x % 32, first = lane / 4 % 4, rest = lane % 4;
    const auto round = [&](unsigned log_splits) {
      return 4 * matrices * ((steps + (1 << log_splits) - 1) >> log_splits) + kItemQuarters;
    };
    const unsigned teams = warps >> first, rounds = items / teams;
    const unsigned left = items - rounds * teams, rest_teams = warps >> rest;
    const unsigned cost =
        rounds * round(first) + (left + rest_teams - 1) / rest_teams * round(rest);
    const bool possible =
        lane < 16 && rest >= first && rest <= kMostLogSplits && (rest == 0 || 1 << rest <= steps);
    const unsigned best =
        __reduce_min_sync(0xffffffffu, possible ? min(cost, 0x07ffffffu) << 4 | lane : 0xffffffffu);
    const int best_first = best / 4 % 4, best_rest = best % 4;
    const unsigned best_teams = warps >> best_first;
    return {static_cast<int>(items / best_teams * best_teams), best_first, best_rest};
  }
};

// A warp, and its way through the items.
template <typename Format>
class NarrowWarp {
 public:
  using Shape = TiledNarrowShape<Format>;
  using Memory = typename Shape::Memory;

  __device__ __forceinline__ NarrowWarp(const TiledArgs& args, Memory& memory)
      : args_(args),
        m_(memory),
        ring_(memory.ring[threadIdx.x / 32], memory.full[threadIdx.x / 32]),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        matrices_(args.activate && args.gated ? 2 : 1),
        first_matrix_(args.activate && !args.gated ? 1 : 0),
        bands_(args.rows / Shape::kRows),
        band_bytes_(TiledRow<Format>::BandBytes(args.columns)),
        x_(args.columns) {}

  __device__ __forceinline__ void Run() {
    LetNextKernelStart();
    // With the ids at hand, which are older than the kernel before this one, weights can be on
    // their way before that one has ended.
    const bool early = args_.lists.expert_ids != nullptr;
    FewTiles few(args_.lists.expert_ids, args_.lists.entries,
                 early ? static_cast<int>(args_.lists.max_tiles) : 0, args_.lists.experts,
                 m_.tiles[warp_]);
    if (!early) WaitForEarlierKernels();
    items_ = (early ? few.Number() : *args_.lists.num_tiles) * bands_;
    schedule_ = NarrowSchedule::Choose(
        items_, Warps(), (args_.columns + Shape::kStep - 1) / Shape::kStep, matrices_);
    in_rest_ = schedule_.whole == 0;
    item_ = in_rest_ ? FirstOfRest() : GridWarp() >> schedule_.log_splits;
    Share share = {}, next = {};
    bool more = item_ < items_;
    if (more) {
      next = ShareAt(few);
      LetFetch(next);
      FetchAhead();
    }
    if (early) WaitForEarlierKernels();
    if (!more) return;
    x_.MoveTo(RowOfX(next.tile));
    x_.Load(next.split * Shape::kStep);
    while (more) {
      share = next;
      Advance();
      more = item_ < items_;
      if (more) {
        next = ShareAt(few);
        LetFetch(next);
      }
      FetchAhead();
      Multiply(share, next);
      Finish(share);
    }
  }

 private:
  // One warp's part of an item: every 2^log_splits-th step of the tile's band, from step `split`
  // on.
  struct Share {
    WarpTile tile;
    int band, log_splits, split;
  };

  // Where a share's weights are.
  struct Bands {
    int expert, band, log_splits, split;
  };

  __device__ __forceinline__ int Warps() const { return gridDim.x * Shape::kWarps; }
  __device__ __forceinline__ int GridWarp() const { return blockIdx.x * Shape::kWarps + warp_; }
  // In rounds without idle teams a block's teams have neighbouring items, of the same tokens. The
  // others' teams are numbered across the blocks, so that the items are spread over all
  // multiprocessors.
  __device__ __forceinline__ int FirstOfRest() const {
    return schedule_.whole + (warp_ >> schedule_.rest_log_splits) * gridDim.x + blockIdx.x;
  }
  __device__ __forceinline__ int LogSplits() const {
    return in_rest_ ? schedule_.rest_log_splits : schedule_.log_splits;
  }
  __device__ __forceinline__ void Advance() {
    item_ += Warps() >> LogSplits();
    if (!in_rest_ && item_ >= schedule_.whole) {
      in_rest_ = true;
      item_ = FirstOfRest();
    }
  }

  __device__ __forceinline__ Share ShareAt(FewTiles& few) const {
    const int index = static_cast<unsigned>(item_) / static_cast<unsigned>(bands_);
    WarpTile tile;
    if (args_.lists.expert_ids != nullptr) {
      tile.expert = few.Expert(index);
      tile.count = few.Take(index);
      tile.pair = lane_ / 4 < tile.count ? m_.tiles[warp_].pair[lane_ / 4] : -1;
      __syncwarp();
    } else {
      const TokenTile listed = args_.lists.tiles[index];
      tile.expert = listed.expert;
      tile.count = listed.count;
      tile.pair = lane_ / 4 < listed.count ? args_.lists.pairs[listed.begin + lane_ / 4] : -1;
    }
    return {tile, item_ - index * bands_, LogSplits(), warp_ & ((1 << LogSplits()) - 1)};
  }

  __device__ __forceinline__ void LetFetch(const Share& share) {
    next_ = {share.tile.expert, share.band, share.log_splits, share.split};
    has_next_ = true;
  }

  // Moves on to the next band to fetch, of this share or the next one; false where there is none
  // yet.
  __device__ __forceinline__ bool NextBand() {
    if (fetch_matrix_ + 1 < matrices_) {
      ++fetch_matrix_;
    } else if (has_next_) {
      fetched_ = next_;
      has_next_ = false;
      fetch_matrix_ = 0;
    } else {
      return false;
    }
    const TiledMatrix& matrix = args_.matrix[first_matrix_ + fetch_matrix_];
    const int row = fetched_.band * Shape::kRows, skipped = fetched_.split * Shape::kStageBytes;
    fetch_from_ =
        matrix.data + fetched_.expert * matrix.expert_bytes + row * args_.row_bytes + skipped;
    fetch_aux_ = matrix.aux + (fetched_.expert * matrix.expert_rows + row) * 2;
    fetch_left_ = band_bytes_ - skipped;  // a share has a step at least
    fetch_stride_ = Shape::kStageBytes << fetched_.log_splits;
    return true;
  }

  __device__ __forceinline__ bool FetchStep() {
    if (fetch_left_ <= 0 && !NextBand()) return false;
    ring_.Fetch(fetch_from_, min(Shape::kStageBytes, fetch_left_), fetch_aux_);
    fetch_from_ += fetch_stride_;
    fetch_left_ -= fetch_stride_;
    fetch_aux_ = nullptr;
    return true;
  }

  __device__ __forceinline__ void FetchAhead() {
    while (ring_.HasPlace() && FetchStep()) {
    }
  }

  // Of lane / 4's token, or where there is none of the tile's first.
  __device__ __forceinline__ const half* RowOfX(const WarpTile& tile) const {
    const int first = __shfl_sync(0xffffffffu, tile.pair, 0);
    const int row = (tile.pair >= 0 ? tile.pair : first) / args_.pairs_a_row;
    return static_cast<const half*>(args_.x.values) + row * args_.x.pitch;
  }

  // next: the share that follows, whose first activations are loaded at the end; or the same again.
  __device__ __forceinline__ void Multiply(const Share& share, const Share& next) {
    const int g = lane_ / 4, t = lane_ % 4;
    const WarpTile& tile = share.tile;
    if (tile.pair >= 0) known_.Load(args_, tile.expert, tile.pair);
    const int begin = share.split * Shape::kStep, stride = Shape::kStep << share.log_splits;
#pragma unroll 1
    for (int m = 0; m < matrices_; ++m) {
      BandSums sums;
#pragma unroll 1
      for (int column = begin; column < args_.columns; column += stride) {
        int next_column = column + stride;
        if (next_column >= args_.columns) {
          next_column = begin;
          if (m == matrices_ - 1) {
            x_.MoveTo(RowOfX(next.tile));
            next_column = next.split * Shape::kStep;
          }
        }
        MultiplyStep<Format>(ring_, x_, column == begin, column, next_column, args_.columns, sums);
        FetchStep();
      }
      // A lane holds rows g and g + 8 of tokens 2 t and 2 t + 1.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        m_.sums[warp_][m][2 * t + i % 2][g + 8 * (i / 2)] = sums.Sum(i);
      }
    }
  }

  __device__ __forceinline__ void Finish(const Share& share) {
    const WarpTile& tile = share.tile;
    float h_factor = 0;
    if (args_.activate && tile.pair >= 0) {
      h_factor = ScaleOfH(args_, known_, tile.expert, tile.pair, share.band == 0 && lane_ % 4 == 0);
    }
    SyncTeam(share.log_splits);
    Store(share, known_.Factor(), h_factor);
    SyncTeam(share.log_splits);
  }

  // Teams of every size have barriers of their own: some warps may have gone on to larger teams.
  __device__ __forceinline__ void SyncTeam(int log_splits) const {
    static_assert(Shape::kWarps == 8);
    if (log_splits == 0) {
      __syncwarp();
    } else {
      const int first = log_splits == 1 ? 1 : log_splits == 2 ? 5 : 7;
      asm volatile("bar.sync %0, %1;" ::"r"(first + (warp_ >> log_splits)), "r"(32 << log_splits)
                   : "memory");
    }
  }

  // A lane has one row of every token whose turn it is: its team's lanes share the tile. factor and
  // h_factor are those of token lane / 4.
  __device__ __forceinline__ void Store(const Share& share, float factor, float h_factor) const {
    const int n = share.band * Shape::kRows + lane_ % Shape::kRows;
    if (!args_.activate) {
      ForEachToken(share, factor, h_factor, [&](int pair, float first, float, float) {
        cuda::Store(args_.y, pair * args_.y_pitch + n, args_.y_type, first);
      });
      return;
    }
    const RowFinish finish(args_, share.tile.expert, n);
    half* y = static_cast<half*>(args_.y) + n / 128 * 128 + NarrowPlace(n % 128);
    WithActivation(args_.activation, [&](auto activation) {
      ForEachToken(share, factor, h_factor,
                   [&](int pair, float first, float second, float pair_h_factor) {
                     const float h = finish.Activate<decltype(activation)::value>(
                         args_, first, matrices_ == 2 ? second : first);
                     y[pair * args_.y_pitch] = __float2half_rn(h * pair_h_factor);
                   });
    });
  }

  // f(pair, sum of the first matrix, of the second, factor of h).
  template <typename F>
  __device__ __forceinline__ void ForEachToken(const Share& share, float factor, float h_factor,
                                               F f) const {
    const int row = lane_ % Shape::kRows, splits = 1 << share.log_splits;
    const int first_warp = warp_ - share.split;
#pragma unroll 1
    for (int base = 2 * share.split; base < share.tile.count; base += 2 * splits) {
      const int token = base + lane_ / Shape::kRows, source = 4 * min(token, Shape::kTokens - 1);
      const int pair = __shfl_sync(0xffffffffu, share.tile.pair, source);
      const float pair_factor = __shfl_sync(0xffffffffu, factor, source);
      const float pair_h_factor = __shfl_sync(0xffffffffu, h_factor, source);
      if (token >= share.tile.count) continue;
      float first = 0, second = 0;
      for (int s = 0; s < splits; ++s) {
        first += m_.sums[first_warp + s][0][token][row];
        if (matrices_ == 2) second += m_.sums[first_warp + s][1][token][row];
      }
      f(pair, first * pair_factor, second * pair_factor, pair_h_factor);
    }
  }

  const TiledArgs& args_;
  Memory& m_;
  WarpRing<Format> ring_;
  const int warp_, lane_, matrices_, first_matrix_, bands_, band_bytes_;
  NarrowSchedule schedule_ = {};
  int items_ = 0, item_ = 0;  // all of them; the one of the share that is found next
  bool in_rest_ = false;
  StepOfX x_;
  BoundOfH known_ = {};
  // What is fetched after the share that is fetched now, if anything.
  Bands fetched_ = {}, next_ = {};
  bool has_next_ = false;
  // The step that is fetched next, and the bytes from it to the band's end: none at first.
  const uint8_t* fetch_from_ = nullptr;
  const float* fetch_aux_ = nullptr;  // null but for a band's first step
  int fetch_left_ = 0, fetch_stride_ = 0, fetch_matrix_ = 1;
};

template <typename Format>
__global__ void __launch_bounds__(32 * TiledNarrowShape<Format>::kWarps,
                                  TiledNarrowShape<Format>::kBlocks)
    TiledNarrow(const __grid_constant__ TiledArgs args) {
  extern __shared__ __align__(128) uint8_t shared[];
  NarrowWarp<Format>(args, *reinterpret_cast<typename TiledNarrowShape<Format>::Memory*>(shared))
      .Run();
}

}  // namespace jax_moe::cuda
