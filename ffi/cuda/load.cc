#include "ffi/cuda/load.h"

#include "ffi/cuda/combine.h"
#include "ffi/cuda/dense_wide.h"
#include "ffi/cuda/dispatch.h"
#include "ffi/cuda/launch_early.h"
#include "ffi/cuda/packed_formats.h"
#include "ffi/cuda/prepare.h"
#include "ffi/cuda/tiled_gemm.h"
#include "ffi/targets.h"

namespace jax_moe::cuda {
namespace {

// What a kernel may use without asking.
constexpr int kDefaultSharedBytes = 48 * 1024;

cudaError_t LoadTiledFormat(int type) {
  const TiledKernels* kernels = FindTiledKernels(type, /*centred=*/false);
  const TiledKernels* centred = FindTiledKernels(type, /*centred=*/true);
  if (kernels == nullptr) return cudaSuccess;
  const cudaError_t status = LoadTiled(*kernels);
  return status != cudaSuccess || centred == kernels ? status : LoadTiled(*centred);
}

// Those that fit the device's shared memory.
cudaError_t LoadPackedFormat(const PackedKernels& kernels) {
  const int limit = SharedMemoryLimit();
  cudaError_t status = cudaSuccess;
  for (const GemmKernel* kernel : {&kernels.vector, &kernels.narrow, &kernels.narrow_s8,
                                   &kernels.medium, &kernels.wide}) {
    if (status != cudaSuccess) break;
    if (kernel->shared_bytes <= limit) status = LoadKernel(kernel->function, kernel->shared_bytes);
  }
  return status;
}

cudaError_t LoadDense(Element type) {
  cudaError_t status = type == Element::kF32 ? cudaSuccess : LoadDenseWide();
  for (const Layout layout : {Layout::kF16, Layout::kBF16, Layout::kF32}) {
    const DenseKernels* kernels = FindDenseKernels(type, layout);
    if (status != cudaSuccess || kernels == nullptr) continue;
    status = LoadKernels(kernels->narrow.function, kernels->wide.function);
  }
  return status;
}

cudaError_t LoadFormat(int format) {
  if ((format & kTiledFormat) != 0) return LoadTiledFormat(format & ~kTiledFormat);
  const PackedFormat* packed = FindPackedFormat(format);
  return packed == nullptr ? LoadDense(static_cast<Element>(format))
                           : LoadPackedFormat(packed->kernels);
}

}  // namespace

cudaError_t LoadKernel(const void* function, int shared_bytes) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, function);  // which loads it
  if (status != cudaSuccess || shared_bytes <= kDefaultSharedBytes) return status;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

cudaError_t LoadProducts(int format) {
  constexpr int kTypes = 64;  // of ggml, and more
  static OncePerDevice shared, formats[2][kTypes];
  const cudaError_t status = shared([] {
    const cudaError_t prepare = LoadPrepare();
    if (prepare != cudaSuccess) return prepare;
    const cudaError_t dispatch = LoadDispatch();
    return dispatch == cudaSuccess ? LoadCombine() : dispatch;
  });
  const int type = format & ~kTiledFormat;
  if (status != cudaSuccess || type < 0) return status;
  if (type >= kTypes) return LoadFormat(format);
  return formats[(format & kTiledFormat) != 0 ? 1 : 0][type]([&] { return LoadFormat(format); });
}

}  // namespace jax_moe::cuda
