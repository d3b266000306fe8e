// Formats whose kernels take the middle of the codes from them before they are scaled.
//
// A K-quant's weight is scale * code - offset, and around zero the offset is half of the largest
// weights' span: to round it to f16 takes more from the weights than anything else that is rounded. Of
// codes that count from their middle the offset is small. The subtraction, exact, is one more
// instruction for every two weights.
#pragma once

#include "ffi/cuda/tiled_gemm.h"
#include "ffi/cuda/tiled_planes.cuh"

namespace jax_moe {
namespace cuda {

template <typename Format>
struct Centred : Format {};

template <typename Format>
inline constexpr bool kIsCentred = false;
template <typename Format>
inline constexpr bool kIsCentred<Centred<Format>> = true;

template <typename Format>
struct TiledUnit<Centred<Format>> : TiledUnit<Format> {};

}  // namespace cuda

template <typename Format>
struct Tiling<cuda::Centred<Format>> : Tiling<Format> {};
template <typename Format>
struct FieldsOf<cuda::Centred<Format>> : FieldsOf<Format> {};

}  // namespace jax_moe
