#include "ffi/cuda/check.h"

#include "ffi/cuda/dispatch.h"
#include "ffi/cuda/packed_formats.h"

namespace jax_moe::cuda {

ffi::Error Invalid(const std::string& op, const std::string& what) {
  return ffi::Error::InvalidArgument(op + ": " + what);
}

ffi::Error CudaError(const std::string& op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  // What a launch says of sizes that its grid or a kernel's 31-bit offsets cannot hold.
  if (status == cudaErrorInvalidConfiguration) {
    return Invalid(op, "the call is too large for one launch: give it fewer tokens at a time");
  }
  return ffi::Error::Internal(op + ": " + cudaGetErrorName(status) + ": " +
                              cudaGetErrorString(status));
}

bool IsAligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

void RequireLimits(Checker& check, const char* name, const Weight& weight) {
  // Bytes of 16 rows in the tiled layout fit 31 bits.
  constexpr int64_t kMostRows = int64_t{1} << 30, kMostColumns = int64_t{1} << 26;
  check.Require(weight.rows <= kMostRows && weight.columns <= kMostColumns,
                std::string(name) + " has more than 2^30 rows or 2^26 columns");
  check.Require(IsAligned(weight.data), std::string(name) + " is not aligned to 16 bytes");
}

void RequireLimits(Checker& check, int64_t experts, int64_t pairs) {
  check.Require(experts <= kMaxExperts && pairs <= int64_t{1} << 30,
                "more than 8192 experts or 2^30 pairs");
}

bool CentresFields(Element x, Element y, Variant variant) {
  return variant != Variant::kScalarGguf && x != Element::kBF16 && y != Element::kBF16;
}

const TiledKernel& ChooseTiledKernel(const Weight& weight, plan::CudaTiledTile tile, bool centred,
                                     bool block_tiles) {
  const TiledKernels& kernels = *FindTiledKernels(weight.format, centred);
  if (tile == plan::CudaTiledTile::kNarrow) return kernels.narrow[block_tiles ? 1 : 0];
  return kernels.wide[static_cast<int>(tile) - 1];
}

Lists ListsOfIds(const int32_t* expert_ids, const int32_t* entries, int64_t pairs,
                 int32_t experts) {
  return {nullptr, nullptr, nullptr, pairs, pairs, expert_ids, entries, experts};
}

Layout TiledLayout(plan::CudaTiledTile tile) {
  return tile == plan::CudaTiledTile::kNarrow ? Layout::kF16Narrow : Layout::kF16Wide;
}

TiledMatrix TiledMatrixOf(const Weight& weight) {
  return {weight.data, weight.aux, weight.rows * weight.row_bytes, weight.rows};
}

TiledArgs TiledProduct(const Weight& weight, const Activations& x, int32_t pairs_a_row,
                       const Lists& lists) {
  TiledArgs args = {};
  args.matrix[0] = TiledMatrixOf(weight);
  args.rows = static_cast<int32_t>(weight.rows);
  args.columns = static_cast<int32_t>(weight.columns);
  args.row_bytes = weight.row_bytes;
  args.x = x;
  args.pairs_a_row = pairs_a_row;
  args.lists = lists;
  return args;
}

bool UsesDenseWide(const Weight& weight, int64_t pairs) {
  return !weight.tiled && plan::UsesCudaDenseWide(weight.format, weight.columns, pairs,
                                                  weight.experts, HasDenseWide());
}

DenseWideArgs DenseWideProduct(const Weight& weight, Layout layout, const Activations& x,
                               int64_t pairs, int32_t pairs_a_row, const Lists& lists) {
  DenseWideArgs args = {};
  args.type = static_cast<Element>(weight.format);
  args.weight[0] = weight.data;
  args.rows = weight.rows;
  args.expert_rows = weight.rows;
  args.experts = weight.experts;
  args.k = weight.columns;
  args.x_layout = layout;
  args.x = x;
  args.pairs = pairs;
  args.pairs_a_row = pairs_a_row;
  args.lists = lists;
  return args;
}

Layout ChooseLayout(const Weight& weight, Element x_type, Variant variant, plan::CudaTile tile,
                    bool dense_wide) {
  if (weight.packed) {
    if (variant == Variant::kScalarGguf) return Layout::kS8Lanes;
    return tile == plan::CudaTile::kVector ? Layout::kPlanes : Layout::kF16Lanes;
  }
  switch (static_cast<Element>(weight.format)) {
    case Element::kF16:
      return Layout::kF16;
    case Element::kBF16:
      if (x_type == Element::kBF16) return Layout::kBF16;
      return dense_wide ? Layout::kBF16Pair : Layout::kF32;
    case Element::kF32:
      return Layout::kF32;
  }
  return Layout::kF32;
}

Layout ChooseHiddenLayout(const Weight& down, Element x_type, Variant variant, plan::CudaTile tile,
                          bool dense_wide) {
  // Rounded to bf16, h adds to the error of y no more than y's own rounding does.
  const bool one = dense_wide && x_type == Element::kBF16;
  return ChooseLayout(down, one ? Element::kBF16 : Element::kF32, variant, tile, dense_wide);
}

GemmKernel ChooseKernel(const Weight& weight, Layout layout, plan::CudaTile tile) {
  if (!weight.packed) {
    const DenseKernels* kernels = FindDenseKernels(static_cast<Element>(weight.format), layout);
    const bool few = tile == plan::CudaTile::kVector || tile == plan::CudaTile::kNarrow;
    return few ? kernels->narrow : kernels->wide;
  }
  const PackedKernels& kernels = FindPackedFormat(weight.format)->kernels;
  if (layout == Layout::kS8Lanes) return kernels.narrow_s8;
  if (layout == Layout::kPlanes) return kernels.vector;
  tile = plan::FitCudaTile(tile, weight.format, SharedMemoryLimit());
  return tile == plan::CudaTile::kWide     ? kernels.wide
         : tile == plan::CudaTile::kMedium ? kernels.medium
                                           : kernels.narrow;
}

}  // namespace jax_moe::cuda
