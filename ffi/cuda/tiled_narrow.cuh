// Tiled weights times up to 8 tokens of an expert: bound by the bytes of the weights.
//
// A persistent grid. An item is a tile of tokens and a band of 16 rows, of gate and up both where
// both are there. A team of 1, 2, 4 or 8 warps has an item, each warp every 1st, 2nd, ... 256
// columns of it. Most items are shared out evenly to teams of one size, neighbouring ones to those
// of a block, so that a team does for many bands of a tile at once what is to be done for a tile.
// Those that are left over may go to larger teams, so that the last round is short
// (NarrowSchedule). A warp streams the bytes of its items, one after another, through a ring in
// shared memory of its own, several hundred cycles ahead, and decodes them straight into
// tensor-core operands. Once tiles are known, warps wait for their team only, once an item or two
// bands of one matrix, to add their sums in warp order.
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

// 2^log_blocks neighbouring blocks, whose items are neighbours, too.
struct NarrowGroups {
  static constexpr int kLogWarps = 3;  // of a block
  int log_blocks;
  Divisor by_groups;

  __device__ __forceinline__ explicit NarrowGroups(int wanted)
      : log_blocks(gridDim.x % (1u << wanted) == 0 ? wanted : 0),
        by_groups(gridDim.x >> log_blocks) {}

  // Teams of 2^log_splits warps, of a group.
  __device__ __forceinline__ int LogTeams(int log_splits) const {
    return log_blocks + kLogWarps - log_splits;
  }
  // In which all of the grid's teams have one of so many items each.
  __device__ __forceinline__ unsigned Rounds(unsigned items, int log_splits) const {
    return by_groups.Quotient(items >> LogTeams(log_splits));
  }
};

// The first `whole` items go to teams of 2^log_splits warps, neighbouring ones to those of a group,
// and as many to all or one more; the others to teams of 2^rest_log_splits, one at a time.
struct NarrowSchedule {
  int whole, log_splits, rest_log_splits;

  // The schedule that takes least, by a whole warp: an item takes the steps of 256 columns of a
  // warp of its teams and half a step for each of its matrices, and one of the rest nearly two
  // steps besides.
  static __device__ __forceinline__ NarrowSchedule Choose(unsigned items,
                                                          const NarrowGroups& groups, int steps,
                                                          int matrices) {
    constexpr unsigned kItemQuarters = 2, kRestQuarters = 7;
    const unsigned lane = threadIdx.x % 32, first = lane / 4 % 4, rest = lane % 4;
    const auto quarters = [&](unsigned log_splits) {
      return matrices * (4 * ((steps + (1 << log_splits) - 1) >> log_splits) + kItemQuarters);
    };
    const auto teams_of = [&](unsigned log_splits) {
      return gridDim.x << (NarrowGroups::kLogWarps - log_splits);
    };
    const unsigned rounds = groups.Rounds(items, first), left = items - rounds * teams_of(first);
    const unsigned rest_rounds = groups.Rounds(left + teams_of(rest) - 1, rest);
    // Teams of the same size have their part of the rest in one go.
    const bool even = first == rest && rounds > 0;
    const unsigned cost = rounds * quarters(first) +
                          rest_rounds * (quarters(rest) + (even ? 0 : kRestQuarters));
    const bool possible = lane < 16 && rest >= first && (rest == 0 || 1 << rest <= steps);
    const unsigned best =
        __reduce_min_sync(0xffffffffu, possible ? min(cost, 0x07ffffffu) << 4 | lane : 0xffffffffu);
    const unsigned whole = even ? items : rounds * teams_of(first);
    return {static_cast<int>(__shfl_sync(0xffffffffu, whole, best % 16)),
            static_cast<int>(best / 4 % 4), static_cast<int>(best % 4)};
  }
};

// A warp's part of a tile of `count` tokens: `bands` bands from `band` on, as far apart as a group
// has teams, and of each every 2^log_splits-th step, from step `split` on. A warp's two, the one at
// hand and the next one, are in shared memory, for the loop over the steps needs nearly all
// registers.
struct NarrowShare {
  int expert, count, band, bands, log_splits, split;
};

