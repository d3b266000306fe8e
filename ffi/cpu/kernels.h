// What a CPU instruction set offers: one table of functions for each, chosen at run time.
//
// A weight row is decoded once, into 8-bit integers with a scale and an offset for every group, and
// multiplied by the rows of all the tokens that want it. Only `decode` depends on the block format.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ffi/plan/cpu.h"
#include "ffi/targets.h"

namespace jax_moe::cpu {

inline constexpr int kPanelRows = 16;   // weight rows decoded at a time, and rows of a result tile
inline constexpr int kChunk = 2048;     // weights of a row decoded at a time
inline constexpr int kFloatChunk = 512; // the same, as floats
inline constexpr int kTokenTile = 128;  // tokens of a result tile

// Bytes of one prepared activation row, float or quantised.
inline constexpr int64_t RowBytes(int64_t k) {
  return 4 * plan::PaddedRow(k) + plan::PaddedRow(k) / 2;
}

// An activation row in float32, and its sums over 16 and over 32 elements.
struct FloatRow {
  FloatRow(void* record, int64_t k) {
    x = static_cast<float*>(record);
    sum16 = x + plan::PaddedRow(k);
    sum32 = sum16 + plan::PaddedRow(k) / 16;
  }
  float* x;      // [K]
  float* sum16;  // [K / 16]
  float* sum32;  // [K / 32]
};

// An activation row rounded to q8_1: 32 values share d = amax / 127 and are q * d. All arrays lie
// in the RowBytes(k) bytes of one record.
struct QuantizedRow {
  QuantizedRow(void* record, int64_t k) {
    const int64_t padded = plan::PaddedRow(k);
    q = static_cast<int8_t*>(record);
    bias4 = reinterpret_cast<int32_t*>(q + padded);
    bias16 = bias4 + padded / 4;
    bias32 = bias16 + padded / 16;
    d = reinterpret_cast<float*>(bias32 + padded / 32);
    sum16 = d + padded / 32;
    sum32 = sum16 + padded / 16;
  }
  int8_t* q;        // [K]
  int32_t* bias4;   // [K / 4]   -128 * sum of 4 q: undoes weights shifted to unsigned by 128
  int32_t* bias16;  // [K / 16]
  int32_t* bias32;  // [K / 32]
  float* d;         // [K / 32]
  float* sum16;     // [K / 16]  d * sum of q, for the weights' offset
  float* sum32;     // [K / 32]
};

// Decoded weights: rows of integers, scales and offsets of their groups, and what the kernels
// derive.
struct alignas(64) Panel {
  int8_t q[kPanelRows][kChunk];
  float scale[kPanelRows][kChunk / 16];
  float offset[kPanelRows][kChunk / 16];
  // The same with rows innermost, for 16 rows at once: integers shifted to unsigned by 128.
  int32_t columns[kChunk / 4][kPanelRows];
  float column_scale[kChunk / 16][kPanelRows];
  float column_offset[kChunk / 16][kPanelRows];
  float values[kPanelRows][kFloatChunk];
};

// A weight matrix [experts, n, k] of blocks or of dense elements.
struct Weights {
  const uint8_t* data = nullptr;
  int format = -1;  // ggml_type
  int64_t experts = 0, n = 0, k = 0, row_bytes = 0;
  const uint8_t* Row(int64_t expert, int64_t row) const {
    return data + (expert * n + row) * row_bytes;
  }
};

// Decodes `count` weights of each of `rows` rows, row_bytes apart.
using DecodeFn = void (*)(const uint8_t* data, int64_t row_bytes, int rows, int count,
                          Panel* panel);

struct Format;

// sums[t * kPanelRows + r] += rows[r] . x[t], for the panel's rows and `tokens` prepared activation
// rows. x[t] is the record of a FloatRow or a QuantizedRow of length k; the product takes elements
// begin .. begin + count - 1, which are the decoded ones.
struct MultiplyArgs {
  Panel* panel;
  const Format* format;
  int rows;
  int tokens;
  void* const* x;
  int64_t k, begin;
  int count;
  float* sums;
};

// The same for packed rows, row_bytes apart, and activation rows of length k, a multiple of 256.
// The panel serves as scratch.
using MultiplyPackedFn = void (*)(const uint8_t* data, int64_t row_bytes, const MultiplyArgs& args);

struct Format {
  int type = -1;
  int block = 1;       // elements a block
  int bytes = 4;       // bytes a block
  int group = 0;       // weights that share a scale; 0: dense
  bool has_offset = false;
  DecodeFn decode = nullptr;  // to integers; dense: to Panel::values
  // For at most Kernels::few_tokens q8_1 rows, and for one float row; null where there is none.
  MultiplyPackedFn multiply_packed_quantized = nullptr;
  MultiplyPackedFn multiply_packed_float = nullptr;
};

// h[t] = act(gate, up) for one tile of sums; see FfnArgs for the meaning of the members.
struct ActivateArgs {
  Activation activation;
  float limit, beta, linear_beta;
  int rows, tokens;
  const float* gate;  // [tokens][kPanelRows]; unused where there is no gate
  const float* up;
  const float* token_factor;  // [tokens]
  float gate_scale, up_scale;
  const float* gate_bias;  // [rows] or null
  const float* up_bias;
  float* const* h;  // [tokens], each to [rows]
};

struct Kernels {
  const char* isa;
  // The format with this ggml_type; null where there is none.
  const Format* (*find_format)(int type);
  // Few tokens need few rows decoded at a time, so that they stay in the first-level cache.
  int few_tokens;
  void (*multiply_quantized)(const MultiplyArgs& args);
  void (*multiply_float)(const MultiplyArgs& args);
  void (*activate)(const ActivateArgs& args);
  // Writes row[0 .. k) times a power of two that brings its largest magnitude to [1, 2), rounded to
  // q8_1 or as it is, zero-padded, to `record`; returns the inverse of the power.
  float (*prepare)(const void* row, int dense_type, int64_t k, bool round, void* record);
  // out[i] = a[i] in the element type.
  void (*store)(const float* a, int64_t n, int dense_type, void* out);
};

// The best table that this machine runs; JAX_MOE_ISA=baseline|avx2|avx512 in the environment lowers
// it.
const Kernels& SelectKernels();

const Kernels& BaselineKernels();
#if defined(__x86_64__)
const Kernels& Avx2Kernels();
const Kernels& Avx512Kernels();
#endif

}  // namespace jax_moe::cpu
