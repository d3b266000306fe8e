// What lies in which plane of an atom of a tiled format, and how a group's scale is made of it.
//
// kChunks of an atom; kCentre: about what the offset takes from fields, in scales; kScaleWords: what Load
// fills besides the fields; Scale: the group's scale and, with an offset, its offset, in float32;
// where fields leave shifts out, IsNegative: the sign of a shift, which are plus or minus a scale.
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

template <typename Format>
struct TiledUnit;

// One f16 scale a unit or a row's block.
template <int kAtomChunks>
struct HalfScaled {
  static constexpr int kChunks = kAtomChunks, kScaleWords = 1, kCentre = 0;
  using Place = TiledPlace<kChunks>;
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int) {
    return {HalfBits(s[0]), 0.0f};
  }
};

// An f16 scale and an f16 minimum a unit.
template <int kCentreValue>
struct HalfScaledWithMinimum {
  static constexpr int kChunks = 1, kScaleWords = 1, kCentre = kCentreValue;
  using Place = TiledPlace<kChunks>;
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int) {
    return {HalfBits(s[0] & 0xffffu), HalfBits(s[0] >> 16)};
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
struct TiledUnit<Q4_1> : HalfScaledWithMinimum<8> {
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
struct TiledUnit<Q5_1> : HalfScaledWithMinimum<16> {
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

template <>
struct TiledUnit<MXFP4> {
  static constexpr int kChunks = 1, kScaleWords = 1, kCentre = 0;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    s[0] = atom[at.Unit(16, 1)];
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int) {
    const uint8_t block[1] = {static_cast<uint8_t>(s[0])};
    return MXFP4::Group(block, 0);
  }
};

template <>
struct TiledUnit<NVFP4> {
  static constexpr int kChunks = 1, kScaleWords = 1, kCentre = 0;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    s[0] = LoadHalf(atom + at.Unit(16, 2));
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int group) {
    // NVFP4::Group without its branches: E4M3's exponent and mantissa at f16's, whose bias is
    // larger by 8. Half of the value again.
    const uint32_t code = s[0] >> 8 * group & 0xff;
    const float scale = HalfBits((code & 0x7f) << 7) * 0x1p7f;
    return {code == 0x7f ? 0.0f : scale, 0.0f};
  }
};

// An integer below 2^23, without the conversion unit, which has a quarter of the rate.
__device__ __forceinline__ float SmallFloat(uint32_t x) {
  return __uint_as_float(0x4b000000u | x) - 8388608.0f;
}

// The 24 bits of lane t in 12 bytes.
__device__ __forceinline__ uint32_t ThreeBytes(const uint32_t* words, int t) {
  const uint32_t low = t < 2 ? words[0] : t == 2 ? words[1] : words[2];
  const uint32_t high = t == 1 ? words[1] : words[2];
  // Bytes 3 t .. 3 t + 2, counted from the start of `low`.
  return __byte_perm(low, high, t == 0 ? 0x2210 : t == 1 ? 0x5543 : t == 2 ? 0x4432 : 0x3321) &
         0x00ffffffu;
}

// d, dmin, and 6 bits of scale and minimum a unit.
template <int kCentreValue>
struct SixBitScaled {
  static constexpr int kChunks = 2, kScaleWords = 3, kCentre = kCentreValue;
  using Place = TiledPlace<kChunks>;
  // Where the unit's 12 bits begin in the three words that follow d and dmin.
  static __device__ __forceinline__ int BeginOf(const Place& at) { return 24 * at.unit + 12 * at.chunk; }
  // row: the plane's 16 bytes.
  static __device__ __forceinline__ void LoadScale(const uint8_t* row, const Place& at, uint32_t* s) {
    const auto* words = reinterpret_cast<const uint32_t*>(row);
    const int first = 1 + BeginOf(at) / 32;
    s[0] = words[0];
    s[1] = words[first];
    s[2] = words[min(first + 1, 3)];
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int) {
    const float2 d = __half22float2(Halves(s[0]));
    const uint32_t bits = __funnelshift_r(s[1], s[2], BeginOf(at));
    return {d.x * SmallFloat(bits & 63), -(d.y * SmallFloat(bits >> 6 & 63))};
  }
};

template <>
struct TiledUnit<Q4_K> : SixBitScaled<8> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadScale(atom + at.Row(16, 0, 16), at, s);
  }
};

template <>
struct TiledUnit<Q5_K> : SixBitScaled<16> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<1>(atom + at.Unit(16, 4), q + 4);
    LoadScale(atom + at.Row(20, 0, 16), at, s);
  }
};

template <>
struct TiledUnit<Q6_K> {
  static constexpr int kChunks = 2, kScaleWords = 2, kCentre = 0;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<2>(atom + at.Unit(16, 8), q + 4);
    s[0] = LoadHalf(atom + at.Unit(24, 2));
    s[1] = LoadHalf(atom + at.Row(26, 0, 2));
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int group) {
    return {HalfBits(s[1]) * static_cast<float>(static_cast<int8_t>(s[0] >> 8 * group)), 0.0f};
  }
};

