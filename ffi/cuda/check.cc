#include "ffi/cuda/check.h"

#include "ffi/cuda/packed_formats.h"

namespace jax_moe::cuda {
namespace {

int SharedMemoryLimit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

int64_t DenseBytes(Element type) { return type == Element::kF32 ? 4 : 2; }

}  // namespace

ffi::Error Invalid(const std::string& op, const std::string& what) {
  return ffi::Error::InvalidArgument(op + ": " + what);
}

ffi::Error CudaError(const std::string& op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(op + ": " + cudaGetErrorName(status) + ": " +
                              cudaGetErrorString(status));
}

std::optional<Element> ElementOf(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return Element::kF32;
    case ffi::DataType::F16:
      return Element::kF16;
    case ffi::DataType::BF16:
      return Element::kBF16;
    default:
      return std::nullopt;
  }
}

bool IsAligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

ffi::ErrorOr<Weight> ReadWeight(const std::string& op, const char* name,
                                const ffi::AnyBuffer& buffer, int format,
                                const ffi::Buffer<ffi::F32>& aux) {
  const auto fail = [&](const std::string& what) {
    return ffi::Unexpected(Invalid(op, name + (" " + what)));
  };
  const auto dims = buffer.dimensions();
  if (dims.size() != 3) return fail("must have three dimensions, not " + ShapeText(buffer));
  Weight weight = {};
  weight.data = static_cast<const uint8_t*>(buffer.untyped_data());
  weight.tiled = (format & kTiledFormat) != 0;
  weight.format = format & ~kTiledFormat;
  weight.experts = dims[0];
  weight.rows = dims[1];
  weight.columns = dims[2];
  format = weight.format;
  if (weight.tiled) {
    if (FindTiledKernels(format) == nullptr || dims[1] % 16 != 0) {
      return fail("cannot be tiled: ggml_type " + std::to_string(format) + ", " + ShapeText(buffer));
    }
    if (static_cast<int64_t>(aux.element_count()) != 2 * dims[0] * dims[1]) {
      return fail("is tiled, and its aux does not match: " + ShapeText(aux));
    }
    weight.aux = aux.typed_data();
  }
  if (const PackedFormat* packed = FindPackedFormat(format)) {
    if (buffer.element_type() != ffi::DataType::U8) return fail("must be uint8 blocks");
    if (dims[2] % packed->block_bytes != 0) {
      return fail("has rows of " + std::to_string(dims[2]) +
                  " bytes, not a multiple of the block's " + std::to_string(packed->block_bytes));
    }
    weight.packed = true;
    weight.row_bytes = dims[2];
    weight.columns = dims[2] / packed->block_bytes * packed->block_weights;
  } else {
    const std::optional<Element> type = ElementOf(buffer.element_type());
    if (!type || static_cast<int>(*type) != format) {
      return fail("does not have the element type of ggml_type " + std::to_string(format));
    }
    weight.row_bytes = dims[2] * DenseBytes(*type);
  }
  if (weight.rows > (int64_t{1} << 30) || weight.columns > (int64_t{1} << 30)) {
    return fail("is larger than the kernels' indices: " + ShapeText(buffer));
  }
  if (!IsAligned(weight.data)) return fail("is not aligned to 16 bytes");
  return weight;
}

const TiledKernel& ChooseTiledKernel(const Weight& weight, plan::CudaTiledTile tile) {
  const TiledKernels& kernels = *FindTiledKernels(weight.format);
  if (tile == plan::CudaTiledTile::kNarrow) return kernels.narrow;
  return kernels.wide[static_cast<int>(tile) - 1];
}

Layout TiledLayout(plan::CudaTiledTile tile) {
  return tile == plan::CudaTiledTile::kNarrow ? Layout::kF16Narrow : Layout::kF16Wide;
}

TiledArgs TiledProduct(const Weight& weight, const Activations& x, int32_t pairs_a_row,
                       const Lists& lists) {
  TiledArgs args = {};
  args.matrix[0] = {weight.data, weight.aux, weight.rows * weight.row_bytes, weight.rows};
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
                               int32_t pairs_a_row, const Lists& lists) {
  DenseWideArgs args = {};
  args.type = static_cast<Element>(weight.format);
  args.weight[0] = weight.data;
  args.rows = weight.rows;
  args.expert_rows = weight.rows;
  args.experts = weight.experts;
  args.k = weight.columns;
  args.x_layout = layout;
  args.x = x;
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

cudaError_t ConfigureFormat(int format) {
  if (format >= 0 && (format & kTiledFormat) != 0) {
    const TiledKernels* kernels = FindTiledKernels(format & ~kTiledFormat);
    return kernels == nullptr ? cudaSuccess : ConfigureTiled(*kernels, IsHopper());
  }
  const PackedFormat* packed = FindPackedFormat(format);
  if (packed == nullptr) return format >= 0 && HasDenseWide() ? ConfigureDenseWide() : cudaSuccess;
  const PackedKernels& kernels = packed->kernels;
  const int limit = SharedMemoryLimit();
  for (const GemmKernel* kernel :
       {&kernels.narrow, &kernels.narrow_s8, &kernels.medium, &kernels.wide}) {
    if (kernel->shared_bytes > limit) continue;
    const cudaError_t error = ConfigureGemm(*kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jax_moe::cuda
