// binary16 and bfloat16 to binary32 and back, rounding to nearest even. Branch-free, so that loops
// over them vectorise on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "ffi/blocks/decoder.h"

namespace jax_moe::cpu {

JM_HD uint32_t FloatToBits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

JM_HD float Bf16ToFloat(uint32_t h) { return BitsToFloat(h << 16); }

JM_HD uint16_t FloatToBf16(float f) {
  const uint32_t bits = FloatToBits(f);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x0040u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

JM_HD uint16_t FloatToHalf(float f) {
  const uint32_t bits = FloatToBits(f);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the sum with 0.5 leaves the rounded subnormal in the low bits of the significand.
  const uint32_t subnormal = FloatToBits(BitsToFloat(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(sign | half);
}

}  // namespace jax_moe::cpu
