// The table of block formats, and the way from a run-time ggml_type to a compile-time format.
#pragma once

#include "ffi/blocks/fp4.h"
#include "ffi/blocks/iq1.h"
#include "ffi/blocks/iq2.h"
#include "ffi/blocks/iq3.h"
#include "ffi/blocks/iq4.h"
#include "ffi/blocks/kquants.h"
#include "ffi/blocks/legacy.h"
#include "ffi/blocks/q1q2.h"
#include "ffi/blocks/ternary.h"

// Calls X(FORMAT) for every block format.
#define JAX_MOE_FORMATS(X)                            \
  X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0)             \
  X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K)             \
  X(IQ1_S) X(IQ1_M) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S)     \
  X(IQ3_XXS) X(IQ3_S) X(IQ4_NL) X(IQ4_XS)             \
  X(TQ1_0) X(TQ2_0) X(MXFP4) X(NVFP4) X(Q1_0) X(Q2_0)

namespace jax_moe {

// Calls f(FORMAT{}) for the block format with this ggml_type; false where there is none.
template <typename F>
bool VisitFormat(int type, F&& f) {
  switch (type) {
#define JAX_MOE_CASE(FORMAT) \
  case FORMAT::kType:        \
    f(FORMAT{});             \
    return true;
    JAX_MOE_FORMATS(JAX_MOE_CASE)
#undef JAX_MOE_CASE
  }
  return false;
}

}  // namespace jax_moe