// What the results of a token of a share need: its sums' factor, that of h, and its row of y.
struct alignas(16) NarrowToken {
  float factor, h_factor;
  uint8_t* row;
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
  NarrowToken tokens[Shape::kWarps][Shape::kTokens];

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
  // Weights of 8 bits come at nearly the memory's rate, and 4 % slower where every block has a
  // piece of its own of them.
  static constexpr int kLogGroup = Shape::kStageBytes > 4096 ? 3 : 0;
  static_assert(Shape::kWarps == 1 << NarrowGroups::kLogWarps);

  __device__ __forceinline__ NarrowWarp(const TiledArgs& args, Memory& memory)
      : args_(args),
        m_(memory),
        ring_(memory.ring[threadIdx.x / 32], memory.full[threadIdx.x / 32]),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        first_matrix_(args.activate && !args.gated ? 1 : 0),
        log_matrices_(args.activate && args.gated ? 1 : 0),
        steps_((args.columns + Shape::kStep - 1) / Shape::kStep),
        bands_(args.rows / Shape::kRows),
        by_pairs_a_row_(args.pairs_a_row),
        by_bands_(bands_),
        groups_(kLogGroup),
        x_(args.columns) {}

  __device__ __forceinline__ void Run() {
    // With ids or lists at hand that are older than the kernel before this one, weights can be on
    // their way before that one has ended.
    const bool has_ids = kBlockTiles || args_.lists.expert_ids != nullptr;
    const bool early = has_ids || args_.lists.older;
    if (!early) WaitForEarlierKernels();
    LetNextKernelStart();  // which may then read the lists at once: Lists::older
    Tiles tiles(args_.lists.expert_ids, args_.lists.entries,
              has_ids ? static_cast<int>(args_.lists.max_tiles) : 0, args_.lists.experts,
              m_.MemoryOfTiles(warp_));
    items_ = (has_ids ? tiles.Number() : *args_.lists.num_tiles) * bands_;
    schedule_ = NarrowSchedule::Choose(items_, groups_, steps_, 1 << log_matrices_);
    Begin();
    bool more = item_ < items_;
    if (more) {
      LoadTile();
      TakeShare(tiles);
      FetchAhead();
    }
    if (early) WaitForEarlierKernels();
    if (!more) return;
    LoadX();
    while (true) {
      pair_ = next_pair_;
      current_ ^= 1;
      left_ = Current().bands;
      more = item_ < items_;
      if (more) TakeShare(tiles);
      FetchAhead();
      for (bool first = true; left_ > 0; first = false) {
        Multiply();
        if (first) SetFactors();
        // While the share's last results are stored.
        if (more && left_ == 0) LoadX();
        Finish();
      }
      if (!more) return;
    }
  }

 private:
  __device__ __forceinline__ int Warps() const { return gridDim.x * Shape::kWarps; }
  // This warp's team in its block. In half of the blocks the last ones, which may have fewer items,
  // are other warps', and so other schedulers' of the multiprocessor.
  __device__ __forceinline__ int Team(int log_splits) const {
    const int shift = blockIdx.x < gridDim.x / 2 ? 0 : 2 >> log_splits;
    return ((warp_ >> log_splits) + shift) & ((Shape::kWarps >> log_splits) - 1);
  }
  __device__ __forceinline__ int LogTeams() const {
    return groups_.LogTeams(schedule_.log_splits);
  }
  // A group of blocks has neighbouring items, its teams in turns: most of a team's are of the same
  // tokens. Those of the rest are spread over all multiprocessors.
  __device__ __forceinline__ void Begin() {
    if (schedule_.whole == 0) return BeginRest();
    const unsigned groups = gridDim.x >> groups_.log_blocks;
    const unsigned group = blockIdx.x >> groups_.log_blocks;
    const unsigned each = groups_.by_groups.Quotient(schedule_.whole);
    const unsigned others = schedule_.whole - each * groups;
    const auto begin = [&](unsigned g) {
      return static_cast<int>(g * each + groups_.by_groups.Quotient(g * others));
    };
    const int block = blockIdx.x - (group << groups_.log_blocks);
    item_ = begin(group) + (Team(schedule_.log_splits) << groups_.log_blocks) + block;
    end_ = begin(group + 1);
  }
  __device__ __forceinline__ void BeginRest() {
    in_rest_ = true;
    item_ = schedule_.whole + Team(schedule_.rest_log_splits) * gridDim.x + blockIdx.x;
    end_ = item_ + 1;
  }
  __device__ __forceinline__ void Advance(int bands) {
    item_ += bands << LogTeams();
    if (item_ < end_) return;
    if (in_rest_) {
      item_ = end_ - 1 + (Warps() >> schedule_.rest_log_splits);
      end_ = item_ + 1;
    } else {
      BeginRest();
    }
  }

