// IQ3_XXS and IQ3_S: code words of four magnitudes, and signs. 256 weights a block.
#pragma once

#include "ffi/blocks/codebooks.h"
#include "ffi/blocks/decoder.h"
#include "ffi/blocks/signs.h"

namespace jax_moe {

// d (f16), 64 indices (a byte each), and for every unit a word with 4 x 7 sign bits and, on top, a
// 4-bit scale that counts half steps.
struct IQ3_XXS {
  static constexpr int kType = 18;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 98;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    for (int j = 0; j < 8; ++j) q[j] = Iq3XxsCodeword(block[2 + 8 * unit + j]);
    ApplySigns(CompleteSigns(SpreadSevens(LoadU32<2>(block + 66 + 4 * unit))), q);
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    const int scale = static_cast<int>(LoadU16<2>(block + 68 + 4 * group) >> 12);
    const float d = HalfToFloat(LoadU16<2>(block));
    return {d * (0.5f + static_cast<float>(scale)) * 0.5f, 0.0f};
  }
};

// d (f16), low bytes of 64 indices, their ninth bits (a byte a unit), 32 bytes of signs, eight
// 4-bit scales s that stand for 1 + 2 s.
struct IQ3_S {
  static constexpr int kType = 21;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 110;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    const uint32_t ninth = block[66 + unit];
    for (int j = 0; j < 8; ++j) {
      q[j] = Iq3SCodeword(block[2 + 8 * unit + j] | (ninth >> j & 1) << 8);
    }
    ApplySigns(LoadU32<2>(block + 74 + 4 * unit), q);
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    const int scale = block[106 + group / 2] >> 4 * (group % 2) & 15;
    return {HalfToFloat(LoadU16<2>(block)) * static_cast<float>(1 + 2 * scale), 0.0f};
  }
};

}  // namespace jax_moe
