// A whole layer for few tokens in one launch: arguments and kernels (tiled_layer.cuh).
#pragma once

#include "ffi/cuda/tiled_gemm.h"
#include "ffi/plan/cuda.h"

namespace jax_moe::cuda {

// gate, up, the activation, down and the sum over slots.
struct TiledLayerArgs {
  TiledArgs up;         // with `activate`; but for x, lists and h_scales
  TiledDownArgs down;   // but for h_scales and splits; h is in the kernel's own order of columns
  const void* x;        // [tokens, up.columns]
  Element x_type;
  // The rest is LaunchTiledLayer's affair.
  TiledMatrix matrix[3];  // gate, up, down
  int32_t log_tokens;     // of a tile: 0 or 1
  int32_t x_warps;        // that prepare a row of x
  int32_t x_units;        // of 16 bytes, a row of x
  int32_t x_pitch;        // of prepared x
  int32_t x_bytes, sum_bytes;
  // Of gate and up, and of down.
  struct Rows {
    int64_t bytes;
    int32_t columns, steps, stage_bytes, band_bytes;  // of 16 rows
    float inverse_steps;
  } rows[2];
  float inverse_bands, inverse_blocks, inverse_x_warps;  // of gate's bands, of the grid
};

struct TiledLayerKernel {
  const void* function;
  int stage_bytes[2];  // 256 columns of 16 rows of gate and up, and of down
};

// The kernel for gate and up of ggml_type `up` and down of `down`, all tiled; null where there is
// none, which the plan knows (ChooseCudaLayer).
const TiledLayerKernel* FindTiledLayer(int up, int down);

cudaError_t LaunchTiledLayer(const TiledLayerKernel& kernel, const plan::CudaLayerShape& shape,
                             TiledLayerArgs args, cudaStream_t stream);

// Lets the kernel use its shared memory on the current device. Before the first launch, outside of
// capture.
cudaError_t ConfigureTiledLayer(const TiledLayerKernel& kernel);

}  // namespace jax_moe::cuda