  // The tile of item_, wanted a share later.
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
  __device__ __forceinline__ void TakeShare(Tiles& tiles) {
    const int index = by_bands_.Quotient(item_);
    int expert, count;
    if constexpr (kBlockTiles) {
      const BlockTiles::Tile tile = tiles.At(index);
      expert = tile.expert;
      count = tile.count;
      next_pair_ = lane_ / 4 < count ? m_.tiles.pair[tile.begin + lane_ / 4] : -1;
    } else if (args_.lists.expert_ids != nullptr) {
      expert = tiles.Expert(index);
      count = tiles.Take(index);
      next_pair_ = lane_ / 4 < count ? m_.tiles[warp_].pair[lane_ / 4] : -1;
      __syncwarp();  // the next Take writes pairs
    } else {
      expert = listed_.expert;
      count = listed_.count;
      next_pair_ = lane_ / 4 < count ? args_.lists.pairs[listed_.begin + lane_ / 4] : -1;
    }
    const int log_splits = in_rest_ ? schedule_.rest_log_splits : schedule_.log_splits;
    const int band = item_ - index * bands_;
    const int bands = (min(end_ - item_, bands_ - band) - 1 >> LogTeams()) + 1;
    // Every lane writes, and so need not wait for another one.
    m_.shares[warp_][current_ ^ 1] = {expert, count,      band,
                                      bands,  log_splits, warp_ & ((1 << log_splits) - 1)};
    has_next_ = true;
    Advance(bands);
    LoadTile();
  }

