// The bit fields of a tiled unit (tiled.h): pairs of weights out of its words, for tensor-core operands.
//
// Read as f16, a half with a field is a power of two times an integer of decoder.h. Most fields
// stand where they can be masked in place, below bit 10, which makes it a subnormal number.
// FieldsOf<FORMAT>:
//
//   kExponent        exponent of that power of two, at the first place
//   kWords           words of a unit
//   kPositions       places at which masked fields stand, kShift bits apart, each needing a scale of its own
//   kBias            what fields have more than the weights' integers
//   kShifts          0; or fields leave out a plus or minus one, of which a unit has as many
//   kPosition<i>     the place of pair i, weights 2 i and 2 i + 1
//   Pair<i>(words)   its fields, in the low and the high half
#pragma once

#include "ffi/blocks/bits.h"
#include "ffi/blocks/formats.h"
#include "ffi/blocks/lookup.h"

namespace jax_moe {

// a << kBits by the pipe that multiplies, where the one for masks and shifts has more to do: by a
// number that the compiler cannot know, or it would make a shift of it.
#if defined(__CUDACC__)
template <int kBits>
static __constant__ uint32_t kPowerOfTwo = uint32_t{1} << kBits;
#endif
template <int kBits>
JM_HD uint32_t MultipliedLeft(uint32_t a) {
#if defined(__CUDA_ARCH__)
  return a * kPowerOfTwo<kBits>;
#else
  return a << kBits;
#endif
}

// Integers in the low bits of a half.
struct IntegerFields {
  static constexpr int kExponent = -24, kShifts = 0;
};

struct Fields4 : IntegerFields {
  static constexpr int kWords = 4, kPositions = 2, kShift = 4;
  template <int i>
  static constexpr int kPosition = i % 2;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    const uint32_t w = i % 4 < 2 ? q[i / 4] : q[i / 4] >> 8;
    return w & (i % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
  }
};

struct Fields5 : IntegerFields {
  static constexpr int kWords = 5, kPositions = 2, kShift = 5;
  template <int i>
  static constexpr int kPosition = i < 15 && i % 3 == 1 ? 1 : 0;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    if constexpr (i == 15) {
      uint32_t w = q[0] >> 15 & 0x00010001u;
#pragma unroll
      for (int j = 1; j < 5; ++j) w |= q[j] >> (15 - j) & (0x00010001u << j);
      return w;
    } else {
      const uint32_t w = i % 3 < 2 ? q[i / 3] : q[i / 3] >> 10;
      return w & (i % 3 == 1 ? 0x03e003e0u : 0x001f001fu);
    }
  }
};

struct Fields6 : IntegerFields {
  static constexpr int kWords = 6, kPositions = 2, kShift = 4;
  template <int i>
  static constexpr int kPosition = i % 8 < 6 && i % 2 == 1 ? 1 : 0;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    constexpr int local = i % 8;
    const uint32_t* abc = q + 3 * (i / 8);
    if constexpr (local < 6) {
      return local % 2 == 0 ? abc[local / 2] >> 10 & 0x003f003fu : abc[local / 2] & 0x03f003f0u;
    } else {
      const uint32_t low = abc[local == 6 ? 0 : 2], high = abc[1] << (local == 6 ? 4 : 2);
      return Select(0x000f000fu, low, high) & 0x003f003fu;
    }
  }
};

struct Fields3 : IntegerFields {
  static constexpr int kWords = 3, kPositions = 3, kShift = 3;
  template <int i>
  static constexpr int kPosition = i == 15 ? 0 : i % 5 % 3;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    if constexpr (i == 15) {
      return (q[0] >> 15 & 0x00010001u) | (q[1] >> 14 & 0x00020002u) | (q[2] >> 13 & 0x00040004u);
    } else {
      const uint32_t w = i % 5 < 3 ? q[i / 5] : q[i / 5] >> 9;
      return w & (0x00070007u << 3 * kPosition<i>);
    }
  }
};

struct Fields2 : IntegerFields {
  static constexpr int kWords = 2, kPositions = 5, kShift = 2;
  template <int i>
  static constexpr int kPosition = i % 8 % 5;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    const uint32_t w = i % 8 < 5 ? q[i / 8] : q[i / 8] >> 10;
    return w & (0x00030003u << 2 * kPosition<i>);
  }
};

