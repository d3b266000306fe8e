// MXFP4 and NVFP4: E2M1 floats under a scale of 8 bits.
#pragma once

#include "ffi/blocks/decoder.h"
#include "ffi/blocks/lookup.h"

namespace jax_moe {

// Twice the value of an E2M1 code, an integer: 0 1 2 3  4 6 8 12, then the same negated.
JM_HD constexpr NibbleTable DoubledE2M1() {
  return {{0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu}};
}

// e (E8M0 exponent, bias 127), nibbles: weights 0..15 in the low ones, 16..31 in the high ones.
struct MXFP4 {
  static constexpr int kType = 39;
  static constexpr int kBlock = 32;
  static constexpr int kBytes = 17;
  static constexpr int kGroup = 32;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int, uint32_t (&q)[8]) {
    uint32_t low[4], high[4];
    LookupNibbles<1>(DoubledE2M1(), block + 1, low, high);
    for (int j = 0; j < 4; ++j) {
      q[j] = low[j];
      q[j + 4] = high[j];
    }
  }

  // 2^(e - 128), half of the E8M0 value because q is doubled. The first two are subnormal floats.
  static JM_HD Affine Group(const uint8_t* block, int) {
    const uint32_t e = block[0];
    return {BitsToFloat(e < 2 ? 0x00200000u << e : (e - 1) << 23), 0.0f};
  }
};

// Four E4M3 scales without sign, then 8 bytes of nibbles for each 16 weights: the first 8 in the
// low ones, the last 8 in the high ones. A GGUF file may have one more scale beside the tensor.
struct NVFP4 {
  static constexpr int kType = 40;
  static constexpr int kBlock = 64;
  static constexpr int kBytes = 36;
  static constexpr int kGroup = 16;
  static constexpr bool kHasOffset = false;

  static JM_HD void Unit(const uint8_t* block, int unit, uint32_t (&q)[8]) {
    uint32_t low[4], high[4];
    LookupNibbles<4>(DoubledE2M1(), block + 4 + 16 * unit, low, high);
    for (int j = 0; j < 2; ++j) {
      q[j] = low[j];
      q[j + 2] = high[j];
      q[j + 4] = low[j + 2];
      q[j + 6] = high[j + 2];
    }
  }

  // Half of the E4M3 value because q is doubled. As in ggml, bit 7 of the byte is ignored, save
  // that the NaN code 0x7f means zero and 0xff does not.
  static JM_HD Affine Group(const uint8_t* block, int group) {
    const uint32_t code = block[group];
    if (code == 0x7f) return {0.0f, 0.0f};
    const uint32_t magnitude = code & 0x7fu;
    if (magnitude < 8) return {static_cast<float>(static_cast<int>(magnitude)) * 0x1p-10f, 0.0f};
    // Exponent bias 7 to 127, less one for the halving.
    return {BitsToFloat((magnitude << 20) + (119u << 23)), 0.0f};
  }
};

}  // namespace jax_moe
