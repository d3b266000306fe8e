// Tiled weights times up to 8 tokens of an expert: bound by the bytes of the weights.
//
// A persistent grid. An item is a tile of tokens and a band of 16 rows, of gate and up both where
// both are there; with many items of few columns it is two bands of one matrix. A team of 1, 2, 4
// or 8 warps has an item, each warp every 1st, 2nd, ... 256 columns of it. Items go out in rounds
// to teams of one size, and those that are left over to larger teams, so that the last round is
// short (NarrowSchedule). A warp streams the bytes of its items, one after another, through a ring
// in shared memory of its own, several hundred cycles ahead, and decodes them straight into
// tensor-core operands. Warps wait for their team only, once an item, to add their sums in warp
// order.
#pragma once

#include <type_traits>

#include "ffi/cuda/block_tiles.cuh"
#include "ffi/cuda/divisor.cuh"
#include "ffi/cuda/few_tiles.cuh"
#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/tiled_epilogue.cuh"
#include "ffi/cuda/tiled_step.cuh"
#include "ffi/cuda/warp_ring.cuh"

namespace jax_moe::cuda {

// The first `whole` items go to teams of 2^log_splits warps in rounds without idle teams, the
// others to teams of 2^rest_log_splits.
struct NarrowSchedule {
  int whole, log_splits, rest_log_splits;

