// TQ1_0 and TQ2_0: weights -1, 0, 1 (TQ2_0: also 2) under one f16 scale for 256.
#pragma once

#include "ffi/blocks/decoder.h"
#include "ffi/blocks/kquants.h"

namespace jax_moe {

// 48 bytes of five base-3 digits and 4 bytes of four, d (f16). A byte b holds a fraction b / 256;
// digit n is the integer part of 3 * frac(3^n * b / 256). In the first 32 bytes digit n is of
// weights 32 n .. 32 n + 31, in the next 16 of 160 + 16 n .., in the last 4 of 240 + 4 n ..
struct TQ1_0 {
  static constexpr int kType = 34;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 54;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    if (unit < 5) {
      const uint32_t power = Power(unit);
      for (int j = 0; j < 8; ++j) q[j] = Digits(LoadU32<2>(block + 4 * j), power);
    } else if (unit < 7) {
      const uint32_t power = unit == 5 ? 1 : 9;
      for (int j = 0; j < 4; ++j) {
        const uint32_t word = LoadU32<2>(block + 32 + 4 * j);
        q[j] = Digits(word, power);
        q[j + 4] = Digits(word, 3 * power);
      }
    } else {
      const uint32_t last = LoadU32<2>(block + 48);
      for (int j = 0; j < 4; ++j) q[j] = Digits(LoadU32<2>(block + 32 + 4 * j), 81);
      for (int j = 0; j < 4; ++j) q[j + 4] = Digits(last, Power(j));
    }
  }

  static JM_HD Affine Group(const uint8_t* block, int) {
    return {HalfToFloat(LoadU16<2>(block + 52)), 0.0f};
  }

 private:
  // 3^n for n = 0..4.
  static JM_HD uint32_t Power(int n) {
    return n == 0 ? 1 : n == 1 ? 3 : n == 2 ? 9 : n == 3 ? 27 : 81;
  }

  // A digit less one of each of four bytes, which are multiplied in 16-bit lanes, two at a time.
  static JM_HD uint32_t Digits(uint32_t bytes, uint32_t power) {
    constexpr uint32_t kLanes = 0x00ff00ffu;
    const uint32_t even = ((bytes & kLanes) * power & kLanes) * 3 >> 8 & kLanes;
    const uint32_t odd = ((bytes >> 8 & kLanes) * power & kLanes) * 3 & ~kLanes;
    return SubBytes(even | odd, 0x01010101u);
  }
};

// 64 bytes of bit pairs as in Q2_K, d (f16). weight = d * (bit pair - 1).
struct TQ2_0 {
  static constexpr int kType = 35;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 66;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    SplitBitPairs<2>(block, unit, q);
    for (int j = 0; j < 8; ++j) q[j] = SubBytes(q[j], 0x01010101u);
  }

  static JM_HD Affine Group(const uint8_t* block, int) {
    return {HalfToFloat(LoadU16<2>(block + 64)), 0.0f};
  }
};

}  // namespace jax_moe
