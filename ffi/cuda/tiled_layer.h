// A whole layer for few tokens in one launch: arguments and kernels (tiled_layer.cuh).
#pragma once

#include "ffi/cuda/load.h"
#include "ffi/cuda/tiled_gemm.h"
#include "ffi/plan/cuda.h"

namespace jax_moe::cuda {

// gate, up, the activation, down and the sum over slots.
struct TiledLayerArgs {
  // From here to `up` LaunchTiledLayer's affair but for x and its type. What a block needs first is
  // together, for constants come from memory, too, some 64 bytes at a time.
  const int32_t* expert_ids;
  const void* x;  // [tokens, up.columns]
  int32_t pairs, experts, top_k, blocks;
  int32_t log_tokens;         // of a tile: 0 or 1
  int32_t x_warps;            // that prepare a row of x
  int32_t x_units;            // of 16 bytes, a row of x
  uint32_t inverse_x_warps;   // this and the other inverses: 2^31 over it, rounded up
  int32_t tokens, matrices;   // matrices: of gate and up
  int32_t bands[2];           // of 16 rows: of a matrix of those, of down
  int32_t down_blocks;        // that have a part of down
  uint32_t inverse_bands, inverse_blocks, inverse_down_blocks;  // inverse_bands: of gate's
  Element x_type;
  bool biased;
  // Of gate and up, and of down.
  struct Rows {
    int32_t columns, steps, band_bytes;  // a band: 16 rows
    uint32_t inverse_steps;
  } rows[2];
  TiledMatrix matrix[3];  // gate, up, down
  int32_t x_pitch;        // of prepared x
  int32_t x_bytes;
  TiledArgs up;        // with `activate`; but for x, lists and h_scales
  TiledDownArgs down;  // but for h_scales and splits; h is in the kernel's own order of columns
  float* given;        // [shape.down_blocks, 16, pairs]: what blocks give each other of pairs' y
};

struct TiledLayerKernel {
  const void* function;
  int stage_bytes[2];  // 256 columns of 16 rows of gate and up, and of down
  mutable OncePerDevice loaded = {};  // LoadTiledLayer's affair
};

// The kernel for gate and up of ggml_type `up` and down of `down`, all tiled; null where there is
// none, which the plan knows (ChooseCudaLayer).
const TiledLayerKernel* FindTiledLayer(int up, int down);

cudaError_t LaunchTiledLayer(const TiledLayerKernel& kernel, const plan::CudaLayerShape& shape,
                             TiledLayerArgs args, cudaStream_t stream);

// Loads the kernel (load.h), once a device.
cudaError_t LoadTiledLayer(const TiledLayerKernel& kernel);

}  // namespace jax_moe::cuda
