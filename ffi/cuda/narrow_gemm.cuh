// Packed weights times up to 8 tokens of an expert: bound by the bytes of the weights.
//
// A band of 16 weight rows belongs to `splits` of a block's 4 warps, each of which takes every
// splits-th chunk of 256 columns and works on its own: raw bytes arrive in buffers of its own, are
// decoded to int8 beside them, 128 columns at a time, and multiplied. The warps' sums are added in
// warp order.
#pragma once

#include "ffi/cuda/packed_tile.cuh"
#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {

template <typename Format>
struct NarrowShape {
  static constexpr int kRows = 16;
  static constexpr int kTokens = 8;
  static constexpr int kWarps = 4;
  static constexpr int kStages = 2;
  static constexpr int kChunk = 256;  // columns copied at a time
  static constexpr int kUnits = 4;    // units of 32 columns decoded at a time
  static constexpr int kParts = kChunk / 32 / kUnits;
  using Raw = RawChunk<Format, kChunk>;
  // 32 bytes of padding put the rows that eight lanes read together into different banks.
  static constexpr int kRowBytes = 32 * kUnits + 32;

  struct alignas(16) Warp {
    uint8_t raw[kStages][kRows * Raw::kSlot];
    uint8_t q[kRows * kRowBytes];
    UnitScales<Format> scales[kUnits][kRows];
  };
  static constexpr int kSharedBytes = kWarps * sizeof(Warp);
};

