// What a warp does with 16 rows and 256 columns of tiled weights that have come, for up to 8 tokens.
#pragma once

#include "ffi/cuda/ptx.cuh"
#include "ffi/cuda/tiled_unit.cuh"
#include "ffi/cuda/warp_ring.cuh"

namespace jax_moe::cuda {

// Adds the products of one chunk of 128 columns.
template <typename Format, int kStep = 0>
__device__ __forceinline__ void MultiplySteps(float (&sum)[4], const LaneUnit<Format>& low,
                                              const LaneUnit<Format>& high, const uint4 (&x)[4]) {
  if constexpr (kStep < 8) {
    uint32_t a[4];
    low.template Decode<kStep>(a[0], a[2]);
    high.template Decode<kStep>(a[1], a[3]);
    const uint4& b = x[kStep / 2];
    MultiplyF16(sum, a, kStep % 2 == 0 ? b.x : b.z, kStep % 2 == 0 ? b.y : b.w);
    MultiplySteps<Format, kStep + 1>(sum, low, high, x);
  }
}

// The activations of a chunk for a lane, loaded a chunk before they are needed.
struct ChunkOfX {
  uint4 v[4];

  // From `column` on of a token's row, null where there is no token; zeros past the end.
  __device__ __forceinline__ void Load(const half* x_row, int column, int columns) {
    const int t = threadIdx.x % 4;
    const bool inside = x_row != nullptr && column + 32 * t < columns;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = inside ? *reinterpret_cast<const uint4*>(x_row + column + 32 * i + 8 * t) : uint4{};
    }
  }
};

// Adds the products of one step, 256 columns from `column` on, those of each chunk to sums of its own.
// x: of the step's first chunk; becomes that of the chunk at `next_column`.
template <typename Format>
__device__ __forceinline__ void MultiplyStep(WarpRing<Format>& ring, const half* x_row, ChunkOfX& x,
                                             int column, int next_column, int columns,
                                             const float (&normaliser)[2], float (&sum)[2][4]) {
  using Tiled = TiledUnit<Format>;
  constexpr int kChunks = 2;  // of a step
  const int lane = threadIdx.x % 32, t = lane % 4;
  const uint8_t* stage = ring.Wait();
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int units = min(4, (columns - column) / 32 - 4 * c);
    if (Tiled::kChunks == 1 && c > 0 && units <= 0) break;
    const ChunkOfX now = x;
    const bool last = c == kChunks - 1 || (Tiled::kChunks == 1 && column + 128 >= columns);
    x.Load(x_row, last ? next_column : column + 128, columns);
    const uint8_t* atom =
        Tiled::kChunks == 2 ? stage : stage + TiledRow<Format>::BandBytes(128 * c);
    typename Tiled::Place place = {units, Tiled::kChunks == 2 ? c : 0, lane / 4, t};
    LaneUnit<Format> low, high;
    low.Load(atom, place, normaliser[0]);
    place.row += 8;
    high.Load(atom, place, normaliser[1]);
    MultiplySteps<Format>(sum[c], low, high, now.v);
  }
  __syncwarp();
}

}  // namespace jax_moe::cuda
