// Tiled weights (ffi/blocks/tiled.h) from shared memory to tensor-core operands.
//
// A lane takes whole units of 32 weights. With g = lane / 4 and t = lane % 4 it has unit t of a chunk
// in rows g and g + 8 of a band, so one scale serves all the weights that it has of a row. Bit fields
// lie where they can be masked in place: bits p .. p + b - 1 of a 16-bit half, read as f16, are the
// subnormal number q * 2^(p - 24), and one HFMA2 turns two of them into scaled weights with a single
// rounding. Scales are brought into f16's range by the row's normaliser, which the sum gets back.
#pragma once

#include <cuda_fp16.h>

#include "ffi/blocks/formats.h"

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

// --- Fields: the words of a unit, and pairs of weights out of them ------------------------------
//
// kPositions: the bit positions at which masked fields stand, each needing a scale of its own, at
// shifts of kShift bits. Pair<i> gives fields of weights 2 i and 2 i + 1 and their position.

struct Fields4 {
  static constexpr int kWords = 4, kPositions = 2, kShift = 4;
  template <int i>
  static constexpr int kPosition = i % 2;
  template <int i>
  static __device__ __forceinline__ uint32_t Pair(const uint32_t* q) {
    const uint32_t w = i % 4 < 2 ? q[i / 4] : q[i / 4] >> 8;
    return w & (i % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
  }
};

struct Fields5 {
  static constexpr int kWords = 5, kPositions = 2, kShift = 5;
  template <int i>
  static constexpr int kPosition = i < 15 && i % 3 == 1 ? 1 : 0;
  template <int i>
  static __device__ __forceinline__ uint32_t Pair(const uint32_t* q) {
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

struct Fields6 {
  static constexpr int kWords = 6, kPositions = 1, kShift = 0;
  template <int i>
  static constexpr int kPosition = 0;
  template <int i>
  static __device__ __forceinline__ uint32_t Pair(const uint32_t* q) {
    constexpr int local = i % 8;
    const uint32_t* abc = q + 3 * (i / 8);
    if constexpr (local < 6) {
      return (local % 2 == 0 ? abc[local / 2] : abc[local / 2] >> 6) & 0x003f003fu;
    } else if constexpr (local == 6) {
      return (abc[0] >> 12 & 0x000f000fu) | (abc[1] >> 8 & 0x00300030u);
    } else {
      return (abc[2] >> 12 & 0x000f000fu) | (abc[1] >> 10 & 0x00300030u);
    }
  }
};

struct Fields3 {
  static constexpr int kWords = 3, kPositions = 3, kShift = 3;
  template <int i>
  static constexpr int kPosition = i == 15 ? 0 : i % 5 % 3;
  template <int i>
  static __device__ __forceinline__ uint32_t Pair(const uint32_t* q) {
    if constexpr (i == 15) {
      return (q[0] >> 15 & 0x00010001u) | (q[1] >> 14 & 0x00020002u) | (q[2] >> 13 & 0x00040004u);
    } else {
      const uint32_t w = i % 5 < 3 ? q[i / 5] : q[i / 5] >> 9;
      return w & (0x00070007u << 3 * kPosition<i>);
    }
  }
};

struct Fields2 {
  static constexpr int kWords = 2, kPositions = 5, kShift = 2;
  template <int i>
  static constexpr int kPosition = i % 8 % 5;
  template <int i>
  static __device__ __forceinline__ uint32_t Pair(const uint32_t* q) {
    const uint32_t w = i % 8 < 5 ? q[i / 8] : q[i / 8] >> 10;
    return w & (0x00030003u << 2 * kPosition<i>);
  }
};

// Two's complement bytes, read as q + 128.
struct Fields8 {
  static constexpr int kWords = 8, kPositions = 1, kShift = 0;
  template <int i>
  static constexpr int kPosition = 0;
  template <int i>
  static __device__ __forceinline__ uint32_t Pair(const uint32_t* q) {
    return __byte_perm(q[i / 2] ^ 0x80808080u, 0, i % 2 == 0 ? 0x4140 : 0x4342);
  }
};

// Nibbles that index a table of sixteen int8, read as value + 128.
template <typename Table>
struct TableFields {
  static constexpr int kWords = 4, kPositions = 1, kShift = 0;
  template <int i>
  static constexpr int kPosition = 0;
  template <int i>
  static __device__ __forceinline__ uint32_t Pair(const uint32_t* q) {
    constexpr NibbleTable kTable = Table::Biased();
    // Pairs 2 n and 2 n + 1 share 16 bits: the compiler sees that the lookups are the same.
    const uint32_t w = i / 2 % 2 == 0 ? q[i / 4] : q[i / 4] >> 16;
    const uint32_t index = w & 0x7777u, choice = (w >> 1 & 0x4444u) | 0x3210u;
    const uint32_t lower = __byte_perm(kTable.word[0], kTable.word[1], index);
    const uint32_t upper = __byte_perm(kTable.word[2], kTable.word[3], index);
    return __byte_perm(__byte_perm(lower, upper, choice), 0, i % 2 == 0 ? 0x4140 : 0x4342);
  }
};

// --- Formats: what lies in which plane ------------------------------------------------------------
//
// kChunks of an atom; kBias: what fields have too much; kCentre: about what the offset takes from fields,
// in scales; kScaleWords: what Load fills besides the fields; Scale: the group's scale and, with an
// offset, its offset, in float32.

JM_HD constexpr NibbleTable Flipped(const NibbleTable& table) {
  return {{table.word[0] ^ 0x80808080u, table.word[1] ^ 0x80808080u, table.word[2] ^ 0x80808080u,
           table.word[3] ^ 0x80808080u}};
}
struct E2M1Table {
  static JM_HD constexpr NibbleTable Biased() { return Flipped(DoubledE2M1()); }
};
struct Iq4Table {
  static JM_HD constexpr NibbleTable Biased() { return Flipped(Iq4Values()); }
};

template <typename Format>
struct TiledUnit;

// One f16 scale a unit.
template <typename Format, typename FieldsType, int kBiasValue>
struct HalfScaled {
  using Fields = FieldsType;
  static constexpr int kChunks = 1, kScaleWords = 1, kBias = kBiasValue, kCentre = 0;
  using Place = TiledPlace<kChunks>;
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int) {
    return {HalfBits(s[0]), 0.0f};
  }
};

// An f16 scale and an f16 minimum a unit.
template <typename Format, typename FieldsType, int kCentreValue>
struct HalfScaledWithMinimum {
  using Fields = FieldsType;
  static constexpr int kChunks = 1, kScaleWords = 1, kBias = 0, kCentre = kCentreValue;
  using Place = TiledPlace<kChunks>;
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int) {
    return {HalfBits(s[0] & 0xffffu), HalfBits(s[0] >> 16)};
  }
};

#define JM_LOAD \
  static __device__ __forceinline__ void Load(const uint8_t* atom, const Place& at, uint32_t* q, \
                                              uint32_t* s)

template <>
struct TiledUnit<Q4_0> : HalfScaled<Q4_0, Fields4, 8> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    s[0] = LoadHalf(atom + at.Unit(16, 2));
  }
};

