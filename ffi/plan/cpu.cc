#include "ffi/plan/cpu.h"

#include <algorithm>

#include "ffi/cpu/kernels.h"

namespace jax_moe::plan {
namespace {

// The parts of a workspace, each rounded up to an alignment.
constexpr int64_t kMaxParts = 16;

// Pair lists by expert: an expert and a place for every pair, offsets and active experts.
int64_t ListBytesPerToken(int64_t top_k) { return 2 * 4 * top_k; }
int64_t FixedBytes(int64_t experts) {
  return 4 * (2 * experts + 2) + kMaxParts * kWorkspaceAlignment;
}

// A row of float32 or of q8_1, each with the sums that kernels derive from it, and its scale.
int64_t PreparedRowBytes(int64_t k) { return cpu::RowBytes(k) + 4; }

double ElementBound(int dense_type) {
  return dense_type == kF32 ? 1e-5 : dense_type == kF16 ? 5e-4 : 2e-3;
}

}  // namespace

Workspace CpuGemmWorkspace(const GemmShape& shape) {
  const int64_t rows = shape.rows_are_pairs ? shape.top_k : 1;
  return {FixedBytes(shape.experts),
          ListBytesPerToken(shape.top_k) + rows * PreparedRowBytes(shape.k)};
}

Workspace CpuFfnWorkspace(const FfnShape& shape) {
  // The down projection's rows take the place of the hidden ones once those are prepared.
  const int64_t hidden_or_down = 4 * std::max(PaddedRow(shape.d_expert), shape.d_model);
  return {FixedBytes(shape.experts),
          ListBytesPerToken(shape.top_k) + PreparedRowBytes(shape.d_model) +
              shape.top_k * (hidden_or_down + PreparedRowBytes(shape.d_expert))};
}

Kernel CpuKernel(bool is_ffn, Variant variant, bool packed, int x_type, int y_type,
                 int64_t workspace_bytes) {
  const bool rounds = variant == Variant::kScalarGguf;
  double bound = std::max(ElementBound(x_type), ElementBound(y_type));
  if (rounds) bound = std::max(bound, is_ffn ? 2.4e-2 : 1.2e-2);
  Kernel kernel;
  kernel.variant = variant;
  kernel.name = rounds ? "cpu_int8_dot" : packed ? "cpu_float_packed" : "cpu_float_dense";
  kernel.arch = cpu::SelectKernels().isa;
  kernel.tile_rows = cpu::kPanelRows;
  kernel.tile_tokens = cpu::kTokenTile;
  kernel.workspace_bytes = workspace_bytes;
  kernel.accumulator = rounds ? "int32 in a group, float32" : "float32";
  kernel.deterministic = true;
  kernel.rounds_activations = rounds;
  kernel.error_bound = bound;
  return kernel;
}

}  // namespace jax_moe::plan
