// Operations on the bits of words, one instruction each, where the compiler would make more of them.
#pragma once

#include "ffi/blocks/decoder.h"

namespace jax_moe {

// Bytes of b:a chosen by the four low nibbles of `selector`, none of which is above 7. With a
// selector that it does not know, __byte_perm masks these nibbles first: an instruction more.
JM_HD uint32_t BytePerm(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
#else
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
#endif
}

// The bits of a where the mask has ones, those of b elsewhere: one instruction, where the compiler
// would mask a and b by themselves for each use.
JM_HD uint32_t Select(uint32_t mask, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(result) : "r"(mask), "r"(a), "r"(b));
  return result;
#else
  return (mask & a) | (~mask & b);
#endif
}

}  // namespace jax_moe
