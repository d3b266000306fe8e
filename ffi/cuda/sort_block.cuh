// The counting sort of dispatch.h, by the blocks of a cluster, each of which counts and places a
// part of the pairs. Bucket `experts` holds the invalid ids.
#pragma once

#include "ffi/cuda/cluster.cuh"
#include "ffi/cuda/dispatch.h"
#include "ffi/cuda/divisor.cuh"
#include "ffi/cuda/hopper.cuh"

namespace jax_moe::cuda {

constexpr int kSortThreads = 256;
constexpr int kSortWarps = kSortThreads / 32;
constexpr int kSortCluster = 8;  // blocks, as many as every device with clusters allows
constexpr int64_t kMostPairsOfSortBlock = 1024;

// Counters of a block, at most 40 KB: every warp that sorts has some of its own, and in a cluster
// there are those of every block.
constexpr int kMostSortCounters = 10240;

// Blocks that sort together on devices with clusters, if there is room for some warps of each.
__host__ __device__ inline int SortCluster(int64_t pairs, int32_t experts) {
  return pairs > kMostPairsOfSortBlock && (kSortCluster + 2) * (experts + 1) <= kMostSortCounters
             ? kSortCluster
             : 1;
}

// Arrays of counters that a cluster's blocks send.
__host__ __device__ inline int SortReceived(int cluster) { return cluster > 1 ? cluster : 0; }

__host__ __device__ inline int SortingWarps(int32_t experts, int cluster) {
  const int others = SortReceived(cluster);
  if ((kSortWarps + others) * (experts + 1) <= kMostSortCounters) return kSortWarps;
  const int fit = kMostSortCounters / (experts + 1) - others;
  return fit < 1 ? 1 : fit;
}

inline size_t SortSharedBytes(const SortArgs& args, int cluster) {
  const int arrays = SortingWarps(args.experts, cluster) + SortReceived(cluster);
  return sizeof(int32_t) * arrays * (args.experts + 1);
}

// Of the values that a block's threads give, returns `total` and the sum over all threads before
// this one, and adds the sum over all threads to `total`. The next call takes other `warp_sums`.
__device__ inline int2 BlockScan(int2 value, int2 (&warp_sums)[kSortWarps], int2& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int2 sum = value;
  for (int d = 1; d < 32; d *= 2) {
    const int x = __shfl_up_sync(0xffffffffu, sum.x, d), y = __shfl_up_sync(0xffffffffu, sum.y, d);
    if (lane >= d) sum = {sum.x + x, sum.y + y};
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int2 before = {total.x + sum.x - value.x, total.y + sum.y - value.y};
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) {
    const int2 other = warp_sums[w];
    if (w < warp) before = {before.x + other.x, before.y + other.y};
    total = {total.x + other.x, total.y + other.y};
  }
  return before;
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
        blocks_(ClusterSize()),
        warps_(SortingWarps(args.experts, blocks_)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        by_tile_tokens_(args.tile_tokens),
        counts_(counts),
        received_(counts + warps_ * buckets_) {
    const unsigned rounds = (pairs_ + 31) / 32, parts = blocks_ * warps_;
    const int share = static_cast<int>((rounds + parts - 1) / parts * 32);
    const int64_t begin = int64_t{share} * (ClusterRank() * warps_ + warp_);
    begin_ = warp_ < warps_ ? static_cast<int>(min(begin, args.pairs)) : pairs_;
    end_ = begin_ + min(share, pairs_ - begin_);
    bits_ = 32 - __clz(args.experts);
  }

  // Before Run; needs no ids.
  __device__ void Clear() {
    for (int i = threadIdx.x; i < warps_ * buckets_; i += kSortThreads) counts_[i] = 0;
    if (blocks_ > 1) ExpectCounts();
  }

  __device__ void Run() {
    // The ids of a warp with few pairs are read once, and their ranks come with the counts.
    const bool twice = end_ - begin_ > 32 * kBatch;
    int bucket[kBatch];
    Load(begin_, bucket);
    __syncthreads();
    if (twice) {
      Count(bucket);
    } else {
      Rank(bucket);
    }
    __syncthreads();
    if (blocks_ > 1) ExchangeCounts();
    PlaceBuckets();
    __syncthreads();
    if (twice) {
      Scatter();
    } else {
      ScatterRanked(bucket);
    }
  }

 private:
  static constexpr int kBatch = 8;  // times 32 pairs whose loads are under way at a time

  // Of the pairs base + 32 i + lane; past the end anything.
  __device__ void Load(int base, int (&bucket)[kBatch]) const {
    int32_t id[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int pair = base + 32 * i + lane_;
      id[i] = pair < end_ ? ids_[pair] : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      bucket[i] = id[i] >= 0 && id[i] < args_.experts ? id[i] : args_.experts;
    }
  }

  // bucket: of the first batch.
  __device__ void Count(int (&bucket)[kBatch]) {
    int32_t* counts = counts_ + warp_ * buckets_;
    for (int base = begin_; base < end_; base += 32 * kBatch) {
      if (base > begin_) Load(base, bucket);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (base + 32 * i + lane_ < end_) atomicAdd(counts + bucket[i], 1);
      }
    }
  }

  // Lets the cluster's blocks, this one too, send what they have of every bucket. A barrier of the
  // cluster with a promise about memory would take as long as all writes to global memory.
  __device__ void ExpectCounts() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (threadIdx.x == 0) {
      InitBarrier(Barrier(), 1);
      FenceBarrierInit();
      ArriveExpectBytes(Barrier(), sizeof(int32_t) * blocks_ * buckets_);
    }
    ArriveInClusterRelaxed();
#endif
  }

