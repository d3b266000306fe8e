// Q1_0 and Q2_0: one or two bits a weight, consecutive from the lowest bit, and an f16 scale.
#pragma once

#include "ffi/blocks/bitmask.h"
#include "ffi/blocks/decoder.h"

namespace jax_moe {

// d (f16), 128 bits. weight = bit ? d : -d.
struct Q1_0 {
  static constexpr int kType = 41;
  static constexpr int kBlock = 128;
  static constexpr int kBytes = 18;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    BitsToByteMasks(~LoadU32<2>(block + 2 + 4 * unit), q);
    for (int j = 0; j < 8; ++j) q[j] |= 0x01010101u;
  }

  static JM_HD Affine Group(const uint8_t* block, int) {
    return {HalfToFloat(LoadU16<2>(block)), 0.0f};
  }
};

// d (f16), 64 bit pairs. weight = d * (bit pair - 1).
struct Q2_0 {
  static constexpr int kType = 42;
  static constexpr int kBlock = 64;
  static constexpr int kBytes = 18;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    for (int j = 0; j < 8; ++j) {
      const uint32_t byte = block[2 + 8 * unit + j];
      const uint32_t pairs = (byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303u;
      q[j] = SubBytes(pairs, 0x01010101u);
    }
  }

  static JM_HD Affine Group(const uint8_t* block, int) {
    return {HalfToFloat(LoadU16<2>(block)), 0.0f};
  }
};

}  // namespace jax_moe
