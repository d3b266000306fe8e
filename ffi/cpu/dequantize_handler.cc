#include "ffi/cpu/handlers.h"
#include "ffi/cpu/operands.h"

namespace jax_moe::cpu {
namespace {

ffi::Error Dequantize(ffi::ThreadPool pool, ffi::AnyBuffer data, ffi::Result<ffi::AnyBuffer> out,
                      int32_t format) {
  Checker check("jax_moe_dequantize");
  int64_t elements = 0, bytes = 0;
  check.Require(BlockSize(format, &elements, &bytes) && elements > 1,
                "unknown block format " + std::to_string(format));
  check.Require(data.dimensions().size() == 2 && data.element_type() == ffi::DataType::U8,
                "data has shape " + ShapeText(data) + ", expected uint8 of rank 2");
  if (!check.ok()) return check.error();
  const int64_t rows = data.dimensions()[0], row_bytes = data.dimensions()[1];
  check.Require(row_bytes % bytes == 0, "data has rows of " + std::to_string(row_bytes) +
                                            " bytes, expected a multiple of " +
                                            std::to_string(bytes));
  const int64_t k = row_bytes / bytes * elements;
  check.RequireShape("the result", *out, ffi::DataType::F32, {rows, k});
  if (!check.ok()) return check.error();
  RunDequantize(format, static_cast<const uint8_t*>(data.untyped_data()), rows, k,
                static_cast<float*>(out->untyped_data()), ExecutorOf(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_moe::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeDequantizeCpu, jax_moe::cpu::Dequantize,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // data
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Attr<int32_t>("format"));
