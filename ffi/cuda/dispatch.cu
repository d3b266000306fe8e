#include <algorithm>

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/launch_early.h"
#include "ffi/cuda/load.h"
#include "ffi/cuda/sort_block.cuh"

namespace jax_moe::cuda {
namespace {

__global__ void __launch_bounds__(kSortThreads) Sort(const __grid_constant__ SortArgs args) {
  extern __shared__ int32_t counts[];
  SortBlock sorting(args, args.expert_ids, counts);
  sorting.Clear();
  WaitForEarlierKernels();
  LetNextKernelStart();
  sorting.Run();
}

__global__ void MarkWinners(const int32_t* sorted_token_ids, int64_t pairs, int32_t* winners) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= pairs) return;
  const int32_t pair = sorted_token_ids[i];
  // The maximum does not depend on the order of its operands.
  if (pair >= 0 && pair < pairs) atomicMax(winners + pair, static_cast<int32_t>(i));
}

__global__ void TakeWinners(const int32_t* flat_expert_ids, int64_t pairs, const int32_t* winners,
                            int32_t* expert_ids) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p < pairs) expert_ids[p] = winners[p] < 0 ? -1 : flat_expert_ids[winners[p]];
}

unsigned Blocks(int64_t items, int threads) {
  return static_cast<unsigned>((items + threads - 1) / threads);
}

}  // namespace

int SortBlocks(const SortArgs& args) {
  return IsHopper() ? SortCluster(args.pairs, args.experts) : 1;
}

int64_t MaxTiles(int64_t pairs, int64_t experts, int64_t tile_tokens, bool even_tiles) {
  const int64_t most = std::min(pairs, experts) + pairs / tile_tokens;
  return even_tiles ? most + pairs / (2 * tile_tokens) : most;
}

cudaError_t LaunchSort(const SortArgs& args, cudaStream_t stream) {
  const int blocks = SortBlocks(args);
  return LaunchClusters(Sort, blocks, static_cast<unsigned>(blocks), kSortThreads,
                        SortSharedBytes(args, blocks), stream, args);
}

cudaError_t LaunchPairExperts(const int32_t* sorted_token_ids, const int32_t* flat_expert_ids,
                              int64_t pairs, int32_t* winners, int32_t* expert_ids,
                              cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(winners, 0xff, sizeof(int32_t) * pairs, stream);
  if (error != cudaSuccess) return error;
  MarkWinners<<<Blocks(pairs, 256), 256, 0, stream>>>(sorted_token_ids, pairs, winners);
  TakeWinners<<<Blocks(pairs, 256), 256, 0, stream>>>(flat_expert_ids, pairs, winners, expert_ids);
  return cudaGetLastError();
}

cudaError_t LoadDispatch() { return LoadKernels(Sort, MarkWinners, TakeWinners); }

}  // namespace jax_moe::cuda
