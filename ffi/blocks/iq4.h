// IQ4_NL and IQ4_XS: nibbles that index a table of 16 unevenly spaced values.
#pragma once

#include "ffi/blocks/decoder.h"
#include "ffi/blocks/lookup.h"

namespace jax_moe {

// -127 -104 -83 -65  -49 -35 -22 -10  1 13 25 38  53 69 89 113
JM_HD constexpr NibbleTable Iq4Values() {
  return {{0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u}};
}

// 16 bytes of nibbles: weights 0..15 in the low ones, 16..31 in the high ones.
template <int kAlign>
JM_HD void LookupIq4(const uint8_t* nibbles, uint32_t (&q)[8]) {
  uint32_t low[4], high[4];
  LookupNibbles<kAlign>(Iq4Values(), nibbles, low, high);
  for (int j = 0; j < 4; ++j) {
    q[j] = low[j];
    q[j + 4] = high[j];
  }
}

// d (f16), nibbles.
struct IQ4_NL {
  static constexpr int kType = 20;
  static constexpr int kBlock = 32;
  static constexpr int kBytes = 18;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int, uint32_t (&q)[8]) {
    LookupIq4<2>(block + 2, q);
  }

  static JM_HD Affine Group(const uint8_t* block, int) {
    return {HalfToFloat(LoadU16<2>(block)), 0.0f};
  }
};

// d (f16), high 2 bits of eight 6-bit scales (u16), their low nibbles (4 bytes), nibbles.
struct IQ4_XS {
  static constexpr int kType = 23;
  static constexpr int kBlock = 256;
  static constexpr int kBytes = 136;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    LookupIq4<4>(block + 8 + 16 * unit, q);
  }

  static JM_HD Affine Group(const uint8_t* block, int group) {
    const int low = block[4 + group / 2] >> 4 * (group % 2) & 15;
    const int high = static_cast<int>(LoadU16<2>(block + 2) >> 2 * group & 3);
    const float d = HalfToFloat(LoadU16<2>(block));
    return {d * static_cast<float>((low | high << 4) - 32), 0.0f};
  }
};

}  // namespace jax_moe
