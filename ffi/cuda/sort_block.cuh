// The counting sort of dispatch.h, by the blocks of a cluster, each of which counts and places a
// part of the pairs. Bucket `experts` holds the invalid ids.
#pragma once

#include "ffi/cuda/cluster.cuh"
#include "ffi/cuda/dispatch.h"

namespace jax_moe::cuda {

constexpr int kSortThreads = 256;
constexpr int kSortWarps = kSortThreads / 32;
static_assert(kSortWarps <= 32);  // a warp scans the sums of all warps
constexpr int kSortCluster = 8;  // blocks, as many as every device with clusters allows

// Warps of a block that sort, each with counters of its own, so that a block needs at most 40 KB.
constexpr int kMostSortCounters = 10240;
__host__ __device__ inline int SortingWarps(int32_t experts) {
  const int fit = kMostSortCounters / (experts + 1) - 1;
  return fit < 1 ? 1 : fit > kSortWarps ? kSortWarps : fit;
}

// Blocks that sort together on devices with clusters. A single warp has no room for counters that
// the other blocks can read.
__host__ __device__ inline int SortCluster(int64_t pairs, int32_t experts) {
  return pairs > 1024 && SortingWarps(experts) > 1 ? kSortCluster : 1;
}

inline size_t SortSharedBytes(const SortArgs& args) {
  const int warps = SortingWarps(args.experts);
  return sizeof(int32_t) * (warps == 1 ? 1 : 1 + warps) * (args.experts + 1);
}

// Of the values that a block's threads give, returns `total` and the sum over all threads before
// this one, and adds the sum over all threads to `total`.
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

// What a block of the cluster does.
class SortBlock {
 public:
  // ids [args.pairs]: what is read in place of args.expert_ids. counts: SortSharedBytes, shared.
  __device__ SortBlock(const SortArgs& args, const int32_t* ids, int32_t* counts)
      : args_(args),
        ids_(ids),
        pairs_(static_cast<int>(args.pairs)),
        buckets_(args.experts + 1),
        warps_(SortingWarps(args.experts)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        all_(counts),
        warp_counts_(warps_ == 1 ? counts : counts + buckets_) {
    const int parts = ClusterSize() * warps_;
    const int share = (pairs_ + 32 * parts - 1) / (32 * parts) * 32;
    begin_ = warp_ < warps_ ? min((ClusterRank() * warps_ + warp_) * share, pairs_) : pairs_;
    end_ = min(begin_ + share, pairs_);
  }

  __device__ void Run() {
    for (int i = threadIdx.x; i < warps_ * buckets_; i += kSortThreads) warp_counts_[i] = 0;
    __syncthreads();
    Count();
    __syncthreads();
    for (int bucket = threadIdx.x; bucket < buckets_; bucket += kSortThreads) {
      int sum = 0;
      for (int w = 0; w < warps_; ++w) sum += warp_counts_[w * buckets_ + bucket];
      all_[bucket] = sum;
    }
    ArriveInCluster();
    WaitInCluster();
    PlaceBuckets();
    // The others read this block's shared memory until they are here too.
    ArriveInCluster();
    __syncthreads();
    Scatter();
    WaitInCluster();
  }

 private:
  static constexpr int kBatch = 8;  // times 32 pairs whose loads are under way at a time

  __device__ int Bucket(int32_t id) const {
    return id >= 0 && id < args_.experts ? id : args_.experts;
  }

  // Of the pairs base + 32 i + lane; 0 past the end.
  __device__ void LoadIds(int base, int32_t (&id)[kBatch]) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int pair = base + 32 * i + lane_;
      id[i] = pair < end_ ? ids_[pair] : 0;
    }
  }

