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

Workspace GemmWorkspace(const GemmProblem& problem) {
  const Workspace cuda = CudaGemmWorkspace(problem);
  return IsTiled(problem.format) ? cuda : Larger(CpuGemmWorkspace(problem.shape), cuda);
}

Workspace FfnWorkspace(const FfnProblem& problem) {
  const Workspace cuda = CudaFfnWorkspace(problem);
  const bool tiled = IsTiled(problem.gate_format) || IsTiled(problem.up_format) ||
                     IsTiled(problem.down_format);
  return tiled ? cuda : Larger(CpuFfnWorkspace(problem.shape), cuda);
}

}  // namespace jax_moe::plan
