// Tiled weights times up to 8 tokens of an expert: bound by the bytes of the weights.
//
// A block's 8 warps have two bands of 16 rows, gate and up of the same neurons where both are there.
// Four warps share a band, each with every fourth 256 columns. A warp streams its bytes through a ring
// in shared memory of its own, several hundred cycles ahead, and decodes them straight into tensor-core
// operands: no barrier is passed until the four sums are added, in warp order.
#pragma once

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/ptx.cuh"
#include "ffi/cuda/tiled_epilogue.cuh"
#include "ffi/cuda/tiled_unit.cuh"

namespace jax_moe::cuda {

template <typename Format>
struct TiledNarrowShape {
  static constexpr int kTokens = 8;
  static constexpr int kRows = 16;  // of a band
  static constexpr int kSplits = 4;
  static constexpr int kWarps = 2 * kSplits;
  static constexpr int kStep = 256;  // columns of a ring's stage
  static constexpr int kStageBytes = kRows * kStep / Format::kBlock * Format::kBytes;
  // Three blocks fit into a multiprocessor of sm_90.
  static constexpr int kStages = std::max(2, std::min(4, 75000 / (kWarps * kStageBytes)));

  struct alignas(16) Memory {
    uint8_t ring[kWarps][kStages][kStageBytes];
    uint64_t full[kWarps][kStages];
    float sums[kWarps][kTokens][kRows + 1];
    float reduced[kWarps];
    float x_factor[kTokens], h_factor[kTokens];
  };
};

// A warp's way through its part of a band.
template <typename Format>
class BandStream {
 public:
  using Shape = TiledNarrowShape<Format>;

  __device__ __forceinline__ BandStream(uint8_t (*ring)[Shape::kStageBytes], uint64_t* full,
                                        const uint8_t* band, int columns, int split)
      : ring_(ring), full_(full), band_(band), columns_(columns), split_(split) {}

  __device__ __forceinline__ void Start() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < Shape::kStages; ++i) InitBarrier(full_ + i, 1);
      FenceBarrierInit();
    }
    __syncwarp();
#endif
#pragma unroll
    for (int i = 0; i < Shape::kStages; ++i) Fetch(i);
  }

  // First column of this warp's step n.
  __device__ __forceinline__ int Column(int n) const {
    return (n * Shape::kSplits + split_) * Shape::kStep;
  }

  __device__ __forceinline__ const uint8_t* Wait(int n) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    WaitBarrier(full_ + n % Shape::kStages, n / Shape::kStages & 1);
#else
    WaitCopies<Shape::kStages - 1>();
    __syncwarp();
#endif
    return ring_[n % Shape::kStages];
  }

  // Step n has been read: its place takes a later one.
  __device__ __forceinline__ void Release(int n) {
    __syncwarp();
    Fetch(n + Shape::kStages);
  }

 private:
  __device__ __forceinline__ void Fetch(int n) {
    const int column = Column(n), lane = threadIdx.x % 32;
    const int bytes =
        column < columns_ ? TiledRow<Format>::BandBytes(min(Shape::kStep, columns_ - column)) : 0;
    const uint8_t* from = band_ + TiledRow<Format>::BandBytes(column);
    uint8_t* to = ring_[n % Shape::kStages];
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (lane == 0 && bytes > 0) {
      ArriveExpectBytes(full_ + n % Shape::kStages, bytes);
      BulkCopy(to, from, bytes, full_ + n % Shape::kStages);
    }
#else
    for (int at = 16 * lane; at < bytes; at += 16 * 32) CopyAsync16(to + at, from + at);
    CommitCopies();
#endif
  }

  uint8_t (*ring_)[Shape::kStageBytes];
  uint64_t* full_;
  const uint8_t* band_;
  const int columns_, split_;
};

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

// This warp's part of a band times the tile's tokens. x_row: the activations of token lane / 4, null
// where there is none.
template <typename Format>
__device__ __forceinline__ void MultiplyBand(BandStream<Format>& stream, const half* x_row,
                                             int columns, const float (&normaliser)[2],
                                             float (&sum)[4]) {
  using Tiled = TiledUnit<Format>;
  constexpr int kChunks = 2;  // of a step
  const int lane = threadIdx.x % 32, t = lane % 4;
  for (int n = 0; stream.Column(n) < columns; ++n) {
    const int column = stream.Column(n);
    uint4 x[kChunks][4] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (x_row == nullptr || column + 128 * c + 32 * t >= columns) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[c][i] = *reinterpret_cast<const uint4*>(x_row + column + 128 * c + 32 * i + 8 * t);
      }
    }
    const uint8_t* stage = stream.Wait(n);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int units = min(4, (columns - column) / 32 - 4 * c);
      if (c > 0 && units <= 0) break;
      const uint8_t* atom =
          Tiled::kChunks == 2 ? stage : stage + TiledRow<Format>::BandBytes(128 * c);
      typename Tiled::Place place = {units, Tiled::kChunks == 2 ? c : 0, lane / 4, t};
      LaneUnit<Format> low, high;
      low.Load(atom, place, normaliser[0]);
      place.row += 8;
      high.Load(atom, place, normaliser[1]);
      MultiplySteps<Format>(sum, low, high, x[c]);
    }
    stream.Release(n);
  }
}

