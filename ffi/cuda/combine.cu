#include "ffi/cuda/combine.h"

#include <type_traits>

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/launch_early.h"
#include "ffi/cuda/load.h"
#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCombineThreads = 128;  // at most

// kColumns of a pair's values, which nobody reads again: 8 halves, or float32. As they are in
// memory, for many loads under way take few registers so.
template <int kColumns>
struct Values {
  static constexpr bool kScaled = kColumns == 8;
  using Element = std::conditional_t<kScaled, half, float>;
  using Piece = std::conditional_t<kColumns == 1, uint32_t, uint4>;
  Piece piece;

  __device__ __forceinline__ void Load(const Element* at) {
    piece = __ldcs(reinterpret_cast<const Piece*>(at));
  }
  __device__ __forceinline__ float Get(int i) const {
    if constexpr (kColumns == 1) return __uint_as_float(piece);
    if constexpr (kColumns == 4) return __uint_as_float(Word(i));
    if constexpr (kColumns == 8) {
      const uint32_t word = Word(i / 2);
      const float2 two = __half22float2(*reinterpret_cast<const half2*>(&word));
      return i % 2 == 0 ? two.x : two.y;
    }
  }

 private:
  __device__ __forceinline__ uint32_t Word(int i) const {
    return i == 0 ? piece.x : i == 1 ? piece.y : i == 2 ? piece.z : piece.w;
  }
};

// What there is to a pair besides its values; no expert: -1. All of it is older than the kernel
// before this one.
struct PairTerms {
  int expert;
  float scale, weight;

  __device__ __forceinline__ PairTerms(const CombineArgs& args, int64_t pair, bool inside) {
    expert = inside ? args.expert_ids[pair] : -1;
    weight = inside && args.weights != nullptr ? args.weights[pair] : 1.0f;
    if (expert >= args.experts) expert = -1;
    const float* scales = args.projection.scale;
    scale = expert >= 0 && scales != nullptr ? scales[expert] : 1.0f;
  }
};

// A grid of tokens by parts of their columns; `scales` a row.
template <int kColumns, bool kBiased>
__global__ void __launch_bounds__(kCombineThreads)
    Combine(const __grid_constant__ CombineArgs args, int scales) {
  LetNextKernelStart();
  const int64_t token = blockIdx.x;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kColumns;
  constexpr bool kScaled = Values<kColumns>::kScaled;
  const auto width = static_cast<uint32_t>(args.columns);
  const bool has = column < args.columns;
  const Projection& p = args.projection;
  // The token's first pair.
  const int64_t pair = token * args.top_k, at = pair * args.columns + column;
  const typename Values<kColumns>::Element* values;
  if constexpr (kScaled) {
    values = args.scaled_values + at;
  } else {
    values = args.values + at;
  }
  const float* row_scales = args.scales + pair * scales;
  if (kScaled && args.scale_columns != 0) row_scales += column / args.scale_columns;
  // Else every slot would begin with these again.
  asm volatile("" : "+l"(values), "+l"(row_scales));
  // Slots are read several at a time and added one after another. Lane i has the terms of the i-th.
  constexpr int kBatch = 8;
  const int lane = threadIdx.x % 32;
  float sum[kColumns] = {};
  for (int first = 0; first < args.top_k; first += kBatch) {
    const int batch = min(kBatch, args.top_k - first);
    const PairTerms terms(args, pair + first + lane, lane < batch);
    if (first == 0) WaitForEarlierKernels();
    Values<kColumns> value[kBatch];
    float scale[kBatch];
    // Those of pairs without an expert are nothing.
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!has || i >= batch) continue;
      value[i].Load(values + static_cast<uint32_t>(first + i) * width);
      scale[i] = kScaled ? __ldcs(row_scales + (first + i) * scales) : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int expert = __shfl_sync(0xffffffffu, terms.expert, i);
      const float weight = __shfl_sync(0xffffffffu, terms.weight, i);
      const float expert_scale = __shfl_sync(0xffffffffu, terms.scale, i);
      if (!has || expert < 0) continue;
      const float factor = scale[i] * expert_scale;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float bias = kBiased ? p.bias[expert * p.bias_pitch + column + c] : 0.0f;
        sum[c] += (value[i].Get(c) * factor + bias) * weight;
      }
    }
  }
  if (has) StoreColumns(args.y, token * args.columns + column, args.y_type, sum);
}

template <bool kBiased>
auto* CombineOf(int columns) {
  return columns == 8 ? Combine<8, kBiased> : columns == 4 ? Combine<4, kBiased>
                                                           : Combine<1, kBiased>;
}

__global__ void __launch_bounds__(kThreads)
    ZeroRows(const int32_t* expert_ids, int32_t experts, void* y, int64_t columns, Element y_type) {
  const int64_t pair = blockIdx.x;
  if (expert_ids[pair] >= 0 && expert_ids[pair] < experts) return;
  for (int64_t column = threadIdx.x; column < columns; column += kThreads) {
    Store(y, pair * columns + column, y_type, 0.0f);
  }
}

}  // namespace

cudaError_t LaunchCombine(const CombineArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) return cudaSuccess;
  const int columns = args.scaled_values != nullptr ? 8 : args.columns % 4 == 0 ? 4 : 1;
  const auto parts = [&](int threads) {
    return (args.columns + threads * columns - 1) / (int64_t{threads} * columns);
  };
  // Few tokens are spread over more blocks.
  const bool few = args.tokens * parts(kCombineThreads) < Multiprocessors();
  const int threads = few ? kCombineThreads / 2 : kCombineThreads;
  const dim3 grid(static_cast<unsigned>(args.tokens), static_cast<unsigned>(parts(threads)));
  const int width = args.scale_columns;
  const int scales = width == 0 ? 1 : static_cast<int>((args.columns + width - 1) / width);
  const bool biased = args.projection.bias != nullptr;
  auto* const kernel = biased ? CombineOf<true>(columns) : CombineOf<false>(columns);
  return LaunchEarly(kernel, grid, threads, 0, stream, args, scales);
}

cudaError_t LaunchZeroRows(const int32_t* expert_ids, int64_t pairs, int32_t experts, void* y,
                           int64_t columns, Element y_type, cudaStream_t stream) {
  if (pairs == 0) return cudaSuccess;
  ZeroRows<<<static_cast<unsigned>(pairs), kThreads, 0, stream>>>(expert_ids, experts, y, columns,
                                                                  y_type);
  return cudaGetLastError();
}

cudaError_t LoadCombine() {
  return LoadKernels(Combine<8, false>, Combine<8, true>, Combine<4, false>, Combine<4, true>,
                     Combine<1, false>, Combine<1, true>, ZeroRows);
}

}  // namespace jax_moe::cuda
