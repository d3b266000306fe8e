// The kernels compiled for the compiler's baseline instruction set.
#include "ffi/cpu/kernels_impl.h"

namespace jax_moe::cpu {

const Kernels& BaselineKernels() {
  static constexpr Kernels kernels = MakeKernels("baseline");
  return kernels;
}

}  // namespace jax_moe::cpu
