// Packed weights times many tokens of an expert: 128 weight rows a block, 32 or 128 tokens.
//
// Three stages run at once, one barrier a step of 64 columns: raw bytes and activations of later
// steps are being copied, the next step's weights are decoded to int8, and this step's are multiplied.
#pragma once

#include "ffi/cuda/packed_tile.cuh"
#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {

template <typename Format, int kTokens_>
struct WideShape {
  static constexpr int kTokens = kTokens_;
  static constexpr int kRows = 128;
  static constexpr int kThreads = 256;
  static constexpr int kStep = 64;
  // A warp multiplies kWarpRows x kWarpTokens.
  static constexpr int kWarpRows = kTokens >= 128 ? 32 : 16;
  static constexpr int kWarpTokens = kTokens >= 128 ? 64 : kTokens;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kTokenTiles = kWarpTokens / 8;
  static constexpr int kWarpsDown = kRows / kWarpRows;
  static_assert(kWarpsDown * (kTokens / kWarpTokens) == kThreads / 32);
  static constexpr int kChunk = Format::kBlock > 128 ? Format::kBlock : 128;
  static constexpr int kStepsAChunk = kChunk / kStep;
  using Raw = RawChunk<Format, kChunk>;
  static constexpr int kRowBytes = kStep + 32;  // rows read together lie in different banks
  static constexpr int kXStages = 3;

  struct alignas(16) Memory {
    uint8_t raw[2][kRows * Raw::kSlot];
    uint8_t q[2][kRows * kRowBytes];
    UnitScales<Format> scales[2][2][kRows];
    uint4 x[kXStages][kTokens * 8];
    float4 x_sums[Format::kHasOffset ? kXStages : 1][Format::kHasOffset ? kTokens : 1];
    int32_t x_rows[kTokens];
  };
};

template <typename Format, int kTokens>
class WideBlock {
 public:
  using Shape = WideShape<Format, kTokens>;
  using Memory = typename Shape::Memory;
  using Scales = UnitScales<Format>;

  __device__ __forceinline__ WideBlock(const GemmArgs& args, Memory& memory, const TokenTile& tile,
                                       const Band& band)
      : args_(args), m_(memory), tile_(tile), band_(band) {}

  __device__ __forceinline__ void Run() {
    // Tokens past the last repeat the first, and their results are dropped.
    for (int i = threadIdx.x; i < kTokens; i += Shape::kThreads) {
      m_.x_rows[i] = args_.lists.pairs[tile_.begin + (i < tile_.count ? i : 0)] / args_.pairs_a_row;
    }
    __syncthreads();
    const int steps = static_cast<int>((args_.k + Shape::kStep - 1) / Shape::kStep);
    CopyWeights(0);
    CopyActivations(0, steps);
    CommitCopies();
    CopyWeights(1);
    CopyActivations(1, steps);
    CommitCopies();
    WaitCopies<1>();
    __syncthreads();
    Decode(0);
    for (int step = 0; step < steps; ++step) {
      WaitCopies<1>();
      __syncthreads();
      if ((step + 1) % Shape::kStepsAChunk == 0) CopyWeights((step + 1) / Shape::kStepsAChunk + 1);
      CopyActivations(step + 2, steps);
      CommitCopies();
      if (step + 1 < steps) Decode(step + 1);
      Multiply(step);
    }
    WaitCopies<0>();
    StoreSums();
  }

 private:
  __device__ __forceinline__ void CopyWeights(int chunk) {
    if (static_cast<int64_t>(chunk) * Shape::kChunk >= args_.k) return;
    CopyRaw<typename Shape::Raw, Shape::kRows, Shape::kThreads>(m_.raw[chunk % 2], band_.rows,
                                                                band_.begin, chunk, threadIdx.x);
  }

  // 128 bytes a token; the two tokens that a quarter of a warp reads together are 64 bytes apart.
  __device__ __forceinline__ void CopyActivations(int step, int steps) {
    if (step >= steps) return;
    uint4* to = m_.x[step % Shape::kXStages];
    const auto* values = static_cast<const half*>(args_.x.values);
#pragma unroll
    for (int i = threadIdx.x; i < kTokens * 8; i += Shape::kThreads) {
      const int token = i / 8, piece = i % 8;
      const int64_t row = m_.x_rows[token];
      CopyAsync16(to + token * 8 + (piece ^ (token % 2 * 4)),
                  values + row * args_.x.pitch + step * Shape::kStep + piece * 8);
    }
    if constexpr (Format::kHasOffset) {
      if (threadIdx.x < kTokens) {
        const int64_t row = m_.x_rows[threadIdx.x];
        CopyAsync16(&m_.x_sums[step % Shape::kXStages][threadIdx.x],
                    args_.x.sums + row * (args_.x.pitch / 16) + step * 4);
      }
    }
  }

  // One unit a thread.
  __device__ __forceinline__ void Decode(int step) {
    const int row = threadIdx.x % Shape::kRows, unit = threadIdx.x / Shape::kRows;
    uint8_t* q = m_.q[step % 2] + row * Shape::kRowBytes + 32 * unit;
    Scales* scales = &m_.scales[step % 2][unit][row];
    if (step * Shape::kStep + 32 * unit >= args_.k) {
      reinterpret_cast<uint4*>(q)[0] = reinterpret_cast<uint4*>(q)[1] = uint4{};
      *scales = Scales{};
      return;
    }
    constexpr int kUnitsABlock = Format::kBlock / 32;
    const int chunk = step / Shape::kStepsAChunk;
    const int unit_of_chunk = step % Shape::kStepsAChunk * 2 + unit;
    const uint8_t* raw = m_.raw[chunk % 2] + row * Shape::Raw::kSlot +
        (Shape::Raw::kAligned
             ? 0
             : band_.rows.template Start<typename Shape::Raw>(band_.begin + row, chunk) & 15);
    DecodeUnit<Format>(raw + unit_of_chunk / kUnitsABlock * Format::kBytes,
                       unit_of_chunk % kUnitsABlock, q, scales);
  }

