// IQ2_XXS, IQ2_XS and IQ2_S: code words of eight magnitudes, and signs. 256 weights a block.
#pragma once

#include "ffi/blocks/codebooks.h"
#include "ffi/blocks/decoder.h"
#include "ffi/blocks/signs.h"

namespace jax_moe {

// d * (0.5 + scale) / 4: a 4-bit scale that counts half steps.
JM_HD Affine Iq2Scale(uint32_t d, uint32_t scale) {
  return {HalfToFloat(d) * (0.5f + static_cast<float>(static_cast<int>(scale))) * 0.25f, 0.0f};
}

// d (f16), then for every unit four indices (a byte each) and a word with 4 x 7 sign bits and, on
// top, a 4-bit scale.
struct IQ2_XXS {
  static constexpr int kType = 16;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 66;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    const uint8_t* code = block + 2 + 8 * unit;
    for (int i = 0; i < 4; ++i) PutCodeword(Iq2XxsCodeword(code[i]), i, q);
    ApplySigns(CompleteSigns(SpreadSevens(LoadU32<2>(code + 4))), q);
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    return Iq2Scale(LoadU16<2>(block), LoadU16<2>(block + 8 + 8 * group) >> 12);
  }
};

// d (f16), 32 codes of 16 bits (9 bits of index, 7 of signs), sixteen 4-bit scales.
struct IQ2_XS {
  static constexpr int kType = 17;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 74;
  static constexpr int kGroup = 16;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    uint32_t sevens = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = LoadU16<2>(block + 2 + 8 * unit + 2 * i);
      PutCodeword(Iq2XsCodeword(code & 511), i, q);
      sevens |= code >> 9 << 8 * i;
    }
    ApplySigns(CompleteSigns(sevens), q);
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    return Iq2Scale(LoadU16<2>(block), block[66 + group / 2] >> 4 * (group % 2) & 15);
  }
};

// d (f16), low bytes of 32 indices, 32 bytes of signs, the indices' high bit pairs (a byte a unit),
// sixteen 4-bit scales.
struct IQ2_S {
  static constexpr int kType = 22;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 82;
  static constexpr int kGroup = 16;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    const uint32_t high = block[66 + unit];
    for (int i = 0; i < 4; ++i) {
      const uint32_t index = block[2 + 4 * unit + i] | (high >> 2 * i & 3) << 8;
      PutCodeword(Iq2SCodeword(index), i, q);
    }
    ApplySigns(LoadU32<2>(block + 34 + 4 * unit), q);
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    return Iq2Scale(LoadU16<2>(block), block[74 + group / 2] >> 4 * (group % 2) & 15);
  }
};

}  // namespace jax_moe
