// Groups (token, slot) pairs by expert: a stable counting sort.
#pragma once

#include <cstdint>

namespace jax_moe::cpu {

// expert_ids [pairs] -> sorted [pairs]: pair indices by expert id, in input order within an expert,
// those with an id outside [0, experts) last; flat[i] = expert_ids[sorted[i]], invalid ids as they
// were; offsets [experts + 1]: where each expert begins in sorted, and last the number of valid
// pairs. Takes any int32 ids; pairs < 2^31. Linear, without scratch memory.
void SortByExpert(const int32_t* expert_ids, int64_t pairs, int64_t experts, int32_t* sorted,
                  int32_t* flat, int32_t* offsets);

}  // namespace jax_moe::cpu
