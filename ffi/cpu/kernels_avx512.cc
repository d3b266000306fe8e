// The kernels compiled for AVX-512 F, BW, VL, DQ and VNNI.
#include "ffi/cpu/kernels_impl.h"

namespace jax_moe::cpu {

const Kernels& Avx512Kernels() {
  static constexpr Kernels kernels = MakeKernels("avx512");
  return kernels;
}

}  // namespace jax_moe::cpu
