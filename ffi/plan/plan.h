// What would run for an op: kernel, tile and workspace, from shapes, formats, dtypes and the device.
// The handlers and select_kernel read this one answer. Plain C++, built on every machine.
#pragma once

#include <cstdint>
#include <string>

#include "ffi/targets.h"

namespace jax_moe::plan {

// Bytes of workspace as a function of the number of tokens, an upper bound on every platform, so that
// one traced program serves them all and a symbolic token dimension can be exported.
struct Workspace {
  int64_t fixed_bytes;
  int64_t bytes_per_token;
  int64_t Bytes(int64_t tokens) const { return fixed_bytes + bytes_per_token * tokens; }
};

struct GemmShape {
  int64_t top_k, experts, n, k;
  bool rows_are_pairs;  // x has a row for every pair rather than for every token
};

struct FfnShape {
  int64_t top_k, experts, d_model, d_expert;
};

Workspace GemmWorkspace(const GemmShape& shape);
Workspace FfnWorkspace(const FfnShape& shape);

// Prepared activation rows are zero-padded to a multiple of this many elements.
inline constexpr int64_t kRowAlignment = 256;
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

// What runs, and what it guarantees.
struct Kernel {
  Variant variant;           // as asked for
  std::string name;          // of the kernel family
  std::string arch;          // instruction set or compute capability that it is compiled for
  int tile_rows;             // weight rows and tokens of a result tile
  int tile_tokens;
  int64_t workspace_bytes;
  std::string accumulator;   // of sums over K
  bool deterministic;        // two runs give the same bits
  bool rounds_activations;   // to q8_1
  double error_bound;        // relative L2, independent normal operands; docs/design.md
};

// The CPU's kernel for an op whose activations and result have these element types (DenseType).
// `packed`: the weights are GGUF blocks. `workspace_bytes` is copied into the answer.
Kernel CpuKernel(bool is_ffn, Variant variant, bool packed, int x_type, int y_type,
                 int64_t workspace_bytes);

}  // namespace jax_moe::plan
