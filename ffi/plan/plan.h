// What would run for an op: kernel, tile and workspace, from shapes, formats, dtypes and the
// device. The handlers and select_kernel read this one answer. Plain C++, built on every machine.
#pragma once

#include <cstdint>
#include <string>

#include "ffi/targets.h"

namespace jax_moe::plan {

// Bytes of workspace as a function of the number of tokens, an upper bound on every device that may
// run the call, so that one traced program serves them all and a symbolic token dimension can be
// exported.
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

// A call of an op: its shape and what else decides which kernels run. Formats, variants and
// activations are those of ffi/targets.h.
struct GemmProblem {
  GemmShape shape;
  int format;
};

struct FfnProblem {
  FfnShape shape;
  int gate_format, up_format, down_format;
  Variant variant;
  Activation activation;
  float limit;
  bool biased;  // gate or up has a bias
};

inline bool IsTiled(int format) { return format >= 0 && (format & kTiledFormat) != 0; }

// What a call allocates: enough for every platform that may run it, which is CUDA alone where a
// weight is tiled.
Workspace GemmWorkspace(const GemmProblem& problem);
Workspace FfnWorkspace(const FfnProblem& problem);

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
