// What would run for an op: kernel, tile and workspace, from shapes, formats, dtypes and the
// device. The handlers and select_kernel read this one answer. Plain C++, built on every machine.
#pragma once

#include <cstdint>
#include <string>

#include "ffi/targets.h"

namespace jax_moe::plan {

// Bytes of workspace as a function of the number of tokens, an upper bound on every platform, so
// that one traced program serves them all and a symbolic token dimension can be exported.
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

// What a call allocates: enough for every platform.
Workspace GemmWorkspace(const GemmShape& shape);
Workspace FfnWorkspace(const FfnShape& shape);

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

}  // namespace jax_moe::plan
