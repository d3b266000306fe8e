// Packed weights on their way from global memory to the tensor cores: raw block bytes are copied to
// shared memory as they are, then every thread decodes units of 32 weights to int8 there. The
// weights stay integers: scales and offsets are applied to the float32 sums of a group, so nothing
// is rounded and no scale can over- or underflow.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>

#include "ffi/blocks/decoder.h"
#include "ffi/cuda/gemm.h"
#include "ffi/cuda/ptx.cuh"

namespace jax_moe::cuda {

// A row's kWeights consecutive weights in shared memory, at the same address modulo 16 as in global
// memory, so that 16-byte copies serve blocks of any size and decoders see the blocks' own
// alignment.
template <typename Format, int kWeights>
struct RawChunk {
  static constexpr int kBytes = kWeights / Format::kBlock * Format::kBytes;
  static constexpr bool kAligned = Format::kBytes % 16 == 0;
  static constexpr int kPieces = kAligned ? kBytes / 16 : (kBytes + 15 + 15) / 16;
  static constexpr int kSlot = 16 * kPieces;
};

// Where in its slot chunk `chunk` of the row at `row` begins.
template <typename Raw>
__device__ __forceinline__ int Shift(const uint8_t* row, int chunk) {
  return static_cast<int>(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row)) +
                          static_cast<uint32_t>(chunk) * Raw::kBytes) &
         15;
}

// One expert's rows of one of the two weight matrices.
struct Rows {
  const uint8_t* tensor;  // 16-byte aligned
  int64_t tensor_bytes;
  int64_t first;  // row of the tensor at which the expert begins
  int count;
  int64_t row_bytes;

  // Byte of the tensor at which row `row` begins; rows past the end repeat the last.
  __device__ __forceinline__ int64_t Start(int row) const {
    return (first + min(row, count - 1)) * row_bytes;
  }
};

// Which rows a band of `band_rows` rows covers. Bands do not cross from one matrix to the other.
struct Band {
  Rows rows;
  int begin;         // row within the expert
  int64_t y_column;  // column of y of row 0
  bool valid;
};

__device__ __forceinline__ Band FindBand(const GemmArgs& args, int expert, int64_t index,
                                         int band_rows) {
  const int64_t bands0 = (args.rows[0] + band_rows - 1) / band_rows;
  const int which = index >= bands0 ? 1 : 0;
  const int64_t rows = which ? args.rows[1] : args.rows[0];
  const int64_t begin = (index - (which ? bands0 : 0)) * band_rows;
  return {{which ? args.weight[1] : args.weight[0], args.experts * rows * args.row_bytes,
           expert * rows, static_cast<int>(rows), args.row_bytes},
          static_cast<int>(begin),
          which ? args.rows[0] : 0,
          begin < rows};
}

// Copies chunks of a row to shared memory. Two threads share a row and take every other 16 bytes.
template <typename Raw>
class RowCopier {
 public:
  __device__ __forceinline__ RowCopier(const Rows& rows, int row, int half)
      : from_(rows.tensor + rows.Start(row)),
        row_bytes_(static_cast<int>(rows.row_bytes)),
        left_(static_cast<int>(min(rows.tensor_bytes - rows.Start(row), int64_t{1} << 30))),
        half_(half) {}

  __device__ __forceinline__ void Copy(uint8_t* slot, int chunk) const {
    const int begin = chunk * Raw::kBytes;
    const int shift = Raw::kAligned ? 0 : Shift<Raw>(from_, chunk);
    const int end = min(begin + Raw::kBytes, row_bytes_) - begin + shift;
    const uint8_t* from = from_ + begin - shift + 16 * half_;
    slot += 16 * half_;
#pragma unroll
    for (int i = 0; i < (Raw::kPieces + 1) / 2; ++i) {
      const int at = 32 * i + 16 * half_;
      // Reads past the row's end, into the next one, but not past the tensor's.
      const int valid = Raw::kAligned ? 16 : min(16, left_ - begin + shift - at);
      if (at < end) CopyAsync16(slot + 32 * i, from + 32 * i, valid);
    }
  }

 private:
  const uint8_t* from_;
  int row_bytes_, left_, half_;
};

// Scale and offset of the one or two groups in a unit.
template <typename Format>
struct alignas(4 * (32 / Format::kGroup) * (Format::kHasOffset ? 2 : 1)) UnitScales {
  static constexpr int kGroups = 32 / Format::kGroup;
  static constexpr int kTerms = Format::kHasOffset ? 2 : 1;
  float terms[kGroups * kTerms];

  __device__ __forceinline__ float scale(int group) const { return terms[group * kTerms]; }
  __device__ __forceinline__ float offset(int group) const { return terms[group * kTerms + 1]; }
};

// Decodes one unit to 32 bytes in lane order (Layout::kF16Lanes): words 0 4 1 5 2 6 3 7.
template <typename Format>
__device__ __forceinline__ UnitScales<Format> DecodeUnit(const uint8_t* block, int unit,
                                                         uint8_t* q) {
  using Scales = UnitScales<Format>;
  // Blocks lie at their own alignment: telling the compiler lets it read 16 bytes at once.
  constexpr int kAlign = Format::kBytes % 16 == 0 ? 16 : Format::kBytes % 8 == 0 ? 8 : 1;
  block = static_cast<const uint8_t*>(__builtin_assume_aligned(block, kAlign));
  uint32_t w[8];
  Format::Unit(block, unit, w);
  uint4* to = reinterpret_cast<uint4*>(q);
  to[0] = make_uint4(w[0], w[4], w[1], w[5]);
  to[1] = make_uint4(w[2], w[6], w[3], w[7]);
  Scales result;
#pragma unroll
  for (int i = 0; i < Scales::kGroups; ++i) {
    const Affine affine = Format::Group(block, unit * Scales::kGroups + i);
    result.terms[i * Scales::kTerms] = affine.scale;
    if constexpr (Format::kHasOffset) result.terms[i * Scales::kTerms + 1] = affine.offset;
  }
  return result;
}

// Four int8 to four f16, exactly: 1024 + 128 + q is an f16 whose low byte is q ^ 0x80.
__device__ __forceinline__ void WordToHalves(uint32_t q, uint32_t& low, uint32_t& high) {
  const uint32_t biased = q ^ 0x80808080u;
  const half2 bias = __half2half2(__ushort_as_half(0x6480));
  const uint32_t a = __byte_perm(biased, 0x64646464u, 0x4140);
  const uint32_t b = __byte_perm(biased, 0x64646464u, 0x4342);
  const half2 x = __hsub2(*reinterpret_cast<const half2*>(&a), bias);
  const half2 y = __hsub2(*reinterpret_cast<const half2*>(&b), bias);
  low = *reinterpret_cast<const uint32_t*>(&x);
  high = *reinterpret_cast<const uint32_t*>(&y);
}

// A lane's weights of a unit, rows g and g + 8, as the A operands of its two products with K = 16.
__device__ __forceinline__ void LoadHalves(const uint8_t* row_g, const uint8_t* row_g8, int t,
                                           uint32_t (&first)[4], uint32_t (&second)[4]) {
  const uint2 x = *reinterpret_cast<const uint2*>(row_g + 8 * t);
  const uint2 y = *reinterpret_cast<const uint2*>(row_g8 + 8 * t);
  WordToHalves(x.x, first[0], first[2]);
  WordToHalves(y.x, first[1], first[3]);
  WordToHalves(x.y, second[0], second[2]);
  WordToHalves(y.y, second[1], second[3]);
}

}  // namespace jax_moe::cuda
