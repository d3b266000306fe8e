#include "ffi/cpu/repack.h"

#include <algorithm>

#include "ffi/blocks/tiled.h"

namespace jax_moe::cpu {
namespace {

template <typename F>
inline constexpr tiled::BitTables<F> kTables = tiled::MakeBitTables<F>();

// Bit i of `to` is bit source[i] of `from`.
template <int kBytes>
void PermuteBits(const uint8_t* from, const uint16_t (&source)[8 * kBytes], uint8_t* to) {
  uint8_t bits[8 * kBytes];
  for (int i = 0; i < kBytes; ++i) {
    for (int b = 0; b < 8; ++b) bits[8 * i + b] = from[i] >> b & 1;
  }
  for (int i = 0; i < kBytes; ++i) {
    unsigned byte = 0;
    for (int b = 0; b < 8; ++b) byte |= static_cast<unsigned>(bits[source[8 * i + b]]) << b;
    to[i] = static_cast<uint8_t>(byte);
  }
}

// Calls f(offset in the band, offset in the record, bytes) for every element of a block's record.
template <typename F, typename Copy>
void ForEachElement(int row, int64_t block, int64_t units, Copy&& copy) {
  using S = tiled::Sizes<F>;
  const auto copy_planes = [&](int byte, auto planes) {
    for (int plane = 0; plane < planes.kCount; ++plane) {
      const int width = planes.Width(plane);
      copy(tiled::BandOffset<F>(row, block, byte, units), byte, width);
      byte += width;
    }
  };
  for (int unit = 0; unit < S::kUnits; ++unit) {
    copy_planes(unit * S::kUnitBytes, typename Tiling<F>::UnitPlanes());
  }
  copy_planes(S::kUnits * S::kUnitBytes, typename Tiling<F>::RowPlanes());
}

// f(row of the band, block of the row, the block's place in GGUF's layout) for a band's blocks.
template <typename F, typename Block>
void ForEachBlock(int64_t row_bytes, Block&& f) {
  for (int row = 0; row < kBandRows; ++row) {
    for (int64_t block = 0; block < row_bytes / F::kBytes; ++block) {
      f(row, block, row * row_bytes + block * F::kBytes);
    }
  }
}

template <typename F>
void PackBand(const uint8_t* data, int64_t row_bytes, uint8_t* band, float* aux) {
  const int64_t units = row_bytes / F::kBytes * tiled::Sizes<F>::kUnits;
  uint32_t largest[kBandRows] = {};
  double squares[kBandRows] = {};
  ForEachBlock<F>(row_bytes, [&](int row, int64_t block, int64_t place) {
    uint8_t record[F::kBytes];
    PermuteBits<F::kBytes>(data + place, kTables<F>.block_bit, record);
    ForEachElement<F>(row, block, units, [&](int64_t in_band, int in_record, int bytes) {
      std::memcpy(band + in_band, record + in_record, bytes);
    });
    for (int unit = 0; unit < tiled::Sizes<F>::kUnits; ++unit) {
      tiled::MeasureUnit<F>(data + place, unit, largest[row], squares[row]);
    }
  });
  for (int row = 0; row < kBandRows; ++row) {
    aux[2 * row] = tiled::RowNormaliser(largest[row]);
    aux[2 * row + 1] = tiled::RowNorm(largest[row], squares[row]);
  }
}

template <typename F>
void UnpackBand(const uint8_t* band, int64_t row_bytes, uint8_t* data) {
  const int64_t units = row_bytes / F::kBytes * tiled::Sizes<F>::kUnits;
  ForEachBlock<F>(row_bytes, [&](int row, int64_t block, int64_t place) {
    uint8_t record[F::kBytes];
    ForEachElement<F>(row, block, units, [&](int64_t in_band, int in_record, int bytes) {
      std::memcpy(record + in_record, band + in_band, bytes);
    });
    PermuteBits<F::kBytes>(record, kTables<F>.record_bit, data + place);
  });
}

void BoundNorms(int64_t rows, float* aux) {
  float largest = 0;
  for (int64_t row = 0; row < rows; ++row) largest = std::max(largest, aux[2 * row + 1]);
  for (int64_t row = 0; row < rows; ++row) aux[2 * row + 1] = tiled::NormBound(largest);
}

bool IsLarge(const RepackShape& shape) {
  return shape.experts * shape.rows * shape.row_bytes >= 1 << 16;
}

}  // namespace

void RunRepack(int format, const RepackShape& shape, const uint8_t* data, uint8_t* tiled,
               float* aux, const Executor& executor) {
  const int64_t bands = shape.experts * shape.rows / kBandRows;
  VisitTiledFormat(format, [&](auto decoder) {
    RunPhases(executor,
              {{bands,
                [&](int64_t band) {
                  const int64_t place = band * kBandRows * shape.row_bytes;
                  PackBand<decltype(decoder)>(data + place, shape.row_bytes, tiled + place,
                                              aux + band * kBandRows * 2);
                }},
               {shape.experts,
                [&](int64_t expert) { BoundNorms(shape.rows, aux + expert * shape.rows * 2); }}},
              IsLarge(shape));
  });
}

void RunUnpack(int format, const RepackShape& shape, const uint8_t* tiled, uint8_t* data,
               const Executor& executor) {
  const int64_t bands = shape.experts * shape.rows / kBandRows;
  VisitTiledFormat(format, [&](auto decoder) {
    RunPhases(executor,
              {{bands,
                [&](int64_t band) {
                  const int64_t place = band * kBandRows * shape.row_bytes;
                  UnpackBand<decltype(decoder)>(tiled + place, shape.row_bytes, data + place);
                }}},
              IsLarge(shape));
  });
}

int64_t TiledBlockBytes(int format) {
  int64_t bytes = 0;
  VisitTiledFormat(format, [&](auto decoder) { bytes = decltype(decoder)::kBytes; });
  return bytes;
}

}  // namespace jax_moe::cpu
