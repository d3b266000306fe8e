// IQ1_S and IQ1_M: code words of eight values g in -1, 0, 1, all shifted by +1/8 or -1/8.
//
// q = 8 g +- 1 is an integer, so that the scale is an eighth of ggml's; both are exact.
#pragma once

#include "ffi/blocks/codebooks.h"
#include "ffi/blocks/decoder.h"

namespace jax_moe {

// Decodes code word `index` into the two words of q at q[0] and q[1].
JM_HD void Iq1Decode(uint32_t index, bool negative_shift, uint32_t* q) {
  // The nibbles are g + 1, and 8 * (g + 1) less 7 or 9 is q.
  const uint32_t word = Iq1Codeword(index);
  const uint32_t less = negative_shift ? 0x09090909u : 0x07070707u;
  q[0] = SubBytes(word << 3 & 0x18181818u, less);
  q[1] = SubBytes(word >> 1 & 0x18181818u, less);
}

// d * (2 * scale + 1) / 8 for a 3-bit scale.
JM_HD Affine Iq1Scale(uint32_t d, uint32_t scale) {
  const float odd = static_cast<float>(static_cast<int>(2 * (scale & 7) + 1));
  return {HalfToFloat(d) * odd * 0.125f, 0.0f};
}

// d (f16), low bytes of 32 indices, and for every unit 16 bits: the high three bits of its four
// indices, a 3-bit scale, the sign of the shift.
struct IQ1_S {
  static constexpr int kType = 19;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 50;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    const uint32_t high = LoadU16<2>(block + 34 + 2 * unit);
    for (int i = 0; i < 4; ++i) {
      const uint32_t index = block[2 + 4 * unit + i] | (high >> 3 * i & 7) << 8;
      Iq1Decode(index, high >> 15, q + 2 * i);
    }
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    return Iq1Scale(LoadU16<2>(block), LoadU16<2>(block + 34 + 2 * group) >> 12);
  }
};

// Low bytes of 32 indices, a nibble for each with three high bits and the sign of its shift, and
// four u16 with four 3-bit scales each; their top nibbles are the f16 d, the lowest one first.
struct IQ1_M {
  static constexpr int kType = 29;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 56;
  static constexpr int kGroup = 16;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    const uint32_t high = LoadU16<2>(block + 32 + 2 * unit);
    for (int i = 0; i < 4; ++i) {
      const uint32_t nibble = high >> 4 * i & 15;
      Iq1Decode(block[4 * unit + i] | (nibble & 7) << 8, nibble >> 3, q + 2 * i);
    }
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    const uint32_t low = LoadU32<4>(block + 48);
    const uint32_t high = LoadU32<4>(block + 52);
    const uint32_t d = (low >> 12 & 0xfu) | (low >> 24 & 0xf0u) | (high >> 4 & 0xf00u) |
                       (high >> 16 & 0xf000u);
    const uint32_t scales = LoadU16<2>(block + 48 + 2 * (group / 4));
    return Iq1Scale(d, scales >> 3 * (group % 4));
  }
};

}  // namespace jax_moe
