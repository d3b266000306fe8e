// Routing on the CPU: from router logits to the experts of each token and their weights.
#pragma once

#include <cstdint>

#include "ffi/targets.h"

namespace jax_moe::cpu {

struct RouteOptions {
  Gating gating = Gating::kSoftmax;
  bool normalize = true;
  float scale = 1.0f;            // 0: none, as in a GGUF file
  int64_t num_groups = 1;        // divides the number of experts
  int64_t num_groups_used = 1;
};

// Routes rows begin .. end - 1 of logits [T, experts], writing those rows of expert_ids and weights
// [T, top_k] and no other: rows are independent, so any split over threads gives the same bits.
// selection_bias [experts] may be null. 1 <= top_k <= experts.
//
// NaN logits count as -inf; a row of nothing but NaN takes experts 0 .. top_k - 1 with NaN weights.
// A NaN selection or group score counts as -inf, and ties go to the lower index. +Inf logits follow
// IEEE arithmetic: they are selected first, and a softmax over them has NaN weights.
void RouteRows(const float* logits, const float* selection_bias, int64_t begin, int64_t end,
               int64_t experts, int64_t top_k, const RouteOptions& options, int32_t* expert_ids,
               float* weights);

}  // namespace jax_moe::cpu
