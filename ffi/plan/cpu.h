// What the CPU handlers run for a problem, and how they divide their workspace.
#pragma once

#include <cstdint>

#include "ffi/plan/plan.h"

namespace jax_moe::plan {

Workspace CpuGemmWorkspace(const GemmShape& shape);
Workspace CpuFfnWorkspace(const FfnShape& shape);

// The CPU's kernel for an op whose activations and result have these element types (DenseType).
// `packed`: the weights are GGUF blocks. `workspace_bytes` is copied into the answer.
Kernel CpuKernel(bool is_ffn, Variant variant, bool packed, int x_type, int y_type,
                 int64_t workspace_bytes);

// Prepared activation rows are zero-padded to a multiple of this many elements.
inline constexpr int64_t kRowAlignment = 512;
inline constexpr int64_t PaddedRow(int64_t k) {
  return (k + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

// Hands out parts of a workspace, each on a cache line of its own.
inline constexpr int64_t kWorkspaceAlignment = 64;
class WorkspaceCursor {
 public:
  explicit WorkspaceCursor(void* begin) : next_(static_cast<uint8_t*>(begin)) {}
  template <typename T>
  T* Take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    next_ += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return part;
  }

 private:
  uint8_t* next_;
};

}  // namespace jax_moe::plan
