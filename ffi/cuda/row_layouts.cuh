// How prepared rows are written: one function a Layout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ffi/cuda/powers.cuh"
#include "ffi/cuda/prepare.h"
#include "ffi/cuda/row_sources.cuh"
#include "ffi/cuda/split.cuh"
#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {

// Eight values of a row. In lane order, lane t of a quad has columns 4t .. 4t + 3 and
// 16 + 4t .. 16 + 4t + 3 of every 32; in the other layouts eight consecutive columns are read.
struct Group {
  int index;  // rows have no more than 2^30 columns
  bool inside;  // false: past the end of the row; takes part in exchanges only
  Layout layout;
  float v[8];

  // The columns of v[0 .. 3] and v[4 .. 7] begin here.
  __device__ int Column(int half) const {
    if (layout != Layout::kF16Lanes && layout != Layout::kS8Lanes) return index * 8 + half * 4;
    return index / 4 * 32 + index % 4 * 4 + half * 16;
  }
  // Of a row with a multiple of 4 columns.
  template <typename Rows>
  __device__ __forceinline__ void LoadFours(const Rows& rows, int64_t row, int columns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = Column(half);
      Four four = {};
      if (inside && column < columns) four = rows.At4(row, column);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[4 * half + i] = four.v[i];
    }
  }
  template <typename Rows>
  __device__ void Load(const Rows& rows, int64_t row, int columns) {
    if (columns % 4 == 0) return LoadFours(rows, row, columns);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = Column(i / 4) + i % 4;
      v[i] = inside && column < columns ? rows.At(row, column) : 0.0f;
    }
  }
  // The largest magnitude's bits, which are in the order of magnitudes; NaN is the largest.
  __device__ __forceinline__ uint32_t MaxBits() const {
    uint32_t max = 0;
#pragma unroll
    for (const float x : v) max = ::max(max, __float_as_uint(x) & 0x7fffffffu);
    return max;
  }
  // Of the 32 columns that a quad has.
  __device__ __forceinline__ float QuadMax() const {
    uint32_t max = MaxBits();
#pragma unroll
    for (int d = 1; d < 4; d *= 2) max = ::max(max, __shfl_xor_sync(0xffffffffu, max, d));
    return __uint_as_float(max);
  }
  // In the tiled layouts: every 32 columns to multiples of a 127th of their largest magnitude.
  __device__ void RoundToQ8() {
    const float scale = QuadMax() / 127.0f;
    if (!(scale > 0 && scale < INFINITY)) return;
    for (float& x : v) x = roundf(x / scale) * scale;
  }
  // Of the values times `factor`; finite where these are at most 2^15.
  __device__ float Squares(float factor) const {
    float sum = 0;
    for (const float x : v) sum = fmaf(x * factor, x * factor, sum);
    return sum;
  }
};

__device__ __forceinline__ float SumHalves(uint32_t packed) {
  const float2 f = __half22float2(*reinterpret_cast<const half2*>(&packed));
  return f.x + f.y;
}

// A prepared row, writable.
struct OutRow {
  Layout layout;
  int64_t units;  // of 32 columns
  uint8_t* values;
  float* scales;
  uint32_t* sums;
};

// The same group of the four units of a chunk is in lanes 4 apart. Of pair i of each, lane i gets all
// four: the 8 columns that a tensor core's product takes from the units.
__device__ __forceinline__ uint4 TransposeUnits(uint4 own) {
  const int unit = threadIdx.x % 16 / 4;
  // First halves of two words change places between units 2 apart, then single words between units 1
  // apart.
  const bool high = unit & 2, odd = unit & 1;
  uint32_t a = high ? own.x : own.z, b = high ? own.y : own.w;
  a = __shfl_xor_sync(0xffffffffu, a, 8);
  b = __shfl_xor_sync(0xffffffffu, b, 8);
  if (high) {
    own.x = a, own.y = b;
  } else {
    own.z = a, own.w = b;
  }
  a = odd ? own.x : own.y;
  b = odd ? own.z : own.w;
  a = __shfl_xor_sync(0xffffffffu, a, 4);
  b = __shfl_xor_sync(0xffffffffu, b, 4);
  if (odd) {
    own.x = a, own.z = b;
  } else {
    own.y = a, own.w = b;
  }
  return own;
}

__device__ __forceinline__ uint4 PackGroup(const Group& group, float factor) {
  const auto pack = [&](int i) {
    return PackTwo<half2>(group.v[i] * factor, group.v[i + 1] * factor);
  };
  return {pack(0), pack(2), pack(4), pack(6)};
}

// In the tiled layouts, whose chunks are 16 groups, what is written in place of a group, and where:
// lane t has unit t.
__device__ __forceinline__ uint4 PackTiled(Layout layout, const Group& group, float factor) {
  const uint4 packed = PackGroup(group, factor);
  return layout == Layout::kF16Wide ? TransposeUnits(packed) : packed;
}
__device__ __forceinline__ int PlaceOfGroup(int index) {
  return index / 16 * 16 + index % 4 * 4 + index % 16 / 4;
}

