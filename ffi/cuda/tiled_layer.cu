#include "ffi/cuda/tiled_layer.cuh"

#include "ffi/blocks/formats.h"
#include "ffi/plan/cuda_shared.h"

namespace jax_moe::cuda {
namespace {

template <typename Up, typename Down>
const TiledLayerKernel& Layer() {
  constexpr int kUp = TiledNarrowShape<Up>::kStageBytes, kDown = TiledNarrowShape<Down>::kStageBytes;
  static_assert(sizeof(typename TiledLayerShape<Up, Down>::Memory) ==
                plan::CudaLayerBytes(kUp, kDown));
  static const TiledLayerKernel kernel = {reinterpret_cast<const void*>(&TiledLayer<Up, Down>),
                                          {kUp, kDown}};
  return kernel;
}

}  // namespace

const TiledLayerKernel* FindTiledLayer(int up, int down) {
  const TiledLayerKernel* kernel = nullptr;
  if (up == down) {
    VisitFormat(up, [&](auto format) {
      kernel = &Layer<decltype(format), decltype(format)>();
    });
  }
#define JAX_MOE_MIXED(UP, DOWN) \
  if (up == UP::kType && down == DOWN::kType) kernel = &Layer<UP, DOWN>();
  JAX_MOE_MIXED_LAYERS(JAX_MOE_MIXED)
#undef JAX_MOE_MIXED
  return kernel;
}

}  // namespace jax_moe::cuda
