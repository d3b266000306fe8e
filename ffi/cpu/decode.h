// Weight rows to integers, scales and offsets. Compiled once for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "ffi/blocks/formats.h"
#include "ffi/cpu/convert.h"
#include "ffi/cpu/decode_simd.h"
#include "ffi/cpu/decode_simd_iq.h"
#include "ffi/cpu/decode_simd_k.h"
#include "ffi/cpu/decode_simd_small.h"
#include "ffi/cpu/kernels.h"

namespace jax_moe::cpu {
namespace {

template <typename F>
void DecodeRows(const uint8_t* data, int64_t row_bytes, int rows, int count, Panel* panel) {
  constexpr int kGroups = F::kBlock / F::kGroup;
  // Small blocks a few at a time; a large one's code is long already.
  constexpr int kAtOnce = F::kBlock < 256 ? 4 : 1;
  const int blocks = count / F::kBlock;
  // While this panel is multiplied, memory fetches the next.
  const int64_t ahead = rows * row_bytes;
  for (int r = 0; r < rows; ++r) {
    const uint8_t* block = data + r * row_bytes;
    int8_t* q = panel->q[r];
    float* scale = panel->scale[r];
    float* offset = panel->offset[r];
    const auto decode = [&](int i) __attribute__((always_inline)) {
      Decoder<F>::Groups(block + i * F::kBytes, scale + i * kGroups, offset + i * kGroups);
      Decoder<F>::Units(block + i * F::kBytes, q + i * F::kBlock);
    };
    for (int left = blocks; left > 0;) {
      const int step = left >= kAtOnce ? kAtOnce : 1;
      for (int line = 0; line < step * F::kBytes; line += 64) {
        __builtin_prefetch(block + ahead + line);
      }
      if (step == kAtOnce) {
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; ++i) decode(i);
      } else {
        decode(0);
      }
      left -= step;
      block += step * F::kBytes;
      q += step * F::kBlock;
      scale += step * kGroups;
      offset += step * kGroups;
    }
    // Kernels read whole groups of 256 weights; beyond the row the activations are zero.
    for (int pad = count; pad % plan::kRowAlignment != 0; pad += F::kGroup) {
      *scale++ = 0.0f;
      if constexpr (F::kHasOffset) *offset++ = 0.0f;
    }
  }
}

template <int kType>
void DecodeDense(const uint8_t* data, int64_t row_bytes, int rows, int count, Panel* panel) {
  for (int r = 0; r < rows; ++r) {
    const uint8_t* row = data + r * row_bytes;
    float* values = panel->values[r];
    if constexpr (kType == kF32) {
      std::memcpy(values, row, 4 * static_cast<size_t>(count));
    } else {
      for (int i = 0; i < count; ++i) {
        const uint32_t bits = LoadU16(row + 2 * i);
        values[i] = kType == kF16 ? HalfToFloat(bits) : Bf16ToFloat(bits);
      }
    }
    for (int i = count; i % 16 != 0; ++i) values[i] = 0.0f;
  }
}

}  // namespace
}  // namespace jax_moe::cpu
