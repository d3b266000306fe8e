#include <algorithm>

#include "ffi/cuda/gemm.h"

namespace jax_moe::cuda {

std::optional<dim3> TileGrid(int64_t blocks, int64_t tiles) {
  constexpr int64_t kMost = 32768;
  const int64_t y = std::min(tiles, kMost), z = (tiles + y - 1) / y;
  if (z > kMost) return std::nullopt;
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

cudaError_t LaunchGemm(const GemmKernel& kernel, const GemmArgs& args, cudaStream_t stream) {
  const auto bands = [&](int64_t rows) {
    return (rows + kernel.block_rows - 1) / kernel.block_rows;
  };
  int64_t blocks = bands(args.rows[0]) + bands(args.rows[1]);
  if (kernel.narrow) {
    const int bands_a_block = 4 >> args.log_splits;
    blocks = (blocks + bands_a_block - 1) / bands_a_block;
  }
  if (blocks == 0 || args.lists.max_tiles == 0) return cudaSuccess;
  const std::optional<dim3> grid = TileGrid(blocks, args.lists.max_tiles);
  if (!grid) return cudaErrorInvalidConfiguration;
  void* parameters[] = {const_cast<GemmArgs*>(&args)};
  return cudaLaunchKernel(kernel.function, *grid, dim3(kernel.threads), parameters,
                          kernel.shared_bytes, stream);
}

}  // namespace jax_moe::cuda
