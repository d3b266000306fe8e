// The down projection, the routing weights and the sum over slots in one kernel, for up to 32 pairs.
//
// A block owns 16 columns of y for all tokens. Four warps share a tile (up to 8 pairs of one expert),
// each with every fourth 256 columns of h, and every other tile is theirs: a warp's bytes come through
// one ring across all of its tiles. What each found of every pair is added in a fixed order.
#pragma once

#include "ffi/cuda/tiled_narrow.cuh"

namespace jax_moe::cuda {

template <typename Format>
struct TiledDownShape {
  using Narrow = TiledNarrowShape<Format>;
  static constexpr int kPairs = 32;
  static constexpr int kTeams = 2;  // of kSplits warps

  struct alignas(16) Memory {
    uint8_t ring[Narrow::kWarps][Narrow::kStages][Narrow::kStageBytes];
    uint64_t full[Narrow::kWarps][Narrow::kStages];
    float sums[kPairs][Narrow::kSplits][Narrow::kRows + 1];
    int32_t first[Narrow::kWarps][kPairs];  // pair of every tile
    int32_t expert[Narrow::kWarps][kPairs];
    int32_t pair[Narrow::kWarps][Narrow::kTokens];
  };
};

// The steps of a warp's tiles, one after another.
template <typename Format>
struct PartOfTiles {
  const TiledMatrix& matrix;
  const int32_t* expert;
  int64_t band_offset;
  int columns, split, team, steps, tiles;
  __device__ __forceinline__ Span16 operator()(int n) const {
    const int tile = steps == 0 ? tiles : team + TiledDownShape<Format>::kTeams * (n / steps);
    if (tile >= tiles) return {nullptr, 0};
    return StepSpan<Format>(matrix.data + expert[tile] * matrix.expert_bytes + band_offset,
                            StepColumn<Format>(n % steps, split), columns);
  }
};

template <typename Format>
__global__ void __launch_bounds__(32 * TiledNarrowShape<Format>::kWarps, 3)
    TiledDown(const __grid_constant__ TiledDownArgs args) {
  using Down = TiledDownShape<Format>;
  using Shape = TiledNarrowShape<Format>;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& memory = *reinterpret_cast<typename Down::Memory*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int team = warp / Shape::kSplits, split = warp % Shape::kSplits;
  LetNextKernelStart();
  // Tiles from the ids, which are older than the kernel before this one.
  const int pairs = args.tokens * args.top_k;
  int id = lane < pairs ? args.expert_ids[lane] : -1;
  if (id < 0 || id >= args.experts) id = -1 - lane;  // like no other
  const unsigned same = __match_any_sync(0xffffffffu, id);
  const int rank = __popc(same & ((1u << lane) - 1));
  const bool begins = id >= 0 && rank % Shape::kTokens == 0;
  const unsigned beginnings = __ballot_sync(0xffffffffu, begins);
  if (begins) {
    const int tile = __popc(beginnings & ((1u << lane) - 1));
    memory.first[warp][tile] = lane;
    memory.expert[warp][tile] = id;
  }
  __syncwarp();
  const int tiles = __popc(beginnings);
  int steps = 0;
  while (StepColumn<Format>(steps, split) < args.columns) ++steps;

  const int row0 = blockIdx.x * Shape::kRows;
  BandStream<Format, PartOfTiles<Format>> stream(
      memory.ring[warp], memory.full[warp],
      {args.matrix, memory.expert[warp], row0 * args.row_bytes, args.columns, split, team, steps,
       tiles});
  stream.Start();
  WaitForEarlierKernels();
  int n = 0;
  for (int tile = team; tile < tiles; tile += Down::kTeams) {
    const int first = memory.first[warp][tile];
    const unsigned members = __shfl_sync(0xffffffffu, same, first);
    const int index = rank - __shfl_sync(0xffffffffu, rank, first);
    const bool member = (members >> lane & 1) && index >= 0 && index < Shape::kTokens;
    if (member) memory.pair[warp][index] = lane;
    const int count = __popc(__ballot_sync(0xffffffffu, member));
    __syncwarp();
    const half* x_row = nullptr;
    if (g < count) x_row = args.h + memory.pair[warp][g] * args.h_pitch;
    const float* aux =
        args.matrix.aux + (memory.expert[warp][tile] * args.matrix.expert_rows + row0) * 2;
    const float normaliser[2] = {0x1p24f / aux[2 * g], 0x1p24f / aux[2 * (g + 8)]};
    float sum[4] = {};
    for (int step = 0; step < steps; ++step, ++n) {
      MultiplyStep<Format>(stream, n, x_row, StepColumn<Format>(step, split), args.columns,
                           normaliser, sum);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 2 * t + i % 2;
      if (token < count) memory.sums[memory.pair[warp][token]][split][g + 8 * (i / 2)] = sum[i];
    }
    __syncwarp();
  }
  __syncthreads();

  const int row = threadIdx.x % Shape::kRows;
  const Projection& p = args.projection;
  for (int token = threadIdx.x / Shape::kRows; token < args.tokens;
       token += 32 * Shape::kWarps / Shape::kRows) {
    float y = 0;
    for (int slot = 0; slot < args.top_k; ++slot) {
      const int pair = token * args.top_k + slot, expert = args.expert_ids[pair];
      if (expert < 0 || expert >= args.experts) continue;
      float value = 0;
#pragma unroll
      for (int s = 0; s < Shape::kSplits; ++s) value += memory.sums[pair][s][row];
      value *= args.matrix.aux[(expert * args.matrix.expert_rows + row0 + row) * 2];
      value = FinishProjection(p, value * args.h_scales[pair], expert, row0 + row);
      y += args.weights == nullptr ? value : value * args.weights[pair];
    }
    Store(args.y, token * args.y_pitch + row0 + row, args.y_type, y);
  }
}

}  // namespace jax_moe::cuda
