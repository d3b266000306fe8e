// Tiled weights times one or two tokens of an expert in a single launch: bound by latency.
//
// A block has 16 rows and a tile of tokens, and a warp of it every 256 columns, or some of these.
// Weights go from memory to registers, for they are read once and by one warp, and all of a step's
// loads are under way at the same time. Meanwhile the warp scales its 256 columns of x by itself,
// so that nobody waits for a whole row. The block's warps meet once, to add their sums in order.
#pragma once

#include "ffi/cuda/eight.cuh"
#include "ffi/cuda/few_tiles.cuh"
#include "ffi/cuda/layer_tiles.cuh"
#include "ffi/cuda/ptx.cuh"
#include "ffi/cuda/row_layouts.cuh"
#include "ffi/cuda/store.cuh"
#include "ffi/cuda/tiled_gemm.h"
#include "ffi/cuda/two_token_step.cuh"

namespace jax_moe::cuda {

struct TiledFewShape {
  static constexpr int kTokens = LayerTiles::kTokens, kRows = 16, kStep = 256;
  // Of a warp.
  struct alignas(16) Memory {
    half x[kTokens][kStep];  // scaled, in the order of StepOfTwo
    uint4 zeros;
    float unit_sums[kTokens][kStep / 16];  // of x as it is multiplied, over each group of the units
    float sums[kTokens][kRows];
    LayerTiles::Table tiles;
    int32_t ids[LayerTiles::kPairs], entries[LayerTiles::kPairs];  // of an only expert
  };
};

// The expert of pair lane. Entries may name pairs that do not exist.
__device__ __forceinline__ int FindFewId(const TiledFewArgs& args, int id, int entry) {
  id = OfLastEntry(id, entry, args.pairs);
  return threadIdx.x % 32 < args.pairs ? id : -1;
}

// A lane's eight columns of a row to where products read them, and the sums that offsets are
// multiplied by, if there are offsets: these are a few additions here, but as many products as the
// weights' where they are used. Returns what undoes the scaling, a power of two for the warp's 256
// columns.
template <typename Format>
__device__ __forceinline__ float PrepareStep(const EightBits& bits, Element type, half* to,
                                             float* sums) {
  const int lane = threadIdx.x % 32;
  Group group;
  ToFloats(bits, type, group.v);
  const int exponent = ExponentOfBits(__reduce_max_sync(0xffffffffu, group.MaxBits()));
  const uint4 packed = PackGroup(group, PowerOfTwo(exponent));
  reinterpret_cast<uint4*>(to)[PlaceOfGroup(lane)] = {packed.x, packed.z, packed.y, packed.w};
  if constexpr (Format::kHasOffset) {
    constexpr int kLanes = 4 / ExactUnit<Format>::kGroups;
    float sum = SumHalves(packed.x) + SumHalves(packed.y) + SumHalves(packed.z) +
                SumHalves(packed.w);
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (lane % kLanes == 0) sums[lane / kLanes] = sum * (1 / kExactUnitScale<Format>);
  }
  return PowerOfTwo(-exponent);
}

template <typename Format>
__global__ void __launch_bounds__(32 * kMostFewWarps, FieldsOf<Format>::kWords > 6 ? 2 : 3)
    TiledFew(const __grid_constant__ TiledFewArgs args) {
  using Shape = TiledFewShape;
  constexpr int kTokens = Shape::kTokens, kRows = Shape::kRows, kStep = Shape::kStep;
  // Rows of whole atoms of 256 columns have no partial step.
  constexpr bool kWhole = TiledUnit<Format>::kChunks == 2;
  constexpr int kStageBytes = kRows * kStep / Format::kBlock * tiled::Sizes<Format>::kBytes;
  extern __shared__ __align__(16) uint8_t shared[];
  auto* warps = reinterpret_cast<Shape::Memory*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = blockDim.x / 32;
  const int band = blockIdx.x, tile = blockIdx.y;
  Shape::Memory& own = warps[warp];
  const bool only = args.experts == 1;
  const int tile_pair = kTokens * tile;
  int expert = 0, count = min(kTokens, args.pairs - tile_pair);
  if (only) {
    // Its tiles are consecutive pairs, and who has no expert is not asked before the end.
    if (warp == 0 && lane < args.pairs) {
      CopyAsync4(&own.ids[lane], args.expert_ids + lane);
      CopyAsync4(&own.entries[lane], args.entries + lane);
    }
    CommitCopies();
  } else {
    const bool listed = lane < args.pairs;
    const int id = FindFewId(args, listed ? args.expert_ids[lane] : -1,
                             listed ? args.entries[lane] : -1);
    const LayerTiles tiles(id, args.experts, /*log_tokens=*/1, own.tiles);
    if (warp == 0 && lane < kRows && tiles.Place(tile) == LayerTiles::kNone) {
      Store(args.y, int64_t{tile} * args.rows + band * kRows + lane, args.y_type, 0.0f);
    }
    if (tile >= tiles.Number()) return;
    expert = tiles.Expert(tile), count = tiles.Count(tile);
  }
  const auto pair_of = [&](int token) -> unsigned {
    return only ? tile_pair + token : own.tiles.pair[tile_pair + token];
  };
  const bool both = count == kTokens;
  UnitsOfTwoRows<Format, kWhole> units[2];
  if (lane == 0) own.zeros = {};
  const half* x = reinterpret_cast<const half*>(&own.zeros);
  int x_stride = 0;
  if (StepOfTwo::Has()) {
    x = own.x[both ? StepOfTwo::Token() : 0] + 8 * (lane % 4);
    x_stride = 32;
  }
  float sum[4] = {};
#pragma unroll 1
  for (int step = warp; step * kStep < args.columns; step += number) {
    const int left = args.columns - step * kStep;
    const uint8_t* weights = args.matrix.data + expert * args.matrix.expert_bytes +
                             band * kRows * args.row_bytes + step * kStageBytes;
#pragma unroll
    for (int c = 0; c < 2; ++c) units[c].Load(weights, c, left);
    EightBits bits[kTokens] = {};
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if ((i == 0 || both) && (kWhole || 8 * lane < left)) {
        const unsigned row = pair_of(i) * args.inverse_pairs_a_row >> 16;
        bits[i] = LoadEight(args.x, args.x_type,
                            int64_t{row} * args.columns + step * kStep + 8 * lane);
      }
    }
    float scale[kTokens] = {};
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i == 0 || both) {
        scale[i] = PrepareStep<Format>(bits[i], args.x_type, own.x[i], own.unit_sums[i]);
      }
    }
    __syncwarp();
    float total[4] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (!kWhole && 128 * c >= left) break;
      uint32_t v[16];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        LoadWords<4>(reinterpret_cast<const uint8_t*>(x + (4 * c + i) * x_stride), v + 4 * i);
      }
      constexpr int kGroups = ExactUnit<Format>::kGroups;
      float sums[kGroups][kTokens];  // gone where there are no offsets
