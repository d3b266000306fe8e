// K-quants: 256 weights a block, an f16 scale over sub-scales of 4, 6 or 8 bits.
#pragma once

#include "ffi/blocks/decoder.h"

namespace jax_moe {

// Two bits a weight, 32 weights with stride one byte in each bit pair, 128 weights in 32 bytes.
template <int kAlign>
JM_HD void SplitBitPairs(const uint8_t* pairs, int unit, uint32_t (&q)[8]) {
  const uint8_t* half = pairs + 32 * (unit / 4);
  const int shift = 2 * (unit % 4);
  for (int j = 0; j < 8; ++j) q[j] = LoadU32<kAlign>(half + 4 * j) >> shift & 0x03030303u;
}

// Sub-scale and sub-minimum, 6 bits each, of Q4_K and Q5_K: eight of each in 12 bytes. The first
// four of both lie in the low bits of bytes 0..7; of the last four, the low nibbles in bytes 8..11
// and the two high bits on top of bytes 0..7.
JM_HD Affine SixBitScaleAndMin(const uint8_t* block, const uint8_t* packed, int group) {
  uint32_t scale, minimum;
  if (group < 4) {
    scale = packed[group] & 63;
    minimum = packed[group + 4] & 63;
  } else {
    scale = (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4;
    minimum = packed[group + 4] >> 4 | packed[group] >> 6 << 4;
  }
  const float d = HalfToFloat(LoadU16<2>(block));
  const float dmin = HalfToFloat(LoadU16<2>(block + 2));
  return {d * static_cast<float>(static_cast<int>(scale)),
          -(dmin * static_cast<float>(static_cast<int>(minimum)))};
}

// 16 bytes with scale (low) and minimum (high nibble), 64 bytes of bit pairs, d (f16), dmin (f16).
struct Q2_K {
  static constexpr int kType = 10;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 84;
  static constexpr int kGroup = 16;
  static constexpr bool kHasOffset = true;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    SplitBitPairs<4>(block + 16, unit, q);
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    const float d = HalfToFloat(LoadU16<2>(block + 80));
    const float dmin = HalfToFloat(LoadU16<2>(block + 82));
    return {d * static_cast<float>(block[group] & 15),
            -(dmin * static_cast<float>(block[group] >> 4))};
  }
};

// 32 bytes with the third bits (bit u: unit u), 64 bytes of bit pairs, 12 bytes with sixteen 6-bit
// scales, d (f16). weight = d * (scale - 32) * (3 bits - 4).
struct Q3_K {
  static constexpr int kType = 11;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 110;
  static constexpr int kGroup = 16;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    SplitBitPairs<2>(block + 32, unit, q);
    for (int j = 0; j < 8; ++j) {
      const uint32_t third = LoadU32<2>(block + 4 * j) >> unit & 0x01010101u;
      q[j] = SubBytes(q[j] | third << 2, 0x04040404u);
    }
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    // Low nibbles of scales 0..7 and 8..15 in the nibbles of bytes 0..7; high bits in bytes 8..11.
    const uint8_t* packed = block + 96;
    const int low = packed[group % 8] >> 4 * (group / 8) & 15;
    const int high = packed[8 + group % 4] >> 2 * (group / 4) & 3;
    const float d = HalfToFloat(LoadU16<2>(block + 108));
    return {d * static_cast<float>((low | high << 4) - 32), 0.0f};
  }
};

// d (f16), dmin (f16), 12 bytes of 6-bit scales and minima, 128 bytes of nibbles.
struct Q4_K {
  static constexpr int kType = 12;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 144;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = true;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    const uint8_t* nibbles = block + 16 + 32 * (unit / 2);
    const int shift = 4 * (unit % 2);
    for (int j = 0; j < 8; ++j) q[j] = LoadU32<4>(nibbles + 4 * j) >> shift & 0x0f0f0f0fu;
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    return SixBitScaleAndMin(block, block + 4, group);
  }
};

// d (f16), dmin (f16), 12 bytes of 6-bit scales and minima, 32 bytes with the fifth bits (bit u:
// unit u), 128 bytes of nibbles.
struct Q5_K {
  static constexpr int kType = 13;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 176;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = true;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    const uint8_t* fifths = block + 16;
    const uint8_t* nibbles = block + 48 + 32 * (unit / 2);
    const int shift = 4 * (unit % 2);
    for (int j = 0; j < 8; ++j) {
      const uint32_t fifth = LoadU32<4>(fifths + 4 * j) >> unit & 0x01010101u;
      q[j] = (LoadU32<4>(nibbles + 4 * j) >> shift & 0x0f0f0f0fu) | fifth << 4;
    }
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    return SixBitScaleAndMin(block, block + 4, group);
  }
};

// 128 bytes of nibbles, 64 bytes of bit pairs, 16 int8 scales, d (f16). Of every 128 weights, units
// 0 and 1 have the low nibbles of 64 bytes, 2 and 3 the high ones.
// weight = d * scale * (6 bits - 32).
struct Q6_K {
  static constexpr int kType = 14;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 210;
  static constexpr int kGroup = 16;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    SplitBitPairs<2>(block + 128, unit, q);
    const uint8_t* nibbles = block + 64 * (unit / 4) + 32 * (unit % 2);
    const int shift = 4 * (unit / 2 % 2);
    for (int j = 0; j < 8; ++j) {
      const uint32_t low = LoadU32<2>(nibbles + 4 * j) >> shift & 0x0f0f0f0fu;
      q[j] = SubBytes(low | q[j] << 4, 0x20202020u);
    }
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    const float d = HalfToFloat(LoadU16<2>(block + 208));
    return {d * static_cast<float>(static_cast<int8_t>(block[192 + group])), 0.0f};
  }
};

}  // namespace jax_moe
