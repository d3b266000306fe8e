// Packed weights times many tokens of an expert: 128 weight rows a block, 32 or 128 tokens.
//
// Three stages run at once, one barrier a step of 64 columns: raw bytes and activations of later
// steps are being copied, the next step's weights are decoded to int8, and this step's are
// multiplied.
#pragma once

#include "ffi/cuda/packed_tile.cuh"
#include "ffi/cuda/split.cuh"
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
  static constexpr int kGroups = 32 / Format::kGroup;
  static constexpr int kOffsetRows = Format::kHasOffset ? kRows : 1;
  static constexpr int kOffsetTokens = Format::kHasOffset ? kTokens : 1;

  // The scales of a unit's groups.
  struct alignas(4 * kGroups) Scales {
    float group[kGroups];
  };
  // Everything but x_rows is there twice: one is filled while the other is used.
  struct alignas(16) Memory {
    uint8_t raw[2][kRows * Raw::kSlot];
    uint8_t q[2][kRows * kRowBytes];
    uint4 x[2][kTokens * 8];
    Scales scales[2][2][kRows];
    uint32_t offsets[2][kOffsetRows][4];   // of every 16 columns, as two bf16
    uint32_t x_sums[2][kOffsetTokens][4];  // likewise
    int32_t x_rows[kTokens];
  };
};

template <typename Format, int kTokens>
class WideBlock {
 public:
  using Shape = WideShape<Format, kTokens>;
  using Memory = typename Shape::Memory;
  using Scales = typename Shape::Scales;
  using Raw = typename Shape::Raw;

  __device__ __forceinline__ WideBlock(const GemmArgs& args, Memory& memory, const TokenTile& tile,
                                       const Band& band)
      : args_(args),
        m_(memory),
        tile_(tile),
        band_(band),
        copier_(band.rows, band.begin + threadIdx.x / 2, threadIdx.x % 2),
        decode_from_(band.rows.tensor + band.rows.Start(band.begin + threadIdx.x % Shape::kRows)),
        k_(static_cast<int>(args.k)) {}

  __device__ __forceinline__ void Run() {
    // Columns past the last token hold anything: their results are dropped.
    for (int i = threadIdx.x; i < tile_.count; i += Shape::kThreads) {
      m_.x_rows[i] = args_.lists.pairs[tile_.begin + i] / args_.pairs_a_row;
    }
    __syncthreads();
    const int steps = (k_ + Shape::kStep - 1) / Shape::kStep;
    CopyWeights(0);
    CopyWeights(1);
    CopyActivations(0);
    CommitCopies();
    WaitCopies<0>();
    __syncthreads();
    Decode(0);
    for (int step = 0; step < steps; ++step) {
      WaitCopies<0>();
      __syncthreads();
      if ((step + 1) % Shape::kStepsAChunk == 0) CopyWeights((step + 1) / Shape::kStepsAChunk + 1);
      if (step + 1 < steps) CopyActivations(step + 1);
      CommitCopies();
      if (step + 1 < steps) Decode(step + 1);
      Multiply(step);
    }
    StoreSums();
  }

 private:
  __device__ __forceinline__ void CopyWeights(int chunk) {
    if (chunk * Shape::kChunk >= k_) return;
    copier_.Copy(m_.raw[chunk % 2] + threadIdx.x / 2 * Raw::kSlot, chunk);
  }

