#include "ffi/cpu/kernels.h"

#include <cstdlib>
#include <cstring>

namespace jax_moe::cpu {
namespace {

const Kernels& Choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("JAX_MOE_ISA");
  const bool allow_avx512 = wanted == nullptr || std::strcmp(wanted, "avx512") == 0;
  const bool allow_avx2 = allow_avx512 || std::strcmp(wanted, "avx2") == 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (avx512 && allow_avx512) return Avx512Kernels();
  if (avx2 && allow_avx2) return Avx2Kernels();
#endif
  return BaselineKernels();
}

}  // namespace

const Kernels& SelectKernels() {
  static const Kernels& kernels = Choose();
  return kernels;
}

}  // namespace jax_moe::cpu
