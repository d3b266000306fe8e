// Activation rows: from any element type to scaled float32 or q8_1, and results to any element
// type.
#pragma once


#include <cstdint>
#include <cstring>


#include "ffi/cpu/convert.h"
#include "ffi/cpu/kernels.h"

namespace jax_moe::cpu {
namespace {

template <int kType>
JM_HD float LoadElement(const void* row, int64_t i) {
  if constexpr (kType == kF32) return static_cast<const float*>(row)[i];
  const uint32_t bits = static_cast<const uint16_t*>(row)[i];
  return kType == kF16 ? HalfToFloat(bits) : Bf16ToFloat(bits);
}

JM_HD uint32_t MagnitudeBits(float f) { return FloatToBits(f) & 0x7fffffffu; }

constexpr uint32_t kInfinityBits = 0x7f800000u;

// What products with groups of kGroup weights take of kTokens q8_1 rows, from args.begin on.
template <int kGroup, int kTokens>
struct QuantizedColumns {
  const int8_t* q[kTokens];
  const float *d[kTokens], *sum[kTokens];  // sum: of each group of kGroup

  JM_HD QuantizedColumns(const MultiplyArgs& args, int first_token) {
    for (int t = 0; t < kTokens; ++t) {
      const QuantizedRow row(args.x[first_token + t], args.k);
      q[t] = row.q + args.begin;
      d[t] = row.d + args.begin / 32;
      sum[t] = kGroup == 16 ? row.sum16 + args.begin / 16 : row.sum32 + args.begin / 32;
    }
  }
};

// One group of 32 values to q8_1. A group that is not finite gets a NaN scale, so that it shows in
// every product.
JM_HD void QuantizeGroup(const float (&v)[32], const QuantizedRow& out, int64_t group) {
  uint32_t amax_bits = 0;
  for (int i = 0; i < 32; ++i) {
    const uint32_t bits = MagnitudeBits(v[i]);
    amax_bits = bits > amax_bits ? bits : amax_bits;
  }
  float d = BitsToFloat(amax_bits) / 127.0f;
  // The row's largest magnitude is at least 1: what is 2^-100 below it is nothing.
  const bool empty = d < 0x1p-100f;
  const bool finite = amax_bits < kInfinityBits;
  const float divisor = empty || !finite ? 1.0f : d;
  const float keep = empty || !finite ? 0.0f : 1.0f;
  if (empty) d = 0.0f;
  if (!finite) d = __builtin_nanf("");
  int32_t q[32];
  for (int i = 0; i < 32; ++i) {
    // Half away from zero: the difference to the truncated quotient is exact.
    const float finite_value = keep != 0.0f ? v[i] : 0.0f;
    const float ratio = finite_value / divisor;
    const int32_t whole = static_cast<int32_t>(ratio);
    const float rest = ratio - static_cast<float>(whole);
    q[i] = whole + (rest >= 0.5f ? 1 : 0) - (rest <= -0.5f ? 1 : 0);
  }
  int32_t sums[8];
  for (int j = 0; j < 8; ++j) {
    sums[j] = q[4 * j] + q[4 * j + 1] + q[4 * j + 2] + q[4 * j + 3];
    out.bias4[8 * group + j] = -128 * sums[j];
  }
  for (int i = 0; i < 32; ++i) out.q[32 * group + i] = static_cast<int8_t>(q[i]);
  const int32_t low = sums[0] + sums[1] + sums[2] + sums[3];
  const int32_t high = sums[4] + sums[5] + sums[6] + sums[7];
  out.bias16[2 * group] = -128 * low;
  out.bias16[2 * group + 1] = -128 * high;
  out.bias32[group] = -128 * (low + high);
  out.d[group] = d;
  out.sum16[2 * group] = d * static_cast<float>(low);
  out.sum16[2 * group + 1] = d * static_cast<float>(high);
  out.sum32[group] = d * static_cast<float>(low + high);
}

template <int kType>
float PrepareRow(const void* row, int64_t k, bool round, void* record) {
  uint32_t amax_bits = 0;
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t bits = MagnitudeBits(LoadElement<kType>(row, i));
    amax_bits = bits > amax_bits ? bits : amax_bits;
  }
  // 2^-exponent may not be a float; its two halves are.
  const bool scalable = amax_bits != 0 && amax_bits < kInfinityBits;
  const int exponent = scalable ? __builtin_ilogbf(BitsToFloat(amax_bits)) : 0;
  const float half = __builtin_ldexpf(1.0f, -exponent / 2);
  const float rest = __builtin_ldexpf(1.0f, -exponent - -exponent / 2);
  const int64_t padded = plan::PaddedRow(k);
  if (round) {
    const QuantizedRow out(record, k);
    float v[32];
    for (int64_t g = 0; g < k / 32; ++g) {
      for (int i = 0; i < 32; ++i) v[i] = LoadElement<kType>(row, 32 * g + i) * half * rest;
      QuantizeGroup(v, out, g);
    }
    std::memset(v, 0, sizeof(v));
    for (int64_t g = k / 32; g < padded / 32; ++g) QuantizeGroup(v, out, g);
  } else {
    const FloatRow out(record, k);
    for (int64_t i = 0; i < k; ++i) out.x[i] = LoadElement<kType>(row, i) * half * rest;
    std::memset(out.x + k, 0, sizeof(float) * static_cast<size_t>(padded - k));
    for (int64_t g = 0; g < padded / 32; ++g) {
      float sums[2] = {};
      for (int i = 0; i < 16; ++i) {
        sums[0] += out.x[32 * g + i];
        sums[1] += out.x[32 * g + 16 + i];
      }
      out.sum16[2 * g] = sums[0];
      out.sum16[2 * g + 1] = sums[1];
      out.sum32[g] = sums[0] + sums[1];
    }
  }
  return __builtin_ldexpf(1.0f, exponent);
}

float Prepare(const void* row, int dense_type, int64_t k, bool round, void* record) {
  if (dense_type == kF32) return PrepareRow<kF32>(row, k, round, record);
  if (dense_type == kF16) return PrepareRow<kF16>(row, k, round, record);
  return PrepareRow<kBF16>(row, k, round, record);
}

void Store(const float* a, int64_t n, int dense_type, void* out) {
  if (dense_type == kF32) {
    std::memcpy(out, a, sizeof(float) * static_cast<size_t>(n));
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(out);
  if (dense_type == kF16) {
    for (int64_t i = 0; i < n; ++i) half[i] = FloatToHalf(a[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) half[i] = FloatToBf16(a[i]);
  }
}

}  // namespace
}  // namespace jax_moe::cpu
