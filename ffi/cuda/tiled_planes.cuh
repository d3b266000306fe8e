// What lies in which plane of an atom of a tiled format, and how a group's scale is made of it.
//
// kChunks of an atom; kScaleWords: what Load fills besides the fields; Scale: the group's scale times
// `unit` and, with an offset, its offset times `offset_unit`, powers of two both, in float32; where
// fields leave shifts out, IsNegative: the sign of a shift, which are plus or minus a scale.
//
// Others make the same in fewer instructions, in float16, of a unit's two groups at once:
// - IntegerScaled: scale and offset are products of integers and of factors that a row's units
//   share. Factors, of the word kFactorsWord, times `unit`, the second one times 2^-14 besides.
//   Integers, the second one times 2^-10; or of two groups Scales and, times 2^-10, Minima. The
//   offset is the product's negative.
// - All others of two groups: the scales are the products of Numbers, of both, and Factor.
// - PowerScaled: the scale is Power.
// What rows share is computed in the same way for both chunks and all groups, so that the compiler
// does it once.
#pragma once

#include <cuda_fp16.h>

#include "ffi/blocks/tiled.h"
#include "ffi/blocks/tiled_fields.h"

namespace jax_moe::cuda {

__device__ __forceinline__ uint32_t Bits(half2 h) { return *reinterpret_cast<const uint32_t*>(&h); }
__device__ __forceinline__ half2 Halves(uint32_t bits) {
  return *reinterpret_cast<const half2*>(&bits);
}
__device__ __forceinline__ half2 BothHalves(float x) { return __half2half2(__float2half_rn(x)); }
// Factors of scales: those that are too large, which then belong to zeros, become the largest number.
__device__ __forceinline__ half2 SaturatedHalves(float low, float high) {
  half2 result;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %2, %1;"
      : "=r"(reinterpret_cast<uint32_t&>(result))
      : "f"(low), "f"(high));
  return result;
}
__device__ __forceinline__ float HalfBits(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Where a lane finds its units: plane offsets within an atom of kChunks chunks of `units` units.
template <int kChunks>
struct TiledPlace {
  int units;  // of this chunk; less than 4 only in the last chunk of a row
  int chunk;  // of the atom
  int row;    // 0 .. 15
  int unit;   // 0 .. units - 1

  // Unit plane that follows `before` bytes a unit, `bytes` bytes a unit itself.
  __device__ __forceinline__ int Unit(int before, int bytes) const {
    return 16 * units * kChunks * before + (16 * units * chunk + row * units + unit) * bytes;
  }
  // Row plane that follows all unit planes (`before` bytes a unit) and `rows_before` bytes a row.
  __device__ __forceinline__ int Row(int before, int rows_before, int bytes) const {
    return 16 * units * kChunks * before + 16 * rows_before + row * bytes;
  }
};

template <int kWords>
__device__ __forceinline__ void LoadWords(const uint8_t* from, uint32_t* to) {
  if constexpr (kWords == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else {
    for (int i = 0; i < kWords; ++i) to[i] = reinterpret_cast<const uint32_t*>(from)[i];
  }
}
__device__ __forceinline__ uint32_t LoadHalf(const uint8_t* from) {
  return *reinterpret_cast<const uint16_t*>(from);
}

// x * d for an integer x below 2^23, rounded once: no conversion, whose unit has a quarter of the
// rate, and of d one multiplication more for all x.
__device__ __forceinline__ float Times(uint32_t x, float d) {
  return fmaf(__uint_as_float(0x4b000000u | x), d, -8388608.0f * d);
}
// The same less `bias`, with two roundings.
__device__ __forceinline__ float TimesLess(uint32_t x, int bias, float d) {
  return (__uint_as_float(0x4b000000u | x) - static_cast<float>(8388608 + bias)) * d;
}

// The kBits low bits of a word in the low bits of a half, those that follow in the other one's, and
// else `others`.
template <int kBits>
__device__ __forceinline__ half2 TwoFields(uint32_t word, uint32_t others) {
  const uint32_t fields = Select(0xffff0000u, word << (16 - kBits), word);
  return Halves(Select(((1u << kBits) - 1) * 0x00010001u, fields, others));
}

// Two integers of 6 bits, the second one times 2^-10.
__device__ __forceinline__ half2 TwoIntegers(uint32_t word) {
  constexpr uint32_t kOnes = 0x3c006400u;
  return __hsub2(TwoFields<6>(word, kOnes), Halves(kOnes));
}
// Two integers of kBits bits, each less `less`, a multiple of 1/2 if it is negative.
template <int kBits>
__device__ __forceinline__ half2 TwoIntegersLess(uint32_t word, float less) {
  return __hsub2(TwoFields<kBits>(word, 0x64006400u), BothHalves(1024.0f + less));
}

template <typename Format>
struct TiledUnit;

// One f16 scale a unit or a row's block.
template <int kAtomChunks>
struct HalfScaled {
  static constexpr int kChunks = kAtomChunks, kScaleWords = 1;
  using Place = TiledPlace<kChunks>;
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int,
                                                 float unit = 1.0f, float = 1.0f) {
    return {HalfBits(s[0]) * unit, 0.0f};
  }
};

// An f16 scale and an f16 minimum a unit.
struct HalfScaledWithMinimum {
  static constexpr int kChunks = 1, kScaleWords = 1;
  using Place = TiledPlace<kChunks>;
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int,
                                                 float unit = 1.0f, float offset_unit = 1.0f) {
    const float2 d = __half22float2(Halves(s[0]));
    return {d.x * unit, d.y * offset_unit};
  }
};

