#include "ffi/cpu/repack.h"

#include <algorithm>

#include "ffi/blocks/tiled.h"

namespace jax_moe::cpu {
namespace {

template <typename F>
inline constexpr tiled::BitTables<F> kTables = tiled::MakeBitTables<F>();

// Bit i of `to` is bit source[i] of `from`, zero past its end.
template <int kFrom, int kTo>
void GatherBits(const uint8_t (&from)[kFrom], const uint16_t (&source)[8 * kTo],
                uint8_t (&to)[kTo]) {
  uint8_t bits[8 * kFrom + 1];
  for (int i = 0; i < kFrom; ++i) {
    for (int b = 0; b < 8; ++b) bits[8 * i + b] = from[i] >> b & 1;
  }
  bits[8 * kFrom] = 0;
  for (int i = 0; i < kTo; ++i) {
    unsigned byte = 0;
    for (int b = 0; b < 8; ++b) byte |= static_cast<unsigned>(bits[source[8 * i + b]]) << b;
    to[i] = static_cast<uint8_t>(byte);
  }
}

template <typename F>
using Record = uint8_t[tiled::Sizes<F>::kBytes];

template <typename F>
void PackBlock(const uint8_t* block, Record<F>& record) {
  uint8_t source[tiled::Sizes<F>::kSourceBytes];
  std::memcpy(source, block, F::kBytes);
  if constexpr (tiled::kDerivedBytes<F> > 0) {
    for (int unit = 0; unit < tiled::Sizes<F>::kUnits; ++unit) {
      Tiling<F>::Derive(block, unit, source + F::kBytes);
    }
  }
  GatherBits(source, kTables<F>.source_bit, record);
}

template <typename F>
void UnpackBlock(const Record<F>& record, uint8_t* block) {
  uint8_t source[tiled::Sizes<F>::kSourceBytes];
  GatherBits(record, kTables<F>.record_bit, source);
  if constexpr (tiled::kDerivedBytes<F> > 0) Tiling<F>::Restore(source + F::kBytes, source);
  std::memcpy(block, source, F::kBytes);
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

// f(row of the band, block of the row) for a band's blocks.
template <typename Block>
void ForEachBlock(int64_t blocks, Block&& f) {
  for (int row = 0; row < kBandRows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) f(row, block);
  }
}

template <typename F>
void PackBand(const uint8_t* data, int64_t blocks, uint8_t* band, float* aux) {
  const int64_t units = blocks * tiled::Sizes<F>::kUnits;
  uint32_t largest[kBandRows] = {};
  double squares[kBandRows] = {};
  ForEachBlock(blocks, [&](int row, int64_t block) {
    const uint8_t* from = data + (row * blocks + block) * F::kBytes;
    Record<F> record;
    PackBlock<F>(from, record);
    ForEachElement<F>(row, block, units, [&](int64_t in_band, int in_record, int bytes) {
      std::memcpy(band + in_band, record + in_record, bytes);
    });
    for (int unit = 0; unit < tiled::Sizes<F>::kUnits; ++unit) {
      tiled::MeasureUnit<F>(from, unit, largest[row], squares[row]);
    }
  });
  for (int row = 0; row < kBandRows; ++row) {
    aux[2 * row] = tiled::RowNormaliser(largest[row]);
    aux[2 * row + 1] = tiled::RowNorm(largest[row], squares[row]);
  }
}

template <typename F>
void UnpackBand(const uint8_t* band, int64_t blocks, uint8_t* data) {
  const int64_t units = blocks * tiled::Sizes<F>::kUnits;
  ForEachBlock(blocks, [&](int row, int64_t block) {
    Record<F> record;
    ForEachElement<F>(row, block, units, [&](int64_t in_band, int in_record, int bytes) {
      std::memcpy(record + in_record, band + in_band, bytes);
    });
    UnpackBlock<F>(record, data + (row * blocks + block) * F::kBytes);
  });
}

void BoundNorms(int64_t rows, float* aux) {
  float largest = 0;
  for (int64_t row = 0; row < rows; ++row) largest = std::max(largest, aux[2 * row + 1]);
  for (int64_t row = 0; row < rows; ++row) aux[2 * row + 1] = tiled::NormBound(largest);
}

bool IsLarge(int format, const RepackShape& shape) {
  return shape.experts * shape.rows * shape.blocks * BlockBytesOf(format).gguf >= 1 << 16;
}

}  // namespace

void RunRepack(int format, const RepackShape& shape, const uint8_t* data, uint8_t* tiled,
               float* aux, const Executor& executor) {
  const int64_t bands = shape.experts * shape.rows / kBandRows;
  VisitFormat(format, [&](auto decoder) {
    using F = decltype(decoder);
    RunPhases(executor,
              {{bands,
                [&](int64_t band) {
                  const int64_t block = band * kBandRows * shape.blocks;
                  PackBand<F>(data + block * F::kBytes, shape.blocks,
                              tiled + block * tiled::Sizes<F>::kBytes, aux + band * kBandRows * 2);
                }},
               {shape.experts,
                [&](int64_t expert) { BoundNorms(shape.rows, aux + expert * shape.rows * 2); }}},
              IsLarge(format, shape));
  });
}

void RunUnpack(int format, const RepackShape& shape, const uint8_t* tiled, uint8_t* data,
               const Executor& executor) {
  const int64_t bands = shape.experts * shape.rows / kBandRows;
  VisitFormat(format, [&](auto decoder) {
    using F = decltype(decoder);
    RunPhases(executor,
              {{bands,
                [&](int64_t band) {
                  const int64_t block = band * kBandRows * shape.blocks;
                  UnpackBand<F>(tiled + block * tiled::Sizes<F>::kBytes, shape.blocks,
                                data + block * F::kBytes);
                }}},
              IsLarge(format, shape));
  });
}

}  // namespace jax_moe::cpu
