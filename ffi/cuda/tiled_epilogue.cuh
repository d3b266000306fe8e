// From sums to results: scales undone, projections finished, activations applied, h scaled.
#pragma once

#include <cuda_fp16.h>

#include "ffi/cuda/activation.cuh"
#include "ffi/cuda/store.cuh"
#include "ffi/cuda/tiled_gemm.h"

namespace jax_moe::cuda {

// Where column c of 128 stands in a chunk of prepared activations.
__device__ __forceinline__ int NarrowPlace(int c) {
  return c % 32 / 8 * 32 + c / 32 * 8 + c % 8;
}
__device__ __forceinline__ int WidePlace(int c) {
  return c % 32 / 4 * 16 + c % 4 / 2 * 8 + c / 32 * 2 + c % 2;
}

// The factor of a pair's sums: what undoes the scaling of its activations, and its weight.
__device__ __forceinline__ float PairFactor(const TiledArgs& args, int pair) {
  const float weight = args.pair_weight == nullptr ? 1.0f : args.pair_weight[pair];
  return weight * args.x.scales[pair / args.pairs_a_row];
}

// The threads that work together on a tile's factors, and how they wait for each other.
struct WholeBlock {
  __device__ static int Thread() { return threadIdx.x; }
  __device__ static int Threads() { return blockDim.x; }
  __device__ static void Sync() { __syncthreads(); }
};

// The largest magnitude of an expert's biases, by all of `Team`; 0 without biases.
template <typename Team>
__device__ __forceinline__ float LargestBias(const Projection& projection, int expert, int rows,
                                             float* memory) {
  if (projection.bias == nullptr) return 0.0f;
  float largest = 0;
  for (int i = Team::Thread(); i < rows; i += Team::Threads()) {
    largest = fmaxf(largest, fabsf(projection.bias[expert * projection.bias_pitch + i]));
  }
  for (int d = 16; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
  if (Team::Thread() % 32 == 0) memory[Team::Thread() / 32] = largest;
  Team::Sync();
  largest = memory[0];
  for (int w = 1; w < Team::Threads() / 32; ++w) largest = fmaxf(largest, memory[w]);
  Team::Sync();
  return largest;
}

// Exponent b with bound <= 2^b.
__device__ __forceinline__ int BoundExponent(float bound) {
  if (bound == 0) return -126;
  return bound < INFINITY ? ilogbf(bound) + 1 : 129;
}

// h of a pair is at most 2^b: the product's magnitude by Cauchy and Schwarz from the norms of x and
// of the rows, through the activation. Returns the power of two that brings it to 2^15 at most and
// writes its inverse; NaN where x is not finite.
__device__ __forceinline__ float ScaleOfH(const TiledArgs& args, int expert, int pair,
                                          const float (&bias)[2], bool write) {
  const int64_t row = pair / args.pairs_a_row;
  const float weight = args.pair_weight == nullptr ? 1.0f : fabsf(args.pair_weight[pair]);
  const float norm = args.x.norms[row] * args.x.scales[row];
  float bound[2] = {1, 1};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i == 0 && !args.gated) continue;
    const TiledMatrix& matrix = args.matrix[i];
    const Projection& p = args.projection[i];
    const float scale = p.scale == nullptr ? 1.0f : fabsf(p.scale[expert]);
    bound[i] = norm * weight * matrix.aux[expert * matrix.expert_rows * 2 + 1] * scale + bias[i];
  }
  int exponent;
  switch (args.activation) {
    case Activation::kSwigluOai:
      exponent = BoundExponent(fminf(bound[0], args.limit > 1 ? args.limit : INFINITY)) +
                 BoundExponent(fminf(bound[1], fabsf(args.limit)) + 1);
      break;
    case Activation::kRelu2:
      exponent = 2 * BoundExponent(bound[1]);
      break;
    case Activation::kSilu:
    case Activation::kGelu:
      exponent = BoundExponent(bound[1]);
      break;
    default:
      exponent = BoundExponent(bound[0]) + BoundExponent(bound[1]);
      break;
  }
  exponent = max(-126, min(exponent - 15, 127));
  const bool finite = args.x.norms[row] < INFINITY && weight < INFINITY;
  if (write) args.h_scales[pair] = finite ? ldexpf(1.0f, exponent) : NAN;
  return finite ? ldexpf(1.0f, -exponent) : 0.0f;
}

__device__ __forceinline__ float FinishProjection(const Projection& p, float value, int expert,
                                                  int row) {
  if (p.scale != nullptr) value *= p.scale[expert];
  if (p.bias != nullptr) value += p.bias[expert * p.bias_pitch + row];
  return value;
}

__device__ __forceinline__ half ActivateToHalf(const TiledArgs& args, float gate, float up,
                                               int expert, int row, float h_factor) {
  if (args.gated) gate = FinishProjection(args.projection[0], gate, expert, row);
  up = FinishProjection(args.projection[1], up, expert, row);
  const float h = Activate(args.activation, gate, up, args.limit, args.beta, args.linear_beta);
  return __float2half_rn(h * h_factor);
}

}  // namespace jax_moe::cuda