#pragma unroll
      for (int i = 0; i < kGroups * kTokens; ++i) {
        sums[i / kTokens][i % kTokens] =
            own.unit_sums[i % kTokens][(4 * c + lane % 4) * kGroups + i / kTokens];
      }
      units[c].Multiply(c, left, v, total, sums);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Neither factor leaves float32's range, but their product may.
      sum[i] = fmaf(total[i] * kExactUnitScale<Format>, scale[i % 2], sum[i]);
    }
    __syncwarp();
  }
  StoreSums(sum, own.sums, count, 1.0f);
  __syncthreads();
  if (warp > 0) return;
  const int token = lane / kRows, row = lane % kRows;
  float y = 0;
  for (int w = 0; w < number; ++w) y += warps[w].sums[token][row];
  const int pair = pair_of(token);
  bool exists = true;
  if (only) {
    WaitCopies<0>();
    __syncwarp();
    exists = __shfl_sync(0xffffffffu, FindFewId(args, own.ids[lane], own.entries[lane]), pair) == 0;
  }
  if (token >= count) return;
  if (args.pair_weight != nullptr) y *= args.pair_weight[pair];
  if (!exists) y = 0;
  Store(args.y, int64_t{pair} * args.rows + band * kRows + row, args.y_type, y);
}

}  // namespace jax_moe::cuda
