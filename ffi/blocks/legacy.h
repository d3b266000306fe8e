// The oldest formats: 32 weights a block, one f16 scale, in two of them an f16 minimum.
#pragma once

#include "ffi/blocks/bitmask.h"
#include "ffi/blocks/decoder.h"

namespace jax_moe {

// 16 bytes of nibbles: weights 0..15 in the low ones, 16..31 in the high ones. kAlign: see LoadU32.
template <int kAlign>
JM_HD void SplitNibbles(const uint8_t* nibbles, uint32_t (&q)[8]) {
  for (int j = 0; j < 4; ++j) {
    const uint32_t word = LoadU32<kAlign>(nibbles + 4 * j);
    q[j] = word & 0x0f0f0f0fu;
    q[j + 4] = word >> 4 & 0x0f0f0f0fu;
  }
}

// d (f16), nibbles. weight = d * (nibble - 8).
struct Q4_0 {
  static constexpr int kType = 2;
  static constexpr int kBlock = 32;
  static constexpr int kBytes = 18;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int, uint32_t (&q)[8]) {
    SplitNibbles<2>(block + 2, q);
    for (int j = 0; j < 8; ++j) q[j] = SubBytes(q[j], 0x08080808u);
  }

  static JM_HD Affine Group(const uint8_t* block, int) {
    return {HalfToFloat(LoadU16<2>(block)), 0.0f};
  }
};

// d (f16), minimum (f16), nibbles. weight = d * nibble + minimum.
struct Q4_1 {
  static constexpr int kType = 3;
  static constexpr int kBlock = 32;
  static constexpr int kBytes = 20;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = true;

  static JM_HD void Unit(const uint8_t* block, int, uint32_t (&q)[8]) {
    SplitNibbles<4>(block + 4, q);
  }

  static JM_HD Affine Group(const uint8_t* block, int) {
    return {HalfToFloat(LoadU16<2>(block)), HalfToFloat(LoadU16<2>(block + 2))};
  }
};

// d (f16), the fifth bits of the 32 weights, nibbles. weight = d * (5 bits - 16).
struct Q5_0 {
  static constexpr int kType = 6;
  static constexpr int kBlock = 32;
  static constexpr int kBytes = 22;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int, uint32_t (&q)[8]) {
    SplitNibbles<2>(block + 6, q);
    // nibble + 16 * bit - 16: where the fifth bit is clear the upper half of the byte is ones.
    uint32_t clear[8];
    BitsToByteMasks(~LoadU32<2>(block + 2), clear);
    for (int j = 0; j < 8; ++j) q[j] |= clear[j] & 0xf0f0f0f0u;
  }

  static JM_HD Affine Group(const uint8_t* block, int) {
    return {HalfToFloat(LoadU16<2>(block)), 0.0f};
  }
};

// d (f16), minimum (f16), the fifth bits, nibbles. weight = d * (5 bits) + minimum.
struct Q5_1 {
  static constexpr int kType = 7;
  static constexpr int kBlock = 32;
  static constexpr int kBytes = 24;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = true;

  static JM_HD void Unit(const uint8_t* block, int, uint32_t (&q)[8]) {
    SplitNibbles<4>(block + 8, q);
    uint32_t set[8];
    BitsToByteMasks(LoadU32<4>(block + 4), set);
    for (int j = 0; j < 8; ++j) q[j] |= set[j] & 0x10101010u;
  }

  static JM_HD Affine Group(const uint8_t* block, int) {
    return {HalfToFloat(LoadU16<2>(block)), HalfToFloat(LoadU16<2>(block + 2))};
  }
};

// d (f16), 32 int8. weight = d * int8.
struct Q8_0 {
  static constexpr int kType = 8;
  static constexpr int kBlock = 32;
  static constexpr int kBytes = 34;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int, uint32_t (&q)[8]) {
    for (int j = 0; j < 8; ++j) q[j] = LoadU32<2>(block + 2 + 4 * j);
  }

  static JM_HD Affine Group(const uint8_t* block, int) {
    return {HalfToFloat(LoadU16<2>(block)), 0.0f};
  }
};

}  // namespace jax_moe
