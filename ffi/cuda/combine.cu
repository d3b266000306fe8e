#include "ffi/cuda/combine.h"

#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) Combine(const __grid_constant__ CombineArgs args,
                                                    int64_t blocks_a_token) {
  const int64_t token = blockIdx.x / blocks_a_token;
  const int64_t column = blockIdx.x % blocks_a_token * kThreads + threadIdx.x;
  if (column >= args.columns) return;
  float sum = 0;
  for (int s = 0; s < args.top_k; ++s) {
    const int64_t pair = token * args.top_k + s;
    const int64_t expert = args.expert_ids[pair];
    if (expert < 0 || expert >= args.experts) continue;
    float value = args.values[pair * args.columns + column];
    const Projection& p = args.projection;
    if (p.scale != nullptr) value *= p.scale[expert];
    if (p.bias != nullptr) value += p.bias[expert * p.bias_pitch + column];
    if (args.weights != nullptr) value *= args.weights[pair];
    sum += value;
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
