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
    float h_factor[kTokens];
    int32_t pair[kWarps][kTokens];
  };
};

// One warp's stream of bands' bytes through its ring. Source(n) tells where step n's bytes begin and how
// many there are, 0 past the last step.
struct Span16 {
  const uint8_t* from;
  int bytes;  // a multiple of 16
};

template <typename Format, typename Source>
class BandStream {
 public:
  using Shape = TiledNarrowShape<Format>;

  __device__ __forceinline__ BandStream(uint8_t (*ring)[Shape::kStageBytes], uint64_t* full,
                                        const Source& source)
      : ring_(ring), full_(full), source_(source) {}

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
    uint8_t* to = ring_[n % Shape::kStages];
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (threadIdx.x % 32 != 0) return;
    const Span16 span = source_(n);
    if (span.bytes == 0) return;
    ArriveExpectBytes(full_ + n % Shape::kStages, span.bytes);
    BulkCopy(to, span.from, span.bytes, full_ + n % Shape::kStages);
#else
    const Span16 span = source_(n);
    for (int at = 16 * (threadIdx.x % 32); at < span.bytes; at += 16 * 32) {
      CopyAsync16(to + at, span.from + at);
    }
    CommitCopies();
#endif
  }

  uint8_t (*ring_)[Shape::kStageBytes];
  uint64_t* full_;
  const Source source_;
};

// First column of step n of the warps with this part of a band.
template <typename Format>
__device__ __forceinline__ int StepColumn(int n, int split) {
  using Shape = TiledNarrowShape<Format>;
  return (n * Shape::kSplits + split) * Shape::kStep;
}

template <typename Format>
__device__ __forceinline__ Span16 StepSpan(const uint8_t* band, int column, int columns) {
  using Row = TiledRow<Format>;
  if (column >= columns) return {band, 0};
  return {band + Row::BandBytes(column),
          Row::BandBytes(min(TiledNarrowShape<Format>::kStep, columns - column))};
}

// The steps of one part of a band.
template <typename Format>
struct PartOfBand {
  const uint8_t* band;
  int columns, split;
  __device__ __forceinline__ Span16 operator()(int n) const {
    return StepSpan<Format>(band, StepColumn<Format>(n, split), columns);
  }
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

// Adds the products of one step: 256 columns from `column` on. x_row: the activations of token
// lane / 4, null where there is none.
template <typename Format, typename Stream>
__device__ __forceinline__ void MultiplyStep(Stream& stream, int n, const half* x_row, int column,
                                             int columns, const float (&normaliser)[2],
                                             float (&sum)[4]) {
  using Tiled = TiledUnit<Format>;
  constexpr int kChunks = 2;  // of a step
  const int lane = threadIdx.x % 32, t = lane % 4;
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

// A tile's expert and pairs, by each warp for itself.
struct WarpTile {
  int expert, count;
};

// From the ids themselves, for up to 32 pairs: block p's tile begins with pair p, if that is the first,
// the ninth, ... of its expert. False where there is none.
__device__ __forceinline__ bool FindWarpTile(const Lists& lists, int32_t* pairs, WarpTile* tile) {
  const int lane = threadIdx.x % 32, first = blockIdx.y;
  const int id = lane < lists.max_tiles ? lists.expert_ids[lane] : -1;
  tile->expert = __shfl_sync(0xffffffffu, id, first);
  if (tile->expert < 0 || tile->expert >= lists.experts) return false;
  const unsigned same = __ballot_sync(0xffffffffu, id == tile->expert);
  const int rank = __popc(same & ((1u << first) - 1));
  if (rank % 8 != 0) return false;
  const int index = __popc(same & ((1u << lane) - 1)) - rank;
  if ((same >> lane & 1) && index >= 0 && index < 8) pairs[index] = lane;
  __syncwarp();
  tile->count = min(8, __popc(same) - rank);
  return true;
}

template <typename Format>
__global__ void __launch_bounds__(32 * TiledNarrowShape<Format>::kWarps, 3)
    TiledNarrow(const __grid_constant__ TiledArgs args) {
  using Shape = TiledNarrowShape<Format>;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& memory = *reinterpret_cast<typename Shape::Memory*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // With the ids at hand, which are older than the kernel before this one, weights can be on their way
  // before that one has ended.
  const bool early = args.lists.expert_ids != nullptr;
  LetNextKernelStart();
  if (!early) WaitForEarlierKernels();
  WarpTile tile;
  if (early) {
    if (!FindWarpTile(args.lists, memory.pair[warp], &tile)) return WaitForEarlierKernels();
  } else {
    TokenTile listed;
    if (!FindTile(args.lists, &listed)) return;
    tile = {listed.expert, listed.count};
    if (lane < tile.count) memory.pair[warp][lane] = args.lists.pairs[listed.begin + lane];
    __syncwarp();
  }
  const int job = warp / Shape::kSplits, split = warp % Shape::kSplits;
  const bool paired = args.activate && args.gated;
  const int which = paired ? job : args.activate ? 1 : 0;
  const int band = paired ? blockIdx.x : 2 * blockIdx.x + job;
  const bool present = band * Shape::kRows < args.rows;

  const TiledMatrix& matrix = args.matrix[which];
  const float* aux = matrix.aux + (tile.expert * matrix.expert_rows + band * Shape::kRows) * 2;
  float sum[4] = {};
  if (present) {
    const uint8_t* bytes =
        matrix.data + tile.expert * matrix.expert_bytes + band * Shape::kRows * args.row_bytes;
    BandStream<Format, PartOfBand<Format>> stream(memory.ring[warp], memory.full[warp],
                                                  {bytes, args.columns, split});
    stream.Start();
    const float normaliser[2] = {0x1p24f / aux[2 * g], 0x1p24f / aux[2 * (g + 8)]};
    if (early) WaitForEarlierKernels();
    const half* x_row = nullptr;
    if (g < tile.count) {
      x_row = static_cast<const half*>(args.x.values) +
              memory.pair[warp][g] / args.pairs_a_row * args.x.pitch;
    }
    for (int n = 0; StepColumn<Format>(n, split) < args.columns; ++n) {
      MultiplyStep<Format>(stream, n, x_row, StepColumn<Format>(n, split), args.columns, normaliser,
                           sum);
    }
    // A lane holds rows g and g + 8 of tokens 2 t and 2 t + 1.
#pragma unroll
    for (int i = 0; i < 4; ++i) memory.sums[warp][2 * t + i % 2][g + 8 * (i / 2)] = sum[i];
  } else if (early) {
    WaitForEarlierKernels();
  }
  if (args.activate) {
    const float bias[2] = {
        args.gated
            ? LargestBias<WholeBlock>(args.projection[0], tile.expert, args.rows, memory.reduced)
            : 0,
        LargestBias<WholeBlock>(args.projection[1], tile.expert, args.rows, memory.reduced)};
    if (threadIdx.x < tile.count) {
      const int pair = memory.pair[0][threadIdx.x];
      memory.h_factor[threadIdx.x] =
          ScaleOfH(args, tile.expert, pair, bias, blockIdx.x == 0);
    }
  }
  __syncthreads();

  const int row = threadIdx.x % Shape::kRows, token = threadIdx.x / Shape::kRows % Shape::kTokens;
  if (token >= tile.count) return;
  const int pair = memory.pair[0][token];
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
