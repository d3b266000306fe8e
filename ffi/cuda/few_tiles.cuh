// Tiles of tokens that every warp finds for itself from the ids of up to 32 pairs: no sort comes first.
#pragma once

#include <cstdint>

namespace jax_moe::cuda {

// A tile is up to 8 pairs of one expert; an expert with more has several. Tiles are in the order of their
// first pairs.
class FewTiles {
 public:
  static constexpr int kPairs = 32, kTokens = 8;

  // Of each tile its first pair and its expert; of the tile at hand its pairs.
  struct Table {
    int32_t first[kPairs], expert[kPairs], pair[kTokens];
  };

  // ids: [pairs], s32; an id that is no expert's is in no tile. table: this warp's.
  __device__ __forceinline__ FewTiles(const int32_t* ids, int pairs, int experts, Table& table)
      : table_(table) {
    const int lane = threadIdx.x % 32;
    int id = lane < pairs ? ids[lane] : -1;
    if (id < 0 || id >= experts) id = -1 - lane;  // like no other
    same_ = __match_any_sync(0xffffffffu, id);
    const unsigned before = (1u << lane) - 1;
    rank_ = __popc(same_ & before);
    const bool begins = id >= 0 && rank_ % kTokens == 0;
    const unsigned beginnings = __ballot_sync(0xffffffffu, begins);
    if (begins) {
      const int tile = __popc(beginnings & before);
      table_.first[tile] = lane;
      table_.expert[tile] = id;
    }
    __syncwarp();
    number_ = __popc(beginnings);
  }

  __device__ __forceinline__ int Number() const { return number_; }
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

 private:
  Table& table_;
  unsigned same_;
  int rank_, number_;
};

}  // namespace jax_moe::cuda
