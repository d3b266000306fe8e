// From the magnitudes of an IQ format's code word back to its index (codebooks.h).
//
// Magnitudes come as the codes that the tiled layout has for them (tiled.h), a byte each.
#pragma once

#include "ffi/blocks/codebooks.h"

namespace jax_moe {

// Sets `count` bits of zeros from bit `bit` on.
JM_HD void PutBits(uint8_t* bytes, int bit, int count, uint32_t value) {
  for (int i = bit; i < bit + count; ++i, value >>= 1) {
    bytes[i / 8] = static_cast<uint8_t>(bytes[i / 8] | (value & 1) << i % 8);
  }
}

// Bit `kBit` of eight codes.
template <int kBit>
JM_HD uint32_t SignsOf(const uint8_t* codes) {
  uint32_t signs = 0;
  for (int i = 0; i < 8; ++i) signs |= (codes[i] >> kBit & 1u) << i;
  return signs;
}

// The index of `word` among `count` ascending code words, a power of two.
template <typename Codeword>
JM_HD uint32_t FindCodeword(uint32_t count, uint64_t word, Codeword&& codeword) {
  uint32_t index = 0;
  for (uint32_t step = count / 2; step > 0; step /= 2) {
    if (codeword(index + step) <= word) index += step;
  }
  return index;
}

// Bytes f(code) of `count` codes, the first one lowest.
template <typename F>
JM_HD uint64_t JoinBytes(const uint8_t* codes, int count, F&& f) {
  uint64_t word = 0;
  for (int i = 0; i < count; ++i) word |= static_cast<uint64_t>(f(codes[i])) << 8 * i;
  return word;
}

JM_HD uint32_t Iq1Index(const uint8_t* codes) {
  const uint64_t word = JoinBytes(codes, 8, [](uint32_t code) { return code; });
  return FindCodeword(2048, word, [](uint32_t index) {
    const uint32_t nibbles = Iq1Codeword(index);
    return static_cast<uint64_t>(nibbles >> 4 & 0x0f0f0f0fu) << 32 | (nibbles & 0x0f0f0f0fu);
  });
}

JM_HD uint64_t Iq2Magnitudes(const uint8_t* codes) {
  return JoinBytes(codes, 8, [](uint32_t code) {
    return (code & 3) == 0 ? 8u : (code & 3) == 1 ? 25u : 43u;
  });
}
JM_HD uint32_t Iq2XxsIndex(const uint8_t* codes) {
  return FindCodeword(256, Iq2Magnitudes(codes), [](uint32_t i) { return Iq2XxsCodeword(i); });
}
JM_HD uint32_t Iq2XsIndex(const uint8_t* codes) {
  return FindCodeword(512, Iq2Magnitudes(codes), [](uint32_t i) { return Iq2XsCodeword(i); });
}
JM_HD uint32_t Iq2SIndex(const uint8_t* codes) {
  return FindCodeword(1024, Iq2Magnitudes(codes), [](uint32_t i) { return Iq2SCodeword(i); });
}

JM_HD uint32_t Iq3XxsIndex(const uint8_t* codes) {
  const uint64_t word = JoinBytes(codes, 4, [](uint32_t code) {
    return (code & 7) == 7 ? 62u : 8 * (code & 7) + 4;
  });
  return FindCodeword(256, word, [](uint32_t i) { return uint64_t{Iq3XxsCodeword(i)}; });
}

// Codes 0..15 of -15, -13, .. 15.
JM_HD uint32_t Iq3SIndex(const uint8_t* codes) {
  const uint64_t word = JoinBytes(codes, 4, [](uint32_t code) {
    return code < 8 ? 15 - 2 * code : 2 * code - 15;
  });
  return FindCodeword(512, word, [](uint32_t i) { return uint64_t{Iq3SCodeword(i)}; });
}

}  // namespace jax_moe