// One chunk's products with f16 activations.
template <typename Format>
__device__ __forceinline__ void MultiplyUnitF16(const uint8_t* q, int row_bytes,
                                                const UnitScales<Format>* scales, int g, int t,
                                                uint4 x, float (&sum)[4]) {
  using Scales = UnitScales<Format>;
  uint32_t a[2][4];
  LoadHalves(q + g * row_bytes, q + (g + 8) * row_bytes, t, a[0], a[1]);
  const Scales s0 = scales[g], s1 = scales[g + 8];
  const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
  // A row of ones gives the sums of the activations, which offsets multiply.
  const uint32_t ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
#pragma unroll
  for (int group = 0; group < Scales::kGroups; ++group) {
    float d[4] = {}, e[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (Scales::kGroups == 2 && half != group) continue;
      MultiplyF16(d, a[half], b[half][0], b[half][1]);
      if constexpr (Format::kHasOffset) MultiplyF16(e, ones, b[half][0], b[half][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Scales& s = i < 2 ? s0 : s1;
      sum[i] = fmaf(s.scale(group), d[i], sum[i]);
      if constexpr (Format::kHasOffset) sum[i] = fmaf(s.offset(group), e[i], sum[i]);
    }
  }
}

// The same with q8_1 activations; d0 and d1 are their scales in columns 2t and 2t + 1.
template <typename Format>
__device__ __forceinline__ void MultiplyUnitS8(const uint8_t* q, int row_bytes,
                                               const UnitScales<Format>* scales, int g, int t,
                                               uint2 x, float d0, float d1, float (&sum)[4]) {
  using Scales = UnitScales<Format>;
  const uint2 w0 = *reinterpret_cast<const uint2*>(q + g * row_bytes + 8 * t);
  const uint2 w1 = *reinterpret_cast<const uint2*>(q + (g + 8) * row_bytes + 8 * t);
  const Scales s0 = scales[g], s1 = scales[g + 8];
  constexpr uint32_t kOnes = 0x01010101u;
#pragma unroll
  for (int group = 0; group < Scales::kGroups; ++group) {
    int d[4] = {}, e[4] = {};
    if constexpr (Scales::kGroups == 1) {
      const uint32_t a[4] = {w0.x, w1.x, w0.y, w1.y};
      const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
      MultiplyS8(d, a, x.x, x.y);
      if constexpr (Format::kHasOffset) MultiplyS8(e, ones, x.x, x.y);
    } else {
      const uint32_t a[2] = {group ? w0.y : w0.x, group ? w1.y : w1.x};
      const uint32_t ones[2] = {kOnes, kOnes};
      MultiplyS8(d, a, group ? x.y : x.x);
      if constexpr (Format::kHasOffset) MultiplyS8(e, ones, group ? x.y : x.x);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Scales& s = i < 2 ? s0 : s1;
      const float dx = i % 2 ? d1 : d0;
      float value = s.scale(group) * static_cast<float>(d[i]);
      if constexpr (Format::kHasOffset)
        value = fmaf(s.offset(group), static_cast<float>(e[i]), value);
      sum[i] = fmaf(dx, value, sum[i]);
    }
  }
}

template <typename Format, bool kS8>
__global__ void __launch_bounds__(128, 6) NarrowGemm(const __grid_constant__ GemmArgs args) {
  using Shape = NarrowShape<Format>;
  using Raw = typename Shape::Raw;
  using X = std::conditional_t<kS8, uint2, uint4>;
  constexpr int kStages = Shape::kStages, kUnits = Shape::kUnits;
  static_assert(kStages >= 2);
  extern __shared__ __align__(128) uint8_t shared[];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  TokenTile tile;
  if (!FindTile(args.lists, &tile)) return;
  const int log_splits = args.log_splits, splits = 1 << log_splits, split = warp & (splits - 1);
  const Band band = FindBand(args, tile.expert,
                             (blockIdx.x << (2 - log_splits)) + (warp >> log_splits), Shape::kRows);

  typename Shape::Warp& own = reinterpret_cast<typename Shape::Warp*>(shared)[warp];
  const int units_total = static_cast<int>(args.k / 32);
  const int chunks = band.valid ? (units_total + kUnits - 1) / kUnits : 0;
  float sum[4] = {};
  const RowCopier<Raw> copier(band.rows, band.begin + lane / 2, lane % 2);
  const int slot = lane / 2 * Raw::kSlot;

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    const int chunk = split + stage * splits;
    if (chunk < chunks) copier.Copy(own.raw[stage] + slot, chunk);
    CommitCopies();
  }

  // Lanes past the last token multiply zeros.
  const bool has_token = g < tile.count;
  const int pair = has_token ? args.lists.pairs[tile.begin + g] : 0;
  const int64_t x_row = (pair / args.pairs_a_row) * args.x.pitch;
  const auto* x = reinterpret_cast<const X*>(static_cast<const uint8_t*>(args.x.values) +
                                             x_row * (kS8 ? 1 : 2)) +
                  t;
  const float* x_scales[2] = {};
  if constexpr (kS8) {
    for (int i = 0; i < 2; ++i) {
      const int p = 2 * t + i < tile.count ? args.lists.pairs[tile.begin + 2 * t + i] : pair;
      x_scales[i] = args.x.scales + (p / args.pairs_a_row) * (args.x.pitch / 32);
    }
  }

  const int decode_row = lane % 16;
  const uint8_t* decode_from = band.rows.tensor + band.rows.Start(band.begin + decode_row);
  int stage = 0;
  for (int chunk = split; chunk < chunks; chunk += splits) {
    WaitCopies<kStages - 2>();
    __syncwarp();
    const int next = chunk + (kStages - 1) * splits;
    const int next_stage = stage == 0 ? kStages - 1 : stage - 1;
    if (next < chunks) copier.Copy(own.raw[next_stage] + slot, next);
    CommitCopies();
    const uint8_t* raw = own.raw[stage] + decode_row * Raw::kSlot +
                         (Raw::kAligned ? 0 : Shift<Raw>(decode_from, chunk));
    stage = stage == kStages - 1 ? 0 : stage + 1;

#pragma unroll 1
    for (int part = 0; part < Shape::kParts; ++part) {
      const int unit0 = part * kUnits, column_unit = chunk * (Shape::kChunk / 32) + unit0;
      const int units = min(kUnits, units_total - column_unit);
      if (units <= 0) break;
      X xs[kUnits];
      float dx[2][kS8 ? kUnits : 1];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        xs[u] = X{};
        if (has_token && u < units) xs[u] = x[(column_unit + u) * 4];
        if constexpr (kS8) {
          for (int i = 0; i < 2; ++i) dx[i][u] = u < units ? x_scales[i][column_unit + u] : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < kUnits / 2; ++i) {
        constexpr int kUnitsABlock = Format::kBlock / 32;
        const int u = 2 * i + lane / 16;
        if (u < units) {
          own.scales[u][decode_row] = DecodeUnit<Format>(
              raw + (unit0 + u) / kUnitsABlock * Format::kBytes, (unit0 + u) % kUnitsABlock,
              own.q + decode_row * Shape::kRowBytes + 32 * u);
        }
      }
      __syncwarp();
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (u >= units) break;
        if constexpr (kS8) {
          MultiplyUnitS8<Format>(own.q + 32 * u, Shape::kRowBytes, own.scales[u], g, t, xs[u],
                                 dx[0][u], dx[1][u], sum);
        } else {
          MultiplyUnitF16<Format>(own.q + 32 * u, Shape::kRowBytes, own.scales[u], g, t, xs[u],
                                  sum);
        }
      }
      __syncwarp();
    }
  }

  WaitCopies<0>();
  if (splits > 1) {
    // Every warp leaves its sums at the start of its own memory.
    __syncwarp();
    reinterpret_cast<float4*>(&own)[lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    __syncthreads();
    if (split != 0) return;
    for (int other = 1; other < splits; ++other) {
      const float4 more = reinterpret_cast<const float4*>(&own + other)[lane];
      sum[0] += more.x;
      sum[1] += more.y;
      sum[2] += more.z;
      sum[3] += more.w;
    }
  }
  if (!band.valid) return;
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    const int token = 2 * t + column;
    if (token >= tile.count) continue;
    const int p = args.lists.pairs[tile.begin + token];
    const float factor = PairFactor(args, p, /*scaled_rows=*/!kS8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = band.begin + g + 8 * half;
      if (row >= band.rows.count) continue;
      Store(args.y, p * args.y_pitch + band.y_column + row, args.y_type,
            sum[2 * half + column] * factor);
    }
  }
}

}  // namespace jax_moe::cuda
