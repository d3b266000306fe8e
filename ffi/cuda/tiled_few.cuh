// Tiled weights times one or two tokens of an expert in a single launch: bound by latency.
//
// A block has 16 rows and a tile of tokens, and a warp of it every 256 columns, or some of these.
// Weights go from memory to registers, for they are read once and by one warp, and all of a step's
// loads are under way at the same time. Meanwhile the warp scales its 256 columns of x by itself,
// so that nobody waits for a whole row. The block's warps meet once, to add their sums in order.
#pragma once

#include "ffi/cuda/few_tiles.cuh"
#include "ffi/cuda/layer_tiles.cuh"
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
    float sums[kTokens][kRows];
    LayerTiles::Table tiles;
  };
};

// Eight consecutive values from a multiple of 8 on.
__device__ __forceinline__ void LoadEight(const void* x, Element type, int64_t index,
                                          float (&to)[8]) {
  const auto load = [&](const auto* from) {
    const Four low = Load4(from + index), high = Load4(from + index + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = low.v[i], to[4 + i] = high.v[i];
  };
  switch (type) {
    case Element::kF32:
      return load(static_cast<const float*>(x));
    case Element::kF16:
      return load(static_cast<const half*>(x));
    case Element::kBF16:
      return load(static_cast<const __nv_bfloat16*>(x));
  }
}

// The expert of this block's tile, and how many tokens it has: none if there is no such tile. id and
// entry: of entry lane.
__device__ __forceinline__ int FindFewTile(const TiledFewArgs& args, int id, int entry,
                                           LayerTiles::Table& table, int& count) {
  if (args.pairs == 1) {  // of a decoded token: the least that has to be done
    id = __shfl_sync(0xffffffffu, entry == 0 ? id : -1, 0);
    count = id >= 0 && id < args.experts ? 1 : 0;
    table.pair[0] = 0;
    table.place[0] = count > 0 ? 0 : LayerTiles::kNone;
    __syncwarp();
    return id;
  }
  if (args.entries != nullptr) id = OfLastEntry(id, entry, args.pairs);
  // Entries may name pairs that do not exist.
  if (threadIdx.x % 32 >= args.pairs) id = -1;
  const LayerTiles tiles(id, args.experts, /*log_tokens=*/1, table);
  const int tile = blockIdx.y;
  count = tile < tiles.Number() ? tiles.Count(tile) : 0;
  return count > 0 ? tiles.Expert(tile) : -1;
}

// Eight columns of a row, those of this lane, from memory to where products read them. Returns what
// undoes the scaling, a power of two for the warp's 256 columns.
__device__ __forceinline__ float PrepareStep(const TiledFewArgs& args, int64_t row, int column,
                                             half* to) {
  Group group = {};
  if (column < args.columns) LoadEight(args.x, args.x_type, row * args.columns + column, group.v);
  uint32_t max = 0;
#pragma unroll
  for (const float v : group.v) max = ::max(max, __float_as_uint(v) & 0x7fffffffu);
  const int exponent = ExponentOfBits(__reduce_max_sync(0xffffffffu, max));
  const uint4 packed = PackGroup(group, PowerOfTwo(exponent));
  reinterpret_cast<uint4*>(to)[PlaceOfGroup(threadIdx.x % 32)] = {packed.x, packed.z, packed.y,
                                                                  packed.w};
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
  const bool listed = lane < args.pairs;
  const int id = listed ? args.expert_ids[lane] : -1;
  const int entry = listed && args.entries != nullptr ? args.entries[lane] : lane;

  Shape::Memory& own = warps[warp];
  UnitsOfTwoRows<Format, kWhole> units[2];
  if (lane == 0) own.zeros = {};
  const half* x = reinterpret_cast<const half*>(&own.zeros);
  const int x_stride = StepOfTwo::Has() ? 32 : 0;
  float sum[4] = {};
  int count = 0;
  // The weights of an only expert need not wait for the ids.
  int expert = args.experts == 1 ? 0 : -1;
#pragma unroll 1
  for (int step = warp; step * kStep < args.columns;) {
    const int left = args.columns - step * kStep;
    if (expert >= 0) {
      const uint8_t* weights = args.matrix.data + expert * args.matrix.expert_bytes +
                               band * kRows * args.row_bytes + step * kStageBytes;
#pragma unroll
      for (int c = 0; c < 2; ++c) units[c].Load(weights, c, left);
    }
    if (count == 0) {
      const int found = FindFewTile(args, id, entry, own.tiles, count);
      if (warp == 0 && lane < kRows && own.tiles.place[tile] == LayerTiles::kNone) {
        Store(args.y, int64_t{tile} * args.rows + band * kRows + lane, args.y_type, 0.0f);
      }
      if (count == 0) return;
      if (StepOfTwo::Has()) {
        x = own.x[StepOfTwo::Token() < count ? StepOfTwo::Token() : 0] + 8 * (lane % 4);
      }
      if (expert < 0) {
        expert = found;
        continue;
      }
    }
    float scale[kTokens] = {};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const unsigned pair = own.tiles.pair[tile * kTokens + i];
      const int row = static_cast<int>(pair * args.inverse_pairs_a_row >> 16);
      const float found = PrepareStep(args, row, step * kStep + 8 * lane, own.x[i]);
      (i == 0 ? scale[0] : scale[1]) = found;
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
      units[c].Multiply(c, left, v, total);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Neither factor leaves float32's range, but their product may.
      sum[i] = fmaf(total[i] * kExactUnitScale<Format>, scale[i % 2], sum[i]);
    }
    step += number;
    __syncwarp();
  }
  StoreSums(sum, own.sums, count, 1.0f);
  __syncthreads();
  const int token = threadIdx.x / kRows, row = threadIdx.x % kRows;
  if (token >= count) return;
  float y = 0;
  for (int w = 0; w < number; ++w) y += warps[w].sums[token][row];
  const int pair = own.tiles.pair[tile * kTokens + token];
  if (args.pair_weight != nullptr) y *= args.pair_weight[pair];
  Store(args.y, int64_t{pair} * args.rows + band * kRows + row, args.y_type, y);
}

}  // namespace jax_moe::cuda
