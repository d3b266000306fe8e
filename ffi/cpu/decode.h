// Weight rows to integers, scales and offsets. Compiled once for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "ffi/blocks/formats.h"
#include "ffi/cpu/convert.h"
#include "ffi/cpu/kernels.h"

namespace jax_moe::cpu {
namespace {

template <typename F, int kUnit>
JM_HD void DecodeUnit(const uint8_t* block, int8_t* q) {
  uint32_t words[8];
  F::Unit(block, kUnit, words);
  std::memcpy(q + 32 * kUnit, words, 32);
}

template <typename F, int kIndex>
JM_HD void DecodeGroup(const uint8_t* block, float* scale, float* offset) {
  const Affine affine = F::Group(block, kIndex);
  scale[kIndex] = affine.scale;
  if constexpr (F::kHasOffset) offset[kIndex] = affine.offset;
}

// Unit and group numbers are constants here, so that what they select costs nothing at run time.
template <typename F, int... kUnits, int... kGroups>
JM_HD void DecodeBlock(const uint8_t* block, int8_t* q, float* scale, float* offset,
                       std::integer_sequence<int, kUnits...>,
                       std::integer_sequence<int, kGroups...>) {
  (DecodeGroup<F, kGroups>(block, scale, offset), ...);
  (DecodeUnit<F, kUnits>(block, q), ...);
}

template <typename F>
void DecodeRows(const uint8_t* data, int64_t row_bytes, int rows, int count, Panel* panel) {
  constexpr int kGroups = F::kBlock / F::kGroup;
  const int blocks = count / F::kBlock;
  for (int r = 0; r < rows; ++r) {
    const uint8_t* block = data + r * row_bytes;
    int8_t* q = panel->q[r];
    float* scale = panel->scale[r];
    float* offset = panel->offset[r];
    for (int b = 0; b < blocks; ++b) {
      __builtin_prefetch(block + 2048);
      DecodeBlock<F>(block, q, scale, offset, std::make_integer_sequence<int, F::kBlock / 32>(),
                     std::make_integer_sequence<int, kGroups>());
      block += F::kBytes;
      q += F::kBlock;
      scale += kGroups;
      offset += kGroups;
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

const Format* FindFormat(int type) {
  static constexpr Format kFormats[] = {
      {kF32, 1, 4, 0, false, DecodeDense<kF32>},
      {kF16, 1, 2, 0, false, DecodeDense<kF16>},
      {kBF16, 1, 2, 0, false, DecodeDense<kBF16>},
#define JAX_MOE_FORMAT(F) {F::kType, F::kBlock, F::kBytes, F::kGroup, F::kHasOffset, DecodeRows<F>},
      JAX_MOE_FORMATS(JAX_MOE_FORMAT)
#undef JAX_MOE_FORMAT
  };
  for (const Format& format : kFormats) {
    if (format.type == type) return &format;
  }
  return nullptr;
}

}  // namespace
}  // namespace jax_moe::cpu