  // Moves on to the next band to fetch, of this share or the next one; false where there is none
  // yet.
  __device__ __forceinline__ bool NextBand() {
    if (fetch_parts_ == 0) {
      if (!has_next_) return false;
      has_next_ = false;
      fetch_share_ ^= 1;
      fetch_parts_ = m_.shares[warp_][fetch_share_].bands << log_matrices_;
    }
    const NarrowShare& share = m_.shares[warp_][fetch_share_];
    const TiledMatrix& matrix = args_.matrix[first_matrix_ + (fetch_parts_ & log_matrices_)];
    const int left = (fetch_parts_ + log_matrices_) >> log_matrices_;  // bands, this one included
    const int row = (share.band + ((share.bands - left) << LogTeams())) * Shape::kRows;
    const int row_bytes = static_cast<int>(args_.row_bytes);
    const int begin = share.split * Shape::kStageBytes;
    --fetch_parts_;
    fetch_from_ = matrix.data + share.expert * matrix.expert_bytes +
                  (static_cast<int64_t>(row) * row_bytes + begin);
    fetch_left_ = row_bytes * Shape::kRows - begin;
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

  // The next share's first activations, and what bounds its h. What has come from memory is used
  // before, else it would be waited for with them.
  __device__ __forceinline__ void LoadX() {
    asm volatile("" : "+r"(listed_.expert), "+r"(listed_.begin), "+r"(listed_.count));
    const int row = RowOfX();
    x_.MoveTo(static_cast<const half*>(args_.x.values) + row * args_.x.pitch);
    x_.Load(Next().split * Shape::kStep);
    if (next_pair_ >= 0) known_.Load(args_, Next().expert, next_pair_, row);
  }

  // Row of x of lane / 4's token of the next share, or where there is none of its first.
  __device__ __forceinline__ int RowOfX() const {
    const int first = __shfl_sync(0xffffffffu, next_pair_, 0);
    return by_pairs_a_row_.Quotient(next_pair_ >= 0 ? next_pair_ : first);
  }

  // The next bands: one of gate and one of up, or two of one matrix, or its last one.
  __device__ __forceinline__ void Multiply() {
    const int begin = Current().split * Shape::kStep;
    const int stride = Shape::kStep << Current().log_splits;
    parts_ = args_.activate ? 1 << log_matrices_ : min(left_, 2);
    left_ -= args_.activate ? 1 : parts_;
#pragma unroll 1
    for (int m = 0; m < parts_; ++m) {
      BandSums sums;
      sums.Begin(ring_.Front().aux);
      int column = begin, after = m == parts_ - 1 && left_ == 0 ? -1 : begin;
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
    if (pair_ >= 0 && lane_ % 4 == 0) {
      NarrowToken token = {known_.Factor(), 0};
      if (args_.activate) {
        token.h_factor = ScaleOfH(args_, known_, Current().expert, pair_, Current().band == 0);
      }
      const int bytes = !args_.activate && args_.y_type == Element::kF32 ? 4 : 2;
      token.row = static_cast<uint8_t*>(args_.y) + pair_ * (args_.y_pitch * bytes);
      m_.tokens[warp_][lane_ / 4] = token;
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
    const int bands = args_.activate ? 1 : parts_;
    const unsigned n =
        (share.band + ((share.bands - left_ - bands) << LogTeams())) * Shape::kRows +
        lane_ % Shape::kRows;
    if (!args_.activate) {
      ForEachToken(share, [&](const NarrowToken& token, float first, float second) {
        cuda::Store(token.row, n, args_.y_type, first);
        if (parts_ == 1) return;
        cuda::Store(token.row, n + (Shape::kRows << LogTeams()), args_.y_type, second);
      });
      return;
    }
    const unsigned place = n / 128 * 128 + NarrowPlace(n % 128);
    ForEachToken(share, [&](const NarrowToken& token, float first, float second) {
      float gate = first, up = parts_ == 2 ? second : first;
      // Not before the loop, where some warps have no turn, nor in the activations, some of which
      // do without gate: what might still be under way, the compiler waits for at the start of
      // every step, and for x with it.
      if (RowFinish::IsWanted(args_)) {
        const RowFinish finish(args_, share.expert, n);
        gate = finish.Gate(gate), up = finish.Up(up);
      }
      float h;
      // In the loop: code that is short stays in the instruction cache, and turns are few.
      WithActivation(args_.activation, [&](auto activation) {
        h = FastActivate<decltype(activation)::value>(gate, up, args_.limit, args_.beta,
                                                      args_.linear_beta);
      });
      reinterpret_cast<half*>(token.row)[place] = __float2half_rn(h * token.h_factor);
    });
  }

  // f(token, result of the first part, of the second).
  template <typename F>
  __device__ __forceinline__ void ForEachToken(const NarrowShare& share, F f) const {
    const int row = lane_ % Shape::kRows, splits = 1 << share.log_splits;
    const int first_warp = warp_ - share.split;
#pragma unroll 1
    for (int t = 2 * share.split + lane_ / Shape::kRows; t < share.count; t += 2 * splits) {
      const NarrowToken token = m_.tokens[warp_][t];
      float first = 0, second = 0;
#pragma unroll 1
      for (int s = 0; s < splits; ++s) {
        first += m_.sums[first_warp + s][0][t][row];
        if (parts_ == 2) second += m_.sums[first_warp + s][1][t][row];
      }
      f(token, first * token.factor, second * token.factor);
    }
  }

  const TiledArgs& args_;
  Memory& m_;
  WarpRing<Format, Memory::kStages> ring_;
  const int warp_, lane_, first_matrix_, log_matrices_, steps_;
  const int bands_;  // items of a tile
  const Divisor by_pairs_a_row_, by_bands_;
  const NarrowGroups groups_;
  NarrowSchedule schedule_ = {};
  // All items; the first one of the share that is taken next, and the end of those that this group
  // has.
  int items_ = 0, item_ = 0, end_ = 0;
  bool in_rest_ = false;
  TokenTile listed_ = {};  // item_'s, where tiles are listed
  StepOfX x_;
  int pair_ = -1, next_pair_ = -1;  // of token lane / 4 of the shares (-1: none)
  int current_ = 1;                 // which of shares is at hand
  // Bands of it that have not been begun, and matrices or bands whose sums are at hand.
  int left_ = 0, parts_ = 1;
  BoundOfH known_ = {};
  // The step that is fetched next, and the bytes from there to its band's end; bands of the share
  // that are yet to be begun, of all matrices. has_next_: there is another share.
  const uint8_t* fetch_from_ = nullptr;
  int fetch_left_ = 0, fetch_stride_ = 0, fetch_parts_ = 0, fetch_share_ = 1;
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
