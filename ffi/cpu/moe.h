// The CPU implementation of the ops, on checked operands. docs/design.md says what each computes.
#pragma once

#include <cstdint>

#include "ffi/cpu/kernels.h"
#include "ffi/cpu/parallel.h"
#include "ffi/targets.h"

namespace jax_moe::cpu {

struct GemmArgs {
  int64_t tokens, top_k;  // P = tokens * top_k
  const void* x;          // [tokens or P, weight.k] of x_type
  int x_type;             // DenseType
  bool rows_are_pairs;
  Weights weight;
  const int32_t* sorted_token_ids;  // [P]
  const int32_t* flat_expert_ids;   // [P]
  const float* topk_weights;        // [P] or null
  bool round;                       // activations to q8_1
  void* y;                          // [P, weight.n] of y_type
  int y_type;
  void* workspace;
};

void RunGemm(const GemmArgs& args, const Executor& executor);

struct FfnArgs {
  int64_t tokens, top_k;
  const void* x;  // [tokens, down.n] of x_type, and so is y
  int x_type;
  const int32_t* expert_ids;  // [tokens, top_k]
  const float* weights;       // [tokens, top_k]
  // gate.format -1: no gate. merged: gate holds gate rows then up rows, and up is not used.
  Weights gate, up, down;
  bool merged;
  const float *gate_bias, *up_bias, *down_bias;     // [experts, n] or null
  const float *gate_scale, *up_scale, *down_scale;  // [experts] or null
  Activation activation;
  float limit, beta, linear_beta;
  bool weights_before;
  bool round;
  void* y;
  void* workspace;
};

void RunFfn(const FfnArgs& args, const Executor& executor);

// data [rows, row_bytes of `format`] to out [rows, k], bit-exact to ggml's dequantiser.
void RunDequantize(int format, const uint8_t* data, int64_t rows, int64_t k, float* out,
                   const Executor& executor);

}  // namespace jax_moe::cpu
