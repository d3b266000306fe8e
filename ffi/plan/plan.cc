#include "ffi/plan/plan.h"

#include <algorithm>

#include "ffi/plan/cpu.h"
#include "ffi/plan/cuda.h"

namespace jax_moe::plan {
namespace {

Workspace Larger(const Workspace& a, const Workspace& b) {
  return {std::max(a.fixed_bytes, b.fixed_bytes), std::max(a.bytes_per_token, b.bytes_per_token)};
}

}  // namespace

Workspace GemmWorkspace(const GemmShape& shape) {
  return Larger(CpuGemmWorkspace(shape), CudaGemmWorkspace(shape));
}

Workspace FfnWorkspace(const FfnShape& shape) {
  return Larger(CpuFfnWorkspace(shape), CudaFfnWorkspace(shape));
}

}  // namespace jax_moe::plan
