// jax_moe_repack and jax_moe_unpack on the CPU.

#include "ffi/blocks/tiled.h"
#include "ffi/cpu/handlers.h"
#include "ffi/cpu/operands.h"
#include "ffi/cpu/repack.h"

namespace jax_moe::cpu {
namespace {

RepackShape RequireOperands(Checker& check, const ffi::AnyBuffer& from, const ffi::AnyBuffer& to,
                            int format) {
  RepackShape shape = {};
  const int64_t block_bytes = TiledBlockBytes(format);
  if (!check.Require(block_bytes > 0,
                     "format " + std::to_string(format) + " has no tiled layout") ||
      !check.Require(from.element_type() == ffi::DataType::U8 && from.dimensions().size() == 3,
                     "data has shape " + ShapeText(from) + ", expected uint8 of rank 3")) {
    return shape;
  }
  shape = {from.dimensions()[0], from.dimensions()[1], from.dimensions()[2]};
  check.Require(shape.rows % kBandRows == 0,
                "data has " + std::to_string(shape.rows) + " rows, expected a multiple of " +
                    std::to_string(kBandRows));
  check.Require(shape.row_bytes % block_bytes == 0,
                "data has rows of " + std::to_string(shape.row_bytes) +
                    " bytes, expected a multiple of " + std::to_string(block_bytes));
  check.RequireShape("the result", to, ffi::DataType::U8,
                     {shape.experts, shape.rows, shape.row_bytes});
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
  const RepackShape shape = RequireOperands(check, tiled, *data, format);
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
