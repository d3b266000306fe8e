// Tiled weights times up to 8 tokens of an expert: bound by the bytes of the weights.
//
// A persistent grid. An item is a tile of tokens and a band of 16 rows, of gate and up both where both are
// there. A team of 1, 2 or 4 warps has an item, each warp every splits-th 256 columns of it. A warp
// streams the bytes of its items, one after another, through a ring in shared memory of its own, several
// hundred cycles ahead, and decodes them straight into tensor-core operands. Warps wait for their team
// only, once an item, to add their sums in warp order.
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

// From the ids themselves, for up to 32 pairs: tile `first` begins with that pair, if it is the first, the
// ninth, ... of its expert. False where there is none.
__device__ __forceinline__ bool FindWarpTile(const Lists& lists, int first, int32_t* pairs,
                                              WarpTile* tile) {
  const int lane = threadIdx.x % 32;
  const int id = lane < lists.max_tiles ? lists.expert_ids[lane] : -1;
  tile->expert = __shfl_sync(0xffffffffu, id, first);
  if (tile->expert < 0 || tile->expert >= lists.experts) return false;
  const unsigned same = __ballot_sync(0xffffffffu, id == tile->expert);
  const int rank = __popc(same & ((1u << first) - 1));
  if (rank % 8 != 0) return false;
  const int index = __popc(same & ((1u << lane) - 1)) - rank;
  if ((same >> lane & 1) && index >= 0 && index < 8) pairs[index] = lane;
  __syncwarp();
  tile->count = min(8, __popc(same) - rank);
  tile->pair = lane / 4 < tile->count ? pairs[lane / 4] : -1;
  __syncwarp();
  return true;
}