  __device__ __forceinline__ void Multiply(int step) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row0 = WarpRow(), token0 = WarpToken();
    const uint8_t* q = m_.q[step % 2] + (row0 + g) * Shape::kRowBytes;
    const uint4* x = m_.x[step % Shape::kXStages];
#pragma unroll 1
    for (int unit = 0; unit < 2; ++unit) {
      uint32_t a[Shape::kRowTiles][2][4];
      Scales scales[Shape::kRowTiles][2];
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        const uint8_t* row = q + 16 * r * Shape::kRowBytes + 32 * unit;
        LoadHalves(row, row + 8 * Shape::kRowBytes, t, a[r][0], a[r][1]);
        scales[r][0] = m_.scales[step % 2][unit][row0 + 16 * r + g];
        scales[r][1] = m_.scales[step % 2][unit][row0 + 16 * r + g + 8];
      }
#pragma unroll
      for (int n = 0; n < Shape::kTokenTiles; ++n) {
        const int token = token0 + 8 * n + g;
        const uint4 b = x[token * 8 + ((4 * unit + t) ^ (token % 2 * 4))];
        float2 sums[2] = {};
        if constexpr (Format::kHasOffset) {
          const auto* s = reinterpret_cast<const float2*>(
              &m_.x_sums[step % Shape::kXStages][token0 + 8 * n + 2 * t]);
          sums[0] = s[unit];
          sums[1] = s[2 + unit];
        }
#pragma unroll
        for (int r = 0; r < Shape::kRowTiles; ++r) {
          MultiplyTile(a[r], b, scales[r], sums, sum_[r][n]);
        }
      }
    }
  }

  __device__ __forceinline__ void MultiplyTile(const uint32_t (&a)[2][4], uint4 b,
                                               const Scales (&scales)[2], const float2 (&sums)[2],
                                               float (&sum)[4]) {
    if constexpr (Scales::kGroups == 1) {
      float d[4] = {};
      MultiplyF16(d, a[0], b.x, b.y);
      MultiplyF16(d, a[1], b.z, b.w);
      Accumulate<0>(d, scales, sums[0].x + sums[0].y, sums[1].x + sums[1].y, sum);
    } else {
      float d[4] = {}, e[4] = {};
      MultiplyF16(d, a[0], b.x, b.y);
      Accumulate<0>(d, scales, sums[0].x, sums[1].x, sum);
      MultiplyF16(e, a[1], b.z, b.w);
      Accumulate<Scales::kGroups - 1>(e, scales, sums[0].y, sums[1].y, sum);
    }
  }

  template <int kGroup>
  __device__ __forceinline__ static void Accumulate(const float (&d)[4], const Scales (&scales)[2],
                                                    float x_sum0, float x_sum1, float (&sum)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Scales& s = scales[i / 2];
      sum[i] = fmaf(s.scale(kGroup), d[i], sum[i]);
      if constexpr (Format::kHasOffset) {
        sum[i] = fmaf(s.offset(kGroup), i % 2 ? x_sum1 : x_sum0, sum[i]);
      }
    }
  }

  __device__ __forceinline__ void StoreSums() const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < Shape::kTokenTiles; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int token = WarpToken() + 8 * n + 2 * t + column;
        if (token >= tile_.count) continue;
        const int pair = args_.lists.pairs[tile_.begin + token];
        const float factor = PairFactor(args_, pair, /*scaled_rows=*/true);
        const int64_t y = pair * args_.y_pitch + band_.y_column;
#pragma unroll
        for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = band_.begin + WarpRow() + 16 * r + 8 * half + g;
            if (row < band_.rows.count) {
              Store(args_.y, y + row, args_.y_type, sum_[r][n][2 * half + column] * factor);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ static int WarpRow() {
    return threadIdx.x / 32 % Shape::kWarpsDown * Shape::kWarpRows;
  }
  __device__ __forceinline__ static int WarpToken() {
    return threadIdx.x / 32 / Shape::kWarpsDown * Shape::kWarpTokens;
  }

  const GemmArgs& args_;
  Memory& m_;
  const TokenTile tile_;
  const Band band_;
  float sum_[Shape::kRowTiles][Shape::kTokenTiles][4] = {};
};

template <typename Format, int kTokens>
__global__ void __launch_bounds__(256, kTokens >= 128 ? 1 : 2)
    WideGemm(const __grid_constant__ GemmArgs args) {
  using Block = WideBlock<Format, kTokens>;
  extern __shared__ __align__(128) uint8_t shared[];
  const unsigned bands =
      static_cast<unsigned>((args.rows[0] + 127) / 128 + (args.rows[1] + 127) / 128);
  const int tile_index = blockIdx.x / bands;
  if (tile_index >= *args.lists.num_tiles) return;
  const TokenTile tile = args.lists.tiles[tile_index];
  const Band band = FindBand(args, tile.expert, blockIdx.x % bands, Block::Shape::kRows);
  Block(args, *reinterpret_cast<typename Block::Memory*>(shared), tile, band).Run();
}

}  // namespace jax_moe::cuda
