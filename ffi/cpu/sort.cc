#include "ffi/cpu/sort.h"

#include <algorithm>

namespace jax_moe::cpu {

void SortByExpert(const int32_t* expert_ids, int64_t pairs, int64_t experts, int32_t* sorted,
                  int32_t* flat, int32_t* offsets) {
  const auto valid = [experts](int32_t id) { return id >= 0 && id < experts; };

  std::fill_n(offsets, experts + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) {
    if (valid(expert_ids[p])) ++offsets[expert_ids[p] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];

  // offsets[e] serves as the cursor of expert e, so it ends where expert e + 1 begins.
  int32_t next_invalid = offsets[experts];
  for (int64_t p = 0; p < pairs; ++p) {
    const int32_t id = expert_ids[p];
    const int32_t at = valid(id) ? offsets[id]++ : next_invalid++;
    sorted[at] = static_cast<int32_t>(p);
    flat[at] = id;
  }
  std::copy_backward(offsets, offsets + experts, offsets + experts + 1);
  offsets[0] = 0;
}

}  // namespace jax_moe::cpu
