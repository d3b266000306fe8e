// Tiled weights (ffi/blocks/tiled.h) from shared memory to tensor-core operands.
//
// A lane takes whole units of 32 weights. With g = lane / 4 and t = lane % 4 it has unit t of a chunk
// in rows g and g + 8 of a band, so one scale serves all the weights that it has of a row. Bit fields
// lie where they can be masked in place: bits p .. p + b - 1 of a 16-bit half, read as f16, are the
// subnormal number q * 2^(p - 24), and one HFMA2 turns two of them into scaled weights with a single
// rounding. E2M1 codes become f16 numbers of their own value times 2^-14, which HMUL2 scales.
// Scales are brought into f16's range by the row's normaliser, which the sum gets back.
#pragma once

#include <type_traits>

#include "ffi/cuda/tiled_centred.cuh"
#include "ffi/cuda/tiled_planes.cuh"

namespace jax_moe::cuda {

template <typename Format, typename FieldsType = FieldsOf<Format>>
class LaneUnit {
 public:
  using Tiled = TiledUnit<Format>;
  using Fields = FieldsType;
  using Place = typename Tiled::Place;
  static constexpr int kGroups = 32 / Format::kGroup;

  // What scales are made of, which can be loaded before the fields where all units are there.
  struct ScaleWords {
    uint32_t s[Tiled::kScaleWords];

    ScaleWords() = default;
    __device__ __forceinline__ ScaleWords(const uint8_t* atom, const Place& at) {
      [[maybe_unused]] uint32_t q[Fields::kWords];
      Tiled::Load(atom, at, q, s);
    }
  };

  // normaliser: 2^24 over the row's. Lanes past the chunk's units get zeros; kExists: there are
  // none.
  template <bool kExists = false>
  __device__ __forceinline__ void Load(const uint8_t* atom, const Place& at, float normaliser) {
    ScaleWords words;
    LoadFields<kExists>(atom, at, words.s, normaliser);
    MakeScales(words.s, at, normaliser);
  }
  __device__ __forceinline__ void Load(const uint8_t* atom, const Place& at,
                                       const ScaleWords& words, float normaliser) {
    uint32_t unused[Tiled::kScaleWords];
    LoadFields(atom, at, unused, normaliser);
    MakeScales(words.s, at, normaliser);
  }

  // Weights 4 step .. 4 step + 3, scaled.
  template <int kStep>
  __device__ __forceinline__ void Decode(uint32_t& first, uint32_t& second) const {
    first = DecodePair<2 * kStep>();
    second = DecodePair<2 * kStep + 1>();
  }

 private:
  // Rows of whole atoms have no partial chunks.
  static __device__ __forceinline__ bool IsThere(const Place& at) {
    return Tiled::kChunks == 2 || at.unit < at.units;
  }

  template <bool kExists = false>
  __device__ __forceinline__ void LoadFields(const uint8_t* atom, const Place& at,
                                             uint32_t (&s)[Tiled::kScaleWords],
                                             float& normaliser) {
    if (kExists || IsThere(at)) {
      Tiled::Load(atom, at, q_, s);
    } else {
#pragma unroll
      for (int i = 0; i < Fields::kWords; ++i) q_[i] = 0;
#pragma unroll
      for (uint32_t& word : s) word = 0;
      normaliser = 0;
    }
  }

