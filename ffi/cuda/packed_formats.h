// Every block format's CUDA kernels.
#pragma once

#include "ffi/cuda/gemm.h"

namespace jax_moe::cuda {

struct PackedFormat {
  PackedKernels kernels;
  const void* dequantize;
  int block_weights;
  int block_bytes;
};

// Defined in instantiate.cuh, instantiated by one .cu file a family of formats.
template <typename Format>
const PackedFormat& Packed();

// The format of a ggml_type, or null.
const PackedFormat* FindPackedFormat(int type);

}  // namespace jax_moe::cuda
