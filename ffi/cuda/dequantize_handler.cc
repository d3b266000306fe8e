// jax_moe_dequantize on CUDA.

#include <algorithm>

#include "ffi/cuda/check.h"
#include "ffi/cuda/handlers.h"
#include "ffi/cuda/load.h"
#include "ffi/cuda/packed_formats.h"

namespace jax_moe::cuda {
namespace {

using Bytes = ffi::BufferR2<ffi::U8>;
using F32Matrix = ffi::BufferR2<ffi::F32>;

ffi::Error Dequantize(cudaStream_t stream, Bytes data, ffi::Result<F32Matrix> out, int32_t format) {
  const std::string op = "jax_moe_dequantize";
  const PackedFormat* packed = FindPackedFormat(format);
  if (packed == nullptr) return Invalid(op, "unknown format " + std::to_string(format));
  const int64_t rows = data.dimensions()[0], row_bytes = data.dimensions()[1];
  const int64_t columns = row_bytes / packed->block_bytes * packed->block_weights;
  if (row_bytes % packed->block_bytes != 0 || out->dimensions()[0] != rows ||
      out->dimensions()[1] != columns) {
    return Invalid(op, "data " + ShapeText(data) + " does not match the result " + ShapeText(*out));
  }
  int64_t units = rows * columns / 32;
  if (units == 0) return ffi::Error::Success();
  if (!IsAligned(data.untyped_data())) return Invalid(op, "data is not aligned to 16 bytes");
  constexpr int kThreads = 256;
  const unsigned blocks =
      static_cast<unsigned>(std::min<int64_t>((units + kThreads - 1) / kThreads, int64_t{1} << 20));
  const uint8_t* from = data.typed_data();
  float* to = out->typed_data();
  void* parameters[] = {&from, &units, &to};
  return CudaError(op, cudaLaunchKernel(packed->dequantize, dim3(blocks), dim3(kThreads),
                                        parameters, 0, stream));
}

ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  const auto format = attributes.get<int32_t>("format");
  if (!format.has_value()) return format.error();
  const PackedFormat* packed = FindPackedFormat(format.value());
  // A format that does not exist is Dequantize's to complain of.
  return CudaError("jax_moe_dequantize",
                   packed == nullptr ? cudaSuccess : LoadKernel(packed->dequantize));
}

}  // namespace
}  // namespace jax_moe::cuda

JAX_MOE_DEFINE_INITIALIZE(JaxMoeDequantizeCudaInitialize, jax_moe::cuda::Initialize);

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeDequantizeCuda, jax_moe::cuda::Dequantize,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<jax_moe::cuda::Bytes>()
                                  .Ret<jax_moe::cuda::F32Matrix>()
                                  .Attr<int32_t>("format"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
