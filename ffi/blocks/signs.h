// Signs of the IQ2 and IQ3 formats: a bit for each weight, set where it is negative.
#pragma once

#include "ffi/blocks/bitmask.h"
#include "ffi/blocks/decoder.h"

namespace jax_moe {

// Negates the bytes of q, all positive, where the bit of `signs` is set; bit i is of byte i.
JM_HD void ApplySigns(uint32_t signs, uint32_t (&q)[8]) {
  uint32_t mask[8];
  BitsToByteMasks(signs, mask);
  for (int j = 0; j < 8; ++j) q[j] = NegateBytes(q[j], mask[j]);
}

// Four bytes with seven sign bits each: the eighth is such that the number of set bits is even.
JM_HD uint32_t CompleteSigns(uint32_t sevens) {
  uint32_t parity = sevens ^ sevens >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return sevens | (parity & 0x01010101u) << 7;
}

// The 28 low bits as four bytes with seven bits each.
JM_HD uint32_t SpreadSevens(uint32_t packed) {
  return (packed & 0x7fu) | (packed << 1 & 0x7f00u) | (packed << 2 & 0x7f0000u) |
         (packed << 3 & 0x7f000000u);
}

// Puts a code word of eight magnitudes where weights 8 * index .. 8 * index + 7 of a unit go.
JM_HD void PutCodeword(uint64_t word, int index, uint32_t (&q)[8]) {
  q[2 * index] = static_cast<uint32_t>(word);
  q[2 * index + 1] = static_cast<uint32_t>(word >> 32);
}

}  // namespace jax_moe
