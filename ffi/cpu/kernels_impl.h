// The kernel table. Included by kernels_*.cc only, each compiled for its own instruction set: all
// that this header brings in has internal linkage, so that no copy is shared between them.
#pragma once

#include "ffi/cpu/activate.h"
#include "ffi/cpu/decode.h"
#include "ffi/cpu/kernels.h"
#include "ffi/cpu/multiply_float.h"
#include "ffi/cpu/multiply_packed.h"
#include "ffi/cpu/multiply_quantized.h"
#include "ffi/cpu/rows.h"

namespace jax_moe::cpu {
namespace {

const Format* FindFormat(int type) {
  static constexpr Format kFormats[] = {
      {kF32, 1, 4, 0, false, DecodeDense<kF32>, nullptr, nullptr},
      {kF16, 1, 2, 0, false, DecodeDense<kF16>, nullptr, nullptr},
      {kBF16, 1, 2, 0, false, DecodeDense<kBF16>, nullptr, nullptr},
#define JAX_MOE_FORMAT(F)                                                                  \
  {F::kType,      F::kBlock,     F::kBytes,                F::kGroup,                 \
   F::kHasOffset, DecodeRows<F>, PackedFunction<F>(true), PackedFunction<F>(false)},
      JAX_MOE_FORMATS(JAX_MOE_FORMAT)
#undef JAX_MOE_FORMAT
  };
  for (const Format& format : kFormats) {
    if (format.type == type) return &format;
  }
  return nullptr;
}

constexpr Kernels MakeKernels(const char* isa) {
  return {isa, FindFormat, 3, MultiplyQuantized, MultiplyFloat, ActivateAny, Prepare, Store};
}

}  // namespace
}  // namespace jax_moe::cpu
