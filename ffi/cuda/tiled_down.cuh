// The down projection, the routing weights and the sum over slots in one kernel, for up to 32 pairs.
//
// A block owns 16 columns of y for all tokens. A team of 1, 2 or 4 of its warps shares a tile (up to 8
// pairs of one expert), each with every 1st, 2nd or 4th 256 columns of h, and teams take turns at tiles: a
// warp's bytes come through one ring across all of its tiles. What each found of every pair is added in a fixed order.
#pragma once

#include "ffi/cuda/tiled_epilogue.cuh"
#include "ffi/cuda/tiled_step.cuh"
#include "ffi/cuda/warp_ring.cuh"

namespace jax_moe::cuda {

template <typename Format>
struct TiledDownShape {
  using Narrow = TiledNarrowShape<Format>;
  static constexpr int kPairs = FewTiles::kPairs;
  static constexpr int kWarps = 8;
  static constexpr int kMostSplits = 4;

  struct alignas(16) Memory {
    uint8_t ring[kWarps][Narrow::kStages][Narrow::kStageBytes];
    uint64_t full[kWarps][Narrow::kStages];
    float sums[kPairs][kMostSplits][Narrow::kRows + 1];
    FewTiles::Table tiles[kWarps];
  };
};

template <typename Format>
__global__ void __launch_bounds__(32 * TiledDownShape<Format>::kWarps, 2)
    TiledDown(const __grid_constant__ TiledDownArgs args) {
  using Down = TiledDownShape<Format>;
  using Shape = TiledNarrowShape<Format>;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& memory = *reinterpret_cast<typename Down::Memory*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int splits = 1 << args.log_splits, teams = Down::kWarps >> args.log_splits;
  const int team = warp >> args.log_splits, split = warp & (splits - 1);
  LetNextKernelStart();
  // Tiles from the ids, which are older than the kernel before this one.
  FewTiles::Table& table = memory.tiles[warp];
  FewTiles few(args.expert_ids, args.tokens * args.top_k, args.experts, table);
  const int tiles = few.Number();

  const int row0 = blockIdx.x * Shape::kRows, stride = splits * Shape::kStep;
  WarpRing<Format> ring(memory.ring[warp], memory.full[warp]);
  // The steps of the team's tiles, one after another.
  const int band_bytes = TiledRow<Format>::BandBytes(args.columns);
  const int first_at = split * Shape::kStageBytes;
  int fetch_tile = first_at < band_bytes ? team : tiles, fetch_at = first_at;
  const auto fetch_ahead = [&] {
    while (ring.HasPlace() && fetch_tile < tiles) {
      const uint8_t* band = args.matrix.data +
                            few.Expert(fetch_tile) * args.matrix.expert_bytes +
                            row0 * args.row_bytes;
      ring.Fetch(band + fetch_at, min(Shape::kStageBytes, band_bytes - fetch_at));
      fetch_at += splits * Shape::kStageBytes;
      if (fetch_at >= band_bytes) {
        fetch_at = first_at;
        fetch_tile += teams;
      }
    }
  };
  fetch_ahead();
  // Normalisers of rows g and g + 8, a tile ahead.
  const auto aux_of = [&](int tile) {
    if (tile >= tiles) return make_float2(1.0f, 1.0f);
    const float* aux = args.matrix.aux +
                       (few.Expert(tile) * args.matrix.expert_rows + row0 + g) * 2;
    return make_float2(aux[0], aux[16]);
  };
  float2 next = aux_of(team);
  WaitForEarlierKernels();
  for (int tile = team; tile < tiles; tile += teams) {
    const int count = few.Take(tile);
    const half* x_row = nullptr;
    if (g < count) x_row = args.h + table.pair[g] * args.h_pitch;
    const int begin = split * Shape::kStep;
    ChunkOfX x;
    x.Load(x_row, begin, args.columns);
    const float normaliser[2] = {next.x, next.y};
    next = aux_of(tile + teams);
    const float factors[2] = {0x1p24f / normaliser[0], 0x1p24f / normaliser[1]};
    float sum[2][4] = {};
    for (int column = begin; column < args.columns; column += stride) {
      MultiplyStep<Format>(ring, x_row, x, column, column + stride, args.columns, factors, sum);
      fetch_ahead();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 2 * t + i % 2;
      if (token < count) {
        memory.sums[table.pair[token]][split][g + 8 * (i / 2)] =
            (sum[0][i] + sum[1][i]) * normaliser[i / 2];
      }
    }
    __syncwarp();
  }
  __syncthreads();

  const int row = threadIdx.x % Shape::kRows;
  const Projection& p = args.projection;
  for (int token = threadIdx.x / Shape::kRows; token < args.tokens;
       token += 32 * Down::kWarps / Shape::kRows) {
    // Slots are read several at a time and added one after another.
    constexpr int kBatch = 8;
    float y = 0;
    for (int slot = 0; slot < args.top_k; slot += kBatch) {
      int expert[kBatch];
      float scale[kBatch], weight[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int pair = token * args.top_k + slot + i;
        const bool there = slot + i < args.top_k;
        expert[i] = there ? args.expert_ids[pair] : -1;
        scale[i] = there ? args.h_scales[pair] : 0.0f;
        weight[i] = there && args.weights != nullptr ? args.weights[pair] : 1.0f;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (expert[i] < 0 || expert[i] >= args.experts) continue;
        const int pair = token * args.top_k + slot + i;
        float value = 0;
        for (int s = 0; s < splits; ++s) value += memory.sums[pair][s][row];
        y += FinishProjection(p, value * scale[i], expert[i], row0 + row) * weight[i];
      }
    }
    Store(args.y, token * args.y_pitch + row0 + row, args.y_type, y);
  }
}

}  // namespace jax_moe::cuda