  __device__ void ExchangeCounts() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    WaitInCluster();  // until all expect them
    for (int bucket = threadIdx.x; bucket < buckets_; bucket += kSortThreads) {
      int sum = 0;
      for (int w = 0; w < warps_; ++w) sum += counts_[w * buckets_ + bucket];
      for (int rank = 0; rank < blocks_; ++rank) {
        SendToCluster(received_ + ClusterRank() * buckets_ + bucket, Barrier(), rank, sum);
      }
    }
    WaitBarrier(Barrier(), 0);
#endif
  }

  __device__ static uint64_t* Barrier() {
    __shared__ uint64_t barrier;
    return &barrier;
  }

  // From the number of pairs in every bucket to where each warp's begin, and to the tiles.
  __device__ void PlaceBuckets() {
    __shared__ int2 warp_sums[2][kSortWarps];
    // Where most experts have one tile; with more it has not been measured.
    const bool largest_first = args_.tiles != nullptr && !args_.even_tiles &&
                               args_.tile_tokens > 8 && args_.experts <= kSortThreads &&
                               pairs_ <= int64_t{args_.experts} * args_.tile_tokens;
    int2 total = {0, 0};
    for (int base = 0; base < buckets_; base += kSortThreads) {
      const int bucket = base + static_cast<int>(threadIdx.x);
      const bool has = bucket < buckets_;
      int here[kSortWarps];
#pragma unroll
      for (int w = 0; w < kSortWarps; ++w) {
        here[w] = has && w < warps_ ? counts_[w * buckets_ + bucket] : 0;
      }
      int number = 0, before = 0;  // in all blocks, and in those before this one
      if (blocks_ > 1) {
#pragma unroll
        for (int rank = 0; rank < kSortCluster; ++rank) {
          const int there = has ? received_[rank * buckets_ + bucket] : 0;
          number += there;
          if (rank < ClusterRank()) before += there;
        }
      } else {
#pragma unroll
        for (int w = 0; w < kSortWarps; ++w) number += here[w];
      }
      const int tiles = bucket < args_.experts ? Tiles(number) : 0;
      int2 begin = BlockScan({number, tiles}, warp_sums[base / kSortThreads % 2], total);
      // All tiles are those of the first round.
      if (largest_first && ClusterRank() == 0 && base == 0) {
        begin.y = PlaceTiles(TileSize(number, tiles), tiles);
      }
      if (!has) continue;
      int next = begin.x + before;
#pragma unroll
      for (int w = 0; w < kSortWarps; ++w) {
        if (w < warps_) counts_[w * buckets_ + bucket] = next;
        next += here[w];
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
    const int tiles = by_tile_tokens_.Quotient(pairs + args_.tile_tokens - 1);
    return args_.even_tiles && tiles > 1 ? tiles + tiles % 2 : tiles;
  }

  // Of nearly equal size, in units of what a tensor core multiplies at a time. With an even number
  // the last one may be empty.
  __device__ int TileSize(int pairs, int tiles) const {
    constexpr unsigned kUnit = 8;
    if (tiles <= 1) return pairs;
    if (args_.tile_tokens <= kUnit) return args_.tile_tokens;
    const unsigned even = static_cast<unsigned>(pairs + tiles - 1) / static_cast<unsigned>(tiles);
    return (even + kUnit - 1) / kUnit * kUnit;
  }

  // Of the tiles of all experts where the thread's begin, if the largest come first, so that a
  // kernel does not end with a few large ones: by 16 tokens, those that lack more than 48 alike.
  __device__ int PlaceTiles(int size, int tiles) const {
    __shared__ int2 warp_sums[kSortWarps];
    const int rank = min((args_.tile_tokens - size) / 16, 3), shift = rank % 2 * 16;
    int2 total = {0, 0};
    const int number = tiles << shift;  // 16 bits for each rank
    const int2 before = BlockScan(rank < 2 ? int2{number, 0} : int2{0, number}, warp_sums, total);
    int place = (rank < 2 ? before.x : before.y) >> shift & 0xffff;
    if (rank > 0) place += total.x & 0xffff;
    if (rank > 1) place += total.x >> 16;
    if (rank > 2) place += total.y & 0xffff;
    return place;
  }

  __device__ void WriteTiles(int bucket, int pairs, int tiles, int2 begin) const {
    const int size = TileSize(pairs, tiles);
    for (int i = 0; i < tiles; ++i) {
      const int start = i * size;
      args_.tiles[begin.y + i] = {bucket, begin.x + start, max(min(size, pairs - start), 0), 0};
    }
  }

  // Of the lanes in `lanes`, which this one is in, those with the same bucket. match.any takes its
  // time for every bucket that there is.
  __device__ unsigned SameBucket(unsigned lanes, int bucket) const {
    constexpr int kTogether = 4;
#pragma unroll 1
    for (int left = bits_; left > 0; left -= kTogether, bucket >>= kTogether) {
#pragma unroll
      for (int bit = 0; bit < kTogether; ++bit) {
        const bool set = bucket >> bit & 1;
        const unsigned others = __ballot_sync(0xffffffffu, set);
        lanes &= set ? others : ~others;
      }
    }
    return lanes;
  }

  // The place of a pair from `base` on, in whose order they are placed; of the warp's counts,
  // next[bucket] is the first free one.
  __device__ int Place(int base, int bucket) const {
    int32_t* next = counts_ + warp_ * buckets_ + bucket;
    const bool inside = base + lane_ < end_;
    const unsigned same = SameBucket(__ballot_sync(0xffffffffu, inside), bucket);
    const int place = *next + __popc(same & ((1u << lane_) - 1));
    __syncwarp();
    if (inside && lane_ == 31 - __clz(same)) *next = place + 1;
    __syncwarp();
    return place;
  }

  // Puts a pair's rank among the warp's pairs of its bucket above the bucket, to save registers.
  static constexpr int kRankShift = 16;
  static_assert(kMaxExperts < 1 << kRankShift && 32 * kBatch < 1 << (31 - kRankShift));
  __device__ void Rank(int (&bucket)[kBatch]) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (begin_ + 32 * i >= end_) break;
      bucket[i] |= Place(begin_ + 32 * i, bucket[i]) << kRankShift;
    }
  }

  __device__ void ScatterRanked(const int (&ranked)[kBatch]) const {
    const int32_t* begins = counts_ + warp_ * buckets_;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (begin_ + 32 * i >= end_) break;
      const int bucket = ranked[i] & ((1 << kRankShift) - 1);
      Write(begin_ + 32 * i + lane_, begins[bucket] + (ranked[i] >> kRankShift));
    }
  }

  // Every id is read again.
  __device__ void Scatter() const {
    for (int base = begin_; base < end_; base += 32 * kBatch) {
      int bucket[kBatch];
      Load(base, bucket);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (base + 32 * i >= end_) break;
        Write(base + 32 * i + lane_, Place(base + 32 * i, bucket[i]));
      }
    }
  }

  __device__ void Write(int pair, int place) const {
    if (pair >= end_) return;
    args_.sorted[place] = pair;
    if (args_.sorted_ids != nullptr) args_.sorted_ids[place] = ids_[pair];
  }

  const SortArgs& args_;
  const int32_t* ids_;
  const int pairs_, buckets_, blocks_, warps_, warp_, lane_;
  const Divisor by_tile_tokens_;
  int begin_, end_;    // the warp's pairs
  int bits_;           // of a bucket
  int32_t* counts_;    // [warps, buckets]: the pairs of every bucket
  int32_t* received_;  // [blocks, buckets]: the same of the cluster's blocks
};

}  // namespace jax_moe::cuda
