#include <algorithm>

#include "ffi/cuda/gemm.h"

namespace jax_moe::cuda {
namespace {

constexpr int kDefaultSharedBytes = 48 * 1024;

}  // namespace

cudaError_t LaunchGemm(const GemmKernel& kernel, const GemmArgs& args, cudaStream_t stream) {
  const auto bands = [&](int64_t rows) {
    return (rows + kernel.block_rows - 1) / kernel.block_rows;
  };
  int64_t blocks = bands(args.rows[0]) + bands(args.rows[1]);
  if (kernel.narrow) {
    const int bands_a_block = 4 >> args.log_splits;
    blocks = (blocks + bands_a_block - 1) / bands_a_block;
  }
  const int64_t tiles = args.lists.max_tiles;
  if (blocks == 0 || tiles == 0) return cudaSuccess;
  const int64_t tiles_y = std::min(tiles, kMaxGridY), tiles_z = (tiles + tiles_y - 1) / tiles_y;
  if (tiles_z > kMaxGridY) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles_y),
                  static_cast<unsigned>(tiles_z));
  void* parameters[] = {const_cast<GemmArgs*>(&args)};
  return cudaLaunchKernel(kernel.function, grid, dim3(kernel.threads), parameters,
                          kernel.shared_bytes, stream);
}

cudaError_t ConfigureGemm(const GemmKernel& kernel) {
  if (kernel.shared_bytes <= kDefaultSharedBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kernel.shared_bytes);
}

}  // namespace jax_moe::cuda
