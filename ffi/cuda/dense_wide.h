// Grouped products of dense 16-bit weights with many tokens of an expert, on Hopper.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ffi/cuda/gemm.h"
#include "ffi/cuda/prepare.h"

namespace jax_moe::cuda {

// Tokens of a tile at most, and its weight rows: of one matrix, or half of it of two each. Columns
// of y that share a scale.
constexpr int kDenseWideTokens = 144;
constexpr int kDenseWideRows = 256;
constexpr int kDenseWideScaleColumns = 128;

// Either y[p, n] = weight_p * (W x), or, with `activate`, h[p, n] = act(gate x, up x).
struct DenseWideArgs {
  Element type;              // of the weights
  const uint8_t* weight[2];  // activate: gate (null: absent) and up; else the first alone
  int64_t rows;              // of a matrix
  int64_t expert_rows;       // from one expert's first row to the next one's
  int64_t experts, k;        // k a multiple of 8
  Layout x_layout;           // kF16 for f16 weights, kBF16 or kBF16Pair for bf16
  Activations x;
  int32_t pairs_a_row;
  int64_t pairs;
  Lists lists;               // tiles of kDenseWideTokens, an even number where an expert has several
  const float* pair_weight;  // null: 1; activate: multiplies gate and up, before scale and bias
  void* y;                   // [pairs, y_pitch]; activate: float32, or h_parts
  int64_t y_pitch;
  Element y_type;
  // Not with `activate`: y is f16, aligned to 16 bytes, with rows and a pitch that are multiples of 8,
  // and these, [pairs, (rows + 127) / 128], undo the scaling of every 128 columns. Null: y is not
  // scaled.
  float* y_scales;
  // With `activate` only.
  bool activate;
  int32_t h_parts;  // h is kBF16 (1) or kBF16Pair (2), y_pitch columns with their padding
  Projection projection[2];
  Activation activation;
  float limit, beta, linear_beta;
};

// Whether the current device has the kernels, and its driver makes tensor maps.
bool HasDenseWide();

// Loads the kernels (load.h), where there are any.
cudaError_t LoadDenseWide();

cudaError_t LaunchDenseWide(const DenseWideArgs& args, cudaStream_t stream);

}  // namespace jax_moe::cuda
