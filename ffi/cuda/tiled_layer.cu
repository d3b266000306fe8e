#include "ffi/cuda/tiled_layer.cuh"

#include "ffi/blocks/formats.h"

namespace jax_moe::cuda {
namespace {

template <typename Up, typename Down>
const TiledLayerKernel& Layer() {
  static const TiledLayerKernel kernel = {
      reinterpret_cast<const void*>(&TiledLayer<Up, Down>),
      sizeof(typename TiledLayerShape<Up, Down>::Memory),
      {TiledNarrowShape<Up>::kStageBytes, TiledNarrowShape<Down>::kStageBytes}};
  return kernel;
}

}  // namespace

// Different formats: those of llama.cpp's Q2_K, Q3_K_M, Q3_K_L, Q4_K_M and Q5_K_M.
const TiledLayerKernel* FindTiledLayer(int up, int down) {
  const TiledLayerKernel* kernel = nullptr;
  if (up == down) {
    VisitFormat(up, [&](auto format) {
      kernel = &Layer<decltype(format), decltype(format)>();
    });
  }
#define JAX_MOE_MIXED(UP, DOWN) \
  if (up == UP::kType && down == DOWN::kType) kernel = &Layer<UP, DOWN>();
  JAX_MOE_MIXED(Q2_K, Q3_K)
  JAX_MOE_MIXED(Q3_K, Q4_K)
  JAX_MOE_MIXED(Q3_K, Q5_K)
  JAX_MOE_MIXED(Q4_K, Q6_K)
  JAX_MOE_MIXED(Q5_K, Q6_K)
#undef JAX_MOE_MIXED
  return kernel;
}

}  // namespace jax_moe::cuda
