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

template <typename Format>
class LaneUnit {
 public:
  using Tiled = TiledUnit<Format>;
  using Fields = FieldsOf<Format>;
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
    [[maybe_unused]] half2 factors;
    if constexpr (kIntegerScaled) factors = Tiled::Factors(s[Tiled::kFactorsWord], normaliser);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      half2 scale;
      if constexpr (kIntegerScaled) {
        // In float16 itself: fewer instructions, and no less exact. What rounding takes from the
        // scale goes into the offset, for the middle of the fields.
        static_assert(Fields::kExponent == -24);  // kFieldUnit is 1
        const half2 middle = BothHalves(kMiddle * 0x1p-24f);
        const half2 integers = Tiled::Integers(s, at, group);
        const half2 product = __hmul2_rn(integers, factors);  // not fused into what follows
        const half2 error = __hfma2(integers, factors, __hneg2(product));
        const half2 rest = __hfma2(__low2half2(error), middle, __hneg2(__high2half2(error)));
        scale = __low2half2(product);
        if constexpr (kIsCentred<Format>) {
          offset_[group] = __hadd2(__hfma2(scale, middle, __hneg2(__high2half2(product))), rest);
        } else {
          offset_[group] = __hsub2(rest, __high2half2(product));
        }
      } else if constexpr (std::is_base_of_v<PowerScaled, Tiled>) {
        scale = BothHalves(Tiled::Power(s, normaliser, Fields::kExponent));
      } else {
        const Affine affine =
            Tiled::Scale(s, at, group, normaliser * kFieldUnit, normaliser * 0x1p-24f);
        scale = BothHalves(affine.scale);
        if constexpr (Format::kHasOffset) offset_[group] = BothHalves(affine.offset);
      }
      if constexpr (Fields::kShifts > 0) {
        const float shift = __low2float(scale) * (0x1p-24f / kFieldUnit);
        constexpr int kLeft = kTakesBias ? 0 : kBias;
        const half2 plus = BothHalves(shift * (1 - kLeft));
        const half2 minus = BothHalves(shift * (-1 - kLeft));
#pragma unroll
        for (int i = group * kOffsets / kGroups; i < (group + 1) * kOffsets / kGroups; ++i) {
          offset_[i] = Tiled::IsNegative(s, at, i) ? minus : plus;
        }
      } else if constexpr (kBias != 0 && !Format::kHasOffset) {
        // A multiple of the rounded scale, so that a field of kBias is exactly zero.
        offset_[group] = __hmul2(scale, BothHalves(-kBias * 0x1p-24f));
      }
#pragma unroll
      for (int p = 0; p < Fields::kPositions; ++p) {
        scale_[group][p] = scale;
        scale = __hmul2(scale, BothHalves(1.0f / (1 << Fields::kShift)));
      }
    }
  }

  static constexpr bool kIntegerScaled = std::is_base_of_v<IntegerScaled, Tiled>;
  static_assert(kIntegerScaled == (kHasCentred<Format> || kIsCentred<Format>));
  static constexpr int kMiddle = kIntegerScaled ? 1 << (Tiling<Format>::kCodeBits - 1) : 0;
  static constexpr int kBias = kIsCentred<Format> ? kMiddle : Fields::kBias;
  // Whether fields lose their bias. Those with shifts do if it is larger than these: rounding the sum
  // of both would take too much.
  static constexpr bool kTakesBias = kIsCentred<Format> || (Fields::kShifts > 0 && kBias > 8);
  static constexpr bool kAddsOffset = Format::kHasOffset || kBias != 0;
  static constexpr int kOffsets = Fields::kShifts > 0 ? Fields::kShifts : kGroups;
  // What the normaliser's 2^24 has too much for fields that are not multiples of 2^-24.
  static constexpr float kFieldUnit = 1.0f / (1 << (24 + Fields::kExponent));

  template <int i>
  __device__ __forceinline__ uint32_t DecodePair() const {
    constexpr int group = kGroups == 1 ? 0 : i / 8;
    constexpr int position = Fields::template kPosition<i>;
    if constexpr (std::is_base_of_v<Fields1, Fields>) {
      return Fields::template Signed<i>(q_, Bits(scale_[group][0]));
    }
    half2 field = Halves(Fields::template Pair<i>(q_));
    if constexpr (kTakesBias) {
      // Both are integers times 2^-24: exact.
      constexpr int kAt = position * Fields::kShift + 24 + Fields::kExponent;
      field = __hsub2(field, Halves((kBias << kAt) * 0x00010001u));
    }
    if constexpr (kAddsOffset) {
      return Bits(__hfma2(field, scale_[group][position], offset_[i * kOffsets / 16]));
    } else {
      return Bits(__hmul2(field, scale_[group][position]));
    }
  }

  uint32_t q_[Fields::kWords];
  half2 scale_[kGroups][Fields::kPositions];
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