  // The schedule that takes least, by a whole warp: a round takes the steps of 256 columns of a
  // warp of its teams, and about two steps for what an item costs besides.
  static __device__ __forceinline__ NarrowSchedule Choose(unsigned items, unsigned warps, int steps,
                                                          int matrices) {
    constexpr unsigned kMostLogSplits = 3, kItemQuarters = 9;
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

// One warp's part of an item: every 2^log_splits-th step of the band of a tile of `count` tokens,
// from step `split` on. A warp's two, the one at hand and the next one, are in shared memory, for
// the loop over the steps needs nearly all registers.
struct NarrowShare {
  int expert, count, band, log_splits, split;
};

// kBlockTiles: each block finds tiles itself, from the ids; else they are listed, or each warp
// does.
template <typename Format, bool kBlockTiles>
struct alignas(16) NarrowMemory {
  using Shape = TiledNarrowShape<Format>;
  // The rest is the L1 cache's, for the activations.
  static constexpr int kStages = Shape::Stages(50000);
  typename Shape::Stage ring[Shape::kWarps][kStages];
  uint64_t full[Shape::kWarps][kStages];
  float sums[Shape::kWarps][2][Shape::kTokens][Shape::kSumRows];
  std::conditional_t<kBlockTiles, BlockTiles::Table, FewTiles::Table[Shape::kWarps]> tiles;
  NarrowShare shares[Shape::kWarps][2];

  // What a warp finds tiles with.
  __device__ __forceinline__ decltype(auto) MemoryOfTiles(int warp) {
    if constexpr (kBlockTiles) {
      static_assert(sizeof(sums) >= BlockTiles::kScratchBytes);  // there are none yet
      return BlockTiles::Memory{tiles, reinterpret_cast<int32_t*>(sums)};
    } else {
      return (tiles[warp]);
    }
  }
};

// A warp, and its way through the items.
template <typename Format, bool kBlockTiles>
class NarrowWarp {
 public:
  using Shape = TiledNarrowShape<Format>;
  using Memory = NarrowMemory<Format, kBlockTiles>;
  using Tiles = std::conditional_t<kBlockTiles, BlockTiles, FewTiles>;
  static constexpr int kStepsOfTwo = 16;  // with more steps bands go out singly

  __device__ __forceinline__ NarrowWarp(const TiledArgs& args, Memory& memory)
      : args_(args),
        m_(memory),
        ring_(memory.ring[threadIdx.x / 32], memory.full[threadIdx.x / 32]),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        first_matrix_(args.activate && !args.gated ? 1 : 0),
        steps_((args.columns + Shape::kStep - 1) / Shape::kStep),
        by_pairs_a_row_(args.pairs_a_row),
        x_(args.columns) {}

  __device__ __forceinline__ void Run() {
    // With ids or lists at hand that are older than the kernel before this one, weights can be on
    // their way before that one has ended.
    const bool has_ids = kBlockTiles || args_.lists.expert_ids != nullptr;
    const bool early = has_ids || args_.lists.older;
    if (!early) WaitForEarlierKernels();
    LetNextKernelStart();  // which may then read the lists at once: Lists::older
    Tiles few(args_.lists.expert_ids, args_.lists.entries,
              has_ids ? static_cast<int>(args_.lists.max_tiles) : 0, args_.lists.experts,
              m_.MemoryOfTiles(warp_));
    const int tiles = has_ids ? few.Number() : *args_.lists.num_tiles;
    bands_ = args_.rows / Shape::kRows;
    two_bands_ = !args_.activate && bands_ % 2 == 0 && steps_ <= kStepsOfTwo &&
                 tiles * bands_ >= 2 * Warps();
    if (two_bands_) bands_ /= 2;
    parts_ = two_bands_ || (args_.activate && args_.gated) ? 2 : 1;
    by_bands_ = Divisor(bands_);
    items_ = tiles * bands_;
    schedule_ = NarrowSchedule::Choose(items_, Warps(), steps_, parts_);
    in_rest_ = schedule_.whole == 0;
    item_ = in_rest_ ? FirstOfRest() : GridWarp() >> schedule_.log_splits;
    bool more = item_ < items_;
    if (more) {
      LoadTile();
      TakeShare(few);
      FetchAhead();
    }
    if (early) WaitForEarlierKernels();
    for (bool first = true;; first = false) {
      // The next share's first activations, and what bounds its h, come while this one's results
      // are stored. What has come from memory is used before, else it would be waited for with
      // them.
      if (!first) SetFactors();
      if (more) {
        asm volatile("" : "+r"(listed_.expert), "+r"(listed_.begin), "+r"(listed_.count));
        const int row = RowOfX();
        x_.MoveTo(static_cast<const half*>(args_.x.values) + row * args_.x.pitch);
        x_.Load(Next().split * Shape::kStep);
        if (next_pair_ >= 0) known_.Load(args_, Next().expert, next_pair_, row);
      }
      if (!first) Finish();
      if (!more) return;
      pair_ = next_pair_;
      current_ ^= 1;
      more = item_ < items_;
      if (more) TakeShare(few);
      FetchAhead();
      Multiply();
    }
  }

 private:
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

  // The tile of item_, wanted an item later.
  __device__ __forceinline__ void LoadTile() {
    if (kBlockTiles) return;
    if (args_.lists.expert_ids == nullptr && item_ < items_) {
      listed_ = args_.lists.tiles[by_bands_.Quotient(item_)];
    }
  }

  __device__ __forceinline__ const NarrowShare& Current() const {
    return m_.shares[warp_][current_];
  }
  __device__ __forceinline__ const NarrowShare& Next() const {
    return m_.shares[warp_][current_ ^ 1];
  }

  // The share at item_ is the next one; item_ moves on.
  __device__ __forceinline__ void TakeShare(Tiles& few) {
    const int index = by_bands_.Quotient(item_);
    int expert, count;
    if constexpr (kBlockTiles) {
      const BlockTiles::Tile tile = few.At(index);
      expert = tile.expert;
      count = tile.count;
      next_pair_ = lane_ / 4 < count ? m_.tiles.pair[tile.begin + lane_ / 4] : -1;
    } else if (args_.lists.expert_ids != nullptr) {
      expert = few.Expert(index);
      count = few.Take(index);
      next_pair_ = lane_ / 4 < count ? m_.tiles[warp_].pair[lane_ / 4] : -1;
      __syncwarp();  // the next Take writes pairs
    } else {
      expert = listed_.expert;
      count = listed_.count;
      next_pair_ = lane_ / 4 < count ? args_.lists.pairs[listed_.begin + lane_ / 4] : -1;
    }
    const int log_splits = LogSplits();
    // Every lane writes, and so need not wait for another one.
    m_.shares[warp_][current_ ^ 1] = {expert, count, item_ - index * bands_, log_splits,
                                      warp_ & ((1 << log_splits) - 1)};
    has_next_ = true;
    Advance();
    LoadTile();
  }

  __device__ __forceinline__ int FirstRow(const NarrowShare& share) const {
    return (two_bands_ ? 2 * share.band : share.band) * Shape::kRows;
  }

  // Moves on to the next band to fetch, of this share or the next one; false where there is none
  // yet.
  __device__ __forceinline__ bool NextBand() {
    if (fetch_part_ + 1 < parts_) {
      ++fetch_part_;
    } else if (has_next_) {
      has_next_ = false;
      fetch_part_ = 0;
      fetch_share_ ^= 1;
    } else {
      return false;
    }
    const TiledMatrix& matrix = args_.matrix[two_bands_ ? 0 : first_matrix_ + fetch_part_];
    const NarrowShare& share = m_.shares[warp_][fetch_share_];
    const int row = FirstRow(share) + (two_bands_ ? Shape::kRows * fetch_part_ : 0);
    const int begin = share.split * Shape::kStageBytes;
    fetch_from_ = matrix.data + share.expert * matrix.expert_bytes + row * args_.row_bytes + begin;
    fetch_left_ = static_cast<int>(args_.row_bytes) * Shape::kRows - begin;
    fetch_stride_ = Shape::kStageBytes << share.log_splits;
    ring_.Fetch(fetch_from_, StepBytes(),
                matrix.aux + (share.expert * matrix.expert_rows + row) * 2);
    return true;
  }

  __device__ __forceinline__ bool FetchStep() {
    if (fetch_left_ > 0) {
      ring_.Fetch(fetch_from_, StepBytes());
    } else if (!NextBand()) {
      return false;
    }
    fetch_from_ += fetch_stride_;
    fetch_left_ -= fetch_stride_;
    return true;
  }
  __device__ __forceinline__ int StepBytes() const {
    // Rows of whole atoms of 256 columns have no partial step.
    return TiledUnit<Format>::kChunks == 2 ? Shape::kStageBytes
                                           : min(fetch_left_, Shape::kStageBytes);
  }

  __device__ __forceinline__ void FetchAhead() {
    while (ring_.HasPlace() && FetchStep()) {
    }
  }

  // Row of x of lane / 4's token of the next share, or where there is none of its first.
  __device__ __forceinline__ int RowOfX() const {
    const int first = __shfl_sync(0xffffffffu, next_pair_, 0);
    return by_pairs_a_row_.Quotient(next_pair_ >= 0 ? next_pair_ : first);
  }

  __device__ __forceinline__ void Multiply() {
    const int begin = Current().split * Shape::kStep;
    const int stride = Shape::kStep << Current().log_splits;
#pragma unroll 1
    for (int m = 0; m < parts_; ++m) {
      BandSums sums;
      sums.Begin(ring_.Front().aux);
      int column = begin, after = m == parts_ - 1 ? -1 : begin;
      asm volatile("" : "+r"(after));  // else it is found anew in every step
      bool last;
#pragma unroll 1
      do {
        int next_column = column + stride;
        last = next_column >= args_.columns;
        if (last) next_column = after;
        MultiplyStep<Format>(ring_, x_, false, column, next_column, args_.columns, sums);
        FetchStep();
        column = next_column;
      } while (!last);
      const int g = lane_ / 4, t = lane_ % 4;
      // A lane holds rows g and g + 8 of tokens 2 t and 2 t + 1.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        m_.sums[warp_][m][2 * t + i % 2][g + 8 * (i / 2)] = sums.Sum(i);
      }
    }
  }

  __device__ __forceinline__ void SetFactors() {
    if (pair_ < 0) return;
    factor_ = known_.Factor();
    if (args_.activate) {
      const bool writes = Current().band == 0 && lane_ % 4 == 0;
      h_factor_ = ScaleOfH(args_, known_, Current().expert, pair_, writes);
    }
  }

  __device__ __forceinline__ void Finish() const {
    const NarrowShare share = Current();
    SyncTeam(share.log_splits);
    Store(share);
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

  // A lane has one row of every token whose turn it is: its team's lanes share the tile.
  __device__ __forceinline__ void Store(const NarrowShare& share) const {
    const int n = FirstRow(share) + lane_ % Shape::kRows;
    if (!args_.activate) {
      ForEachToken(share, [&](int pair, float first, float second, float) {
        const int64_t at = pair * args_.y_pitch + n;
        cuda::Store(args_.y, at, args_.y_type, first);
        if (two_bands_) cuda::Store(args_.y, at + Shape::kRows, args_.y_type, second);
      });
      return;
    }
    half* y = static_cast<half*>(args_.y) + n / 128 * 128 + NarrowPlace(n % 128);
    ForEachToken(share, [&](int pair, float first, float second, float pair_h_factor) {
      // Not before the loop, where some warps have no turn, nor in the activations, some of which
      // do without gate: what might still be under way, the compiler waits for at the start of
      // every step, and for x with it.
      const RowFinish finish(args_, share.expert, n);
      const float gate = finish.Gate(first), up = finish.Up(parts_ == 2 ? second : first);
      float h;
      // In the loop: code that is short stays in the instruction cache, and turns are few.
      WithActivation(args_.activation, [&](auto activation) {
        h = FastActivate<decltype(activation)::value>(gate, up, args_.limit, args_.beta,
                                                      args_.linear_beta);
      });
      y[pair * args_.y_pitch] = __float2half_rn(h * pair_h_factor);
    });
  }

  // f(pair, sum of the first part, of the second, factor of h).
  template <typename F>
  __device__ __forceinline__ void ForEachToken(const NarrowShare& share, F f) const {
    const int row = lane_ % Shape::kRows, splits = 1 << share.log_splits;
    const int first_warp = warp_ - share.split;
#pragma unroll 1
    for (int base = 2 * share.split; base < share.count; base += 2 * splits) {
      const int token = base + lane_ / Shape::kRows, source = 4 * min(token, Shape::kTokens - 1);
      const int pair = __shfl_sync(0xffffffffu, pair_, source);
      const float pair_factor = __shfl_sync(0xffffffffu, factor_, source);
      const float pair_h_factor = __shfl_sync(0xffffffffu, h_factor_, source);
      if (token >= share.count) continue;
      float first = 0, second = 0;
      for (int s = 0; s < splits; ++s) {
        first += m_.sums[first_warp + s][0][token][row];
        if (parts_ == 2) second += m_.sums[first_warp + s][1][token][row];
      }
      f(pair, first * pair_factor, second * pair_factor, pair_h_factor);
    }
  }

  const TiledArgs& args_;
  Memory& m_;
  WarpRing<Format, Memory::kStages> ring_;
  const int warp_, lane_, first_matrix_, steps_;
  const Divisor by_pairs_a_row_;
  // An item's bands: two where there are many items, for what it costs besides its steps, else one;
  // its parts: bands, or one of gate and one of up. bands_: items of a tile.
  bool two_bands_ = false;
  int bands_ = 0, parts_ = 1;
  Divisor by_bands_ = Divisor(1);
  NarrowSchedule schedule_ = {};
  int items_ = 0, item_ = 0;  // all of them; the one of the share that is taken next
  bool in_rest_ = false;
  TokenTile listed_ = {};  // item_'s, where tiles are listed
  StepOfX x_;
  int pair_ = -1, next_pair_ = -1;  // of token lane / 4 of the shares (-1: none)
  int current_ = 1;                 // which of shares is at hand
  BoundOfH known_ = {};
  float factor_ = 0, h_factor_ = 0;  // of token lane / 4
  // The step that is fetched next, and the bytes from there to the band's end: the first band is
  // yet to be begun. has_next_: there is another share than the one that is fetched.
  const uint8_t* fetch_from_ = nullptr;
  int fetch_left_ = 0, fetch_stride_ = 0, fetch_part_ = 1, fetch_share_ = 1;
  bool has_next_ = false;
};

template <typename Format, bool kBlockTiles>
__global__ void __launch_bounds__(32 * TiledNarrowShape<Format>::kWarps,
                                  TiledNarrowShape<Format>::kBlocks)
    TiledNarrow(const __grid_constant__ TiledArgs args) {
  extern __shared__ __align__(128) uint8_t shared[];
  using Memory = NarrowMemory<Format, kBlockTiles>;
  NarrowWarp<Format, kBlockTiles>(args, *reinterpret_cast<Memory*>(shared)).Run();
}

}  // namespace jax_moe::cuda
