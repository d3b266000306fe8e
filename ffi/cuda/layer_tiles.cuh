// Who goes where in the kernel for a whole layer: tiles of up to 32 pairs, which every warp finds
// for itself from the ids.
#pragma once

#include <cstdint>

namespace jax_moe::cuda {

class LayerTiles {
 public:
  static constexpr int kPairs = 32, kTokens = 2;

  // A tile is up to 2^log_tokens pairs of one expert, in the order of its first pair.
  struct Table {
    int32_t expert[kPairs];          // of a tile
    uint8_t count[kPairs];           // of a tile
    uint8_t pair[kPairs * kTokens];  // of a tile's tokens, kTokens places each
    uint8_t place[kPairs];           // of a pair, in `pair`; kNone: its id is no expert's
  };
  static constexpr uint8_t kNone = 0xff;

  // id: of pair lane, -1 past the last one. table: this warp's.
  __device__ __forceinline__ LayerTiles(int id, int experts, int log_tokens, Table& table)
      : table_(table) {
    const int lane = threadIdx.x % 32, mask = (1 << log_tokens) - 1;
    const bool valid = id >= 0 && id < experts;
    if (!valid) id = -1;  // all the same: different values are looked for one after another
    const unsigned same = __match_any_sync(0xffffffffu, id);
    const unsigned before = (1u << lane) - 1;
    const int rank = __popc(same & before);
    const unsigned beginnings = __ballot_sync(0xffffffffu, valid && (rank & mask) == 0);
    number_ = __popc(beginnings);
    uint8_t place = kNone;
    if (valid) {
      // The last beginning of a tile of this expert, up to this pair, is that of the pair's tile.
      const int first = 31 - __clz(same & beginnings & (before | 1u << lane));
      const int tile = __popc(beginnings & ((1u << first) - 1));
      place = tile * kTokens + (rank & mask);
      table.pair[place] = lane;
      if (first == lane) {
        table.expert[tile] = id;
        table.count[tile] = min(mask + 1, __popc(same) - rank);
      }
    }
    table.place[lane] = place;
    __syncwarp();
  }

  __device__ __forceinline__ int Number() const { return number_; }
  __device__ __forceinline__ int Expert(int tile) const { return table_.expert[tile]; }
  __device__ __forceinline__ int Count(int tile) const { return table_.count[tile]; }
  __device__ __forceinline__ int Pair(int tile, int token) const {
    return table_.pair[tile * kTokens + token];
  }
  // kNone, or the pair's tile times kTokens and its place there.
  __device__ __forceinline__ int Place(int pair) const { return table_.place[pair]; }

 private:
  Table& table_;
  int number_;
};

}  // namespace jax_moe::cuda
