// From rows of pairs to rows of tokens.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ffi/cuda/gemm.h"
#include "ffi/cuda/prepare.h"

namespace jax_moe::cuda {

// y[t] = sum over slots s, in order, of weight[t, s] * (values[p] * scale[e] + bias[e]), p = t *
// top_k + s and e its expert; slots without an expert add nothing.
struct CombineArgs {
  const float* values;        // [tokens * top_k, columns]
  const half* scaled_values;  // in place of the above, each row times scales; columns: 8 n
  const float* scales;        // [tokens * top_k, one for every scale_columns]
  int32_t scale_columns;      // a multiple of 8; 0: a row has one scale
  const int32_t* expert_ids;  // [tokens, top_k]
  const float* weights;       // [tokens, top_k]; null: 1
  Projection projection;
  int64_t tokens, columns;
  int32_t top_k, experts;
  void* y;  // [tokens, columns]
  Element y_type;
};
cudaError_t LaunchCombine(const CombineArgs& args, cudaStream_t stream);

// Zeros the rows of y [pairs, columns] whose pair has no expert.
cudaError_t LaunchZeroRows(const int32_t* expert_ids, int64_t pairs, int32_t experts, void* y,
                           int64_t columns, Element y_type, cudaStream_t stream);

// Loads the kernels (load.h).
cudaError_t LoadCombine();

}  // namespace jax_moe::cuda
