// jax_moe_repack and jax_moe_unpack on CUDA.

#include "ffi/cuda/repack.h"

#include <optional>

#include "ffi/blocks/tiled.h"
#include "ffi/cuda/check.h"
#include "ffi/cuda/handlers.h"
#include "ffi/cuda/load.h"

namespace jax_moe::cuda {
namespace {

using Weights = ffi::BufferR3<ffi::U8>;
using Aux = ffi::BufferR3<ffi::F32>;

// Of data in GGUF's layout.
RepackShape ShapeOf(const Weights& data, int format) {
  const auto dims = data.dimensions();
  return {dims[0], dims[1], dims[2] / BlockBytesOf(format).gguf};
}

// What is wrong with a call, none if nothing.
std::optional<ffi::Error> Complaint(const std::string& op, const Weights& data,
                                    const Weights& tiled, int format) {
  const BlockBytes bytes = BlockBytesOf(format);
  if (bytes.gguf == 0) return Invalid(op, "unknown format " + std::to_string(format));
  const RepackShape shape = ShapeOf(data, format);
  if (shape.rows % kBandRows != 0 || data.dimensions()[2] % bytes.gguf != 0) {
    return Invalid(op, "data must be [experts, a multiple of 16, of " +
                           std::to_string(bytes.gguf) + "], not " + ShapeText(data));
  }
  const auto dims = tiled.dimensions();
  if (dims[0] != shape.experts || dims[1] != shape.rows || dims[2] != shape.blocks * bytes.tiled) {
    return Invalid(op, "tiled data " + ShapeText(tiled) + " must have " +
                           std::to_string(bytes.tiled) + " bytes for each block of data " +
                           ShapeText(data));
  }
  if (!IsAligned(data.untyped_data()) || !IsAligned(tiled.untyped_data())) {
    return Invalid(op, "data is not aligned to 16 bytes");
  }
  return std::nullopt;
}

ffi::Error Repack(cudaStream_t stream, Weights data, ffi::Result<Weights> tiled,
                  ffi::Result<Aux> aux, int32_t format) {
  const std::string op = "jax_moe_repack";
  if (const auto complaint = Complaint(op, data, *tiled, format)) return *complaint;
  const RepackShape shape = ShapeOf(data, format);
  const auto dims = aux->dimensions();
  if (dims[0] != shape.experts || dims[1] != shape.rows || dims[2] != 2) {
    return Invalid(op, "aux must be [experts, rows, 2], not " + ShapeText(*aux));
  }
  if (shape.experts * shape.rows == 0) return ffi::Error::Success();
  return CudaError(op, LaunchRepack(format, shape, data.typed_data(), tiled->typed_data(),
                                    aux->typed_data(), stream));
}

ffi::Error Unpack(cudaStream_t stream, Weights tiled, ffi::Result<Weights> data, int32_t format) {
  const std::string op = "jax_moe_unpack";
  if (const auto complaint = Complaint(op, *data, tiled, format)) return *complaint;
  if (tiled.element_count() == 0) return ffi::Error::Success();
  return CudaError(op, LaunchUnpack(format, ShapeOf(*data, format), tiled.typed_data(),
                                    data->typed_data(), stream));
}

ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  const auto format = attributes.get<int32_t>("format");
  if (!format.has_value()) return format.error();
  return CudaError("jax_moe_repack, jax_moe_unpack", LoadRepack(format.value()));
}

}  // namespace
}  // namespace jax_moe::cuda

JAX_MOE_DEFINE_INITIALIZE(JaxMoeRepackCudaInitialize, jax_moe::cuda::Initialize);

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeRepackCuda, jax_moe::cuda::Repack,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<jax_moe::cuda::Weights>()
                                  .Ret<jax_moe::cuda::Weights>()
                                  .Ret<jax_moe::cuda::Aux>()
                                  .Attr<int32_t>("format"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeUnpackCuda, jax_moe::cuda::Unpack,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<jax_moe::cuda::Weights>()
                                  .Ret<jax_moe::cuda::Weights>()
                                  .Attr<int32_t>("format"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
