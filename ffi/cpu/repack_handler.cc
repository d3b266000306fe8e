// jax_moe_repack and jax_moe_unpack on the CPU.

#include "ffi/blocks/tiled.h"
#include "ffi/cpu/handlers.h"
#include "ffi/cpu/operands.h"
#include "ffi/cpu/repack.h"

namespace jax_moe::cpu {
namespace {

RepackShape RequireOperands(Checker& check, const ffi::AnyBuffer& data,
                            const ffi::AnyBuffer& tiled, int format) {
  RepackShape shape = {};
  const BlockBytes bytes = BlockBytesOf(format);
  if (!check.Require(bytes.gguf > 0, "unknown format " + std::to_string(format)) ||
      !check.Require(data.element_type() == ffi::DataType::U8 && data.dimensions().size() == 3,
                     "data has shape " + ShapeText(data) + ", expected uint8 of rank 3")) {
    return shape;
  }
  const int64_t row_bytes = data.dimensions()[2];
  shape = {data.dimensions()[0], data.dimensions()[1], row_bytes / bytes.gguf};
  check.Require(shape.rows % kBandRows == 0,
                "data has " + std::to_string(shape.rows) + " rows, expected a multiple of " +
                    std::to_string(kBandRows));
  check.Require(row_bytes % bytes.gguf == 0,
                "data has rows of " + std::to_string(row_bytes) +
                    " bytes, expected a multiple of " + std::to_string(bytes.gguf));
  check.RequireShape("tiled", tiled, ffi::DataType::U8,
                     {shape.experts, shape.rows, shape.blocks * bytes.tiled});
  return shape;
}

ffi::Error Repack(ffi::ThreadPool pool, ffi::AnyBuffer data, ffi::Result<ffi::AnyBuffer> tiled,
                  ffi::Result<ffi::AnyBuffer> aux, int32_t format) {
  Checker check("jax_moe_repack");
  const RepackShape shape = RequireOperands(check, data, *tiled, format);
  check.RequireShape("aux", *aux, ffi::DataType::F32, {shape.experts, shape.rows, 2});
  if (!check.ok()) return check.error();
  RunRepack(format, shape, static_cast<const uint8_t*>(data.untyped_data()),
            static_cast<uint8_t*>(tiled->untyped_data()), static_cast<float*>(aux->untyped_data()),
            ExecutorOf(pool));
  return ffi::Error::Success();
}

ffi::Error Unpack(ffi::ThreadPool pool, ffi::AnyBuffer tiled, ffi::Result<ffi::AnyBuffer> data,
                  int32_t format) {
  Checker check("jax_moe_unpack");
  const RepackShape shape = RequireOperands(check, *data, tiled, format);
  if (!check.ok()) return check.error();
  RunUnpack(format, shape, static_cast<const uint8_t*>(tiled.untyped_data()),
            static_cast<uint8_t*>(data->untyped_data()), ExecutorOf(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_moe::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeRepackCpu, jax_moe::cpu::Repack,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // data
                                  .Ret<xla::ffi::AnyBuffer>()  // tiled
                                  .Ret<xla::ffi::AnyBuffer>()  // aux
                                  .Attr<int32_t>("format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeUnpackCpu, jax_moe::cpu::Unpack,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // tiled
                                  .Ret<xla::ffi::AnyBuffer>()  // data
                                  .Attr<int32_t>("format"));