__device__ __forceinline__ void WriteHalves(const OutRow& out, const Group& group, float factor) {
  const uint4 packed = PackGroup(group, factor);
  if (group.inside) reinterpret_cast<uint4*>(out.values)[group.index] = packed;
  if (out.layout != Layout::kF16Lanes) return;
  float2 sum = {SumHalves(packed.x) + SumHalves(packed.y),
                SumHalves(packed.z) + SumHalves(packed.w)};
  for (int d = 1; d < 4; d *= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, d);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, d);
  }
  if (group.inside && group.index % 4 == 0) {
    reinterpret_cast<uint2*>(out.sums)[group.index / 4] =
        make_uint2(SplitBF16(sum.x), SplitBF16(sum.y));
  }
}

// q8_1: d = max / 127 over 32 columns, q = x / d rounded half away from zero.
__device__ __forceinline__ void WriteS8(const OutRow& out, const Group& group) {
  const float scale = group.QuadMax() / 127.0f;
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool finite = scale > 0 && scale < INFINITY;
    const int q = finite ? static_cast<int>(roundf(group.v[i] / scale)) : 0;
    words[i / 4] |= static_cast<uint32_t>(q & 0xff) << 8 * (i % 4);
  }
  if (!group.inside) return;
  reinterpret_cast<uint2*>(out.values)[group.index] = make_uint2(words[0], words[1]);
  if (group.index % 4 == 0) out.scales[group.index / 4] = scale;
}

// Signed bytes of an integer below 2^22 in magnitude, lowest first: bytes[0] + 256 bytes[1] + 65536
// bytes[2].
__device__ __forceinline__ void SplitBytes(int x, int (&bytes)[3]) {
  for (int i = 0; i < 3; ++i) {
    bytes[i] = static_cast<int8_t>(x & 0xff);
    x = (x - bytes[i]) >> 8;
  }
}

__device__ __forceinline__ void WritePlanes(const OutRow& out, const Group& group) {
  const float max = group.QuadMax();
  // Brings the largest magnitude to 2^21 .. 2^22; not finite: the scale tells.
  const bool finite = max < INFINITY;
  const int exponent = finite && max > 0 ? min(21 - ilogbf(max), 126) : 0;
  const float factor = finite ? ldexpf(1.0f, exponent) : 0.0f;
  uint32_t planes[3][2] = {};
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int x = finite ? __float2int_rn(group.v[i] * factor) : 0;
    sum += x;
    int bytes[3];
    SplitBytes(x, bytes);
    for (int p = 0; p < 3; ++p) {
      planes[p][i / 4] |= static_cast<uint32_t>(bytes[2 - p] & 0xff) << 8 * (i % 4);
    }
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  const int other_sum = __shfl_xor_sync(0xffffffffu, sum, 2);
  if (!group.inside) return;
  const int64_t unit = group.index / 4, quarter = group.index % 4;
  for (int p = 0; p < 3; ++p) {
    const int64_t piece = (2 * p + quarter / 2) * out.units + unit;
    reinterpret_cast<uint2*>(out.values)[2 * piece + quarter % 2] =
        make_uint2(planes[p][0], planes[p][1]);
  }
  if (quarter == 0) {
    const float scale = finite ? ldexpf(1.0f, -exponent) : NAN;
    reinterpret_cast<float4*>(out.values)[6 * out.units + unit] =
        make_float4(scale, static_cast<float>(sum), static_cast<float>(other_sum), 0.0f);
  }
}

// The group's eight values to `row`, 16 bytes at a time.
template <typename T>
__device__ __forceinline__ void WriteEight(void* row, const Group& group, const T (&values)[8]) {
  constexpr int kPieces = sizeof(values) / 16;
  uint4 pieces[kPieces];
  memcpy(pieces, values, sizeof(values));
#pragma unroll
  for (int i = 0; i < kPieces; ++i) static_cast<uint4*>(row)[group.index * kPieces + i] = pieces[i];
}

template <typename T>
__device__ __forceinline__ void WriteAs(const OutRow& out, const Group& group) {
  if (!group.inside) return;
  T values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = static_cast<T>(group.v[i]);
  WriteEight(out.values, group, values);
}

__device__ __forceinline__ void WritePair(const OutRow& out, const Group& group) {
  if (!group.inside) return;
  __nv_bfloat16 high[8], low[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    high[i] = __float2bfloat16_rn(group.v[i]);
    low[i] = __float2bfloat16_rn(group.v[i] - __bfloat162float(high[i]));
  }
  WriteEight(out.values, group, high);
  WriteEight(out.values + out.units * 64, group, low);
}

__device__ __forceinline__ void Write(const OutRow& out, const Group& group, float factor) {
  switch (out.layout) {
    case Layout::kF16Lanes:
    case Layout::kF16:
      return WriteHalves(out, group, factor);
    case Layout::kS8Lanes:
      return WriteS8(out, group);
    case Layout::kPlanes:
      return WritePlanes(out, group);
    case Layout::kBF16:
      return WriteAs<__nv_bfloat16>(out, group);
    case Layout::kBF16Pair:
      return WritePair(out, group);
    case Layout::kF32:
      return WriteAs<float>(out, group);
    case Layout::kF16Narrow:
    case Layout::kF16Wide:
      return;  // PrepareTiledRow
  }
}

}  // namespace jax_moe::cuda
