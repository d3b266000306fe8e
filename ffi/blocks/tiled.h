// The tiled layout: GGUF's blocks as the CUDA kernels read them.
//
// A unit is 32 consecutive weights of a row, a chunk 4 units (the last one of a row may have
// fewer where a block is shorter than 128 weights), a band 16 rows of an expert. Inside a band are
// atoms in column order: two chunks (one block) where a block has 256 weights, one chunk otherwise.
// Inside an atom come the planes, first those of units and then those of rows. With w bytes an
// element, a plane of units is, for each chunk,
//
//     [row 0..15][unit of the chunk][w]        and a plane of rows        [row 0..15][w].
//
// The elements of one block, one after another, are its record: for each unit those of the planes
// of units, then those of the planes of rows. A record has the bits of its source in another order.
// For most formats that is the block. Formats whose weights share code words are expanded: there
// the source is the block followed by derived bytes, among them a code for each weight, and the
// record leaves out the bits of the block that they replace. Tiling<FORMAT> states the order, and
// everything else follows from it:
//
//   struct Tiling<FORMAT> {
//     static constexpr int kCodeBits;         // bits of a weight in the record
//     static constexpr tiled::Order kOrder;   // in which Packing places them in a unit's words
//     using UnitPlanes = Planes<...>;         // bytes an element: codes first, then scales
//     using RowPlanes = Planes<...>;
//     // The bit of the source, byte 0's lowest is bit 0, which holds
//     static JM_HD constexpr int Code(int w, int b);        // bit b of weight w of the block,
//     static JM_HD constexpr int UnitBit(int unit, int b);  // bit b after the unit's codes,
//     static JM_HD constexpr int RowBit(int b);             // bit b of the planes of rows.
//     // Where it is expanded:
//     static constexpr int kDerivedBytes;
//     // Those of a unit, into their places among all.
//     static JM_HD void Derive(const uint8_t* block, int unit, uint8_t* derived);
//     // Sets the bits that the record leaves out in a block where they are zero.
//     static JM_HD void Restore(const uint8_t* derived, uint8_t* block);
//   };
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "ffi/blocks/codewords.h"
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
//
// kOctal: the low three bits weight after weight in nibbles. Of three bits, those of weight 24 + i
// are on top of the i-th nibbles of the three words. Of four, the fourth ones are on top of their
// word's nibbles: of weight i at bit 8 i + 7, of weight 4 + i at bit 8 i + 3.
enum class Order { kNatural, kPairs, kE2M1, kOctal };

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
  if (order == Order::kOctal) {
    const int nibble = position / 4, b = position % 4;
    if (b < 3) return {8 * word + nibble, b};
    return bits == 3 ? CodeBit{24 + nibble, word}
                     : CodeBit{8 * word + (nibble % 2 == 0 ? 4 : 0) + nibble / 2, 3};
  }
  if (bits == 6) {
    // Words A, B, C of 16 weights, two pairs each; pairs 6 and 7 lie in the halves' last four bits:
    // the low four bits of 6 in A and of 7 in C, the high two of both in B.
    const int pair = 8 * (word / 3), part = word % 3;
    if (bit >= 10) return {2 * (pair + 2 * part) + half, bit - 10};
    if (bit >= 4) return {2 * (pair + 2 * part + 1) + half, bit - 4};
    if (part != 1) return {2 * (pair + (part == 0 ? 6 : 7)) + half, bit};
    return {2 * (pair + (bit < 2 ? 6 : 7)) + half, 4 + bit % 2};
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

template <>
struct Tiling<TQ2_0> {
  static constexpr int kCodeBits = 2;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<8>;
  using RowPlanes = Planes<2>;
  static JM_HD constexpr int Code(int w, int b) { return tiled::BitPair(0, w, b); }
  static JM_HD constexpr int UnitBit(int, int) { return 0; }
  static JM_HD constexpr int RowBit(int b) { return 8 * 64 + b; }
};

template <>
struct Tiling<Q1_0> {
  static constexpr int kCodeBits = 1;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<4>;
  using RowPlanes = Planes<2>;
  static JM_HD constexpr int Code(int w, int) { return 8 * 2 + w; }
  static JM_HD constexpr int UnitBit(int, int) { return 0; }
  static JM_HD constexpr int RowBit(int b) { return b; }
};

// The two units of a block have a byte of d each.
template <>
struct Tiling<Q2_0> {
  static constexpr int kCodeBits = 2;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<8, 1>;
  using RowPlanes = Planes<>;
  static JM_HD constexpr int Code(int w, int b) { return 8 * 2 + 2 * w + b; }
  static JM_HD constexpr int UnitBit(int unit, int b) { return 8 * unit + b; }
  static JM_HD constexpr int RowBit(int) { return 0; }
};

// --- The expanded formats: what Derive gives first is a code for each weight ---

template <typename Format>
struct ExpandedTiling {
  static constexpr int kDerivedBytes = Format::kBlock;
  static JM_HD constexpr int Code(int w, int b) { return 8 * (Format::kBytes + w) + b; }
  static JM_HD constexpr int UnitBit(int, int) { return 0; }
  static JM_HD void Derive(const uint8_t* block, int unit, uint8_t* derived) {
    uint32_t q[8];
    Format::Unit(block, unit, q);
    for (int w = 0; w < 32; ++w) {
      const int value = static_cast<int8_t>(q[w / 4] >> 8 * (w % 4));
      derived[32 * unit + w] = static_cast<uint8_t>(Tiling<Format>::CodeOf(value));
    }
  }
};

// Digits 0, 1, 2. A byte has 256 values for the 243 of five digits, and the last four bytes have a
// digit that no weight uses: what tells them apart is kept beside d, though no kernel reads it.
template <>
struct Tiling<TQ1_0> : ExpandedTiling<TQ1_0> {
  static constexpr int kCodeBits = 2;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<8>;
  using RowPlanes = Planes<2, 8>;
  static constexpr int kBytes = 52, kLong = 48;  // of digits; of them, with five weights each
  static constexpr int kDerivedBytes = 256 + kBytes;
  static JM_HD constexpr uint32_t CodeOf(int value) { return static_cast<uint32_t>(value + 1); }
  // d; a bit for each of the first 48 bytes, four for each of the last.
  static JM_HD constexpr int RowBit(int b) {
    if (b < 16) return 8 * kBytes + b;
    b -= 16;
    const int rest = 8 * (TQ1_0::kBytes + 256);
    return b < kLong ? rest + 8 * b : rest + 8 * (kLong + (b - kLong) / 4) + (b - kLong) % 4;
  }
  static JM_HD void Derive(const uint8_t* block, int unit, uint8_t* derived) {
    ExpandedTiling::Derive(block, unit, derived);
    for (int i = unit; i < kBytes; i += 8) {
      const int digits = block[i] * 243 >> 8;
      const int rest = block[i] - FirstByte(digits);
      derived[256 + i] = static_cast<uint8_t>(i < kLong ? rest : digits % 3 | rest << 2);
    }
  }
  static JM_HD void Restore(const uint8_t* derived, uint8_t* block) {
    for (int i = 0; i < kBytes; ++i) {
      const int rest = derived[256 + i];
      int digits = 0;
      for (int n = 0; n < 5; ++n) {
        const int digit = n == 4 && i >= kLong ? rest & 3 : derived[WeightOf(i, n)];
        digits = 3 * digits + digit;
      }
      block[i] = static_cast<uint8_t>(FirstByte(digits) + (i < kLong ? rest : rest >> 2));
    }
  }

 private:
  // The least byte with these five digits.
  static JM_HD constexpr int FirstByte(int digits) { return (digits * 256 + 242) / 243; }
  // The weight that has digit n of byte i.
  static JM_HD constexpr int WeightOf(int i, int n) {
    return i < 32 ? 32 * n + i : i < kLong ? 160 + 16 * n + i - 32 : 240 + 4 * n + i - kLong;
  }
};

// g + 1: the shift of 1/8 is the kernels' offset.
template <typename Format>
struct Iq1Tiling : ExpandedTiling<Format> {
  static constexpr int kCodeBits = 2;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<8>;
  static JM_HD constexpr uint32_t CodeOf(int value) {
    return static_cast<uint32_t>(value + 12) >> 3;
  }
};

template <>
struct Tiling<IQ1_S> : Iq1Tiling<IQ1_S> {
  using RowPlanes = Planes<4, 2>;
  // For every unit its scale and the sign of its shift, then d.
  static JM_HD constexpr int RowBit(int b) {
    return b < 32 ? 8 * (34 + 2 * (b / 4)) + 12 + b % 4 : b - 32;
  }
  static JM_HD void Restore(const uint8_t* derived, uint8_t* block) {
    for (int i = 0; i < 32; ++i) {
      const uint32_t index = Iq1Index(derived + 8 * i);
      PutBits(block, 8 * (2 + i), 8, index);
      PutBits(block, 8 * (34 + 2 * (i / 4)) + 3 * (i % 4), 3, index >> 8);
    }
  }
};

template <>
struct Tiling<IQ1_M> : Iq1Tiling<IQ1_M> {
  using RowPlanes = Planes<12>;
  // For t = 0..3, ten bits for each of units t and 4 + t: two scales, four signs of shifts; then d.
  static JM_HD constexpr int RowBit(int b) {
    if (b >= 80) return 8 * (48 + 2 * ((b - 80) / 4)) + 12 + (b - 80) % 4;
    const int unit = b / 20 + 4 * (b / 10 % 2), field = b % 10;
    if (field >= 6) return 8 * (32 + 2 * unit) + 4 * (field - 6) + 3;
    const int group = 2 * unit + field / 3;
    return 8 * (48 + 2 * (group / 4)) + 3 * (group % 4) + field % 3;
  }
  static JM_HD void Restore(const uint8_t* derived, uint8_t* block) {
    for (int i = 0; i < 32; ++i) {
      const uint32_t index = Iq1Index(derived + 8 * i);
      PutBits(block, 8 * i, 8, index);
      PutBits(block, 8 * 32 + 4 * i, 3, index >> 8);
    }
  }
};

// 0, 1, 2 for the magnitudes 8, 25, 43, and the sign.
template <typename Format>
struct Iq2Tiling : ExpandedTiling<Format> {
  static constexpr int kCodeBits = 3;
  static constexpr tiled::Order kOrder = tiled::Order::kOctal;
  static JM_HD constexpr uint32_t CodeOf(int value) {
    return static_cast<uint32_t>(value < 0 ? -value : value) >> 4 | (value < 0 ? 4 : 0);
  }
};

template <>
struct Tiling<IQ2_XXS> : Iq2Tiling<IQ2_XXS> {
  using UnitPlanes = Planes<8, 4>;
  using RowPlanes = Planes<4, 2>;
  // The scales, then d.
  static JM_HD constexpr int RowBit(int b) {
    return b < 32 ? 8 * (9 + 8 * (b / 4)) + 4 + b % 4 : b - 32;
  }
  static JM_HD void Restore(const uint8_t* derived, uint8_t* block) {
    for (int i = 0; i < 32; ++i) {
      const int unit = 2 + 8 * (i / 4);
      PutBits(block, 8 * (unit + i % 4), 8, Iq2XxsIndex(derived + 8 * i));
      PutBits(block, 8 * (unit + 4) + 7 * (i % 4), 7, SignsOf<2>(derived + 8 * i));
    }
  }
};

// A byte with two scales a unit.
template <typename Format, int kScales>
struct TwoScaleIq2Tiling : Iq2Tiling<Format> {
  using UnitPlanes = Planes<8, 4, 1>;
  using RowPlanes = Planes<2>;
  static JM_HD constexpr int UnitBit(int unit, int b) { return 8 * (kScales + unit) + b; }
  static JM_HD constexpr int RowBit(int b) { return b; }
};

template <>
struct Tiling<IQ2_XS> : TwoScaleIq2Tiling<IQ2_XS, 66> {
  static JM_HD void Restore(const uint8_t* derived, uint8_t* block) {
    for (int i = 0; i < 32; ++i) {
      PutBits(block, 8 * (2 + 2 * i), 9, Iq2XsIndex(derived + 8 * i));
      PutBits(block, 8 * (2 + 2 * i) + 9, 7, SignsOf<2>(derived + 8 * i));
    }
  }
};

template <>
struct Tiling<IQ2_S> : TwoScaleIq2Tiling<IQ2_S, 74> {
  static JM_HD void Restore(const uint8_t* derived, uint8_t* block) {
    for (int i = 0; i < 32; ++i) {
      const uint32_t index = Iq2SIndex(derived + 8 * i);
      PutBits(block, 8 * (2 + i), 8, index);
      PutBits(block, 8 * 66 + 2 * i, 2, index >> 8);
      PutBits(block, 8 * (34 + i), 8, SignsOf<2>(derived + 8 * i));
    }
  }
};

// 0..7 for the magnitudes 4, 12, .. 52, 62, and the sign.
template <>
struct Tiling<IQ3_XXS> : ExpandedTiling<IQ3_XXS> {
  static constexpr int kCodeBits = 4;
  static constexpr tiled::Order kOrder = tiled::Order::kOctal;
  using UnitPlanes = Planes<16>;
  using RowPlanes = Planes<4, 2>;
  static JM_HD constexpr uint32_t CodeOf(int value) {
    return static_cast<uint32_t>(value < 0 ? -value : value) >> 3 | (value < 0 ? 8 : 0);
  }
  // The scales, then d.
  static JM_HD constexpr int RowBit(int b) {
    return b < 32 ? 8 * (69 + 4 * (b / 4)) + 4 + b % 4 : b - 32;
  }
  static JM_HD void Restore(const uint8_t* derived, uint8_t* block) {
    for (int i = 0; i < 64; ++i) PutBits(block, 8 * (2 + i), 8, Iq3XxsIndex(derived + 4 * i));
    for (int i = 0; i < 32; ++i) {
      PutBits(block, 8 * (66 + 4 * (i / 4)) + 7 * (i % 4), 7, SignsOf<3>(derived + 8 * i));
    }
  }
};

// 0..15 for -15, -13, .. 15.
template <>
struct Tiling<IQ3_S> : ExpandedTiling<IQ3_S> {
  static constexpr int kCodeBits = 4;
  static constexpr tiled::Order kOrder = tiled::Order::kPairs;
  using UnitPlanes = Planes<16>;
  using RowPlanes = Planes<4, 2>;
  static JM_HD constexpr uint32_t CodeOf(int value) {
    return static_cast<uint32_t>(value + 15) >> 1;
  }
  // The scales, then d.
  static JM_HD constexpr int RowBit(int b) { return b < 32 ? 8 * 106 + b : b - 32; }
  static JM_HD void Restore(const uint8_t* derived, uint8_t* block) {
    for (int i = 0; i < 64; ++i) {
      const uint32_t index = Iq3SIndex(derived + 4 * i);
      PutBits(block, 8 * (2 + i), 8, index);
      PutBits(block, 8 * 66 + i, 1, index >> 8);
    }
    for (int i = 0; i < 32; ++i) {
      // Negative codes are those below 8.
      PutBits(block, 8 * (74 + i), 8, ~SignsOf<3>(derived + 8 * i));
    }
  }
};

// --- What follows from them ---

namespace tiled {

template <typename Format, typename = void>
inline constexpr int kDerivedBytes = 0;
template <typename Format>
inline constexpr int kDerivedBytes<Format, std::void_t<decltype(Tiling<Format>::kDerivedBytes)>> =
    Tiling<Format>::kDerivedBytes;

template <typename Format>
struct Sizes {
  static constexpr int kUnits = Format::kBlock / 32;  // of a record
  static constexpr int kAtomUnits = kUnits == 8 ? 8 : kChunkUnits;
  static constexpr int kUnitBytes = Tiling<Format>::UnitPlanes::kBytes;
  static constexpr int kRowBytes = Tiling<Format>::RowPlanes::kBytes;
  static constexpr int kBytes = kUnits * kUnitBytes + kRowBytes;  // of a record
  static constexpr int kSourceBytes = Format::kBytes + kDerivedBytes<Format>;
};

// The bit of its source that bit `bit` of a record holds.
template <typename Format>
constexpr int SourceBit(int bit) {
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

// For every bit of a record the source's bit that it holds, and the other way round.
template <typename Format>
struct BitTables {
  static constexpr int kBits = 8 * Sizes<Format>::kBytes;
  static constexpr int kSourceBits = 8 * Sizes<Format>::kSourceBytes;
  uint16_t source_bit[kBits];
  uint16_t record_bit[kSourceBits];  // kBits: the record leaves it out
  bool is_injective;
};

template <typename Format>
constexpr BitTables<Format> MakeBitTables() {
  using Tables = BitTables<Format>;
  Tables tables{};
  for (int i = 0; i < Tables::kSourceBits; ++i) tables.record_bit[i] = Tables::kBits;
  tables.is_injective = true;
  for (int i = 0; i < Tables::kBits; ++i) {
    const int from = SourceBit<Format>(i);
    if (from < 0 || from >= Tables::kSourceBits || tables.record_bit[from] != Tables::kBits) {
      tables.is_injective = false;
      return tables;
    }
    tables.source_bit[i] = static_cast<uint16_t>(from);
    tables.record_bit[from] = static_cast<uint16_t>(i);
  }
  return tables;
}

// Whether no bit is there twice. Where nothing is derived none is left out, then: a permutation.
template <typename Format>
constexpr bool KeepsBits() {
  return MakeBitTables<Format>().is_injective &&
         (kDerivedBytes<Format> > 0 || Sizes<Format>::kBytes == Format::kBytes);
}

#define JAX_MOE_CASE(FORMAT) static_assert(KeepsBits<FORMAT>());
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

// Bytes of a block of a ggml_type in both layouts; zeros where there is no such format.
struct BlockBytes {
  int64_t gguf, tiled;
};
inline BlockBytes BlockBytesOf(int format) {
  BlockBytes bytes = {};
  VisitFormat(format, [&](auto decoder) {
    using F = decltype(decoder);
    bytes = {F::kBytes, tiled::Sizes<F>::kBytes};
  });
  return bytes;
}

}  // namespace jax_moe
