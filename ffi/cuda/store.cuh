// The first and the last thing that a grouped product does: finding its tile, writing its results.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ffi/cuda/gemm.h"

namespace jax_moe::cuda {

__device__ __forceinline__ void Store(void* y, int64_t index, Element type, float value) {
  switch (type) {
    case Element::kF32:
      static_cast<float*>(y)[index] = value;
      break;
    case Element::kF16:
      static_cast<half*>(y)[index] = __float2half_rn(value);
      break;
    case Element::kBF16:
      static_cast<__nv_bfloat16*>(y)[index] = __float2bfloat16_rn(value);
      break;
  }
}

// Two numbers rounded to the halves of a word, the first to the low one. Two: half2 or __nv_bfloat162.
template <typename Two>
__device__ __forceinline__ uint32_t PackTwo(float first, float second) {
  Two two;
  if constexpr (std::is_same_v<Two, half2>) {
    two = __floats2half2_rn(first, second);
  } else {
    two = __floats2bfloat162_rn(first, second);
  }
  return *reinterpret_cast<const uint32_t*>(&two);
}

// kColumns consecutive ones, to an index that is a multiple of kColumns.
template <int kColumns>
__device__ __forceinline__ void StoreColumns(void* y, int64_t index, Element type,
                                             const float (&value)[kColumns]) {
  if constexpr (kColumns == 8) {
    uint32_t words[4];
    if (type == Element::kF16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = PackTwo<half2>(value[2 * i], value[2 * i + 1]);
      }
    } else if (type == Element::kBF16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = PackTwo<__nv_bfloat162>(value[2 * i], value[2 * i + 1]);
      }
    } else {
      auto* to = reinterpret_cast<float4*>(static_cast<float*>(y) + index);
      to[0] = make_float4(value[0], value[1], value[2], value[3]);
      to[1] = make_float4(value[4], value[5], value[6], value[7]);
      return;
    }
    *reinterpret_cast<uint4*>(static_cast<half*>(y) + index) =
        make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) Store(y, index + i, type, value[i]);
  }
}

// To an even index.
__device__ __forceinline__ void StoreTwo(void* y, int64_t index, Element type, float first,
                                         float second) {
  switch (type) {
    case Element::kF32:
      *reinterpret_cast<float2*>(static_cast<float*>(y) + index) = {first, second};
      break;
    case Element::kF16:
      *reinterpret_cast<half2*>(static_cast<half*>(y) + index) = __floats2half2_rn(first, second);
      break;
    case Element::kBF16:
      *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(y) + index) =
          __floats2bfloat162_rn(first, second);
      break;
  }
}

// This block's tile; false where there is none. The grid has room for as many tiles as there can
// be.
__device__ __forceinline__ bool FindTile(const Lists& lists, TokenTile* tile) {
  const int index = blockIdx.y + blockIdx.z * gridDim.y;
  if (index >= lists.max_tiles) return false;
  // Loaded together; past the last tile the list holds anything.
  const int number = *lists.num_tiles;
  *tile = lists.tiles[index];
  return index < number;
}

// The factor of a pair's results: what undoes the scaling of its row, and its weight.
__device__ __forceinline__ float PairFactor(const GemmArgs& args, int pair, bool scaled_rows) {
  const float weight = args.pair_weight ? args.pair_weight[pair] : 1.0f;
  return scaled_rows ? weight * args.x.scales[pair / args.pairs_a_row] : weight;
}

}  // namespace jax_moe::cuda
