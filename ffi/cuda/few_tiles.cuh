// Tiles of tokens that every warp finds for itself from the ids of up to 32 pairs: no sort comes
// first.
#pragma once

#include <cstdint>

#include "ffi/cuda/gemm.h"

namespace jax_moe::cuda {

// The expert of pair lane, from the id and the pair of every lane's entry, of which the last one
// that names the pair decides; -1: none does.
__device__ __forceinline__ int OfLastEntry(int id, int pair, int pairs) {
  int result = -1;
#pragma unroll 1
  for (int i = 0; i < pairs; ++i) {
    const int other_pair = __shfl_sync(0xffffffffu, pair, i);
    const int other_id = __shfl_sync(0xffffffffu, id, i);
    if (other_pair == static_cast<int>(threadIdx.x % 32)) result = other_id;
  }
  return result;
}

// A tile is up to 8 pairs of one expert; an expert with more has several. Tiles are in the order of
// their first pairs.
class FewTiles {
 public:
  static constexpr int kPairs = kFewPairs, kTokens = 8;

  // Of each tile its first pair, its expert and, once Rank has been called, the pairs in earlier
  // tiles; of the tile at hand its pairs.
  struct Table {
    int32_t first[kPairs], expert[kPairs], before[kPairs], pair[kTokens];
  };

  // ids: [pairs], s32; an id that is no expert's is in no tile. entries: [pairs], s32, the pair that
  // each id is of, where the last of several decides; null: every pair's own. table: this warp's.
  __device__ __forceinline__ FewTiles(const int32_t* ids, const int32_t* entries, int pairs,
                                      int experts, Table& table)
      : table_(table) {
    if (pairs == 0) {
      same_ = beginnings_ = 0, rank_ = 0, valid_ = false;
      return;
    }
    const int lane = threadIdx.x % 32;
    int id = lane < pairs ? ids[lane] : -1;
    if (entries != nullptr) id = OfLastEntry(id, lane < pairs ? entries[lane] : -1, pairs);
    // Entries may name pairs that do not exist.
    if (lane >= pairs || id < 0 || id >= experts) id = -1 - lane;  // like no other
    same_ = __match_any_sync(0xffffffffu, id);
    const unsigned before = (1u << lane) - 1;
    rank_ = __popc(same_ & before);
    const bool begins = id >= 0 && rank_ % kTokens == 0;
    beginnings_ = __ballot_sync(0xffffffffu, begins);
    if (begins) {
      const int tile = __popc(beginnings_ & before);
      table_.first[tile] = lane;
      table_.expert[tile] = id;
    }
    __syncwarp();
    valid_ = id >= 0;
  }

  __device__ __forceinline__ int Number() const { return __popc(beginnings_); }
  __device__ __forceinline__ int Expert(int tile) const { return table_.expert[tile]; }

  // Takes a tile at hand: its pairs are table.pair[0 .. n - 1] until the next Take. Returns n.
  __device__ __forceinline__ int Take(int tile) {
    const int lane = threadIdx.x % 32, first = table_.first[tile];
    const unsigned members = __shfl_sync(0xffffffffu, same_, first);
    const int index = rank_ - __shfl_sync(0xffffffffu, rank_, first);
    const bool member = (members >> lane & 1) && index >= 0 && index < kTokens;
    if (member) table_.pair[index] = lane;
    const int count = __popc(__ballot_sync(0xffffffffu, member));
    __syncwarp();
    return count;
  }

  // Of pair lane: its tile and its place among the pairs in the order of tiles; tile -1: no
  // expert's.
  struct Ranked {
    int tile, place;
  };
  __device__ __forceinline__ Ranked Rank() {
    const int lane = threadIdx.x % 32;
    const unsigned before = (1u << lane) - 1;
    const bool begins = beginnings_ >> lane & 1;
    const int count = begins ? min(kTokens, __popc(same_) - rank_) : 0;
    int earlier = count;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, earlier, d);
      if (lane >= d) earlier += other;
    }
    earlier -= count;
    if (begins) table_.before[__popc(beginnings_ & before)] = earlier;
    __syncwarp();
    // The last beginning of a tile of this expert, up to this pair, is that of the pair's tile.
    const int first = valid_ ? 31 - __clz(same_ & beginnings_ & (before | 1u << lane)) : 0;
    const int place = __shfl_sync(0xffffffffu, earlier, first) + rank_ % kTokens;
    return {valid_ ? __popc(beginnings_ & ((1u << first) - 1)) : -1, place};
  }
  __device__ __forceinline__ int Before(int tile) const { return table_.before[tile]; }

 private:
  Table& table_;
  unsigned same_, beginnings_;
  int rank_;
  bool valid_;
};

}  // namespace jax_moe::cuda