  __device__ void Count() {
    int32_t* counts = warp_counts_ + warp_ * buckets_;
    for (int base = begin_; base < end_; base += 32 * kBatch) {
      int32_t id[kBatch];
      LoadIds(base, id);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (base + 32 * i + lane_ < end_) atomicAdd(counts + Bucket(id[i]), 1);
      }
    }
  }

  // From the number of pairs in every bucket to where each warp's begin, and to the tiles.
  __device__ void PlaceBuckets() {
    __shared__ int2 warp_sums[kSortWarps];
    int2 total = {0, 0};
    for (int base = 0; base < buckets_; base += kSortThreads) {
      const int bucket = base + static_cast<int>(threadIdx.x);
      const bool has = bucket < buckets_;
      int there[kSortCluster];
#pragma unroll
      for (int rank = 0; rank < kSortCluster; ++rank) {
        there[rank] = has && rank < ClusterSize() ? LoadFromCluster(all_ + bucket, rank) : 0;
      }
      int number = 0, before = 0;  // in all blocks, and in those before this one
#pragma unroll
      for (int rank = 0; rank < kSortCluster; ++rank) {
        number += there[rank];
        if (rank < ClusterRank()) before += there[rank];
      }
      const int tiles = bucket < args_.experts ? Tiles(number) : 0;
      const int2 begin = BlockScan({number, tiles}, warp_sums, total);
      if (!has) continue;
      int next = begin.x + before;
      for (int w = 0; w < warps_; ++w) {
        int32_t& count = warp_counts_[w * buckets_ + bucket];
        const int here = count;
        count = next;
        next += here;
      }
      if (ClusterRank() == 0) {
        args_.offsets[bucket] = begin.x;
        WriteTiles(bucket, number, tiles, begin);
      }
    }
    const bool tells = args_.tiles != nullptr && ClusterRank() == 0 && threadIdx.x == 0;
    if (tells) *args_.num_tiles = total.y;
  }

  // Of an expert.
  __device__ int Tiles(int pairs) const {
    if (args_.tiles == nullptr) return 0;
    const int tiles = (pairs + args_.tile_tokens - 1) / args_.tile_tokens;
    return args_.even_tiles && tiles > 1 ? tiles + tiles % 2 : tiles;
  }

  // Of nearly equal size, in units of what a tensor core multiplies at a time. With an even number
  // the last one may be empty.
  __device__ void WriteTiles(int bucket, int pairs, int tiles, int2 begin) const {
    const int step = min(8, args_.tile_tokens);
    const int size = tiles == 0 ? 0 : ((pairs + tiles - 1) / tiles + step - 1) / step * step;
    for (int i = 0; i < tiles; ++i) {
      const int start = i * size;
      args_.tiles[begin.y + i] = {bucket, begin.x + start, max(min(size, pairs - start), 0), 0};
    }
  }

  // Writes a warp's pairs to their places; of its counts, next[bucket] is the first free one.
  __device__ void Scatter() {
    int32_t* next = warp_counts_ + warp_ * buckets_;
    for (int base = begin_; base < end_; base += 32 * kBatch) {
      int32_t id[kBatch];
      unsigned same[kBatch];  // lanes with the same bucket
      LoadIds(base, id);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool inside = base + 32 * i + lane_ < end_;
        same[i] = __match_any_sync(0xffffffffu, inside ? Bucket(id[i]) : -1);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int pair = base + 32 * i + lane_, bucket = Bucket(id[i]);
        const int place = next[bucket] + __popc(same[i] & ((1u << lane_) - 1));
        __syncwarp();
        if (pair < end_) {
          args_.sorted[place] = pair;
          if (args_.sorted_ids != nullptr) args_.sorted_ids[place] = id[i];
          if (lane_ == 31 - __clz(same[i])) next[bucket] = place + 1;
        }
        __syncwarp();
      }
    }
  }

  const SortArgs& args_;
  const int32_t* ids_;
  const int pairs_, buckets_, warps_, warp_, lane_;
  int begin_, end_;       // the warp's pairs
  int32_t* all_;          // [buckets]: this block's pairs of every bucket
  int32_t* warp_counts_;  // [warps, buckets]: the same of every warp
};

}  // namespace jax_moe::cuda
