// GGUF's layout to the tiled one (ffi/blocks/tiled.h) and back: a thread block a band of rows.
#include "ffi/cuda/repack.h"

#include <algorithm>

#include "ffi/blocks/tiled.h"

namespace jax_moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowThreads = kThreads / kBandRows;  // that measure a row

template <typename F>
__device__ const tiled::BitTables<F> kTables = tiled::MakeBitTables<F>();

// Calls f(row of the band, block of the row, byte of the block) for this thread's bytes of a band.
template <typename F, typename Byte>
__device__ void ForEachByte(int64_t row_bytes, Byte&& f) {
  for (int row = 0; row < kBandRows; ++row) {
    for (int64_t i = threadIdx.x; i < row_bytes; i += kThreads) {
      const int64_t block = i / F::kBytes;
      f(row, block, static_cast<int>(i - block * F::kBytes));
    }
  }
}

template <typename F>
__global__ void __launch_bounds__(kThreads)
    Pack(const uint8_t* data, int64_t bands, int64_t row_bytes, uint8_t* tiled, float* aux) {
  const int64_t blocks = row_bytes / F::kBytes;
  const int64_t units = blocks * tiled::Sizes<F>::kUnits;
  for (int64_t band = blockIdx.x; band < bands; band += gridDim.x) {
    const uint8_t* from = data + band * kBandRows * row_bytes;
    uint8_t* to = tiled + band * kBandRows * row_bytes;
    ForEachByte<F>(row_bytes, [&](int row, int64_t block, int byte) {
      const uint8_t* source = from + row * row_bytes + block * F::kBytes;
      unsigned value = 0;
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        const unsigned bit = kTables<F>.block_bit[8 * byte + b];
        value |= (source[bit / 8] >> bit % 8 & 1u) << b;
      }
      to[tiled::BandOffset<F>(row, block, byte, units)] = static_cast<uint8_t>(value);
    });

    const int row = threadIdx.x / kRowThreads;
    uint32_t largest = 0;
    double squares = 0;
    for (int64_t unit = threadIdx.x % kRowThreads; unit < units; unit += kRowThreads) {
      tiled::MeasureUnit<F>(
          from + row * row_bytes + unit / tiled::Sizes<F>::kUnits * F::kBytes,
          static_cast<int>(unit % tiled::Sizes<F>::kUnits), largest, squares);
    }
#pragma unroll
    for (int step = kRowThreads / 2; step > 0; step /= 2) {
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      squares += __shfl_xor_sync(0xffffffffu, squares, step);
    }
    if (threadIdx.x % kRowThreads == 0) {
      float* row_aux = aux + (band * kBandRows + row) * 2;
      row_aux[0] = tiled::RowNormaliser(largest);
      row_aux[1] = tiled::RowNorm(largest, squares);
    }
  }
}

template <typename F>
__global__ void __launch_bounds__(kThreads)
    Unpack(const uint8_t* tiled, int64_t bands, int64_t row_bytes, uint8_t* data) {
  const int64_t units = row_bytes / F::kBytes * tiled::Sizes<F>::kUnits;
  for (int64_t band = blockIdx.x; band < bands; band += gridDim.x) {
    const uint8_t* from = tiled + band * kBandRows * row_bytes;
    uint8_t* to = data + band * kBandRows * row_bytes;
    ForEachByte<F>(row_bytes, [&](int row, int64_t block, int byte) {
      unsigned value = 0;
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        const unsigned bit = kTables<F>.record_bit[8 * byte + b];
        const int64_t place =
            tiled::BandOffset<F>(row, block, static_cast<int>(bit / 8), units);
        value |= (from[place] >> bit % 8 & 1u) << b;
      }
      to[row * row_bytes + block * F::kBytes + byte] = static_cast<uint8_t>(value);
    });
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

int64_t TiledBlockBytes(int format) {
  int64_t bytes = 0;
  VisitTiledFormat(format, [&](auto decoder) { bytes = decltype(decoder)::kBytes; });
  return bytes;
}

cudaError_t LaunchRepack(int format, const RepackShape& shape, const uint8_t* data, uint8_t* tiled,
                         float* aux, cudaStream_t stream) {
  const int64_t bands = shape.experts * shape.rows / kBandRows;
  VisitTiledFormat(format, [&](auto decoder) {
    using F = decltype(decoder);
    Pack<F><<<Grid(bands), kThreads, 0, stream>>>(data, bands, shape.row_bytes, tiled, aux);
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  BoundNorms<<<Grid(shape.experts), kThreads, 0, stream>>>(shape.experts, shape.rows, aux);
  return cudaGetLastError();
}

cudaError_t LaunchUnpack(int format, const RepackShape& shape, const uint8_t* tiled, uint8_t* data,
                         cudaStream_t stream) {
  const int64_t bands = shape.experts * shape.rows / kBandRows;
  VisitTiledFormat(format, [&](auto decoder) {
    using F = decltype(decoder);
    Unpack<F><<<Grid(bands), kThreads, 0, stream>>>(tiled, bands, shape.row_bytes, data);
  });
  return cudaGetLastError();
}

}  // namespace jax_moe::cuda