template <>
struct TiledUnit<Q3_K> {
  static constexpr int kChunks = 2, kScaleWords = 4, kCentre = 0;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    LoadWords<1>(atom + at.Unit(8, 4), q + 2);
    LoadWords<3>(atom + at.Row(12, 0, 12), s);
    s[3] = LoadHalf(atom + at.Row(12, 12, 2));
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int group) {
    const uint32_t bits = ThreeBytes(s, at.unit) >> (12 * at.chunk + 6 * group) & 63;
    return {HalfBits(s[3]) * (SmallFloat(bits) - 32.0f), 0.0f};
  }
};

template <>
struct TiledUnit<Q2_K> {
  static constexpr int kChunks = 2, kScaleWords = 2, kCentre = 2;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    s[0] = LoadHalf(atom + at.Unit(8, 2));
    LoadWords<1>(atom + at.Row(10, 0, 4), s + 1);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int group) {
    const uint32_t bits = s[0] >> 8 * group;
    return {HalfBits(s[1] & 0xffffu) * SmallFloat(bits & 15),
            -(HalfBits(s[1] >> 16) * SmallFloat(bits >> 4 & 15))};
  }
};

template <>
struct TiledUnit<IQ4_XS> {
  static constexpr int kChunks = 2, kScaleWords = 2, kCentre = 0;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<2>(atom + at.Row(16, 0, 8), s);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int) {
    // 48 bits that follow the 16 of d.
    const int shift = 16 + 12 * at.unit + 6 * at.chunk;
    const uint32_t six = (shift < 32 ? __funnelshift_r(s[0], s[1], shift) : s[1] >> (shift - 32)) & 63;
    return {HalfBits(s[0] & 0xffffu) * (SmallFloat(six) - 32.0f), 0.0f};
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
  static __device__ __forceinline__ uint32_t FourBits(const uint32_t* s, const Place& at) {
    return s[0] >> (16 * at.chunk + 4 * at.unit) & 15;
  }
};

// An eighth of 2 * scale + 1: fields are eight times the values of the code words.
__device__ __forceinline__ float Iq1Factor(uint32_t scale) {
  return SmallFloat(2 * (scale & 7) + 1) * 0.125f;
}

template <>
struct TiledUnit<IQ1_S> : FourBitScaled<8> {
  static constexpr int kCentre = 8;
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    LoadScales(atom, at, s);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int) {
    return {HalfBits(s[1]) * Iq1Factor(FourBits(s, at)), 0.0f};
  }
  static __device__ __forceinline__ bool IsNegative(const uint32_t* s, const Place& at, int) {
    return FourBits(s, at) > 7;
  }
};

template <>
struct TiledUnit<IQ1_M> {
  static constexpr int kChunks = 2, kScaleWords = 3, kCentre = 8;
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
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int group) {
    return {HalfBits(s[2] >> 16) * Iq1Factor(TenBits(s, at) >> 3 * group), 0.0f};
  }
  static __device__ __forceinline__ bool IsNegative(const uint32_t* s, const Place& at, int shift) {
    return TenBits(s, at) >> (6 + shift) & 1;
  }
};

// A quarter of scale + 1/2.
__device__ __forceinline__ float Iq2Factor(uint32_t scale) {
  return fmaf(SmallFloat(scale), 0.25f, 0.125f);
}

template <>
struct TiledUnit<IQ2_XXS> : FourBitScaled<12> {
  static constexpr int kCentre = 0;
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    LoadWords<1>(atom + at.Unit(8, 4), q + 2);
    LoadScales(atom, at, s);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int) {
    return {HalfBits(s[1]) * Iq2Factor(FourBits(s, at)), 0.0f};
  }
};

// A byte with two scales a unit, and d.
struct TwoScaleIq2 {
  static constexpr int kChunks = 2, kScaleWords = 2, kCentre = 0;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<2>(atom + at.Unit(0, 8), q);
    LoadWords<1>(atom + at.Unit(8, 4), q + 2);
    s[0] = atom[at.Unit(12, 1)];
    s[1] = LoadHalf(atom + at.Row(13, 0, 2));
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int group) {
    return {HalfBits(s[1]) * Iq2Factor(s[0] >> 4 * group & 15), 0.0f};
  }
};
template <>
struct TiledUnit<IQ2_XS> : TwoScaleIq2 {};
template <>
struct TiledUnit<IQ2_S> : TwoScaleIq2 {};

template <>
struct TiledUnit<IQ3_XXS> : FourBitScaled<16> {
  static constexpr int kCentre = 0;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadScales(atom, at, s);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int) {
    return {HalfBits(s[1]) * fmaf(SmallFloat(FourBits(s, at)), 0.5f, 0.25f), 0.0f};
  }
};

template <>
struct TiledUnit<IQ3_S> : FourBitScaled<16> {
  static constexpr int kCentre = 16;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadScales(atom, at, s);
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int) {
    return {HalfBits(s[1]) * SmallFloat(2 * FourBits(s, at) + 1), 0.0f};
  }
  static __device__ __forceinline__ bool IsNegative(const uint32_t*, const Place&, int) {
    return false;
  }
};
#undef JM_LOAD

}  // namespace jax_moe::cuda
