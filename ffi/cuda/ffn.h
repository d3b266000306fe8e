// moe_ffn as a sequence of launches.
#pragma once

#include <optional>

#include "ffi/cuda/check.h"
#include "ffi/cuda/dispatch.h"
#include "ffi/cuda/prepare.h"
#include "ffi/cuda/tiled_layer.h"

namespace jax_moe::cuda {

// The problem once its operands have been read.
struct Ffn {
  Element type;  // of x and y
  const void* x;
  void* y;
  const int32_t* expert_ids;
  const float* weights;
  int64_t tokens, pairs, d_model, d_expert;
  int32_t top_k, experts;
  std::optional<Weight> gate, up;  // merged: gate alone, with the rows of both
  Weight down;
  bool merged, weights_before;
  bool fuses;  // plan::CudaFuses
  // Where one kernel does it all.
  const TiledLayerKernel* layer;
  std::optional<plan::CudaLayerShape> layer_shape;
  Variant variant;
  Projection gate_projection, up_projection, down_projection;
  Activation activation;
  float limit, beta, linear_beta;
  uint8_t* memory;
  plan::CudaFfnLayout layout;

  int32_t* Ints(int64_t offset) const { return reinterpret_cast<int32_t*>(memory + offset); }
  TokenTile* Tiles() const { return reinterpret_cast<TokenTile*>(memory + layout.tiles); }
  float* Values() const { return reinterpret_cast<float*>(memory + layout.values); }
  plan::CudaTile Tile() const { return plan::ChooseCudaTile(pairs, experts); }
  plan::CudaTiledTile TiledTile() const {
    return plan::ChooseCudaTiledTile(pairs, experts, d_model, IsHopper());
  }
  bool Centred() const { return CentresFields(type, type, variant); }
  bool DenseWide(const Weight& weight) const { return UsesDenseWide(weight, pairs); }
};

// Lists, prepared tokens, gate and up, prepared h, down, the sum over slots; or all in one.
cudaError_t RunFfn(const Ffn& ffn, cudaStream_t stream);

}  // namespace jax_moe::cuda
