#include "ffi/cuda/combine.h"

#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    Combine(const __grid_constant__ CombineArgs args, int64_t blocks_a_token) {
  const int64_t token = blockIdx.x / blocks_a_token;
  const int64_t column = blockIdx.x % blocks_a_token * kThreads + threadIdx.x;
  if (column >= args.columns) return;
  const Projection& p = args.projection;
  // Slots are read several at a time and added one after another.
  constexpr int kBatch = 8;
  float sum = 0;
  for (int first = 0; first < args.top_k; first += kBatch) {
    int expert[kBatch];
    float value[kBatch], scale[kBatch], bias[kBatch], weight[kBatch];
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
      value[i] = args.values[pair * args.columns + column];
      scale[i] = p.scale == nullptr ? 1.0f : p.scale[expert[i]];
      bias[i] = p.bias == nullptr ? 0.0f : p.bias[expert[i] * p.bias_pitch + column];
      weight[i] = args.weights == nullptr ? 1.0f : args.weights[pair];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (expert[i] >= 0) sum += (value[i] * scale[i] + bias[i]) * weight[i];
    }
  }
  Store(args.y, token * args.columns + column, args.y_type, sum);
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
  const int64_t blocks_a_token = (args.columns + kThreads - 1) / kThreads;
  if (args.tokens == 0) return cudaSuccess;
  Combine<<<static_cast<unsigned>(args.tokens * blocks_a_token), kThreads, 0, stream>>>(
      args, blocks_a_token);
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