#define JM_LOAD \
  static __device__ __forceinline__ void Load(const uint8_t* atom, const Place& at, uint32_t* q, \
                                              uint32_t* s)

template <>
struct TiledUnit<Q4_0> : HalfScaled<1> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    s[0] = LoadHalf(atom + at.Unit(16, 2));
  }
};

template <>
struct TiledUnit<Q4_1> : HalfScaledWithMinimum {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<1>(atom + at.Unit(16, 4), s);
  }
};

template <>
struct TiledUnit<Q5_0> : HalfScaled<1> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<1>(atom + at.Unit(16, 4), q + 4);
    s[0] = LoadHalf(atom + at.Unit(20, 2));
  }
};

template <>
struct TiledUnit<Q5_1> : HalfScaledWithMinimum {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<1>(atom + at.Unit(16, 4), q + 4);
    LoadWords<1>(atom + at.Unit(20, 4), s);
  }
};

template <>
struct TiledUnit<Q8_0> : HalfScaled<1> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<4>(atom + at.Unit(16, 16), q + 4);
    s[0] = LoadHalf(atom + at.Unit(32, 2));
  }
};

template <>
struct TiledUnit<IQ4_NL> : HalfScaled<1> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    s[0] = LoadHalf(atom + at.Unit(16, 2));
  }
};

// Scales that are powers of two.
struct PowerScaled {};

template <>
struct TiledUnit<MXFP4> : PowerScaled {
  static constexpr int kChunks = 1, kScaleWords = 1;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    s[0] = atom[at.Unit(16, 1)];
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int,
                                                 float unit = 1.0f, float = 1.0f) {
    // MXFP4::Group without its branch: the first number is the larger one from e = 2 on, the second
    // one below.
    const int e = static_cast<int>(s[0]);
    return {__int_as_float(max(e * 0x800000 - 0x800000, e * 0x200000 + 0x200000)) * unit, 0.0f};
  }
  // The scale times `unit`, a power of two or zero, and 2^-24 over 2^exponent: a sum of exponents,
  // zero where that is no normal number.
  static __device__ __forceinline__ float Power(const uint32_t* s, float unit, int exponent) {
    const int known = __float_as_int(unit) - (128 + 24 + exponent) * 0x800000;
    return __int_as_float(max(static_cast<int>(s[0]) * 0x800000 + known, 0));
  }
};

template <>
struct TiledUnit<NVFP4> {
  static constexpr int kChunks = 1, kScaleWords = 1;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    s[0] = LoadHalf(atom + at.Unit(16, 2));
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int group,
                                                 float unit = 1.0f, float = 1.0f) {
    // NVFP4::Group without its branches: E4M3's exponent and mantissa at f16's, whose bias is
    // larger by 8. Half of the value again.
    const uint32_t code = s[0] >> 8 * group & 0xff;
    const float scale = HalfBits((code & 0x7f) << 7) * (unit * 0x1p7f);
    return {code == 0x7f ? 0.0f : scale, 0.0f};
  }
  static __device__ __forceinline__ half2 Numbers(const uint32_t* s, const Place&) {
    const uint32_t codes = BytePerm(s[0], 0, 0x4140);
    const uint32_t numbers = __hne2_mask(Halves(codes), Halves(0x007f007fu));
    return __hmul2(Halves(codes << 7 & 0x3f803f80u & numbers), BothHalves(0x1p8f));
  }
  static __device__ __forceinline__ float Factor(const uint32_t*, float unit) {
    return unit * 0.5f;
  }
};

