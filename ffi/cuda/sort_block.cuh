// The steps of the counting sort of dispatch.h, by blocks of kSortThreads.
#pragma once

#include "ffi/cuda/dispatch.h"

namespace jax_moe::cuda {

constexpr int kSortThreads = 256;
constexpr int kSortWarps = kSortThreads / 32;
static_assert(kSortWarps <= 32);  // a warp scans the sums of all warps
// Beside the preparation of as many rows a single block's sort is hardly noticed.
constexpr int kSingleSegment = 32768;

// Pairs a segment: enough that the counts of all segments fit into `pairs` elements.
__host__ __device__ inline int64_t SegmentSize(int64_t experts) {
  return experts < 1024 ? 2048 : 2 * (experts + 1);
}

__host__ __device__ inline int64_t Segments(int64_t pairs, int64_t experts) {
  const int64_t size = SegmentSize(experts);
  return pairs <= (size > kSingleSegment ? size : kSingleSegment) ? 1 : (pairs + size - 1) / size;
}

// Warps that count, each with counters of its own, so that a block needs at most 33 KB and a warp
// has some 64 pairs at least.
__host__ __device__ inline int CountingWarps(int64_t pairs, int64_t experts) {
  const int64_t fit = 8192 / (experts + 1), useful = (pairs + 63) / 64;
  const int64_t warps = fit < useful ? fit : useful;
  return static_cast<int>(warps < 1 ? 1 : warps > kSortWarps ? kSortWarps : warps);
}

// A warp's part of segment begin .. end - 1.
struct Span {
  int64_t begin, end;
};

__device__ inline Span WarpSpan(int64_t begin, int64_t end, int warps, int warp) {
  const int64_t share = (end - begin + 32 * warps - 1) / (32 * warps) * 32;
  const int64_t first = begin + warp * share;
  return {first < end ? first : end, first + share < end ? first + share : end};
}

// Visits a warp's pairs in order, all lanes at once: f(pair, bucket, lanes with the same bucket),
// with bucket -1 for lanes past the end. Bucket `experts` holds the invalid ids.
template <typename F>
__device__ inline void ForEachPair(const int32_t* ids, int32_t experts, Span span, F f) {
  constexpr int kBatch = 8;  // loads under way at a time
  const int lane = threadIdx.x % 32;
  for (int64_t base = span.begin; base < span.end; base += 32 * kBatch) {
    int32_t bucket[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t pair = base + 32 * i + lane;
      bucket[i] = -1;
      if (pair < span.end) {
        const int32_t id = ids[pair];
        bucket[i] = id >= 0 && id < experts ? id : experts;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + 32 * i >= span.end) break;
      f(base + 32 * i + lane, bucket[i], __match_any_sync(0xffffffffu, bucket[i]));
      __syncwarp();
    }
  }
}

__device__ inline void CountPairs(const int32_t* ids, int32_t experts, Span span, int32_t* counts) {
  const int lane = threadIdx.x % 32;
  ForEachPair(ids, experts, span, [&](int64_t, int32_t bucket, unsigned same) {
    if (bucket >= 0 && lane == __ffs(same) - 1) counts[bucket] += __popc(same);
  });
}

// Writes a warp's pairs to their places; next[bucket] is the first free one.
__device__ inline void ScatterPairs(const SortArgs& args, Span span, int32_t* next) {
  const int lane = threadIdx.x % 32;
  ForEachPair(args.expert_ids, args.experts, span,
              [&](int64_t pair, int32_t bucket, unsigned same) {
                const int32_t first = bucket >= 0 ? next[bucket] : 0;
                __syncwarp();
                if (bucket < 0) return;
                args.sorted[first + __popc(same & ((1u << lane) - 1))] = static_cast<int32_t>(pair);
                if (lane == __ffs(same) - 1) next[bucket] = first + __popc(same);
              });
}

// Exclusive prefix sums of two values a thread, over the block; adds the totals to `total`.
__device__ inline int2 BlockScan(int2 value, int2* warp_sums, int2& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int2 sum = value;
  for (int d = 1; d < 32; d *= 2) {
    const int x = __shfl_up_sync(0xffffffffu, sum.x, d), y = __shfl_up_sync(0xffffffffu, sum.y, d);
    if (lane >= d) sum = {sum.x + x, sum.y + y};
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int2 part = lane < kSortWarps ? warp_sums[lane] : make_int2(0, 0);
  for (int d = 1; d < 32; d *= 2) {
    const int x = __shfl_up_sync(0xffffffffu, part.x, d),
              y = __shfl_up_sync(0xffffffffu, part.y, d);
    if (lane >= d) part = {part.x + x, part.y + y};
  }
  const int before = warp == 0 ? 0 : warp - 1;
  const int2 warps_before = {__shfl_sync(0xffffffffu, part.x, before) * (warp > 0),
                             __shfl_sync(0xffffffffu, part.y, before) * (warp > 0)};
  const int2 result = {total.x + warps_before.x + sum.x - value.x,
                       total.y + warps_before.y + sum.y - value.y};
  total.x += __shfl_sync(0xffffffffu, part.x, 31);
  total.y += __shfl_sync(0xffffffffu, part.y, 31);
  __syncthreads();
  return result;
}

// From the number of pairs in every bucket to where each begins, and to the tiles.
// count(bucket) returns the number, place(bucket, begin) takes the result.
template <typename Count, typename Place>
__device__ inline void PlaceBuckets(const SortArgs& args, Count count, Place place) {
  __shared__ int2 warp_sums[kSortWarps];
  int2 total = {0, 0};
  for (int base = 0; base <= args.experts; base += kSortThreads) {
    const int bucket = base + threadIdx.x;
    const int number = bucket <= args.experts ? count(bucket) : 0;
    const int tiles = args.tiles != nullptr && bucket < args.experts
                          ? (number + args.tile_tokens - 1) / args.tile_tokens
                          : 0;
    const int2 before = BlockScan({number, tiles}, warp_sums, total);
    if (bucket > args.experts) continue;
    args.offsets[bucket] = before.x;
    place(bucket, before.x);
    // Tiles of nearly equal size, in units of what a tensor core multiplies at a time.
    const int step = min(8, args.tile_tokens);
    const int size = tiles == 0 ? 0 : ((number + tiles - 1) / tiles + step - 1) / step * step;
    for (int i = 0; i < tiles; ++i) {
      const int start = i * size;
      args.tiles[before.y + i] = {bucket, before.x + start, min(size, number - start), 0};
    }
  }
  if (args.tiles != nullptr && threadIdx.x == 0) *args.num_tiles = total.y;
}

__device__ inline void ClearCounts(int32_t* counts, int number) {
  for (int i = threadIdx.x; i < number; i += kSortThreads) counts[i] = 0;
  __syncthreads();
}

// The whole sort in one block of kSortThreads; counts [CountingWarps, experts + 1] in shared memory.
__device__ inline void SortInBlock(const SortArgs& args, int32_t* counts) {
  const int buckets = args.experts + 1, warps = CountingWarps(args.pairs, args.experts);
  const int warp = threadIdx.x / 32;
  const Span span = WarpSpan(0, args.pairs, warps, warp);
  ClearCounts(counts, warps * buckets);
  if (warp < warps) CountPairs(args.expert_ids, args.experts, span, counts + warp * buckets);
  __syncthreads();
  PlaceBuckets(
      args,
      [&](int bucket) {
        int sum = 0;
        for (int w = 0; w < warps; ++w) sum += counts[w * buckets + bucket];
        return sum;
      },
      [&](int bucket, int begin) {
        for (int w = 0; w < warps; ++w) {
          const int here = counts[w * buckets + bucket];
          counts[w * buckets + bucket] = begin;
          begin += here;
        }
      });
  __syncthreads();
  if (warp < warps) ScatterPairs(args, span, counts + warp * buckets);
  if (args.sorted_ids == nullptr) return;
  __syncthreads();
  for (int i = threadIdx.x; i < args.pairs; i += kSortThreads) {
    args.sorted_ids[i] = args.expert_ids[args.sorted[i]];
  }
}

inline size_t SortSharedBytes(const SortArgs& args) {
  return sizeof(int32_t) * CountingWarps(args.pairs, args.experts) * (args.experts + 1);
}

}  // namespace jax_moe::cuda
