// GGUF's layout to the tiled one (ffi/blocks/tiled.h) and back: a thread block a band of rows, of
// which 256 columns at a time are in shared memory as records' sources.
#include "ffi/cuda/repack.h"

#include <algorithm>

#include "ffi/blocks/tiled.h"
#include "ffi/cuda/load.h"

namespace jax_moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowThreads = kThreads / kBandRows;  // that measure a row

template <typename F>
__device__ const tiled::BitTables<F> kTables = tiled::MakeBitTables<F>();

// Sources of a band's rows, as many blocks of each as 256 weights are.
template <typename F>
struct Step {
  static constexpr int kBlocks = 256 / F::kBlock;
  uint8_t source[kBandRows][kBlocks][tiled::Sizes<F>::kSourceBytes];
};

// Calls f(row, block of the step, item) for this thread's items, of which every block of a step has
// kItems.
template <typename F, int kItems, typename Item>
__device__ void ForEachItem(int blocks, Item&& f) {
  for (int i = threadIdx.x; i < kBandRows * blocks * kItems; i += kThreads) {
    f(i / kItems / blocks, i / kItems % blocks, i % kItems);
  }
}

template <typename F>
__device__ void Measure(const uint8_t* band, int64_t blocks, float* aux) {
  constexpr int kUnits = tiled::Sizes<F>::kUnits;
  const int row = threadIdx.x / kRowThreads;
  uint32_t largest = 0;
  double squares = 0;
  for (int64_t unit = threadIdx.x % kRowThreads; unit < blocks * kUnits; unit += kRowThreads) {
    tiled::MeasureUnit<F>(band + (row * blocks + unit / kUnits) * F::kBytes,
                          static_cast<int>(unit % kUnits), largest, squares);
  }
#pragma unroll
  for (int step = kRowThreads / 2; step > 0; step /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    squares += __shfl_xor_sync(0xffffffffu, squares, step);
  }
  if (threadIdx.x % kRowThreads == 0) {
    aux[2 * row] = tiled::RowNormaliser(largest);
    aux[2 * row + 1] = tiled::RowNorm(largest, squares);
  }
}

template <typename F>
__global__ void __launch_bounds__(kThreads)
    Pack(const uint8_t* data, int64_t bands, int64_t blocks, uint8_t* tiled, float* aux) {
  using S = tiled::Sizes<F>;
  __shared__ Step<F> shared;
  for (int64_t band = blockIdx.x; band < bands; band += gridDim.x) {
    const int64_t first_block = band * kBandRows * blocks;
    const uint8_t* from = data + first_block * F::kBytes;
    uint8_t* to = tiled + first_block * S::kBytes;
    for (int64_t begin = 0; begin < blocks; begin += Step<F>::kBlocks) {
      const int count = static_cast<int>(min(int64_t{Step<F>::kBlocks}, blocks - begin));
      ForEachItem<F, F::kBytes>(count, [&](int row, int block, int byte) {
        shared.source[row][block][byte] = from[(row * blocks + begin + block) * F::kBytes + byte];
      });
      if constexpr (tiled::kDerivedBytes<F> > 0) {
        ForEachItem<F, S::kUnits>(count, [&](int row, int block, int unit) {
          Tiling<F>::Derive(from + (row * blocks + begin + block) * F::kBytes, unit,
                            shared.source[row][block] + F::kBytes);
        });
      }
      __syncthreads();
      ForEachItem<F, S::kBytes>(count, [&](int row, int block, int byte) {
        const uint8_t* source = shared.source[row][block];
        unsigned value = 0;
#pragma unroll
        for (int b = 0; b < 8; ++b) {
          const unsigned bit = kTables<F>.source_bit[8 * byte + b];
          value |= (source[bit / 8] >> bit % 8 & 1u) << b;
        }
        to[tiled::BandOffset<F>(row, begin + block, byte, blocks * S::kUnits)] =
            static_cast<uint8_t>(value);
      });
      __syncthreads();
    }
    Measure<F>(from, blocks, aux + band * kBandRows * 2);
  }
}