template <>
struct TiledUnit<Q4_1> : HalfScaledWithMinimum<Q4_1, Fields4, 8> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<1>(atom + at.Unit(16, 4), s);
  }
};

template <>
struct TiledUnit<Q5_0> : HalfScaled<Q5_0, Fields5, 16> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<1>(atom + at.Unit(16, 4), q + 4);
    s[0] = LoadHalf(atom + at.Unit(20, 2));
  }
};

template <>
struct TiledUnit<Q5_1> : HalfScaledWithMinimum<Q5_1, Fields5, 16> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<1>(atom + at.Unit(16, 4), q + 4);
    LoadWords<1>(atom + at.Unit(20, 4), s);
  }
};

template <>
struct TiledUnit<Q8_0> : HalfScaled<Q8_0, Fields8, 128> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<4>(atom + at.Unit(16, 16), q + 4);
    s[0] = LoadHalf(atom + at.Unit(32, 2));
  }
};

template <>
struct TiledUnit<IQ4_NL> : HalfScaled<IQ4_NL, TableFields<Iq4Table>, 128> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    s[0] = LoadHalf(atom + at.Unit(16, 2));
  }
};

template <>
struct TiledUnit<MXFP4> {
  using Fields = TableFields<E2M1Table>;
  static constexpr int kChunks = 1, kScaleWords = 1, kBias = 128, kCentre = 0;
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
  using Fields = TableFields<E2M1Table>;
  static constexpr int kChunks = 1, kScaleWords = 1, kBias = 128, kCentre = 0;
  using Place = TiledPlace<kChunks>;
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    s[0] = LoadHalf(atom + at.Unit(16, 2));
  }
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place&, int group) {
    const uint8_t block[1] = {static_cast<uint8_t>(s[0] >> 8 * group)};
    return NVFP4::Group(block, 0);
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
template <typename FieldsType, int kCentreValue>
struct SixBitScaled {
  using Fields = FieldsType;
  static constexpr int kChunks = 2, kScaleWords = 4, kBias = 0, kCentre = kCentreValue;
  using Place = TiledPlace<kChunks>;
  static __device__ __forceinline__ Affine Scale(const uint32_t* s, const Place& at, int) {
    const float2 d = __half22float2(Halves(s[0]));
    const uint32_t bits = ThreeBytes(s + 1, at.unit) >> 12 * at.chunk;
    return {d.x * SmallFloat(bits & 63), -(d.y * SmallFloat(bits >> 6 & 63))};
  }
};

template <>
struct TiledUnit<Q4_K> : SixBitScaled<Fields4, 8> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<4>(atom + at.Row(16, 0, 16), s);
  }
};

