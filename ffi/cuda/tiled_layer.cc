#include "ffi/cuda/tiled_layer.h"

#include "ffi/cuda/launch_early.h"
#include "ffi/plan/cuda_shared.h"

namespace jax_moe::cuda {

cudaError_t LaunchTiledLayer(const TiledLayerKernel& kernel, const plan::CudaLayerShape& shape,
                             TiledLayerArgs args, cudaStream_t stream) {
  const auto inverse = [](int64_t n) {
    return static_cast<uint32_t>(((int64_t{1} << 31) + n - 1) / n);
  };
  const auto rows = [&](int32_t columns, int stage_bytes) {
    const int32_t steps = (columns + 255) / 256;
    const auto band_bytes = static_cast<int32_t>(int64_t{stage_bytes} * columns / 256);
    return TiledLayerArgs::Rows{columns, steps, band_bytes, inverse(steps)};
  };
  const TiledDownArgs& down = args.down;
  args.expert_ids = down.expert_ids;
  args.pairs = down.tokens * down.top_k;
  args.experts = down.experts;
  args.top_k = down.top_k;
  args.blocks = static_cast<int32_t>(shape.blocks);
  args.log_tokens = down.tokens > 1 ? 1 : 0;
  args.x_warps = plan::kCudaLayerWarps / down.tokens;
  args.x_units = args.up.columns / (args.x_type == Element::kF32 ? 4 : 8);
  args.inverse_x_warps = inverse(args.x_warps);
  args.tokens = down.tokens;
  args.matrices = args.up.gated ? 2 : 1;
  args.bands[0] = args.up.rows / 16;
  args.bands[1] = static_cast<int32_t>(down.y_pitch / 16);
  args.inverse_bands = inverse(args.bands[0]);
  args.inverse_blocks = inverse(args.blocks);
  args.down_blocks = static_cast<int32_t>(shape.down_blocks);
  args.inverse_down_blocks = inverse(args.down_blocks);
  args.biased = args.up.projection[0].bias != nullptr || args.up.projection[1].bias != nullptr ||
                down.projection.bias != nullptr;
  args.rows[0] = rows(args.up.columns, kernel.stage_bytes[0]);
  args.rows[1] = rows(down.columns, kernel.stage_bytes[1]);
  args.matrix[0] = args.up.matrix[0];
  args.matrix[1] = args.up.matrix[1];
  args.matrix[2] = down.matrix;
  args.x_pitch = static_cast<int32_t>(shape.x_pitch);
  args.x_bytes = static_cast<int32_t>(shape.x_bytes);
  void* parameters[] = {&args};
  return LaunchTogether(kernel.function, static_cast<unsigned>(shape.blocks),
                        32 * plan::kCudaLayerWarps, static_cast<size_t>(shape.shared_bytes), stream,
                        parameters);
}

cudaError_t LoadTiledLayer(const TiledLayerKernel& kernel) {
  return kernel.loaded([&] {
    return LoadKernel(kernel.function, static_cast<int>(plan::CudaSharedLimit(90)));
  });
}

}  // namespace jax_moe::cuda
