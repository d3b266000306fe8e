// Blocks to float32 on the host, straight from the decoders.
#pragma once

#include <cstdint>

#include "ffi/blocks/formats.h"

namespace jax_moe {

template <typename Format>
void DequantizeBlock(const uint8_t* block, float* weights) {
  for (int unit = 0; unit < Format::kBlock / 32; ++unit) {
    uint32_t q[8];
    Format::Unit(block, unit, q);
    for (int i = 0; i < 32; ++i) {
      const int index = 32 * unit + i;
      const Affine group = Format::Group(block, index / Format::kGroup);
      const float integer = static_cast<int8_t>(q[i / 4] >> 8 * (i % 4));
      weights[index] = group.scale * integer;
      // Adding an absent offset would turn -0 into 0.
      if constexpr (Format::kHasOffset) weights[index] += group.offset;
    }
  }
}

// Decodes `blocks` consecutive blocks of a ggml_type; false where there is no such format.
inline bool Dequantize(int type, const uint8_t* data, int64_t blocks, float* weights) {
  return VisitFormat(type, [&](auto format) {
    using Format = decltype(format);
    for (int64_t b = 0; b < blocks; ++b) {
      DequantizeBlock<Format>(data + b * Format::kBytes, weights + b * Format::kBlock);
    }
  });
}

}  // namespace jax_moe
