// The tiled layout: the bits of GGUF's blocks in the order in which the CUDA kernels read them.
//
// A unit is 32 consecutive weights of a row, a chunk 4 units (the last one of a row may have
// fewer where a block is shorter than 256 weights), a band 16 rows of an expert. A band occupies
// the bytes that its rows occupy in GGUF's layout. Inside it are atoms in column order: two chunks
// (one block) where a block has 256 weights, one chunk otherwise. Inside an atom come the planes,
// first those of units and then those of rows. With w bytes an element, a plane of units is, for
// each chunk,
//
//     [row 0..15][unit of the chunk][w]        and a plane of rows        [row 0..15][w].
//
// The elements of one block, one after another, are its record: for each unit those of the planes
// of units, then those of the planes of rows. A record has the bits of its block in another order.
// Tiling<FORMAT> states that order, and everything else is derived from it:
//
//   struct Tiling<FORMAT> {
//     static constexpr int kCodeBits;         // bits of a weight in the block
//     static constexpr tiled::Order kOrder;   // in which Packing places them in a unit's words
//     using UnitPlanes = Planes<...>;         // bytes an element: codes first, then scales
//     using RowPlanes = Planes<...>;
//     // The bit of the block, byte 0's lowest is bit 0, which holds
//     static JM_HD constexpr int Code(int w, int b);        // bit b of weight w of the block,
//     static JM_HD constexpr int UnitBit(int unit, int b);  // bit b after the unit's codes,
//     static JM_HD constexpr int RowBit(int b);             // bit b of the planes of rows.
//   };
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "ffi/blocks/formats.h"