// Two's complement bytes, read as q + 128.
struct Fields8 : IntegerFields {
  static constexpr int kWords = 8, kPositions = 1, kShift = 0;
  template <int i>
  static constexpr int kPosition = 0;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    return BytePerm(q[i / 2] ^ 0x80808080u, 0, i % 2 == 0 ? 0x4140 : 0x4342);
  }
};

// E2M1 numbers: a half with the sign at bit 15 and exponent and mantissa at bits 11 .. 9 is the
// value times 2^-14, zero and the subnormal one included. Decoders' integers are twice the values.
// kMultiplies: shifts to the left are products.
template <bool kMultiplies>
struct FieldsE2M1 {
  static constexpr int kWords = 4, kPositions = 1, kShift = 0;
  static constexpr int kExponent = -15, kBias = 0, kShifts = 0;
  template <int i>
  static constexpr int kPosition = 0;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    uint32_t w = q[i / 4];
    // The second code of every byte in place of the first.
    if constexpr (i % 4 >= 2) w = Select(0x80808080u, Left<7>(w), w >> 3);
    if constexpr (i % 2 == 1) w = Left<8>(w);
    return w & 0x8e008e00u;
  }

 private:
  template <int kBits>
  static JM_HD uint32_t Left(uint32_t w) {
    return kMultiplies ? MultipliedLeft<kBits>(w) : w << kBits;
  }
};

JM_HD constexpr NibbleTable Flipped(const NibbleTable& table) {
  return {{table.word[0] ^ 0x80808080u, table.word[1] ^ 0x80808080u, table.word[2] ^ 0x80808080u,
           table.word[3] ^ 0x80808080u}};
}

// Nibbles that index the table of sixteen int8 of IQ4, read as value + 128.
struct FieldsIq4 : IntegerFields {
  static constexpr int kWords = 4, kPositions = 1, kShift = 0;
  template <int i>
  static constexpr int kPosition = 0;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    constexpr NibbleTable kTable = Flipped(Iq4Values());
    // Pairs 2 n and 2 n + 1 share 16 bits: the compiler sees that the lookups are the same.
    const uint32_t four = LookupFour(kTable, q[i / 4], i / 2 % 2);
    return BytePerm(four, 0, i % 2 == 0 ? 0x4140 : 0x4342);
  }
};

// Signs of ones.
struct Fields1 {
  static constexpr int kWords = 1, kPositions = 1, kShift = 0;
  static constexpr int kExponent = 0, kBias = 0, kShifts = 0;
  template <int i>
  static constexpr int kPosition = 0;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    return Signed<i>(q, 0x3c003c00u);
  }
  // In place of a product by a scale: the scale, or where the bit is 0 less than zero.
  template <int i>
  static JM_HD uint32_t Signed(const uint32_t* q, uint32_t scale) {
    return (q[0] << (15 - i) & 0x80008000u) ^ (scale ^ 0x80008000u);
  }
};

// Bit pairs f, read as 8 f: high enough in the half that their scales stay in f16's range.
template <int kUnitShifts>
struct FieldsIq1 {
  static constexpr int kWords = 2, kPositions = 3, kShift = 2;
  static constexpr int kExponent = -23, kBias = 8, kShifts = kUnitShifts;
  template <int i>
  static constexpr int kPosition = i % 8 < 2 ? i % 8 : (i % 8 - 2) % 3;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    const uint32_t w = q[i / 8];
    const uint32_t placed = i % 8 < 2 ? w << 4 : i % 8 < 5 ? w : w >> 6;
    return placed & (0x00300030u << 2 * kPosition<i>);
  }
};

// Nibbles c of odd numbers 2 c - 15, read as 2 c + 1.
struct FieldsIq3S : IntegerFields {
  static constexpr int kWords = 4, kPositions = 2, kShift = 4, kBias = 16;
  template <int i>
  static constexpr int kPosition = i % 2;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    const uint32_t w = i % 4 < 2 ? q[i / 4] << 1 : q[i / 4] >> 7;
    constexpr int kAt = kShift * kPosition<i>;
    return Select(0x001e001eu << kAt, w, 0x00010001u << kAt);
  }
};

