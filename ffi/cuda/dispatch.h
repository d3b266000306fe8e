// From expert ids to lists of pairs by expert, on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ffi/cuda/gemm.h"

namespace jax_moe::cuda {

// A stable counting sort of `pairs` ids into experts 0 .. experts - 1 and, last, all others.
struct SortArgs {
  const int32_t* expert_ids;  // [pairs]
  int64_t pairs;  // at most 2^30
  int32_t experts;
  int32_t* sorted;      // [pairs]: pair ids in order
  int32_t* sorted_ids;  // [pairs]: their expert ids; null: not wanted
  int32_t* offsets;     // [experts + 1]: where every expert begins; the number of valid pairs
  TokenTile* tiles;     // by expert; where most have one, the largest first; null: not wanted
  int32_t* num_tiles;
  int32_t tile_tokens;
  bool even_tiles;  // an expert with more than one tile has an even number of them
};

// Experts beyond this do not fit the counters in shared memory.
constexpr int64_t kMaxExperts = 8192;

// Blocks that do the sort on the current device: a cluster of them.
int SortBlocks(const SortArgs& args);

// Upper bound of the number of tiles.
int64_t MaxTiles(int64_t pairs, int64_t experts, int64_t tile_tokens, bool even_tiles);

cudaError_t LaunchSort(const SortArgs& args, cudaStream_t stream);

// The entry that decides each pair: of all i with sorted_token_ids[i] = p the last one. Writes
// expert_ids[p] = flat_expert_ids[i], -1 where there is none. `winners` is scratch [pairs].
cudaError_t LaunchPairExperts(const int32_t* sorted_token_ids, const int32_t* flat_expert_ids,
                              int64_t pairs, int32_t* winners, int32_t* expert_ids,
                              cudaStream_t stream);

// Loads the kernels (load.h).
cudaError_t LoadDispatch();

}  // namespace jax_moe::cuda
