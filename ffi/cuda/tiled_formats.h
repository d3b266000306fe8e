// The table of the tiled formats' kernels.
#pragma once

#include "ffi/cuda/tiled_gemm.h"

// Calls X(FORMAT) for every block format with a tiled layout.
#define JAX_MOE_TILED_FORMATS(X)      \
  X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) \
  X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) \
  X(IQ4_NL) X(IQ4_XS) X(MXFP4) X(NVFP4)

namespace jax_moe::cuda {

// Defined in tiled_*.cu.
template <typename Format>
const TiledKernels& Tiled();

}  // namespace jax_moe::cuda