// A warp of a team of 2^log_splits, and its way through the items.
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
        splits_(1 << args.log_splits),
        split_(warp_ & (splits_ - 1)),
        matrices_(args.activate && args.gated ? 2 : 1),
        first_matrix_(args.activate && !args.gated ? 1 : 0),
        bands_(args.rows / Shape::kRows),
        band_bytes_(TiledRow<Format>::BandBytes(args.columns)) {}

  __device__ __forceinline__ void Run() {
    // With the ids at hand, which are older than the kernel before this one, weights can be on their
    // way before that one has ended.
    const bool early = args_.lists.expert_ids != nullptr;
    LetNextKernelStart();
    if (!early) WaitForEarlierKernels();
    tiles_ = early ? static_cast<int>(args_.lists.max_tiles) : *args_.lists.num_tiles;
    const int teams = gridDim.x * (Shape::kWarps >> args_.log_splits);
    const int team = (blockIdx.x * Shape::kWarps + warp_) >> args_.log_splits;
    tile_index_ = team / bands_;
    band_ = team % bands_;
    tile_step_ = teams / bands_;
    band_step_ = teams % bands_;
    WarpTile tile = {}, next = {};
    bool more = Find(&next);
    int band = band_;
    if (more) {
      next_ = MatrixAt(next.expert, band);
      FetchAhead();
      LoadNormalisers(next.expert, band);
    }
    if (early) WaitForEarlierKernels();
    while (more) {
      tile = next;
      band = band_;
      Advance();
      more = Find(&next);
      const float current[2][2] = {{normaliser_[0][0], normaliser_[0][1]},
                                   {normaliser_[1][0], normaliser_[1][1]}};
      if (more) {
        next_ = MatrixAt(next.expert, band_);
        LoadNormalisers(next.expert, band_);
      }
      FetchAhead();
      Item(tile, band, current);
    }
  }

 private:
  // Where a warp's steps are fetched from: those of one item, gate's first.
  struct Source {
    const uint8_t* band = nullptr;  // of the first matrix
    int64_t to_second = 0;
  };

  __device__ __forceinline__ void Advance() {
    tile_index_ += tile_step_;
    band_ += band_step_;
    if (band_ >= bands_) band_ -= bands_, ++tile_index_;
  }

  // The tile of the item at hand, or the next one that has one.
  __device__ __forceinline__ bool Find(WarpTile* tile) {
    for (; tile_index_ < tiles_; Advance()) {
      if (args_.lists.expert_ids != nullptr) {
        if (FindWarpTile(args_.lists, tile_index_, m_.pair[warp_], tile)) return true;
      } else {
        const TokenTile listed = args_.lists.tiles[tile_index_];
        tile->expert = listed.expert;
        tile->count = listed.count;
        tile->pair = lane_ / 4 < listed.count ? args_.lists.pairs[listed.begin + lane_ / 4] : -1;
        return true;
      }
    }
    return false;
  }

  __device__ __forceinline__ const uint8_t* BandOf(int which, int expert, int band) const {
    const TiledMatrix& matrix = args_.matrix[which];
    return matrix.data + expert * matrix.expert_bytes + band * Shape::kRows * args_.row_bytes;
  }
  __device__ __forceinline__ Source MatrixAt(int expert, int band) const {
    const uint8_t* first = BandOf(first_matrix_, expert, band);
    return {first, matrices_ == 2 ? BandOf(1, expert, band) - first : 0};
  }

  // Moves on to a step to fetch, of this item or the next one; false where there is none yet.
  __device__ __forceinline__ bool HasStep() {
    const int first = split_ * Shape::kStageBytes;
    if (first >= band_bytes_) return false;
    if (fetch_at_ < band_bytes_) return true;
    if (fetch_matrix_ + 1 < matrices_) {
      ++fetch_matrix_;
    } else if (next_.band != nullptr) {
      source_ = next_;
      next_ = {};
      fetch_matrix_ = 0;
    } else {
      return false;
    }
    fetch_at_ = first;
    return true;
  }

  __device__ __forceinline__ void FetchAhead() {
    while (ring_.HasPlace() && HasStep()) {
      const uint8_t* from = source_.band + (fetch_matrix_ == 0 ? 0 : source_.to_second);
      ring_.Fetch(from + fetch_at_, min(Shape::kStageBytes, band_bytes_ - fetch_at_));
      fetch_at_ += splits_ * Shape::kStageBytes;
    }
  }

  // Those of rows lane / 4 and lane / 4 + 8 of the next item, an item ahead.
  __device__ __forceinline__ void LoadNormalisers(int expert, int band) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m == matrices_) break;
      const TiledMatrix& matrix = args_.matrix[first_matrix_ + m];
      const float* aux =
          matrix.aux + (expert * matrix.expert_rows + band * Shape::kRows + lane_ / 4) * 2;
      normaliser_[m][0] = aux[0];
      normaliser_[m][1] = aux[16];
    }
  }

  __device__ __forceinline__ void Item(const WarpTile& tile, int band,
                                       const float (&normaliser)[2][2]) {
    const int g = lane_ / 4, t = lane_ % 4;
    const half* x_row = nullptr;
    float factor = 0, h_factor = 0;
    if (tile.pair >= 0) {
      x_row = static_cast<const half*>(args_.x.values) + tile.pair / args_.pairs_a_row * args_.x.pitch;
      factor = PairFactor(args_, tile.pair);
      if (args_.activate) h_factor = ScaleOfH(args_, tile.expert, tile.pair, band == 0 && t == 0);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m == matrices_) break;
      const float factors[2] = {0x1p24f / normaliser[m][0], 0x1p24f / normaliser[m][1]};
      float sum[2][4] = {};
#pragma unroll 1
      for (int column = split_ * Shape::kStep; column < args_.columns;
           column += splits_ * Shape::kStep) {
        MultiplyStep<Format>(ring_, x_row, column, args_.columns, factors, sum);
        FetchAhead();
      }
      // A lane holds rows g and g + 8 of tokens 2 t and 2 t + 1.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        m_.sums[warp_][m][2 * t + i % 2][g + 8 * (i / 2)] =
            (sum[0][i] + sum[1][i]) * normaliser[m][i / 2];
      }
    }
    SyncTeam();
    Store(tile, band, factor, h_factor);
    SyncTeam();
  }

  __device__ __forceinline__ void SyncTeam() const {
    if (splits_ == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + (warp_ >> args_.log_splits)), "r"(32 * splits_)
                   : "memory");
    }
  }

  // A lane has one row of every token whose turn it is: its team's lanes share the tile. factor and
  // h_factor are those of token lane / 4.
  __device__ __forceinline__ void Store(const WarpTile& tile, int band, float factor,
                                        float h_factor) const {
    const int n = band * Shape::kRows + lane_ % Shape::kRows;
    if (!args_.activate) {
      ForEachToken(tile, factor, h_factor, [&](int pair, float first, float, float) {
        cuda::Store(args_.y, pair * args_.y_pitch + n, args_.y_type, first);
      });
      return;
    }
    const RowFinish finish(args_, tile.expert, n);
    half* y = static_cast<half*>(args_.y) + n / 128 * 128 + NarrowPlace(n % 128);
    WithActivation(args_.activation, [&](auto activation) {
      ForEachToken(tile, factor, h_factor,
                   [&](int pair, float first, float second, float pair_h_factor) {
                     y[pair * args_.y_pitch] = finish.Activate<decltype(activation)::value>(
                         args_, first, matrices_ == 2 ? second : first, pair_h_factor);
                   });
    });
  }

  // f(pair, sum of the first matrix, of the second, factor of h).
  template <typename F>
  __device__ __forceinline__ void ForEachToken(const WarpTile& tile, float factor, float h_factor,
                                               F f) const {
    const int row = lane_ % Shape::kRows, first_warp = warp_ & ~(splits_ - 1);
#pragma unroll 1
    for (int base = 2 * split_; base < tile.count; base += 2 * splits_) {
      const int token = base + lane_ / Shape::kRows, source = 4 * min(token, Shape::kTokens - 1);
      const int pair = __shfl_sync(0xffffffffu, tile.pair, source);
      const float pair_factor = __shfl_sync(0xffffffffu, factor, source);
      const float pair_h_factor = __shfl_sync(0xffffffffu, h_factor, source);
      if (token >= tile.count) continue;
      float first = 0, second = 0;
      for (int s = 0; s < splits_; ++s) {
        first += m_.sums[first_warp + s][0][token][row];
        if (matrices_ == 2) second += m_.sums[first_warp + s][1][token][row];
      }
      f(pair, first * pair_factor, second * pair_factor, pair_h_factor);
    }
  }

  const TiledArgs& args_;
  Memory& m_;
  WarpRing<Format> ring_;
  const int warp_, lane_, splits_, split_, matrices_, first_matrix_, bands_, band_bytes_;
  int tiles_ = 0, tile_index_ = 0, band_ = 0, tile_step_ = 0, band_step_ = 0;
  Source source_, next_;
  float normaliser_[2][2] = {};
  // The step that is fetched next: at first, the next item's.
  int fetch_at_ = 1 << 30, fetch_matrix_ = 1;
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
