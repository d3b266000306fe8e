// Packed weights times up to 4 tokens of an expert, without tensor cores: where an expert has one
// token or two, the decoding is all there is to do, and here it stays in registers.
//
// A warp has two weight rows; its lanes take units of 32 columns, decode them straight from global
// memory and multiply with four-way integer products. Activations are 24-bit integers of a power of
// two for every 32 columns, in three planes of bytes (Layout::kPlanes), so the integer sums are
// exact.
#pragma once

#include "ffi/cuda/packed_tile.cuh"
#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {

struct VectorShape {
  static constexpr int kWarps = 4;
  static constexpr int kWarpRows = 2;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kTokens = 4;
};

// Integers, scales and offsets of a unit, in registers.
template <typename Format>
struct Unit {
  static constexpr int kGroups = 32 / Format::kGroup;
  uint32_t q[8];
  Affine group[kGroups];

  __device__ __forceinline__ void Decode(const uint8_t* row, int unit) {
    constexpr int kUnitsABlock = Format::kBlock / 32;
    constexpr int kAlign = Format::kBytes % 16 == 0 ? 16 : Format::kBytes % 8 == 0 ? 8 : 1;
    const auto* block = static_cast<const uint8_t*>(
        __builtin_assume_aligned(row + unit / kUnitsABlock * Format::kBytes, kAlign));
    Format::Unit(block, unit % kUnitsABlock, q);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      group[i] = Format::Group(block, unit % kUnitsABlock * kGroups + i);
    }
  }
};

// The activations of a unit: planes, their power of two, sums over each half.
struct UnitPlanes {
  uint32_t plane[3][8];
  float scale, sum[2];

  // Neighbouring lanes read neighbouring pieces.
  __device__ __forceinline__ void Load(const uint4* row, int64_t units, int unit) {
    const uint4* from = row + unit;
#pragma unroll
    for (int p = 0; p < 3; ++p) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 words = from[(2 * p + i) * units];
        plane[p][4 * i] = words.x;
        plane[p][4 * i + 1] = words.y;
        plane[p][4 * i + 2] = words.z;
        plane[p][4 * i + 3] = words.w;
      }
    }
    const uint4 last = from[6 * units];
    scale = __uint_as_float(last.x);
    sum[0] = __uint_as_float(last.y);
    sum[1] = __uint_as_float(last.z);
  }
};

template <typename Format>
__device__ __forceinline__ float Dot(const Unit<Format>& w, const UnitPlanes& x) {
  constexpr int kGroups = Unit<Format>::kGroups, kWords = 8 / kGroups;
  float total = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    int dot[3] = {};
#pragma unroll
    for (int j = group * kWords; j < (group + 1) * kWords; ++j) {
#pragma unroll
      for (int p = 0; p < 3; ++p) {
        dot[p] = __dp4a(static_cast<int>(w.q[j]), static_cast<int>(x.plane[p][j]), dot[p]);
      }
    }
    const float sum =
        fmaf(static_cast<float>(dot[0]), 65536.0f, static_cast<float>(dot[1] * 256 + dot[2]));
    total = fmaf(w.group[group].scale, sum, total);
    if constexpr (Format::kHasOffset) {
      const float x_sum = kGroups == 1 ? x.sum[0] + x.sum[1] : x.sum[group];
      total = fmaf(w.group[group].offset, x_sum, total);
    }
  }
  return total;
}

template <typename Format>
__global__ void __launch_bounds__(32 * VectorShape::kWarps, 6)
    VectorGemm(const __grid_constant__ GemmArgs args) {
  constexpr int kTokens = VectorShape::kTokens, kRows = VectorShape::kWarpRows;
  TokenTile tile;
  if (!FindTile(args.lists, &tile)) return;
  const Band band = FindBand(args, tile.expert, blockIdx.x, VectorShape::kRows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = band.begin + warp * kRows;
  if (row0 >= band.rows.count) return;
  const uint8_t* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = band.rows.tensor + band.rows.Start(row0 + r);
  const uint4* x[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t pair = i < tile.count ? args.lists.pairs[tile.begin + i] : 0;
    x[i] = static_cast<const uint4*>(args.x.values) + pair / args.pairs_a_row * (args.x.pitch / 4);
  }

  float sum[kTokens][kRows] = {};
  const int units = static_cast<int>(args.k / 32);
  const int64_t x_units = args.x.pitch / 32;
  for (int unit = lane; unit < units; unit += 32) {
    Unit<Format> w[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) w[r].Decode(rows[r], unit);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i >= tile.count) break;
      UnitPlanes planes;
      planes.Load(x[i], x_units, unit);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[i][r] = fmaf(planes.scale, Dot(w[r], planes), sum[i][r]);
    }
  }

#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (i >= tile.count) break;
    const int64_t pair = args.lists.pairs[tile.begin + i];
    const float factor = args.pair_weight ? args.pair_weight[pair] : 1.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float total = sum[i][r];
      for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(0xffffffffu, total, d);
      if (lane == 0 && row0 + r < band.rows.count) {
        Store(args.y, pair * args.y_pitch + band.y_column + row0 + r, args.y_type, total * factor);
      }
    }
  }
}

}  // namespace jax_moe::cuda