// Scales and offsets that are an integer times d and dmin.
struct IntegerScaled {
  static __device__ __forceinline__ half2 Factors(uint32_t d_and_dmin, float unit) {
    const float2 d = __half22float2(Halves(d_and_dmin));
    return SaturatedHalves(d.x * unit, d.y * (unit * 0x1p-14f));
  }
};

// d, dmin, and 6 bits of scale and minimum a unit.
struct SixBitScaled : IntegerScaled {
  static constexpr int kChunks = 2, kScaleWords = 3, kFactorsWord = 0;
  using Place = TiledPlace<kChunks>;
  // row: the plane's 16 bytes. A lane's 24 bits, those of both chunks, are 3 bytes of the three words
  // that follow d and dmin.
  static __device__ __forceinline__ void LoadScale(const uint8_t* row, const Place& at,
                                                   uint32_t* s) {
    const auto* words = reinterpret_cast<const uint32_t*>(row);
    const int first = 1 + 24 * at.unit / 32;
    s[0] = words[0];
    s[1] = words[first];
    s[2] = words[min(first + 1, 3)];
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int,
                                                 float unit = 1.0f, float offset_unit = 1.0f) {
    const float2 d = __half22float2(Halves(s[0]));
    const uint32_t bits = Both(s, at);
    return {Times(bits & 63, d.x * unit), -Times(bits & 63 << 6, d.y * (offset_unit * 0x1p-6f))};
  }
  static __device__ __forceinline__ half2 Integers(const uint32_t* s, const Place& at) {
    return TwoIntegers(Both(s, at));
  }

 private:
  // Six bits of each, and others above.
  static __device__ __forceinline__ uint32_t Both(const uint32_t* s, const Place& at) {
    return __funnelshift_r(s[1], s[2], 24 * at.unit) >> 12 * at.chunk;
  }
};

template <>
struct TiledUnit<Q4_K> : SixBitScaled {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadScale(atom + at.Row(16, 0, 16), at, s);
  }
};

template <>
struct TiledUnit<Q5_K> : SixBitScaled {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<1>(atom + at.Unit(16, 4), q + 4);
    LoadScale(atom + at.Row(20, 0, 16), at, s);
  }
};

template <>
struct TiledUnit<Q6_K> {
  static constexpr int kChunks = 2, kScaleWords = 2;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<2>(atom + at.Unit(16, 8), q + 4);
    s[0] = LoadHalf(atom + at.Unit(24, 2));
    s[1] = LoadHalf(atom + at.Row(26, 0, 2));
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int group,
                                                 float unit = 1.0f, float = 1.0f) {
    // Two's complement bytes, read as x + 128.
    const uint32_t byte = __byte_perm(s[0] ^ 0x8080u, 0, 0x4440 | group);
    return {TimesLess(byte, 128, HalfBits(s[1]) * unit), 0.0f};
  }
  static __device__ __forceinline__ half2 Numbers(const uint32_t* s, const Place&) {
    return __hsub2(Halves(BytePerm(s[0] ^ 0x8080u, 0x64646464u, 0x4140)), Halves(0x64806480u));
  }
  static __device__ __forceinline__ float Factor(const uint32_t* s, float unit) {
    return HalfBits(s[1]) * unit;
  }
};

