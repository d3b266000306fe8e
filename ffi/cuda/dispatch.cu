#include <algorithm>

#include "ffi/cuda/sort_block.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kThreads = kSortThreads;

__global__ void __launch_bounds__(kThreads) SortSegment(SortArgs args) {
  extern __shared__ int32_t counts[];
  SortInBlock(args, counts);
}

__device__ Span SegmentSpan(const SortArgs& args) {
  const int64_t size = SegmentSize(args.experts), begin = blockIdx.x * size;
  return {begin, min(begin + size, args.pairs)};
}

// Counts one segment a block.
__global__ void __launch_bounds__(kThreads) CountSegments(SortArgs args) {
  extern __shared__ int32_t counts[];
  const int buckets = args.experts + 1, warps = CountingWarps(args.pairs, args.experts);
  const int warp = threadIdx.x / 32;
  const Span segment = SegmentSpan(args);
  ClearCounts(counts, warps * buckets);
  if (warp < warps) {
    CountPairs(args.expert_ids, args.experts, WarpSpan(segment.begin, segment.end, warps, warp),
               counts + warp * buckets);
  }
  __syncthreads();
  for (int bucket = threadIdx.x; bucket < buckets; bucket += kThreads) {
    int sum = 0;
    for (int w = 0; w < warps; ++w) sum += counts[w * buckets + bucket];
    args.segment_counts[static_cast<int64_t>(blockIdx.x) * buckets + bucket] = sum;
  }
}

// From the segments' counts to where each segment's pairs of each bucket begin.
__global__ void __launch_bounds__(kThreads) PlaceSegments(SortArgs args) {
  const int64_t segments = Segments(args.pairs, args.experts), buckets = args.experts + 1;
  PlaceBuckets(
      args,
      [&](int bucket) {
        int sum = 0;
        for (int64_t s = 0; s < segments; ++s) sum += args.segment_counts[s * buckets + bucket];
        return sum;
      },
      [&](int bucket, int begin) {
        for (int64_t s = 0; s < segments; ++s) {
          const int here = args.segment_counts[s * buckets + bucket];
          args.segment_counts[s * buckets + bucket] = begin;
          begin += here;
        }
      });
}

__global__ void __launch_bounds__(kThreads) ScatterSegments(SortArgs args) {
  extern __shared__ int32_t counts[];
  const int buckets = args.experts + 1, warps = CountingWarps(args.pairs, args.experts);
  const int warp = threadIdx.x / 32;
  const Span segment = SegmentSpan(args);
  const Span span = WarpSpan(segment.begin, segment.end, warps, warp);
  ClearCounts(counts, warps * buckets);
  if (warp < warps) CountPairs(args.expert_ids, args.experts, span, counts + warp * buckets);
  __syncthreads();
  for (int bucket = threadIdx.x; bucket < buckets; bucket += kThreads) {
    int begin = args.segment_counts[static_cast<int64_t>(blockIdx.x) * buckets + bucket];
    for (int w = 0; w < warps; ++w) {
      const int here = counts[w * buckets + bucket];
      counts[w * buckets + bucket] = begin;
      begin += here;
    }
  }
  __syncthreads();
  if (warp < warps) ScatterPairs(args, span, counts + warp * buckets);
}

__global__ void GatherIds(SortArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < args.pairs) args.sorted_ids[i] = args.expert_ids[args.sorted[i]];
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

int64_t SortCounts(int64_t pairs, int64_t experts) {
  const int64_t segments = Segments(pairs, experts);
  return segments == 1 ? 0 : segments * (experts + 1);
}

bool SortsInOneBlock(int64_t pairs, int64_t experts) { return Segments(pairs, experts) == 1; }

int64_t MaxTiles(int64_t pairs, int64_t experts, int64_t tile_tokens) {
  return std::min(pairs, experts) + pairs / tile_tokens;
}

cudaError_t LaunchSort(const SortArgs& args, cudaStream_t stream) {
  const size_t shared = SortSharedBytes(args);
  const int64_t segments = Segments(args.pairs, args.experts);
  if (segments == 1) {
    SortSegment<<<1, kThreads, shared, stream>>>(args);
    return cudaGetLastError();
  }
  const unsigned blocks = static_cast<unsigned>(segments);
  CountSegments<<<blocks, kThreads, shared, stream>>>(args);
  PlaceSegments<<<1, kThreads, 0, stream>>>(args);
  ScatterSegments<<<blocks, kThreads, shared, stream>>>(args);
  if (args.sorted_ids != nullptr) {
    GatherIds<<<Blocks(args.pairs, 256), 256, 0, stream>>>(args);
  }
  return cudaGetLastError();
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

}  // namespace jax_moe::cuda