namespace jax_moe {

inline constexpr int kBandRows = 16;
inline constexpr int kChunkUnits = 4;

template <typename Format>
struct Tiling;

// The bytes of an element of each plane.
template <int... kWidths>
struct Planes {
  static constexpr int kCount = sizeof...(kWidths);
  static constexpr int kBytes = (0 + ... + kWidths);
  static JM_HD constexpr int Width(int plane) {
    const int widths[] = {kWidths..., 0};
    return widths[plane];
  }
};

namespace tiled {

// A bit of a unit's codes: bit `bit` of weight `weight`.
struct CodeBit {
  int weight, bit;
};

// kNatural: weight after weight. The others put weights 2i and 2i + 1, a pair, at the same bits of
// a word's halves, so that one mask takes both.
//
// kPairs: pair after pair. Where the bits of a code do not divide 16 the last pair goes into the
// bits that are left, one of each word.
//
// kE2M1: pairs of E2M1 codes, s e1 e0 m from bit 3 down. A byte of a half has two, whose bits from
// 7 down are
//
//     s  e1' e0' m'  e1 e0 m  s'
//
// for pairs 4j (s e1 e0 m) and 4j + 2 (primed) of word j in the halves' high bytes and for 4j + 1
// and 4j + 3 in the low ones. Masked in a high byte, the first is the f16 number v * 2^-14 for its
// value v; so is the second once three of its bits are shifted by 3 and its sign by 7, in both
// bytes at once.
enum class Order { kNatural, kPairs, kE2M1 };

// What bit `position` of word `word` of a unit's codes holds.
JM_HD constexpr CodeBit Packing(int bits, Order order, int word, int position) {
  if (order == Order::kNatural) {
    return {32 / bits * word + position / bits, position % bits};
  }
  const int half = position / 16, bit = position % 16;
  if (order == Order::kE2M1) {
    const int in_byte = bit % 8;
    const bool second = in_byte == 0 || (in_byte > 3 && in_byte < 7);
    const int pair = 4 * word + 2 * second + (bit < 8);
    const int code_bit = in_byte % 7 == 0 ? 3 : (in_byte - 1) % 3;
    return {2 * pair + half, code_bit};
  }
  if (bits == 6) {
    // Words A, B, C of 16 weights, two pairs each; pairs 6 and 7 lie in what is left: the low four
    // bits of 6 in A and of 7 in C, the high two of both in B.
    const int pair = 8 * (word / 3), part = word % 3;
    if (bit < 12) return {2 * (pair + 2 * part + bit / 6) + half, bit % 6};
    if (part != 1) return {2 * (pair + (part == 0 ? 6 : 7)) + half, bit - 12};
    return {2 * (pair + (bit < 14 ? 6 : 7)) + half, 4 + bit % 2};
  }
  const int pairs_a_word = 16 / bits;
  if (bit < pairs_a_word * bits) {
    return {2 * (pairs_a_word * word + bit / bits) + half, bit % bits};
  }
  return {30 + half, word};
}

// --- Where fields lie in GGUF's blocks ---

// 16 bytes of nibbles: weights 0..15 in the low ones, 16..31 in the high ones.
JM_HD constexpr int Nibble(int byte, int w, int b) {
  return 8 * (byte + w % 16) + 4 * (w / 16) + b;
}

// Nibbles of 256 weights: units 2i in the low and 2i + 1 in the high ones of 32 bytes.
JM_HD constexpr int NibbleOf256(int byte, int w, int b) {
  return 8 * (byte + 32 * (w / 64) + w % 32) + 4 * (w / 32 % 2) + b;
}

// Bit pairs of 256 weights: four units in 32 bytes.
JM_HD constexpr int BitPair(int byte, int w, int b) {
  return 8 * (byte + 32 * (w / 128) + w % 32) + 2 * (w / 32 % 4) + b;
}

// One bit of 256 weights: bit u of 32 bytes for unit u.
JM_HD constexpr int BitOfUnit(int byte, int w) { return 8 * (byte + w % 32) + w / 32; }

// d and dmin of Q4_K and Q5_K as they are; then for t = 0..3, six bits each: the scale and minimum
// of units t and 4 + t.
JM_HD constexpr int SixBitScalesAndMinima(int bit) {
  if (bit < 32) return bit;
  const int field = (bit - 32) / 6, b = (bit - 32) % 6;
  const int t = field / 4;
  const bool late = field / 2 % 2, minimum = field % 2;
  if (!late) return 8 * (4 + t + 4 * minimum) + b;
  return b < 4 ? 8 * (12 + t) + 4 * minimum + b : 8 * (4 + t + 4 * minimum) + 6 + b - 4;
}

}  // namespace tiled

// --- The formats ---

// A scale (and minimum) at the front of a block of 32 weights, then nibbles.
template <int kScaleBytes, tiled::Order kNibbleOrder>
struct NibbleTiling {
  static constexpr int kCodeBits = 4;
  static constexpr tiled::Order kOrder = kNibbleOrder;
  using UnitPlanes = Planes<16, kScaleBytes>;
  using RowPlanes = Planes<>;
  static JM_HD constexpr int Code(int w, int b) { return tiled::Nibble(kScaleBytes, w, b); }
  static JM_HD constexpr int UnitBit(int, int b) { return b; }
  static JM_HD constexpr int RowBit(int) { return 0; }
};
template <>
struct Tiling<Q4_0> : NibbleTiling<2, tiled::Order::kPairs> {};
template <>
struct Tiling<Q4_1> : NibbleTiling<4, tiled::Order::kPairs> {};
template <>
struct Tiling<IQ4_NL> : NibbleTiling<2, tiled::Order::kNatural> {};
template <>
struct Tiling<MXFP4> : NibbleTiling<1, tiled::Order::kE2M1> {};

template <int kScaleBytes>
struct FiveBitTiling {
  static constexpr int kCodeBits = 5;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<16, 4, kScaleBytes>;
  using RowPlanes = Planes<>;
  static JM_HD constexpr int Code(int w, int b) {
    return b < 4 ? tiled::Nibble(kScaleBytes + 4, w, b) : 8 * kScaleBytes + w;
  }
  static JM_HD constexpr int UnitBit(int, int b) { return b; }
  static JM_HD constexpr int RowBit(int) { return 0; }
};
template <>
struct Tiling<Q5_0> : FiveBitTiling<2> {};
template <>
struct Tiling<Q5_1> : FiveBitTiling<4> {};

template <>
struct Tiling<Q8_0> {
  static constexpr int kCodeBits = 8;
  static constexpr tiled::Order kOrder = tiled::Order::kNatural;
  using UnitPlanes = Planes<16, 16, 2>;
  using RowPlanes = Planes<>;
  static JM_HD constexpr int Code(int w, int b) { return 8 * (2 + w) + b; }
  static JM_HD constexpr int UnitBit(int, int b) { return b; }
  static JM_HD constexpr int RowBit(int) { return 0; }
};

template <>
struct Tiling<NVFP4> {
  static constexpr int kCodeBits = 4;
  static constexpr tiled::Order kOrder = tiled::Order::kE2M1;
  using UnitPlanes = Planes<16, 2>;
  using RowPlanes = Planes<>;
  static JM_HD constexpr int Code(int w, int b) {
    return 8 * (4 + 8 * (w / 16) + w % 8) + 4 * (w / 8 % 2) + b;
  }
  static JM_HD constexpr int UnitBit(int unit, int b) { return 16 * unit + b; }
  static JM_HD constexpr int RowBit(int) { return 0; }
};

template <>
struct Tiling<Q2_K> {
  static constexpr int kCodeBits = 2;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<8, 2>;
  using RowPlanes = Planes<4>;
  static JM_HD constexpr int Code(int w, int b) { return tiled::BitPair(16, w, b); }
  static JM_HD constexpr int UnitBit(int unit, int b) { return 16 * unit + b; }
  static JM_HD constexpr int RowBit(int b) { return 8 * 80 + b; }
};

template <>
struct Tiling<Q3_K> {
  static constexpr int kCodeBits = 3;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<8, 4>;
  using RowPlanes = Planes<12, 2>;
  static JM_HD constexpr int Code(int w, int b) {
    return b < 2 ? tiled::BitPair(32, w, b) : tiled::BitOfUnit(0, w);
  }
  static JM_HD constexpr int UnitBit(int, int) { return 0; }
  // For t = 0..3 the six bits of the scales of groups 2t, 2t + 1, 8 + 2t and 8 + 2t + 1; then d.
  static JM_HD constexpr int RowBit(int bit) {
    if (bit >= 96) return 8 * 108 + bit - 96;
    const int field = bit / 6, b = bit % 6;
    const int group = 2 * (field / 4) + field % 2 + 8 * (field / 2 % 2);
    return b < 4 ? 8 * (96 + group % 8) + 4 * (group / 8) + b
                 : 8 * (104 + group % 4) + 2 * (group / 4) + b - 4;
  }
};

template <>
struct Tiling<Q4_K> {
  static constexpr int kCodeBits = 4;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<16>;
  using RowPlanes = Planes<16>;
  static JM_HD constexpr int Code(int w, int b) { return tiled::NibbleOf256(16, w, b); }
  static JM_HD constexpr int UnitBit(int, int) { return 0; }
  static JM_HD constexpr int RowBit(int b) { return tiled::SixBitScalesAndMinima(b); }
};

template <>
struct Tiling<Q5_K> {
  static constexpr int kCodeBits = 5;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<16, 4>;
  using RowPlanes = Planes<16>;
  static JM_HD constexpr int Code(int w, int b) {
    return b < 4 ? tiled::NibbleOf256(48, w, b) : tiled::BitOfUnit(16, w);
  }
  static JM_HD constexpr int UnitBit(int, int) { return 0; }
  static JM_HD constexpr int RowBit(int b) { return tiled::SixBitScalesAndMinima(b); }
};

template <>
struct Tiling<Q6_K> {
  static constexpr int kCodeBits = 6;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<16, 8, 2>;
  using RowPlanes = Planes<2>;
  // Of every 128 weights, units 0 and 1 have the low nibbles of 64 bytes, 2 and 3 the high ones.
  static JM_HD constexpr int Code(int w, int b) {
    return b < 4 ? 8 * (64 * (w / 128) + w % 64) + 4 * (w / 64 % 2) + b
                 : tiled::BitPair(128, w, b - 4);
  }
  static JM_HD constexpr int UnitBit(int unit, int b) { return 8 * (192 + 2 * unit) + b; }
  static JM_HD constexpr int RowBit(int b) { return 8 * 208 + b; }
};

template <>
struct Tiling<IQ4_XS> {
  static constexpr int kCodeBits = 4;
  static constexpr tiled::Order kOrder = tiled::Order::kNatural;
  using UnitPlanes = Planes<16>;
  using RowPlanes = Planes<8>;
  static JM_HD constexpr int Code(int w, int b) {
    return tiled::Nibble(8 + 16 * (w / 32), w % 32, b);
  }
  static JM_HD constexpr int UnitBit(int, int) { return 0; }
  // d; then for t = 0..3 the six bits of the scales of units t and 4 + t.
  static JM_HD constexpr int RowBit(int bit) {
    if (bit < 16) return bit;
    const int field = (bit - 16) / 6, b = (bit - 16) % 6;
    const int unit = field / 2 + 4 * (field % 2);
    return b < 4 ? 8 * (4 + unit / 2) + 4 * (unit % 2) + b : 16 + 2 * unit + b - 4;
  }
};

// --- What follows from them ---

template <typename Format, typename = void>
struct HasTiling : std::false_type {};
template <typename Format>
struct HasTiling<Format, std::void_t<decltype(Tiling<Format>::kCodeBits)>> : std::true_type {};

// As VisitFormat, for the formats that can be tiled.
template <typename F>
bool VisitTiledFormat(int type, F&& f) {
  bool found = false;
  VisitFormat(type, [&](auto format) {
    if constexpr (HasTiling<decltype(format)>::value) {
      found = true;
      f(format);
    }
  });
  return found;
}

namespace tiled {

template <typename Format>
struct Sizes {
  static constexpr int kUnits = Format::kBlock / 32;  // of a record
  static constexpr int kAtomUnits = kUnits == 8 ? 8 : kChunkUnits;
  static constexpr int kUnitBytes = Tiling<Format>::UnitPlanes::kBytes;
  static constexpr int kRowBytes = Tiling<Format>::RowPlanes::kBytes;
  static_assert(kUnits * kUnitBytes + kRowBytes == Format::kBytes);
};

// The bit of a block that bit `bit` of its record holds.
template <typename Format>
constexpr int BlockBit(int bit) {
  using T = Tiling<Format>;
  constexpr int kUnitBits = 8 * Sizes<Format>::kUnitBytes;
  const int unit = bit / kUnitBits, in_unit = bit % kUnitBits;
  if (unit < Sizes<Format>::kUnits) {
    if (in_unit >= 32 * T::kCodeBits) return T::UnitBit(unit, in_unit - 32 * T::kCodeBits);
    const CodeBit code = Packing(T::kCodeBits, T::kOrder, in_unit / 32, in_unit % 32);
    return T::Code(32 * unit + code.weight, code.bit);
  }
  return T::RowBit(bit - Sizes<Format>::kUnits * kUnitBits);
}

// For every bit of a record the block's bit that it holds, and the other way round.
template <typename Format>
struct BitTables {
  static constexpr int kBits = 8 * Format::kBytes;
  uint16_t block_bit[kBits];
  uint16_t record_bit[kBits];
  bool is_permutation;
};

template <typename Format>
constexpr BitTables<Format> MakeBitTables() {
  BitTables<Format> tables{};
  constexpr int kBits = BitTables<Format>::kBits;
  for (int i = 0; i < kBits; ++i) tables.record_bit[i] = kBits;
  tables.is_permutation = true;
  for (int i = 0; i < kBits; ++i) {
    const int from = BlockBit<Format>(i);
    if (from < 0 || from >= kBits || tables.record_bit[from] != kBits) {
      tables.is_permutation = false;
      return tables;
    }
    tables.block_bit[i] = static_cast<uint16_t>(from);
    tables.record_bit[from] = static_cast<uint16_t>(i);
  }
  return tables;
}

// Whether no bit is lost: the layout can be undone.
template <typename Format>
constexpr bool IsPermutation() {
  if constexpr (HasTiling<Format>::value) return MakeBitTables<Format>().is_permutation;
  return true;
}

#define JAX_MOE_CASE(FORMAT) static_assert(IsPermutation<FORMAT>());
JAX_MOE_FORMATS(JAX_MOE_CASE)
#undef JAX_MOE_CASE

// Offset in its band of byte `byte` of the record of block `block` of row `row`, for rows of
// `units` units.
template <typename Format>
JM_HD int64_t BandOffset(int row, int64_t block, int byte, int64_t units) {
  using S = Sizes<Format>;
  const int64_t first_unit = block * S::kUnits;
  const int64_t atom = first_unit / S::kAtomUnits;
  const int64_t left = units - atom * S::kAtomUnits;
  const int atom_units = left < S::kAtomUnits ? static_cast<int>(left) : S::kAtomUnits;
  int64_t offset = atom * kBandRows * (S::kAtomUnits * S::kUnitBytes + S::kRowBytes);
  if (byte >= S::kUnits * S::kUnitBytes) {
    byte -= S::kUnits * S::kUnitBytes;
    offset += kBandRows * atom_units * S::kUnitBytes;
    using Rows = typename Tiling<Format>::RowPlanes;
    for (int plane = 0; plane < Rows::kCount; ++plane) {
      const int width = Rows::Width(plane);
      if (byte < width) return offset + row * width + byte;
      offset += kBandRows * width;
      byte -= width;
    }
    return offset;
  }
  const int unit = static_cast<int>(first_unit % S::kAtomUnits) + byte / S::kUnitBytes;
  const int chunk = unit / kChunkUnits, t = unit % kChunkUnits;
  const int chunk_units = atom_units < kChunkUnits ? atom_units : kChunkUnits;
  byte %= S::kUnitBytes;
  using Units = typename Tiling<Format>::UnitPlanes;
  for (int plane = 0; plane < Units::kCount; ++plane) {
    const int width = Units::Width(plane);
    if (byte < width) {
      return offset + width * (kBandRows * kChunkUnits * chunk + row * chunk_units + t) + byte;
    }
    offset += kBandRows * atom_units * width;
    byte -= width;
  }
  return offset;
}

// --- aux: what a kernel must know of a row's and an expert's magnitudes ---

// The bits of the largest magnitude among a unit's scales and 1/256 of its offsets, at least
// `largest`, and the sum of the squares of its weights, added to `squares`. Inf and NaN have larger
// bits than any number.
template <typename Format>
JM_HD void MeasureUnit(const uint8_t* block, int unit, uint32_t& largest, double& squares) {
  uint32_t q[8];
  Format::Unit(block, unit, q);
  constexpr int kGroups = 32 / Format::kGroup;
  for (int g = 0; g < kGroups; ++g) {
    int sum = 0, sum_of_squares = 0;
    for (int j = g * (8 / kGroups); j < (g + 1) * (8 / kGroups); ++j) {
      for (int b = 0; b < 4; ++b) {
        const int value = static_cast<int8_t>(q[j] >> 8 * b);
        sum += value;
        sum_of_squares += value * value;
      }
    }
    const Affine group = Format::Group(block, unit * kGroups + g);
    const float magnitudes[] = {group.scale, group.offset * 0x1p-8f};
    for (const float magnitude : magnitudes) {
#if defined(__CUDA_ARCH__)
      const uint32_t bits = __float_as_uint(magnitude) & 0x7fffffffu;
#else
      uint32_t bits;
      std::memcpy(&bits, &magnitude, 4);
      bits &= 0x7fffffffu;
#endif
      largest = bits > largest ? bits : largest;
    }
    const double scale = group.scale, offset = group.offset;
    squares += scale * scale * sum_of_squares + 2 * scale * offset * sum +
               offset * offset * Format::kGroup;
  }
}

inline constexpr uint32_t kInfinityBits = 0x7f800000u;

// A row's normaliser, a power of two: 2^10 times that of the largest magnitude, between 2^-100 and
// 2^100; 1 for a row of zeros; NaN where a scale or an offset is not finite.
JM_HD float RowNormaliser(uint32_t largest) {
  if (largest == 0) return 1.0f;
  if (largest >= kInfinityBits) return BitsToFloat(0x7fc00000u);
  int exponent = static_cast<int>(largest >> 23) - 127 + 10;
  exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
  return BitsToFloat(static_cast<uint32_t>(exponent + 127) << 23);
}

// A row's Euclidean norm, zero for a row that is not finite.
JM_HD float RowNorm(uint32_t largest, double squares) {
  if (largest >= kInfinityBits || !(squares > 0)) return 0.0f;
  const double norm = sqrt(squares);
  return norm < 3.4e38 ? static_cast<float>(norm) : 3.4e38f;
}

// An expert's bound on its rows' norms, from the largest of them: rounding is covered.
JM_HD float NormBound(float largest_norm) {
  return largest_norm < 3.39e38f ? 1.001f * largest_norm : 3.4e38f;
}

}  // namespace tiled
}  // namespace jax_moe