template <>
struct TiledUnit<Q3_K> {
  static constexpr int kChunks = 2, kScaleWords = 3;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    LoadWords<1>(atom + at.Unit(8, 4), q + 2);
    // A lane's 24 bits, those of both chunks, are 3 bytes of the 12.
    const auto* words = reinterpret_cast<const uint32_t*>(atom + at.Row(12, 0, 12));
    const int first = 24 * at.unit / 32;
    s[0] = words[first];
    s[1] = words[min(first + 1, 2)];
    s[2] = LoadHalf(atom + at.Row(12, 12, 2));
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int group,
                                                 float unit = 1.0f, float = 1.0f) {
    return {TimesLess(Both(s, at) >> 6 * group & 63, 32, HalfBits(s[2]) * unit), 0.0f};
  }
  static __device__ __forceinline__ half2 Numbers(const uint32_t* s, const Place& at) {
    return TwoIntegersLess<6>(Both(s, at), 32.0f);
  }
  static __device__ __forceinline__ float Factor(const uint32_t* s, float unit) {
    return HalfBits(s[2]) * unit;
  }

 private:
  // Six bits of each, and others above.
  static __device__ __forceinline__ uint32_t Both(const uint32_t* s, const Place& at) {
    return __funnelshift_r(s[0], s[1], 24 * at.unit) >> 12 * at.chunk;
  }
};

template <>
struct TiledUnit<Q2_K> : IntegerScaled {
  static constexpr int kChunks = 2, kScaleWords = 2, kFactorsWord = 1;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    s[0] = LoadHalf(atom + at.Unit(8, 2));
    LoadWords<1>(atom + at.Row(10, 0, 4), s + 1);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int group,
                                                 float unit = 1.0f, float offset_unit = 1.0f) {
    const float2 d = __half22float2(Halves(s[1]));
    const uint32_t bits = s[0] >> 8 * group;
    return {Times(bits & 15, d.x * unit), -Times(bits & 0xf0, d.y * (offset_unit * 0x1p-4f))};
  }
  static __device__ __forceinline__ half2 Scales(const uint32_t* s) {
    constexpr uint32_t kOnes = 0x64006400u;
    return __hsub2(Halves(Select(0x000f000fu, Bytes(s), kOnes)), Halves(kOnes));
  }
  static __device__ __forceinline__ half2 Minima(const uint32_t* s) {
    constexpr uint32_t kOnes = 0x3c003c00u;
    return __hsub2(Halves(Select(0x000f000fu, Bytes(s) >> 4, kOnes)), Halves(kOnes));
  }

 private:
  static __device__ __forceinline__ uint32_t Bytes(const uint32_t* s) {
    return BytePerm(s[0], 0, 0x4140);
  }
};

template <>
struct TiledUnit<IQ4_XS> {
  static constexpr int kChunks = 2, kScaleWords = 2;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<2>(atom + at.Row(16, 0, 8), s);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int,
                                                 float unit = 1.0f, float = 1.0f) {
    // Of the 48 bits that follow the 16 of d, a lane's 12 are those of both chunks.
    const uint32_t bits = __funnelshift_r(at.unit < 2 ? s[0] : s[1], s[1], 16 + 12 * at.unit);
    return {TimesLess(bits >> 6 * at.chunk & 63, 32, HalfBits(s[0] & 0xffffu) * unit), 0.0f};
  }
};

template <>
struct TiledUnit<TQ2_0> : HalfScaled<2> {
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    s[0] = LoadHalf(atom + at.Row(8, 0, 2));
  }
};

template <>
struct TiledUnit<TQ1_0> : TiledUnit<TQ2_0> {};

template <>
struct TiledUnit<Q1_0> : HalfScaled<1> {
  JM_LOAD {
    LoadWords<1>(atom + at.Unit(0, 4), q);
    s[0] = LoadHalf(atom + at.Row(4, 0, 2));
  }
};

template <>
struct TiledUnit<Q2_0> : HalfScaled<1> {
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    // A block's two units have a byte each.
    s[0] = LoadHalf(atom + (at.Unit(8, 1) & ~1));
  }
};

// Four bits a unit and then d, after kBefore bytes a unit.
template <int kBefore>
struct FourBitScaled {
  static constexpr int kChunks = 2, kScaleWords = 2;
  using Place = TiledPlace<kChunks>;
  static __device__ __forceinline__ void LoadScales(const uint8_t* atom, const Place& at,
                                                    uint32_t* s) {
    LoadWords<1>(atom + at.Row(kBefore, 0, 4), s);
    s[1] = LoadHalf(atom + at.Row(kBefore, 4, 2));
  }
  // The unit's four bits x as 2 x + 1, and other bits above.
  static __device__ __forceinline__ uint32_t Odd(const uint32_t* s, const Place& at) {
    return __funnelshift_r(s[0], s[0], 16 * at.chunk + 4 * at.unit + 31) | 1;
  }
};

