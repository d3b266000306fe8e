#include "ffi/cuda/tiled_layer.h"

#include "ffi/cuda/launch_early.h"
#include "ffi/plan/cuda_shared.h"

namespace jax_moe::cuda {

cudaError_t LaunchTiledLayer(const TiledLayerKernel& kernel, const plan::CudaLayerShape& shape,
                             TiledLayerArgs args, cudaStream_t stream) {
  const auto rows = [&](int32_t columns, int64_t bytes, int stage_bytes) {
    const int32_t steps = (columns + 255) / 256;
    const auto band_bytes = static_cast<int32_t>(int64_t{stage_bytes} * columns / 256);
    return TiledLayerArgs::Rows{bytes,       columns,    steps,
                                stage_bytes, band_bytes, 1.0f / static_cast<float>(steps)};
  };
  args.matrix[0] = args.up.matrix[0];
  args.matrix[1] = args.up.matrix[1];
  args.matrix[2] = args.down.matrix;
  args.log_tokens = args.down.tokens > 1 ? 1 : 0;
  args.x_warps = plan::kCudaLayerWarps / args.down.tokens;
  args.x_units = args.up.columns / (args.x_type == Element::kF32 ? 4 : 8);
  args.inverse_x_warps = 1.0f / static_cast<float>(args.x_warps);
  args.x_pitch = static_cast<int32_t>(shape.x_pitch);
  args.x_bytes = static_cast<int32_t>(shape.x_bytes);
  args.sum_bytes = static_cast<int32_t>(shape.sum_bytes);
  args.rows[0] = rows(args.up.columns, args.up.row_bytes, kernel.stage_bytes[0]);
  args.rows[1] = rows(args.down.columns, args.down.row_bytes, kernel.stage_bytes[1]);
  args.inverse_bands = 1.0f / static_cast<float>(args.up.rows / 16);
  args.inverse_blocks = 1.0f / static_cast<float>(shape.blocks);
  void* parameters[] = {&args};
  return LaunchTogether(kernel.function, static_cast<unsigned>(shape.blocks),
                        32 * plan::kCudaLayerWarps, static_cast<size_t>(shape.shared_bytes), stream,
                        parameters);
}

cudaError_t ConfigureTiledLayer(const TiledLayerKernel& kernel) {
  return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(plan::CudaSharedLimit(90)));
}

}  // namespace jax_moe::cuda
