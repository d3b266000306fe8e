#include "ffi/cuda/tiled_gemm.h"

#include <algorithm>
#include <cstdlib>

#include "ffi/blocks/formats.h"
#include "ffi/cuda/tiled_formats.h"

namespace jax_moe::cuda {
namespace {

// On Hopper the kernel may start while the one before it ends (WaitForEarlierKernels).
cudaError_t Launch(const TiledKernel& kernel, dim3 grid, void** parameters, cudaStream_t stream) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = kernel.shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = std::getenv("JAX_MOE_NO_PDL") == nullptr && IsHopper() ? 1 : 0;
  return cudaLaunchKernelExC(&config, kernel.function, parameters);
}

}  // namespace

bool IsHopper() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9;
}

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
  return Launch(kernel, grid, parameters, stream);
}

cudaError_t LaunchTiledDown(const TiledKernel& kernel, const TiledDownArgs& args,
                            cudaStream_t stream) {
  void* parameters[] = {const_cast<TiledDownArgs*>(&args)};
  return Launch(kernel, dim3(static_cast<unsigned>(args.y_pitch / kernel.block_rows)), parameters,
                stream);
}

cudaError_t ConfigureTiled(const TiledKernels& kernels, bool hopper) {
  const auto configure = [](const TiledKernel& kernel) {
    return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                kernel.shared_bytes);
  };
  cudaError_t status = configure(kernels.narrow);
  if (status == cudaSuccess) status = configure(kernels.down);
  for (const TiledKernel& kernel : kernels.wide) {
    if (status == cudaSuccess && hopper) status = configure(kernel);
  }
  return status;
}

}  // namespace jax_moe::cuda