// Order::kOctal: three bits that index the eight bytes of kLow and kHigh.
template <int kBits, uint32_t kLow, uint32_t kHigh>
struct OctalFields : IntegerFields {
  static constexpr int kWords = kBits, kPositions = 1, kShift = 0;
  template <int i>
  static constexpr int kPosition = 0;
  template <int i>
  static JM_HD uint32_t Pair(const uint32_t* q) {
    // Pairs 2 n and 2 n + 1 share 16 bits: the compiler sees that the lookups are the same.
    constexpr int kHalf = i / 2 % 2;
    const uint32_t four = BytePerm(kLow, kHigh, Eight<i / 4>(q) >> 16 * kHalf);
    // Fourth bits become the signs of halves.
    uint32_t upper = 0;
    if constexpr (kBits == 4) upper = (kHalf == 0 ? q[i / 4] : q[i / 4] << 4) & 0x80808080u;
    return BytePerm(four, upper, i % 2 == 0 ? 0x5140 : 0x7362);
  }

 private:
  // Nibbles of weights 8 n .. 8 n + 7.
  template <int n>
  static JM_HD uint32_t Eight(const uint32_t* q) {
    if constexpr (n < kBits) {
      return Select(0x77777777u, q[n], 0);  // or the compiler shifts first and masks each half
    } else {
      return (q[0] >> 3 & 0x11111111u) | (q[1] >> 2 & 0x22222222u) | (q[2] >> 1 & 0x44444444u);
    }
  }
};

// 8, 25, 43 and, from index 4 on, their negatives, read as value + 64.
struct FieldsIq2 : OctalFields<3, 0x406b5948u, 0x40152738u> {
  static constexpr int kBias = 64;
};

// Magnitudes, and signs from their fourth bits.
struct FieldsIq3 : OctalFields<4, 0x1c140c04u, 0x3e342c24u> {
  static constexpr int kBias = 0;
};

template <typename Format>
struct FieldsOf;
template <>
struct FieldsOf<Q1_0> : Fields1 {};
template <>
struct FieldsOf<Q2_0> : Fields2 {
  static constexpr int kBias = 1;
};
template <>
struct FieldsOf<TQ1_0> : Fields2 {
  static constexpr int kBias = 1;
};
template <>
struct FieldsOf<TQ2_0> : Fields2 {
  static constexpr int kBias = 1;
};
template <>
struct FieldsOf<IQ1_S> : FieldsIq1<1> {};
template <>
struct FieldsOf<IQ1_M> : FieldsIq1<4> {};
template <>
struct FieldsOf<IQ2_XXS> : FieldsIq2 {};
template <>
struct FieldsOf<IQ2_XS> : FieldsIq2 {};
template <>
struct FieldsOf<IQ2_S> : FieldsIq2 {};
template <>
struct FieldsOf<IQ3_XXS> : FieldsIq3 {};
template <>
struct FieldsOf<IQ3_S> : FieldsIq3S {};
template <>
struct FieldsOf<Q4_0> : Fields4 {
  static constexpr int kBias = 8;
};
template <>
struct FieldsOf<Q4_1> : Fields4 {
  static constexpr int kBias = 0;
};
template <>
struct FieldsOf<Q4_K> : Fields4 {
  static constexpr int kBias = 0;
};
template <>
struct FieldsOf<Q5_0> : Fields5 {
  static constexpr int kBias = 16;
};
template <>
struct FieldsOf<Q5_1> : Fields5 {
  static constexpr int kBias = 0;
};
template <>
struct FieldsOf<Q5_K> : Fields5 {
  static constexpr int kBias = 0;
};
template <>
struct FieldsOf<Q8_0> : Fields8 {
  static constexpr int kBias = 128;
};
template <>
struct FieldsOf<Q6_K> : Fields6 {
  static constexpr int kBias = 32;
};
template <>
struct FieldsOf<Q3_K> : Fields3 {
  static constexpr int kBias = 4;
};
template <>
struct FieldsOf<Q2_K> : Fields2 {
  static constexpr int kBias = 0;
};
template <>
struct FieldsOf<IQ4_NL> : FieldsIq4 {
  static constexpr int kBias = 128;
};
template <>
struct FieldsOf<IQ4_XS> : FieldsIq4 {
  static constexpr int kBias = 128;
};
template <>
struct FieldsOf<MXFP4> : FieldsE2M1<true> {};
template <>
struct FieldsOf<NVFP4> : FieldsE2M1<true> {};

// The same for kernels in which shifts are not what takes longest.
template <typename Format>
struct ShiftedFieldsOf : FieldsOf<Format> {};
template <>
struct ShiftedFieldsOf<MXFP4> : FieldsE2M1<false> {};
template <>
struct ShiftedFieldsOf<NVFP4> : FieldsE2M1<false> {};

}  // namespace jax_moe
