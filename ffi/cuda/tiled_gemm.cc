#include "ffi/cuda/tiled_gemm.h"

#include <algorithm>
#include <limits>

#include "ffi/blocks/tiled.h"
#include "ffi/cuda/launch_early.h"

namespace jax_moe::cuda {
namespace {

cudaError_t Launch(const TiledKernel& kernel, dim3 grid, void** parameters, cudaStream_t stream,
                   int cluster = 1) {
  return LaunchEarly(kernel.function, grid, kernel.threads, kernel.shared_bytes, stream, parameters,
                     cluster);
}

// The blocks for each of `bands` that take least time: in so many rounds, each of a part of a band.
int ChooseDownSplits(int64_t bands, int64_t places) {
  int best = 1;
  const auto cost = [&](int splits) {
    return (bands * splits + places - 1) / places * (kMostDownSplits / splits);
  };
  for (int splits = 2; splits <= kMostDownSplits; splits *= 2) {
    if (cost(splits) < cost(best)) best = splits;
  }
  return best;
}

// One block for every place on the device, but no more than there are items.
cudaError_t LaunchPersistent(const TiledKernel& kernel, TiledArgs args, cudaStream_t stream) {
  const int64_t items = args.lists.max_tiles * (args.rows / kernel.block_rows);
  if (items == 0) return cudaSuccess;
  if (items > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const int64_t blocks = std::min(int64_t{Multiprocessors()} * kernel.blocks, items);
  void* parameters[] = {&args};
  return Launch(kernel, dim3(static_cast<unsigned>(blocks)), parameters, stream);
}

}  // namespace

const TiledKernels* FindTiledKernels(int format) {
  const TiledKernels* kernels = nullptr;
  VisitTiledFormat(format, [&](auto decoder) { kernels = &Tiled<decltype(decoder)>(); });
  return kernels;
}

cudaError_t LaunchTiled(const TiledKernel& kernel, TiledArgs args, cudaStream_t stream) {
  if (kernel.blocks > 0) return LaunchPersistent(kernel, args, stream);
  const bool paired = args.activate && args.gated;
  const int64_t block_rows = paired ? kernel.block_rows / 2 : kernel.block_rows;
  const int64_t rows = args.activate && kernel.pads_rows ? args.y_pitch : args.rows;
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  if (blocks == 0 || args.lists.max_tiles == 0) return cudaSuccess;
  const std::optional<dim3> grid = TileGrid(blocks, args.lists.max_tiles);
  if (!grid) return cudaErrorInvalidConfiguration;
  void* parameters[] = {&args};
  return Launch(kernel, *grid, parameters, stream);
}

cudaError_t LaunchTiledDown(const TiledKernel& kernel, TiledDownArgs args, cudaStream_t stream) {
  const int64_t bands = args.y_pitch / kernel.block_rows;
  args.splits = IsHopper() ? ChooseDownSplits(bands, int64_t{Multiprocessors()} * kernel.blocks) : 1;
  void* parameters[] = {&args};
  return Launch(kernel, dim3(static_cast<unsigned>(bands * args.splits)), parameters, stream,
                args.splits);
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