template <typename F>
__global__ void __launch_bounds__(kThreads)
    Unpack(const uint8_t* tiled, int64_t bands, int64_t blocks, uint8_t* data) {
  using S = tiled::Sizes<F>;
  __shared__ Step<F> shared;
  for (int64_t band = blockIdx.x; band < bands; band += gridDim.x) {
    const int64_t first_block = band * kBandRows * blocks;
    const uint8_t* from = tiled + first_block * S::kBytes;
    uint8_t* to = data + first_block * F::kBytes;
    for (int64_t begin = 0; begin < blocks; begin += Step<F>::kBlocks) {
      const int count = static_cast<int>(min(int64_t{Step<F>::kBlocks}, blocks - begin));
      ForEachItem<F, S::kSourceBytes>(count, [&](int row, int block, int byte) {
        unsigned value = 0;
#pragma unroll
        for (int b = 0; b < 8; ++b) {
          const unsigned bit = kTables<F>.record_bit[8 * byte + b];
          if (bit == 8 * S::kBytes) continue;
          const int64_t place = tiled::BandOffset<F>(row, begin + block, static_cast<int>(bit / 8),
                                                     blocks * S::kUnits);
          value |= (from[place] >> bit % 8 & 1u) << b;
        }
        shared.source[row][block][byte] = static_cast<uint8_t>(value);
      });
      __syncthreads();
      if constexpr (tiled::kDerivedBytes<F> > 0) {
        ForEachItem<F, 1>(count, [&](int row, int block, int) {
          uint8_t* source = shared.source[row][block];
          Tiling<F>::Restore(source + F::kBytes, source);
        });
        __syncthreads();
      }
      ForEachItem<F, F::kBytes>(count, [&](int row, int block, int byte) {
        to[(row * blocks + begin + block) * F::kBytes + byte] = shared.source[row][block][byte];
      });
      __syncthreads();
    }
  }
}

// The norms of an expert's rows to the bound on all of them, a thread block an expert.
__global__ void __launch_bounds__(kThreads) BoundNorms(int64_t experts, int64_t rows, float* aux) {
  __shared__ float partial[kThreads / 32];
  for (int64_t expert = blockIdx.x; expert < experts; expert += gridDim.x) {
    float* expert_aux = aux + expert * rows * 2;
    float largest = 0;
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
      largest = fmaxf(largest, expert_aux[2 * row + 1]);
    }
    for (int step = 16; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = largest;
    __syncthreads();
    for (const float other : partial) largest = fmaxf(largest, other);
    const float bound = tiled::NormBound(largest);
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
      expert_aux[2 * row + 1] = bound;
    }
    __syncthreads();
  }
}

unsigned Grid(int64_t blocks) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, int64_t{1} << 30));
}

}  // namespace

cudaError_t LaunchRepack(int format, const RepackShape& shape, const uint8_t* data, uint8_t* tiled,
                         float* aux, cudaStream_t stream) {
  const int64_t bands = shape.experts * shape.rows / kBandRows;
  VisitFormat(format, [&](auto decoder) {
    using F = decltype(decoder);
    Pack<F><<<Grid(bands), kThreads, 0, stream>>>(data, bands, shape.blocks, tiled, aux);
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  BoundNorms<<<Grid(shape.experts), kThreads, 0, stream>>>(shape.experts, shape.rows, aux);
  return cudaGetLastError();
}

cudaError_t LaunchUnpack(int format, const RepackShape& shape, const uint8_t* tiled, uint8_t* data,
                         cudaStream_t stream) {
  const int64_t bands = shape.experts * shape.rows / kBandRows;
  VisitFormat(format, [&](auto decoder) {
    using F = decltype(decoder);
    Unpack<F><<<Grid(bands), kThreads, 0, stream>>>(tiled, bands, shape.blocks, data);
  });
  return cudaGetLastError();
}

cudaError_t LoadRepack(int format) {
  cudaError_t status = LoadKernel(BoundNorms);
  VisitFormat(format, [&](auto decoder) {
    using F = decltype(decoder);
    if (status == cudaSuccess) status = LoadKernels(Pack<F>, Unpack<F>);
  });
  return status;
}

}  // namespace jax_moe::cuda
