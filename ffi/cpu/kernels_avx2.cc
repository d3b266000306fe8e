// The kernels compiled for AVX2, FMA, F16C and BMI2.
#include "ffi/cpu/kernels_impl.h"

namespace jax_moe::cpu {

const Kernels& Avx2Kernels() {
  static constexpr Kernels kernels = MakeKernels("avx2");
  return kernels;
}

}  // namespace jax_moe::cpu
