// The kernel table. Included by kernels_*.cc only, each compiled for its own instruction set: all
// that this header brings in has internal linkage, so that no copy is shared between them.
#pragma once

#include "ffi/cpu/activate.h"
#include "ffi/cpu/decode.h"
#include "ffi/cpu/kernels.h"
#include "ffi/cpu/multiply_float.h"
#include "ffi/cpu/multiply_quantized.h"
#include "ffi/cpu/rows.h"

namespace jax_moe::cpu {
namespace {

constexpr Kernels MakeKernels(const char* isa) {
  return {isa, FindFormat, 3, MultiplyQuantized, MultiplyFloat, ActivateAny, Prepare, Store};
}

}  // namespace
}  // namespace jax_moe::cpu
