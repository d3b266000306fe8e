// From sums to results: scales undone, projections finished, activations applied, h scaled.
#pragma once

#include <cuda_fp16.h>

#include "ffi/cuda/powers.cuh"
#include "ffi/cuda/store.cuh"
#include "ffi/cuda/tiled_activation.cuh"
#include "ffi/cuda/tiled_gemm.h"

namespace jax_moe::cuda {

// Where column c of 128 stands in a chunk of prepared activations.
__device__ __forceinline__ int NarrowPlace(unsigned c) {
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

// Exponent b with bound <= 2^b, for a bound that is not negative; 129 where it is not finite.
__device__ __forceinline__ int BoundExponent(float bound) {
  return static_cast<int>(__float_as_uint(bound) >> 23 & 0xff) - 126;
}

// What bounds h of a pair, loaded well before it is used.
struct BoundOfH {
  float norm, scale, weight, row_norm[2];

  // row: pair's, of x.
  __device__ __forceinline__ void Load(const TiledArgs& args, int expert, int pair, int row) {
    scale = args.x.scales[row];
    weight = args.pair_weight == nullptr ? 1.0f : args.pair_weight[pair];
    if (!args.activate) return;
    norm = args.x.norms[row];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_norm[i] = args.matrix[i].aux[expert * args.matrix[i].expert_rows * 2 + 1];
    }
  }
  // As PairFactor.
  __device__ __forceinline__ float Factor() const { return weight * scale; }
};

// h of a pair is at most 2^b: the product's magnitude by Cauchy and Schwarz from the norms of x and
// of the rows, through the activation; there are no biases, or the activation's limit bounds h alone. With
// both, the smaller one counts.
// Returns the power of two that brings h to 2^15 at most and writes its inverse, where it is wanted;
// NaN where x is not finite.
__device__ __forceinline__ float ScaleOfH(const TiledArgs& args, const BoundOfH& known, int expert,
                                          float* inverse) {
  int exponent;
  const float x_bound = known.norm * known.scale * fabsf(known.weight);
  const auto bound = [&](int i) {
    const Projection& p = args.projection[i];
    const float scale = p.scale == nullptr ? 1.0f : fabsf(p.scale[expert]);
    return BoundExponent(x_bound * known.row_norm[i] * scale);
  };
  if (args.activation == Activation::kSwigluOai) {
    exponent = BoundExponent(fmaxf(args.limit, 1.0f)) + BoundExponent(fabsf(args.limit) + 1);
    // |h| <= |gate| (|up| + 1)
    if (args.projection[0].bias == nullptr && args.projection[1].bias == nullptr) {
      exponent = min(exponent, bound(0) + max(bound(1), 0) + 1);
    }
  } else {
    exponent = bound(1);
    if (args.gated) exponent += bound(0);
    if (args.activation == Activation::kRelu2) exponent *= 2;
  }
  exponent = max(-126, min(exponent - 15, 126));  // a finite h is below 2^128
  const bool finite = known.norm < INFINITY && fabsf(known.weight) < INFINITY;
  if (inverse != nullptr) *inverse = finite ? PowerOfTwo(exponent) : NAN;
  return finite ? PowerOfTwo(-exponent) : 0.0f;
}
__device__ __forceinline__ float ScaleOfH(const TiledArgs& args, const BoundOfH& known, int expert,
                                          int pair, bool write) {
  return ScaleOfH(args, known, expert, write ? args.h_scales + pair : nullptr);
}
__device__ __forceinline__ float ScaleOfH(const TiledArgs& args, int expert, int pair, bool write) {
  BoundOfH known;
  known.Load(args, expert, pair, pair / args.pairs_a_row);
  return ScaleOfH(args, known, expert, pair, write);
}

// The same for y = W x of a pair, to f16: x is at most 2^15 in magnitude once scaled, so its norm is known
// only where it was prepared from an array, and is at most 2^15 times the root of its columns.
__device__ __forceinline__ float ScaleOfY(const TiledArgs& args, int expert, int pair, bool write) {
  const TiledMatrix& matrix = args.matrix[0];
  const float x_scale = args.x.scales[pair / args.pairs_a_row];
  const float norm = 0x1p15f * sqrtf(static_cast<float>(args.columns)) *
                     matrix.aux[expert * matrix.expert_rows * 2 + 1];
  // Products of powers of two: the scale of x may be as extreme as float32 allows.
  const int exponent = max(-126, min(BoundExponent(norm * x_scale) - 15, 127));
  if (write) args.y_scales[pair] = x_scale < INFINITY ? ldexpf(1.0f, exponent) : NAN;
  return ldexpf(1.0f, -exponent);
}

__device__ __forceinline__ float FinishProjection(const Projection& p, float value, int expert,
                                                  int row) {
  if (p.scale != nullptr) value *= p.scale[expert];
  if (p.bias != nullptr) value += p.bias[expert * p.bias_pitch + row];
  return value;
}

}  // namespace jax_moe::cuda
