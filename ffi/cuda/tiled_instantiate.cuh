// The kernels of one tiled block format, for the files that instantiate them.
#pragma once

#include "ffi/cuda/tiled_down.cuh"
#include "ffi/cuda/tiled_few.cuh"
#include "ffi/cuda/tiled_gemm.h"
#include "ffi/cuda/tiled_narrow.cuh"
#include "ffi/cuda/tiled_panels.cuh"
#include "ffi/cuda/tiled_wide.cuh"

namespace jax_moe::cuda {

template <typename Format, int kTokens>
TiledKernel DescribeTiledPanels() {
  using Shape = TiledPanelsShape<Format, kTokens>;
  return {reinterpret_cast<const void*>(&TiledPanels<Format, kTokens>),
          Shape::kThreads,
          kTokens,
          16 * Shape::kBands,
          Shape::kSharedBytes,
          /*pads_rows=*/true,
          /*blocks=*/0,
          /*places=*/Shape::kBlocks,
          Shape::kMostSplits};
}

// For 128 tokens.
template <typename Format>
TiledKernel DescribeTiledWide() {
  if constexpr (kPanelsForMost<Format>) {
    return DescribeTiledPanels<Format, 128>();
  } else {
    using Shape = TiledWideShape<Format>;
    return {reinterpret_cast<const void*>(&TiledWide<Format>),
            Shape::kThreads,
            Shape::kTokens,
            16 * Shape::kBands,
            Shape::kSharedBytes,
            /*pads_rows=*/true,
            /*blocks=*/0,
            /*places=*/0,
            /*most_splits=*/1};
  }
}

template <typename Format, bool kBlockTiles>
TiledKernel DescribeTiledNarrow() {
  using Shape = TiledNarrowShape<Format>;
  return {reinterpret_cast<const void*>(&TiledNarrow<Format, kBlockTiles>),
          32 * Shape::kWarps,
          Shape::kTokens,
          Shape::kRows,
          sizeof(NarrowMemory<Format, kBlockTiles>),
          /*pads_rows=*/false,
          Shape::kBlocks,
          /*places=*/0,
          /*most_splits=*/1};
}

template <typename Format>
const void* FewOf() {
  if constexpr (kIsCentred<Format>) {
    return nullptr;
  } else {
    return reinterpret_cast<const void*>(&TiledFew<Format>);
  }
}

template <typename Format>
const TiledKernels& Tiled() {
  using Narrow = TiledNarrowShape<Format>;
  using Down = TiledDownShape<Format>;
  static const TiledKernels kernels = {
      {DescribeTiledNarrow<Format, false>(), DescribeTiledNarrow<Format, true>()},
      {DescribeTiledPanels<Format, 32>(), DescribeTiledPanels<Format, 64>(),
       DescribeTiledPanels<Format, 96>(), DescribeTiledWide<Format>()},
      {reinterpret_cast<const void*>(&TiledDown<Format>), 32 * kMostDownWarps, Narrow::kTokens,
       Narrow::kRows, sizeof(typename Down::Memory), /*pads_rows=*/false, /*blocks=*/0,
       /*places=*/0, /*most_splits=*/1},
      sizeof(typename Down::Warp),
      FewOf<Format>(),
      sizeof(TiledFewShape::Memory)};
  return kernels;
}

}  // namespace jax_moe::cuda

#define JAX_MOE_INSTANTIATE_TILED(FORMAT) \
  template const jax_moe::cuda::TiledKernels& jax_moe::cuda::Tiled<jax_moe::FORMAT>();