  __device__ __forceinline__ void MakeScales(const uint32_t (&s)[Tiled::kScaleWords],
                                             const Place& at, float normaliser) {
    half2 scale;
    if constexpr (kIntegerScaled) {
      // In float16 itself: fewer instructions, and no less exact. What rounding takes from the
      // scale goes into the offset, for the middle of the fields.
      static_assert(Fields::kExponent == -24);  // kFieldUnit is 1
      const half2 middle = BothHalves(kMiddle * 0x1p-24f);
      const half2 factors = Tiled::Factors(s[Tiled::kFactorsWord], normaliser);
      half2 minimum, rest;
      if constexpr (kGroups == 2) {
        const half2 integers = Tiled::Scales(s), minima = Tiled::Minima(s);
        const half2 first = __low2half2(factors), second = __high2half2(factors);
        scale = __hmul2_rn(integers, first);  // not fused into what follows
        minimum = __hmul2_rn(minima, second);
        const half2 error = __hfma2(integers, first, __hneg2(scale));
        rest = __hfma2(error, middle, __hneg2(__hfma2(minima, second, __hneg2(minimum))));
      } else {
        const half2 integers = Tiled::Integers(s, at);
        const half2 product = __hmul2_rn(integers, factors);
        const half2 error = __hfma2(integers, factors, __hneg2(product));
        scale = __low2half2(product);
        minimum = __high2half2(product);
        rest = __hfma2(__low2half2(error), middle, __hneg2(__high2half2(error)));
      }
      if constexpr (kIsCentred<Format>) {
        offset_[0] = __hadd2(__hfma2(scale, middle, __hneg2(minimum)), rest);
      } else {
        offset_[0] = __hsub2(rest, minimum);
      }
    } else if constexpr (kGroups == 2) {
      const half2 numbers = Tiled::Numbers(s, at);
      const float factor = Tiled::Factor(s, normaliser * kFieldUnit);
      scale = __hmul2(numbers, SaturatedHalves(factor, factor));
    } else if constexpr (std::is_base_of_v<PowerScaled, Tiled>) {
      scale = BothHalves(Tiled::Power(s, normaliser, Fields::kExponent));
    } else {
      const Affine affine = Tiled::Scale(s, at, 0, normaliser * kFieldUnit, normaliser * 0x1p-24f);
      scale = BothHalves(affine.scale);
      if constexpr (Format::kHasOffset) offset_[0] = BothHalves(affine.offset);
    }
    if constexpr (Fields::kShifts > 0) {
      constexpr float kShift = 0x1p-24f / kFieldUnit;
      const half2 plus = __hmul2(scale, BothHalves(kShift * (1 - kBias)));
      const half2 minus = __hmul2(scale, BothHalves(kShift * (-1 - kBias)));
#pragma unroll
      for (int i = 0; i < kOffsets; ++i) offset_[i] = Tiled::IsNegative(s, at, i) ? minus : plus;
    } else if constexpr (kBias != 0 && !Format::kHasOffset) {
      // A multiple of the rounded scale, so that a field of kBias is exactly zero.
      offset_[0] = __hmul2(scale, BothHalves(-kBias * 0x1p-24f));
    }
#pragma unroll
    for (int p = 0; p < Fields::kPositions; ++p) {
      scale_[p] = scale;
      scale = __hmul2(scale, BothHalves(1.0f / (1 << Fields::kShift)));
    }
  }

  static constexpr bool kIntegerScaled = std::is_base_of_v<IntegerScaled, Tiled>;
  static_assert(kIntegerScaled == (kHasCentred<Format> || kIsCentred<Format>));
  static constexpr int kMiddle = kIntegerScaled ? 1 << (Tiling<Format>::kCodeBits - 1) : 0;
  static constexpr int kBias = kIsCentred<Format> ? kMiddle : Fields::kBias;
  // What rounding takes from the sum of bias and shift is within bounds for a small bias only.
  static_assert(Fields::kShifts == 0 || kBias <= 8);
  static constexpr bool kAddsOffset = Format::kHasOffset || kBias != 0;
  static constexpr int kOffsets = Fields::kShifts > 0 ? Fields::kShifts : 1;
  // What the normaliser's 2^24 has too much for fields that are not multiples of 2^-24.
  static constexpr float kFieldUnit = 1.0f / (1 << (24 + Fields::kExponent));

  // Of a scale or an offset, what pair i takes; the compiler makes operands of it.
  template <int i>
  static __device__ __forceinline__ half2 Of(half2 value) {
    if constexpr (kGroups == 1) return value;
    return i < 8 ? __low2half2(value) : __high2half2(value);
  }

  template <int i>
  __device__ __forceinline__ uint32_t DecodePair() const {
    constexpr int position = Fields::template kPosition<i>;
    const half2 scale = Of<i>(scale_[position]);
    if constexpr (std::is_base_of_v<Fields1, Fields>) {
      return Fields::template Signed<i>(q_, Bits(scale));
    }
    half2 field = Halves(Fields::template Pair<i>(q_));
    if constexpr (kIsCentred<Format>) {
      // Both are integers times 2^-24: exact.
      constexpr int kAt = position * Fields::kShift + 24 + Fields::kExponent;
      field = __hsub2(field, Halves((kBias << kAt) * 0x00010001u));
    }
    if constexpr (kAddsOffset) {
      return Bits(__hfma2(field, scale, Of<i>(offset_[i * kOffsets / 16])));
    } else {
      return Bits(__hmul2(field, scale));
    }
  }

  uint32_t q_[Fields::kWords];
  // Of two groups, each of the first one in the low half and of the second one in the high half.
  half2 scale_[Fields::kPositions];
  half2 offset_[kOffsets];  // where kAddsOffset
};

template <typename Format>
struct TiledRow {
  // Bytes of a band's columns 0 .. columns - 1, columns a multiple of a block.
  static __device__ __forceinline__ int BandBytes(int columns) {
    return columns / Format::kBlock * tiled::Sizes<Format>::kBytes * 16;
  }
};

}  // namespace jax_moe::cuda