template <typename Format>
__global__ void __launch_bounds__(32 * TiledNarrowShape<Format>::kWarps, 3)
    TiledNarrow(const __grid_constant__ TiledArgs args) {
  using Shape = TiledNarrowShape<Format>;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& memory = *reinterpret_cast<typename Shape::Memory*>(shared);
  TokenTile tile;
  if (!FindTile(args.lists, &tile)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int job = warp / Shape::kSplits;
  const bool paired = args.activate && args.gated;
  const int which = paired ? job : args.activate ? 1 : 0;
  const int band = paired ? blockIdx.x : 2 * blockIdx.x + job;
  const bool present = band * Shape::kRows < args.rows;

  const TiledMatrix& matrix = args.matrix[which];
  const float* aux = matrix.aux + (tile.expert * matrix.expert_rows + band * Shape::kRows) * 2;
  float sum[4] = {};
  if (present) {
    BandStream<Format> stream(
        memory.ring[warp], memory.full[warp],
        matrix.data + tile.expert * matrix.expert_bytes + band * Shape::kRows * args.row_bytes,
        args.columns, warp % Shape::kSplits);
    stream.Start();
    const half* x_row = nullptr;
    if (g < tile.count) {
      const int pair = args.lists.pairs[tile.begin + g];
      x_row = static_cast<const half*>(args.x.values) + pair / args.pairs_a_row * args.x.pitch;
    }
    const float normaliser[2] = {0x1p24f / aux[2 * g], 0x1p24f / aux[2 * (g + 8)]};
    MultiplyBand<Format>(stream, x_row, args.columns, normaliser, sum);
    // A lane holds rows g and g + 8 of tokens 2 t and 2 t + 1.
#pragma unroll
    for (int i = 0; i < 4; ++i) memory.sums[warp][2 * t + i % 2][g + 8 * (i / 2)] = sum[i];
  }
  if (args.activate) {
    const float bias[2] = {
        args.gated
            ? LargestBias<WholeBlock>(args.projection[0], tile.expert, args.rows, memory.reduced)
            : 0,
        LargestBias<WholeBlock>(args.projection[1], tile.expert, args.rows, memory.reduced)};
    if (threadIdx.x < tile.count) {
      const int pair = args.lists.pairs[tile.begin + threadIdx.x];
      memory.h_factor[threadIdx.x] =
          ScaleOfH(args, tile.expert, pair, bias, blockIdx.x == 0);
    }
  }
  __syncthreads();

  const int row = threadIdx.x % Shape::kRows, token = threadIdx.x / Shape::kRows % Shape::kTokens;
  if (token >= tile.count) return;
  const int pair = args.lists.pairs[tile.begin + token];
  const float factor = PairFactor(args, pair);
  const auto result = [&](int job_of, int index, int band_of) {
    float total = 0;
#pragma unroll
    for (int s = 0; s < Shape::kSplits; ++s)
      total += memory.sums[job_of * Shape::kSplits + s][token][row];
    const TiledMatrix& m = args.matrix[index];
    return total * m.aux[(tile.expert * m.expert_rows + band_of * Shape::kRows + row) * 2] * factor;
  };
  const int half_of_block = threadIdx.x / (Shape::kRows * Shape::kTokens);
  if (paired) {
    if (half_of_block > 0) return;
    const int n = band * Shape::kRows + row;
    static_cast<half*>(args.y)[pair * args.y_pitch + n / 128 * 128 + NarrowPlace(n % 128)] =
        ActivateToHalf(args, result(0, 0, blockIdx.x), result(1, 1, blockIdx.x), tile.expert, n,
                       memory.h_factor[token]);
    return;
  }
  const int my_band = 2 * blockIdx.x + half_of_block, n = my_band * Shape::kRows + row;
  if (n >= args.rows) return;
  const float value = result(half_of_block, which, my_band);
  if (args.activate) {
    static_cast<half*>(args.y)[pair * args.y_pitch + n / 128 * 128 + NarrowPlace(n % 128)] =
        ActivateToHalf(args, 0.0f, value, tile.expert, n, memory.h_factor[token]);
  } else {
    Store(args.y, pair * args.y_pitch + n, args.y_type, value);
  }
}

}  // namespace jax_moe::cuda
