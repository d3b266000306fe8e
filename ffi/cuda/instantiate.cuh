// The kernels of one block format, for the files that instantiate them.
#pragma once

#include "ffi/cuda/dequantize.cuh"
#include "ffi/cuda/narrow_gemm.cuh"
#include "ffi/cuda/packed_formats.h"
#include "ffi/cuda/vector_gemm.cuh"
#include "ffi/cuda/wide_gemm.cuh"
#include "ffi/plan/cuda_shared.h"

namespace jax_moe::cuda {

template <typename Format>
GemmKernel DescribeVector() {
  return {reinterpret_cast<const void*>(&VectorGemm<Format>),
          32 * VectorShape::kWarps,
          VectorShape::kTokens,
          VectorShape::kRows,
          /*shared_bytes=*/0,
          /*narrow=*/false};
}

template <typename Format, bool kS8>
GemmKernel DescribeNarrow() {
  using Shape = NarrowShape<Format>;
  return {reinterpret_cast<const void*>(&NarrowGemm<Format, kS8>),
          32 * Shape::kWarps,
          Shape::kTokens,
          Shape::kRows,
          Shape::kSharedBytes,
          /*narrow=*/true};
}

template <typename Format, int kTokens>
GemmKernel DescribeWide() {
  using Shape = WideShape<Format, kTokens>;
  static_assert(sizeof(typename Shape::Memory) ==
                (plan::CudaWideSharedBytes<Format>(kTokens) + 15) / 16 * 16);
  return {reinterpret_cast<const void*>(&WideGemm<Format, kTokens>),
          Shape::kThreads,
          kTokens,
          Shape::kRows,
          static_cast<int>(sizeof(typename Shape::Memory)),
          /*narrow=*/false};
}

template <typename Format>
const PackedFormat& Packed() {
  static const PackedFormat format = {
      {DescribeVector<Format>(), DescribeNarrow<Format, false>(), DescribeNarrow<Format, true>(),
       DescribeWide<Format, 32>(), DescribeWide<Format, 128>()},
      reinterpret_cast<const void*>(&Dequantize<Format>),
      Format::kBlock,
      Format::kBytes};
  return format;
}

}  // namespace jax_moe::cuda

#define JAX_MOE_INSTANTIATE(FORMAT) \
  template const jax_moe::cuda::PackedFormat& jax_moe::cuda::Packed<jax_moe::FORMAT>();