template <>
struct TiledUnit<IQ1_S> : FourBitScaled<8> {
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    LoadScales(atom, at, s);
  }
  // Fields are eight times the values of the code words.
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int,
                                                 float unit = 1.0f, float = 1.0f) {
    return {Times(Odd(s, at) & 15, HalfBits(s[1]) * (unit * 0.125f)), 0.0f};
  }
  static __device__ __forceinline__ bool IsNegative(const uint32_t* s, const Place& at, int) {
    return Odd(s, at) & 16;
  }
};

template <>
struct TiledUnit<IQ1_M> {
  static constexpr int kChunks = 2, kScaleWords = 3;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    LoadWords<3>(atom + at.Row(8, 0, 12), s);
  }
  // Two scales of three bits, four signs.
  static __device__ __forceinline__ uint32_t TenBits(const uint32_t* s, const Place& at) {
    const bool late = at.unit >= 2;
    return __funnelshift_r(late ? s[1] : s[0], late ? s[2] : s[1], 20 * at.unit) >> 10 * at.chunk;
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int group,
                                                 float unit = 1.0f, float = 1.0f) {
    const uint32_t scale = TenBits(s, at) >> 3 * group & 7;
    return {Times(2 * scale + 1, HalfBits(s[2] >> 16) * (unit * 0.125f)), 0.0f};
  }
  // Each x + 1/2.
  static __device__ __forceinline__ half2 Numbers(const uint32_t* s, const Place& at) {
    return TwoIntegersLess<3>(TenBits(s, at), -0.5f);
  }
  static __device__ __forceinline__ float Factor(const uint32_t* s, float unit) {
    return HalfBits(s[2] >> 16) * (unit * 0.25f);
  }
  static __device__ __forceinline__ bool IsNegative(const uint32_t* s, const Place& at, int shift) {
    return TenBits(s, at) >> (6 + shift) & 1;
  }
};

template <>
struct TiledUnit<IQ2_XXS> : FourBitScaled<12> {
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    LoadWords<1>(atom + at.Unit(8, 4), q + 2);
    LoadScales(atom, at, s);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int,
                                                 float unit = 1.0f, float = 1.0f) {
    return {Times(Odd(s, at) & 31, HalfBits(s[1]) * (unit * 0.125f)), 0.0f};
  }
};

// A byte with two scales a unit, and d.
struct TwoScaleIq2 {
  static constexpr int kChunks = 2, kScaleWords = 2;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    LoadWords<1>(atom + at.Unit(8, 4), q + 2);
    s[0] = atom[at.Unit(12, 1)];
    s[1] = LoadHalf(atom + at.Row(13, 0, 2));
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int group,
                                                 float unit = 1.0f, float = 1.0f) {
    // A quarter of x + 1/2.
    const uint32_t odd = s[0] << 1 >> 4 * group & 30 | 1;
    return {Times(odd, HalfBits(s[1]) * (unit * 0.125f)), 0.0f};
  }
  // Each x + 1/2.
  static __device__ __forceinline__ half2 Numbers(const uint32_t* s, const Place&) {
    return TwoIntegersLess<4>(s[0], -0.5f);
  }
  static __device__ __forceinline__ float Factor(const uint32_t* s, float unit) {
    return HalfBits(s[1]) * (unit * 0.25f);
  }
};
template <>
struct TiledUnit<IQ2_XS> : TwoScaleIq2 {};
template <>
struct TiledUnit<IQ2_S> : TwoScaleIq2 {};

template <>
struct TiledUnit<IQ3_XXS> : FourBitScaled<16> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadScales(atom, at, s);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int,
                                                 float unit = 1.0f, float = 1.0f) {
    return {Times(Odd(s, at) & 31, HalfBits(s[1]) * (unit * 0.25f)), 0.0f};
  }
};

template <>
struct TiledUnit<IQ3_S> : FourBitScaled<16> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadScales(atom, at, s);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int,
                                                 float unit = 1.0f, float = 1.0f) {
    return {Times(Odd(s, at) & 31, HalfBits(s[1]) * unit), 0.0f};
  }
};
#undef JM_LOAD

}  // namespace jax_moe::cuda