  // 128 bytes a token; the two tokens that a quarter of a warp reads together are 64 bytes apart.
  __device__ __forceinline__ void CopyActivations(int step) {
    uint4* to = m_.x[step % 2];
    const auto* values = static_cast<const half*>(args_.x.values) + step * Shape::kStep;
    const int piece = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < kTokens * 8 / Shape::kThreads; ++i) {
      const int token = threadIdx.x / 8 + i * (Shape::kThreads / 8);
      if (token >= tile_.count) break;
      CopyAsync16(to + token * 8 + (piece ^ (token % 2 * 4)),
                  values + m_.x_rows[token] * args_.x.pitch + piece * 8);
    }
    if constexpr (Format::kHasOffset) {
      if (threadIdx.x < tile_.count) {
        CopyAsync16(m_.x_sums[step % 2][threadIdx.x],
                    args_.x.sums + m_.x_rows[threadIdx.x] * (args_.x.pitch / 16) + step * 4);
      }
    }
  }

  // One unit a thread.
  __device__ __forceinline__ void Decode(int step) {
    const int row = threadIdx.x % Shape::kRows, unit = threadIdx.x / Shape::kRows;
    uint8_t* q = m_.q[step % 2] + row * Shape::kRowBytes + 32 * unit;
    Scales scales = {};
    uint32_t offsets[2] = {};
    if (step * Shape::kStep + 32 * unit < k_) {
      constexpr int kUnitsABlock = Format::kBlock / 32;
      const int chunk = step / Shape::kStepsAChunk;
      const int unit_of_chunk = step % Shape::kStepsAChunk * 2 + unit;
      const uint8_t* raw = m_.raw[chunk % 2] + row * Raw::kSlot +
                           (Raw::kAligned ? 0 : Shift<Raw>(decode_from_, chunk));
      const auto decoded = DecodeUnit<Format>(raw + unit_of_chunk / kUnitsABlock * Format::kBytes,
                                              unit_of_chunk % kUnitsABlock, q);
#pragma unroll
      for (int i = 0; i < Shape::kGroups; ++i) scales.group[i] = decoded.scale(i);
      if constexpr (Format::kHasOffset) {
        offsets[0] = SplitBF16(decoded.offset(0));
        offsets[1] =
            Shape::kGroups == 2 ? SplitBF16(decoded.offset(Shape::kGroups - 1)) : offsets[0];
      }
    } else {
      reinterpret_cast<uint4*>(q)[0] = reinterpret_cast<uint4*>(q)[1] = uint4{};
    }
    m_.scales[step % 2][unit][row] = scales;
    if constexpr (Format::kHasOffset) {
      *reinterpret_cast<uint2*>(&m_.offsets[step % 2][row][2 * unit]) =
          make_uint2(offsets[0], offsets[1]);
    }
  }

  // Token tiles of this warp that hold a token.
  __device__ __forceinline__ int UsedTokenTiles() const {
    return (tile_.count - WarpToken() + 7) / 8;
  }

  __device__ __forceinline__ void Multiply(int step) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row0 = WarpRow(), token0 = WarpToken(), used = UsedTokenTiles();
    const uint8_t* q = m_.q[step % 2] + (row0 + g) * Shape::kRowBytes;
    const uint4* x = m_.x[step % 2] + (token0 + g) * 8;
    const int flip = g % 2 * 4;
    if constexpr (Format::kHasOffset) MultiplyOffsets(step, used);
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
        if (n >= used) break;
        const uint4 b = x[n * 64 + ((4 * unit + t) ^ flip)];
#pragma unroll
        for (int r = 0; r < Shape::kRowTiles; ++r) MultiplyTile(a[r], b, scales[r], sum_[r][n]);
      }
    }
  }

  // Adds offset * (sum of activations) over the four 16-column groups of a step with one product:
  // lane t of a quad holds group t, and (o + o')(s + s') of its split factors takes its four
  // columns.
  __device__ __forceinline__ void MultiplyOffsets(int step, int used) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t a[Shape::kRowTiles][4];
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t o = m_.offsets[step % 2][WarpRow() + 16 * r + 8 * half + g][t];
        a[r][half] = __byte_perm(o, o, 0x1010);
        a[r][half + 2] = __byte_perm(o, o, 0x3232);
      }
    }
#pragma unroll
    for (int n = 0; n < Shape::kTokenTiles; ++n) {
      if (n >= used) break;
      const uint32_t s = m_.x_sums[step % 2][WarpToken() + 8 * n + g][t];
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) MultiplyBF16(sum_[r][n], a[r], s, s);
    }
  }

  __device__ __forceinline__ void MultiplyTile(const uint32_t (&a)[2][4], uint4 b,
                                               const Scales (&scales)[2], float (&sum)[4]) {
    float d[2][4] = {};
    MultiplyF16(d[0], a[0], b.x, b.y);
    MultiplyF16(d[Shape::kGroups - 1], a[1], b.z, b.w);
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fmaf(scales[i / 2].group[group], d[group][i], sum[i]);
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
  const RowCopier<Raw> copier_;
  const uint8_t* decode_from_;
  const int k_;
  float sum_[Shape::kRowTiles][Shape::kTokenTiles][4] = {};
};

template <typename Format, int kTokens>
__global__ void __launch_bounds__(256, 2) WideGemm(const __grid_constant__ GemmArgs args) {
  using Block = WideBlock<Format, kTokens>;
  extern __shared__ __align__(128) uint8_t shared[];
  TokenTile tile;
  if (!FindTile(args.lists, &tile)) return;
  const Band band = FindBand(args, tile.expert, blockIdx.x, Block::Shape::kRows);
  Block(args, *reinterpret_cast<typename Block::Memory*>(shared), tile, band).Run();
}

}  // namespace jax_moe::cuda
