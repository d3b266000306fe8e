#include "ffi/cuda/combine.h"

#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kThreads = 256;

// kColumns of a pair's values.
template <int kColumns>
__device__ __forceinline__ void LoadValues(const CombineArgs& args, int64_t pair, int64_t column,
                                           float (&value)[kColumns]) {
  const int64_t at = pair * args.columns + column;
  if (args.scaled_values == nullptr) {
    for (int i = 0; i < kColumns; ++i) value[i] = args.values[at + i];
  } else if constexpr (kColumns == 8) {
    const uint4 bits = *reinterpret_cast<const uint4*>(args.scaled_values + at);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    for (int i = 0; i < 4; ++i) {
      const float2 two = __half22float2(*reinterpret_cast<const half2*>(&words[i]));
      value[2 * i] = two.x, value[2 * i + 1] = two.y;
    }
  } else {
    for (int i = 0; i < kColumns; ++i) value[i] = __half2float(args.scaled_values[at + i]);
  }
}

template <int kColumns>
__global__ void __launch_bounds__(kThreads)
    Combine(const __grid_constant__ CombineArgs args, int64_t blocks_a_token) {
  const int64_t token = blockIdx.x / blocks_a_token;
  const int64_t column = (blockIdx.x % blocks_a_token * kThreads + threadIdx.x) * kColumns;
  if (column >= args.columns) return;
  const Projection& p = args.projection;
  const int width = args.scale_columns == 0 ? static_cast<int>(args.columns) : args.scale_columns;
  const int64_t scales = (args.columns + width - 1) / width, group = column / width;
  // Slots are read several at a time and added one after another.
  constexpr int kBatch = 8;
  float sum[kColumns] = {};
  for (int first = 0; first < args.top_k; first += kBatch) {
    int expert[kBatch];
    float value[kBatch][kColumns], scale[kBatch], weight[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t pair = token * args.top_k + first + i;
      expert[i] = first + i < args.top_k ? args.expert_ids[pair] : -1;
      if (expert[i] >= args.experts) expert[i] = -1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (expert[i] < 0) continue;
      const int64_t pair = token * args.top_k + first + i;
      LoadValues(args, pair, column, value[i]);
      scale[i] = p.scale == nullptr ? 1.0f : p.scale[expert[i]];
      if (args.scaled_values != nullptr) scale[i] *= args.scales[pair * scales + group];
      weight[i] = args.weights == nullptr ? 1.0f : args.weights[pair];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (expert[i] < 0) continue;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float bias =
            p.bias == nullptr ? 0.0f : p.bias[expert[i] * p.bias_pitch + column + c];
        sum[c] += (value[i][c] * scale[i] + bias) * weight[i];
      }
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    Store(args.y, token * args.columns + column + c, args.y_type, sum[c]);
  }
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
  const int64_t blocks_a_token = (args.columns + kThreads * columns - 1) / (kThreads * columns);
  const unsigned blocks = static_cast<unsigned>(args.tokens * blocks_a_token);
  if (columns == 8) {
    Combine<8><<<blocks, kThreads, 0, stream>>>(args, blocks_a_token);
  } else if (columns == 4) {
    Combine<4><<<blocks, kThreads, 0, stream>>>(args, blocks_a_token);
  } else {
    Combine<1><<<blocks, kThreads, 0, stream>>>(args, blocks_a_token);
  }
  return cudaGetLastError();
}

cudaError_t LaunchZeroRows(const int32_t* expert_ids, int64_t pairs, int32_t experts, void* y,
                           int64_t columns, Element y_type, cudaStream_t stream) {
  if (pairs == 0) return cudaSuccess;
  ZeroRows<<<static_cast<unsigned>(pairs), kThreads, 0, stream>>>(expert_ids, experts, y, columns,
                                                                  y_type);
  return cudaGetLastError();
}

}  // namespace jax_moe::cuda
