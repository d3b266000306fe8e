// Activations on their way to the tensor cores: rounding, range-safe scaling, order, padding.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ffi/cuda/dispatch.h"
#include "ffi/cuda/gemm.h"
#include "ffi/targets.h"

namespace jax_moe::cuda {

// Where prepared rows go. `memory` holds PreparedBytes and is 16-byte aligned.
struct PreparedRows {
  Layout layout;
  int64_t rows, columns;
  uint8_t* memory;
  bool rounds = false;  // kF16Narrow and kF16Wide: values are rounded to q8_1 first
};

inline __host__ __device__ bool IsTiled(Layout layout) {
  return layout == Layout::kF16Narrow || layout == Layout::kF16Wide;
}

inline int64_t PreparedPitch(Layout layout, int64_t columns) {
  const int64_t unit = IsTiled(layout) ? 128 : 64;
  return (columns + unit - 1) / unit * unit;
}

inline __host__ __device__ int LayoutBytes(Layout layout) {
  switch (layout) {
    case Layout::kF32:
    case Layout::kPlanes:
    case Layout::kBF16Pair:
      return 4;
    case Layout::kS8Lanes:
      return 1;
    default:
      return 2;
  }
}

// Whether the wide kernels for tiled weights can address the rows: they count pieces of 16 bytes in 32 bits.
inline bool CanAddress(const PreparedRows& to) {
  return to.layout != Layout::kF16Wide ||
         to.rows * (PreparedPitch(to.layout, to.columns) / 8) <= int64_t{0xffffffff};
}

// The values, then what goes with them; at most 4 bytes a column and 8 a row.
inline Activations ViewPrepared(const PreparedRows& to) {
  const int64_t pitch = PreparedPitch(to.layout, to.columns);
  uint8_t* after = to.memory + to.rows * pitch * LayoutBytes(to.layout);
  auto* sums = reinterpret_cast<uint32_t*>(after);
  auto* scales = reinterpret_cast<float*>(after);
  if (to.layout == Layout::kF16Lanes) scales += to.rows * (pitch / 16);
  return {to.memory, scales, sums, pitch, scales + to.rows};
}

// Prepares x [rows, columns]. Sorts in the same launch (dispatch.h).
cudaError_t LaunchPrepare(const void* x, Element x_type, const PreparedRows& to,
                          cudaStream_t stream, const SortArgs* sort = nullptr);

// Who is whose in a moe_gemm (LaunchPairExperts of dispatch.h), and the rows of y that belong to nobody.
struct PairArgs {
  const int32_t* sorted_token_ids;  // [pairs]
  const int32_t* flat_expert_ids;   // [pairs]
  void* y;                          // [pairs, columns]
  int64_t columns;
  Element y_type;
};

// So many pairs have what comes before their product in one launch.
inline constexpr int64_t kPairsInOneLaunch = 1024;

// Finds the pairs' experts, sorts them (sort.expert_ids is not read) if the kernel that follows needs
// that, writes zeros to rows of y without an expert, and prepares x, in one launch, for up to
// kPairsInOneLaunch pairs.
cudaError_t LaunchPrepareGemm(const PairArgs& pairs, const SortArgs& sort, bool sorts, const void* x,
                              Element x_type, const PreparedRows& to, cudaStream_t stream);

// The result of a projection of expert e is value * scale[e] + bias[e, column]; null: 1 and 0.
struct Projection {
  const float* scale;
  const float* bias;
  int64_t bias_pitch;
};

// h[p, j] = act(gate, up) of every pair, prepared. Rows of pairs without an expert are left as they
// are.
struct ActivateArgs {
  const float* gate;  // [pairs, pitch]; null: no gate
  const float* up;    // [pairs, pitch]
  int64_t pitch;
  Projection gate_projection, up_projection;
  const float* pair_weight;   // multiplies both, before scale and bias; null: 1
  const int32_t* expert_ids;  // [pairs]
  int32_t experts;
  Activation activation;
  float limit, beta, linear_beta;
};
cudaError_t LaunchActivate(const ActivateArgs& args, const PreparedRows& to, cudaStream_t stream);

// Loads the kernels (load.h).
cudaError_t LoadPrepare();

}  // namespace jax_moe::cuda
