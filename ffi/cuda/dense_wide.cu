#include "ffi/cuda/dense_wide.cuh"

#include <algorithm>
#include <limits>

#include "ffi/cuda/launch_early.h"
#include "ffi/cuda/load.h"
#include "ffi/plan/cuda.h"

namespace jax_moe::cuda {
namespace {

static_assert(kDenseWideTokens == plan::kCudaDenseWideShape.tokens &&
              kDenseWideRows == plan::kCudaDenseWideShape.rows);

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time: nothing here links with the driver.
EncodeTiled FindEncodeTiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    const bool ok = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return found;
}

// [experts, rows, k] in boxes of 64 rows and 64 columns, in the 128-byte swizzle.
bool MakeMap(const DenseWideArgs& args, const uint8_t* weight, CUtensorMap* map) {
  const auto u64 = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t sizes[] = {u64(args.k), u64(args.rows), u64(args.experts)};
  const cuuint64_t strides[] = {u64(2 * args.k), u64(2 * args.k * args.expert_rows)};
  const cuuint32_t box[] = {64, 64, 1}, steps[] = {1, 1, 1};
  const EncodeTiled encode = FindEncodeTiled();
  return encode != nullptr &&
         encode(map,
                args.type == Element::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                3, const_cast<uint8_t*>(weight), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

struct Kernel {
  const void* function;
  int shared_bytes;
};

template <typename T, int kParts>
Kernel Describe(int cluster) {
  return {cluster == 1 ? reinterpret_cast<const void*>(&DenseWide<T, kParts, 1>)
                       : reinterpret_cast<const void*>(&DenseWide<T, kParts, 2>),
          DenseWideShape<kParts>::kSharedBytes};
}

Kernel FindKernel(Layout layout, int cluster) {
  return layout == Layout::kF16    ? Describe<half, 1>(cluster)
         : layout == Layout::kBF16 ? Describe<__nv_bfloat16, 1>(cluster)
                                   : Describe<__nv_bfloat16, 2>(cluster);
}

// Whether eight 16-bit results from a row that is a multiple of 8 on can be stored at once.
bool StoresEight(const DenseWideArgs& args) {
  return args.y_type != Element::kF32 && args.rows % 8 == 0 && args.y_pitch % 8 == 0 &&
         reinterpret_cast<uintptr_t>(args.y) % 16 == 0;
}

// Whether gate and up are the sums as they are.
bool IsPlain(const DenseWideArgs& args) {
  const auto bare = [](const Projection& p) { return p.scale == nullptr && p.bias == nullptr; };
  return args.type != Element::kF16 && args.pair_weight == nullptr && bare(args.projection[0]) &&
         bare(args.projection[1]);
}

}  // namespace

bool HasDenseWide() { return IsHopper() && FindEncodeTiled() != nullptr; }

cudaError_t LoadDenseWide() {
  if (!HasDenseWide()) return cudaSuccess;
  for (const Layout layout : {Layout::kF16, Layout::kBF16, Layout::kBF16Pair}) {
    for (const int cluster : {1, 2}) {
      const Kernel kernel = FindKernel(layout, cluster);
      const cudaError_t status = LoadKernel(kernel.function, kernel.shared_bytes);
      if (status != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchDenseWide(const DenseWideArgs& args, cudaStream_t stream) {
  DenseWideParams params = {};
  params.args = args;
  params.paired = args.activate && args.weight[0] != nullptr;
  // With this mean hardly any expert has two tiles. Tokens are read for every band: L2 is theirs.
  params.once = 2 * args.pairs <= kDenseWideTokens * args.experts;
  params.plain = IsPlain(args);
  params.stores_eight = StoresEight(args);
  const int64_t band_rows = params.paired ? kDenseWideRows / 2 : kDenseWideRows;
  const int64_t rows = args.activate && args.h_parts > 0 ? args.y_pitch : args.rows;
  params.bands = static_cast<int32_t>((rows + band_rows - 1) / band_rows);
  const int64_t items = params.bands * args.lists.max_tiles;
  if (items == 0) return cudaSuccess;
  // The kernel counts items, the 16-byte pieces of x, and the columns of both parts of h in 32 bits.
  const int64_t rows_of_x = (args.pairs + args.pairs_a_row - 1) / args.pairs_a_row;
  const int64_t pieces = rows_of_x * args.x.pitch / (args.x_layout == Layout::kBF16Pair ? 4 : 8);
  if (items > std::numeric_limits<int32_t>::max() / 2 ||
      (args.h_parts == 2 && args.y_pitch > std::numeric_limits<int32_t>::max() / 2) ||
      pieces > std::numeric_limits<uint32_t>::max()) {
    return cudaErrorInvalidConfiguration;
  }
  const uint8_t* first = args.activate && !params.paired ? args.weight[1] : args.weight[0];
  if (!MakeMap(args, first, &params.map[0]) ||
      !MakeMap(args, params.paired ? args.weight[1] : first, &params.map[1])) {
    return cudaErrorInvalidValue;
  }
  // Where most experts have two tiles or more, two blocks share the weights that they read.
  const int cluster = args.pairs > kDenseWideTokens * args.experts ? 2 : 1;
  const Kernel kernel = FindKernel(args.x_layout, cluster);
  const int64_t clusters =
      std::min((items + cluster - 1) / cluster, int64_t{Multiprocessors()} / cluster);
  void* parameters[] = {&params};
  return LaunchEarly(kernel.function, dim3(static_cast<unsigned>(clusters * cluster)),
                     DenseWideShape<1>::kThreads, static_cast<size_t>(kernel.shared_bytes), stream,
                     parameters, cluster);
}

}  // namespace jax_moe::cuda
