// Routing on the GPU; the rules are those of ffi/cpu/route.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ffi/targets.h"

namespace jax_moe::cuda {

struct RouteArgs {
  const float* logits;          // [tokens, experts]
  const float* selection_bias;  // [experts]; null: none
  int32_t* expert_ids;          // [tokens, top_k]
  float* weights;               // [tokens, top_k]
  int64_t tokens;
  int32_t experts, top_k;
  Gating gating;
  bool normalize;
  float scale;
  int32_t num_groups, num_groups_used;
};

cudaError_t LaunchRoute(const RouteArgs& args, cudaStream_t stream);

// Loads the kernels of a gating (load.h).
cudaError_t LoadRoute(Gating gating);

// Experts beyond this do not fit a token's rows in shared memory.
constexpr int64_t kMaxRoutedExperts = 4096;

}  // namespace jax_moe::cuda
