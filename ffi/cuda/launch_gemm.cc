#include <limits>

#include "ffi/cuda/gemm.h"

namespace jax_moe::cuda {
namespace {

constexpr int kDefaultSharedBytes = 48 * 1024;
constexpr int kNarrowWarps = 4;

}  // namespace

cudaError_t LaunchGemm(const GemmKernel& kernel, const GemmArgs& args, cudaStream_t stream) {
  const auto bands = [&](int64_t rows) { return (rows + kernel.block_rows - 1) / kernel.block_rows; };
  int64_t blocks = bands(args.rows[0]) + bands(args.rows[1]);
  if (kernel.narrow) {
    const int bands_a_block = kNarrowWarps / args.splits;
    blocks = (blocks + bands_a_block - 1) / bands_a_block;
  }
  blocks *= args.lists.max_tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  void* parameters[] = {const_cast<GemmArgs*>(&args)};
  return cudaLaunchKernel(kernel.function, dim3(static_cast<unsigned>(blocks)), dim3(kernel.threads),
                          parameters, kernel.shared_bytes, stream);
}

cudaError_t ConfigureGemm(const GemmKernel& kernel) {
  if (kernel.shared_bytes <= kDefaultSharedBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kernel.shared_bytes);
}

}  // namespace jax_moe::cuda