template <>
struct TiledUnit<Q5_K> : SixBitScaled<Fields5, 16> {
  JM_LOAD {
    LoadWords<4>(atom + at.Unit(0, 16), q);
    LoadWords<1>(atom + at.Unit(16, 4), q + 4);
    LoadWords<4>(atom + at.Row(20, 0, 16), s);
  }
};

template <>
struct TiledUnit<Q6_K> {
  using Fields = Fields6;
  static constexpr int kChunks = 2, kScaleWords = 2, kBias = 32, kCentre = 0;
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
  using Fields = Fields3;
  static constexpr int kChunks = 2, kScaleWords = 4, kBias = 4, kCentre = 0;
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
  using Fields = Fields2;
  static constexpr int kChunks = 2, kScaleWords = 2, kBias = 0, kCentre = 2;
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
  using Fields = TableFields<Iq4Table>;
  static constexpr int kChunks = 2, kScaleWords = 2, kBias = 128, kCentre = 0;
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
#undef JM_LOAD

// --- A lane's unit of a row, decoded step by step -------------------------------------------------

template <typename Format>
class LaneUnit {
 public:
  using Tiled = TiledUnit<Format>;
  using Fields = typename Tiled::Fields;
  using Place = typename Tiled::Place;
  static constexpr int kGroups = 32 / Format::kGroup;

  // normaliser: 2^24 over the row's. Lanes past the chunk's units get zeros.
  __device__ __forceinline__ void Load(const uint8_t* atom, const Place& at, float normaliser) {
    uint32_t s[Tiled::kScaleWords];
    // Rows of whole atoms have no partial chunks.
    if (Tiled::kChunks == 2 || at.unit < at.units) {
      Tiled::Load(atom, at, q_, s);
    } else {
#pragma unroll
      for (int i = 0; i < Fields::kWords; ++i) q_[i] = 0;
#pragma unroll
      for (int i = 0; i < Tiled::kScaleWords; ++i) s[i] = 0;
      normaliser = 0;
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const Affine affine = Tiled::Scale(s, at, group);
      half2 scale = BothHalves(affine.scale * normaliser);
      if constexpr (Format::kHasOffset) {
        // Fields less kCentre: what is left of the offset is small, and so is what rounding takes
        // from it.
        offset_[group] = BothHalves(fmaf(affine.scale, static_cast<float>(Tiled::kCentre),
                                         affine.offset) *
                                    (normaliser * 0x1p-24f));
      } else {
        // A multiple of the rounded scale, so that a field of kBias is exactly zero.
        offset_[group] = __hmul2(scale, BothHalves(-Tiled::kBias * 0x1p-24f));
      }
#pragma unroll
      for (int p = 0; p < Fields::kPositions; ++p) {
        scale_[group][p] = scale;
        scale = __hmul2(scale, BothHalves(1.0f / (1 << Fields::kShift)));
      }
    }
  }

  // Weights 4 step .. 4 step + 3, scaled.
  template <int kStep>
  __device__ __forceinline__ void Decode(uint32_t& first, uint32_t& second) const {
    first = DecodePair<2 * kStep>();
    second = DecodePair<2 * kStep + 1>();
  }

 private:
  template <int i>
  __device__ __forceinline__ uint32_t DecodePair() const {
    constexpr int group = kGroups == 1 ? 0 : i / 8;
    constexpr int position = Fields::template kPosition<i>;
    half2 field = Halves(Fields::template Pair<i>(q_));
    if constexpr (Tiled::kCentre > 0) {
      // Both are integers times 2^-24: exact.
      constexpr uint32_t kCentre = (Tiled::kCentre << position * Fields::kShift) * 0x00010001u;
      field = __hsub2(field, Halves(kCentre));
    }
    return Bits(__hfma2(field, scale_[group][position], offset_[group]));
  }

  uint32_t q_[Fields::kWords];
  half2 scale_[kGroups][Fields::kPositions], offset_[kGroups];
};

// Columns, bytes and atoms of a row of tiled blocks.
template <typename Format>
struct TiledRow {
  static constexpr int kChunks = TiledUnit<Format>::kChunks;  // of an atom
  // Bytes of a band's columns 0 .. columns - 1, columns a multiple of a block.
  static __device__ __forceinline__ int BandBytes(int columns) {
    return columns / Format::kBlock * Format::kBytes * 16;
  }
};

}  // namespace jax_moe::cuda
