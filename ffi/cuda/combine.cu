#include "ffi/cuda/combine.h"

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/launch_early.h"
#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kThreads = 256;

// kColumns of a pair's values: as they are in memory, for many loads under way take few registers so.
template <int kColumns>
struct Values {
  static constexpr int kWords = kColumns == 8 ? 4 : kColumns;
  uint32_t words[kWords];

  // From element `at` on.
  __device__ __forceinline__ void Load(const CombineArgs& args, int64_t at) {
    if constexpr (kColumns == 8) {
      const uint4 bits = *reinterpret_cast<const uint4*>(args.scaled_values + at);
      words[0] = bits.x, words[1] = bits.y, words[2] = bits.z, words[3] = bits.w;
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        words[i] = __float_as_uint(args.scaled_values == nullptr
                                       ? args.values[at + i]
                                       : __half2float(args.scaled_values[at + i]));
      }
    }
  }
  __device__ __forceinline__ float Get(int i) const {
    if constexpr (kColumns == 8) {
      const float2 two = __half22float2(*reinterpret_cast<const half2*>(&words[i / 2]));
      return i % 2 == 0 ? two.x : two.y;
    } else {
      return __uint_as_float(words[i]);
    }
  }
};

// A grid of tokens by parts of their columns; `scales` a row.
template <int kColumns>
__global__ void __launch_bounds__(kThreads)
    Combine(const __grid_constant__ CombineArgs args, int scales) {
  LetNextKernelStart();
  WaitForEarlierKernels();
  const int64_t token = blockIdx.x;
  const int column = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * kColumns;
  if (column >= args.columns) return;
  const Projection& p = args.projection;
  const int group = args.scale_columns == 0 ? 0 : column / args.scale_columns;
  // Slots are read several at a time and added one after another.
  constexpr int kBatch = 8;
  float sum[kColumns] = {};
  for (int first = 0; first < args.top_k; first += kBatch) {
    int expert[kBatch];
    Values<kColumns> value[kBatch];
    float scale[kBatch], weight[kBatch];
    int64_t pair = token * args.top_k + first, at = pair * args.columns + column;
    // Values of pairs without an expert are nothing, but are read without waiting for the id.
#pragma unroll
    for (int i = 0; i < kBatch; ++i, ++pair, at += args.columns) {
      expert[i] = -1;
      if (first + i >= args.top_k) continue;
      expert[i] = args.expert_ids[pair];
      value[i].Load(args, at);
      scale[i] = args.scaled_values == nullptr ? 1.0f : args.scales[pair * scales + group];
      weight[i] = args.weights == nullptr ? 1.0f : args.weights[pair];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (expert[i] >= args.experts) expert[i] = -1;
      if (expert[i] >= 0 && p.scale != nullptr) scale[i] *= p.scale[expert[i]];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (expert[i] < 0) continue;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float bias =
            p.bias == nullptr ? 0.0f : p.bias[expert[i] * p.bias_pitch + column + c];
        sum[c] += (value[i].Get(c) * scale[i] + bias) * weight[i];
      }
    }
  }
  StoreColumns(args.y, token * args.columns + column, args.y_type, sum);
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
  const int columns =
      args.scaled_values != nullptr && args.columns % 8 == 0 ? 8 : args.columns % 4 == 0 ? 4 : 1;
  const int64_t parts = (args.columns + kThreads * columns - 1) / (kThreads * columns);
  const dim3 grid(static_cast<unsigned>(args.tokens), static_cast<unsigned>(parts));
  const int width = args.scale_columns;
  const int scales = width == 0 ? 1 : static_cast<int>((args.columns + width - 1) / width);
  const auto kernel = columns == 8 ? Combine<8> : columns == 4 ? Combine<4> : Combine<1>;
  return LaunchEarly(kernel, grid, kThreads, 0, stream, args, scales);
}

cudaError_t LaunchZeroRows(const int32_t* expert_ids, int64_t pairs, int32_t experts, void* y,
                           int64_t columns, Element y_type, cudaStream_t stream) {
  if (pairs == 0) return cudaSuccess;
  ZeroRows<<<static_cast<unsigned>(pairs), kThreads, 0, stream>>>(expert_ids, experts, y, columns,
                                                                  y_type);
  return cudaGetLastError();
}

}  // namespace jax_moe::cuda
