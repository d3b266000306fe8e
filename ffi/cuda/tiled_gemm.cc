#include "ffi/cuda/tiled_gemm.h"

#include <algorithm>

#include "ffi/blocks/formats.h"
#include "ffi/cuda/tiled_formats.h"

namespace jax_moe::cuda {

const TiledKernels* FindTiledKernels(int format) {
  switch (format) {
#define JAX_MOE_CASE(FORMAT) \
  case FORMAT::kType:        \
    return &Tiled<FORMAT>();
    JAX_MOE_TILED_FORMATS(JAX_MOE_CASE)
#undef JAX_MOE_CASE
  }
  return nullptr;
}

cudaError_t LaunchTiled(const TiledKernel& kernel, const TiledArgs& args, cudaStream_t stream) {
  const bool paired = args.activate && args.gated;
  const int64_t block_rows = paired ? kernel.block_rows / 2 : kernel.block_rows;
  const int64_t rows = args.activate && kernel.pads_rows ? args.y_pitch : args.rows;
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  const int64_t tiles = args.lists.max_tiles;
  if (blocks == 0 || tiles == 0) return cudaSuccess;
  const int64_t tiles_y = std::min(tiles, kMaxGridY), tiles_z = (tiles + tiles_y - 1) / tiles_y;
  if (tiles_z > kMaxGridY) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles_y),
                  static_cast<unsigned>(tiles_z));
  void* parameters[] = {const_cast<TiledArgs*>(&args)};
  return cudaLaunchKernel(kernel.function, grid, dim3(kernel.threads), parameters,
                          kernel.shared_bytes, stream);
}

cudaError_t ConfigureTiled(const TiledKernels& kernels, bool hopper) {
  const auto configure = [](const TiledKernel& kernel) {
    return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                kernel.shared_bytes);
  };
  cudaError_t status = configure(kernels.narrow);
  for (const TiledKernel& kernel : kernels.wide) {
    if (status == cudaSuccess && hopper) status = configure(kernel);
  }
  return status;
}

}  // namespace jax_moe::cuda
