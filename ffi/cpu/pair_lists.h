// Which pairs each expert has, in ascending order of pairs: a counting sort.
#pragma once

#include <cstdint>

#include "ffi/plan/cpu.h"

namespace jax_moe::cpu {

struct PairLists {
  int32_t* expert_of;  // [P] of a pair; outside [0, experts): none
  int32_t* pairs;      // [P] sorted by expert, those of none last
  int32_t* begin;      // [experts + 2]: expert e has pairs[begin[e]] .. pairs[begin[e + 1] - 1]
  int32_t* active;     // experts that have a pair
  int64_t num_pairs;
  int64_t num_active;
  int64_t num_valid;   // pairs that have an expert

  PairLists(int64_t pair_count, int64_t experts, plan::WorkspaceCursor* workspace)
      : expert_of(workspace->Take<int32_t>(pair_count)),
        pairs(workspace->Take<int32_t>(pair_count)),
        begin(workspace->Take<int32_t>(experts + 2)),
        active(workspace->Take<int32_t>(experts)),
        num_pairs(pair_count),
        experts_(experts) {}

  // Fills the lists from expert_of.
  void Build() {
    for (int64_t e = 0; e < experts_ + 2; ++e) begin[e] = 0;
    for (int64_t p = 0; p < num_pairs; ++p) ++begin[Bucket(p) + 1];
    num_active = 0;
    for (int64_t e = 0; e < experts_; ++e) {
      if (begin[e + 1] > 0) active[num_active++] = static_cast<int32_t>(e);
    }
    for (int64_t e = 0; e <= experts_; ++e) begin[e + 1] += begin[e];
    num_valid = begin[experts_];
    // Filling moves each begin to its end, which is the next one's begin: shift back after.
    for (int64_t p = 0; p < num_pairs; ++p) pairs[begin[Bucket(p)]++] = static_cast<int32_t>(p);
    for (int64_t e = experts_ + 1; e > 0; --e) begin[e] = begin[e - 1];
    begin[0] = 0;
  }

  int64_t Count(int64_t expert) const { return begin[expert + 1] - begin[expert]; }
  bool Valid(int64_t pair) const { return Bucket(pair) < experts_; }

 private:
  int64_t Bucket(int64_t pair) const {
    const int64_t expert = expert_of[pair];
    return expert >= 0 && expert < experts_ ? expert : experts_;
  }

  int64_t experts_;
};

}  // namespace jax_moe::cpu
