// What a warp does with 16 rows and 256 columns of tiled weights that have come, for one or two
// tokens.
//
// A tensor-core product has eight columns. Here they are not eight tokens but the four units of a
// chunk with two tokens each: column 2 u + i has the activations of token i where they belong to
// unit u, and zeros elsewhere. So products of different units stay apart, and scales and offsets
// are applied to the units' sums, in float32. The operand is made of the packed fields alone:
// integers times a power of two, exact in f16.
//
// Products take columns in pairs 2 i and 2 i + 2 of eight, whose fields stand at equal places more
// often than those of neighbours: TwoTokenPlace.
//
// With g = lane / 4 and t = lane % 4, a lane has unit t of rows g and g + 8 (tiled_unit.cuh), its
// sums of both tokens, and activations where g / 2 = t.
#pragma once

#include <utility>

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/ptx.cuh"
#include "ffi/cuda/tiled_planes.cuh"

namespace jax_moe::cuda {

// f16 2^exponent in both halves.
__device__ constexpr uint32_t HalfPower(int exponent) {
  return (exponent >= -14 ? (exponent + 15) << 10 : 1 << (exponent + 24)) * 0x00010001u;
}

// A unit of a row.
template <typename Format>
class ExactUnit {
 public:
  using Tiled = TiledUnit<Format>;
  using Fields = ShiftedFieldsOf<Format>;
  using Place = typename Tiled::Place;
  static constexpr int kGroups = 32 / Format::kGroup;
  template <int... i>
  static constexpr bool Alternates(std::integer_sequence<int, i...>) {
    return ((Fields::template kPosition<i> == i % 2) && ...);
  }

  float scale[kGroups], offset[kGroups];

  // kWhole: all units of the chunk are there. Two steps, so that words can be on their way while
  // something else is done.
  template <bool kWhole>
  __device__ __forceinline__ void Load(const uint8_t* atom, const Place& at) {
    if (!kWhole) {
#pragma unroll
      for (int i = 0; i < Fields::kWords; ++i) q_[i] = 0;
#pragma unroll
      for (int i = 0; i < Tiled::kScaleWords; ++i) s_[i] = 0;
    }
    if (kWhole || at.unit < at.units) Tiled::Load(atom, at, q_, s_);
  }
  // Units past the chunk's end have a scale of zero.
  template <bool kWhole>
  __device__ __forceinline__ void SetScales(const Place& at) {
    const bool exists = kWhole || at.unit < at.units;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const Affine affine = Tiled::Scale(s_, at, group);
      scale[group] = exists ? affine.scale : 0.0f;
      offset[group] = exists ? affine.offset : 0.0f;
    }
    if constexpr (Fields::kShifts > 0) {
#pragma unroll
      for (int i = 0; i < Fields::kShifts; ++i) {
        shift_[i] = Tiled::IsNegative(s_, at, i) ? Minus(Fields::kBias + 1, 0)
                                                 : Minus(Fields::kBias - 1, 0);
      }
    }
  }

  // Whether fields of odd pairs all stand at the second of two places, and those of even ones at
  // the first: these have sums of their own, so that no field has to be moved.
  static constexpr bool kKeepsPlaces = Fields::kPositions == 2 && Fields::kShifts == 0 &&
                                       Alternates(std::make_integer_sequence<int, 16>());

  // The integers of weights 2 i and 2 i + 1 times 2^kExponent, and, with kKeepsPlaces, their
  // place's power of two.
  template <int i>
  __device__ __forceinline__ uint32_t Pair() const {
    constexpr int kMoved = Fields::kShift * Fields::template kPosition<i>;
    constexpr int kPlace = kKeepsPlaces ? kMoved : 0;
    const half2 field = Halves(Fields::template Pair<i>(q_));
    const half2 move = Halves(HalfPower(kPlace - kMoved));
    if constexpr (Fields::kShifts > 0) {
      return Bits(__hfma2(field, move, Halves(shift_[i * Fields::kShifts / 16])));
    } else if constexpr (Fields::kBias != 0) {
      const half2 bias = Halves(Minus(Fields::kBias, kPlace));
      return Bits(kPlace == kMoved ? __hadd2(field, bias) : __hfma2(field, move, bias));
    } else {
      return kPlace == kMoved ? Bits(field) : Bits(__hmul2(field, move));
    }
  }

 private:
  // f16 -integer * 2^(kExponent + place) in both halves, a subnormal number.
  static constexpr __device__ uint32_t Minus(int integer, int place) {
    return (0x8000 | integer << (24 + Fields::kExponent + place)) * 0x00010001u;
  }

  uint32_t q_[Fields::kWords], s_[Tiled::kScaleWords];
  uint32_t shift_[Fields::kShifts > 0 ? Fields::kShifts : 1];
};

// Where column c stands for these products: of eight, the order of pairs is 0, 2, 1, 3.
__device__ __forceinline__ int TwoTokenPlace(int c) {
  return (c & ~6) | (c & 2) << 1 | (c & 4) >> 1;
}

// Products of pairs kFirst and kFirst + 2 of both rows. kFirst % 4: 0 or 1.
template <int kFirst, typename Unit>
__device__ __forceinline__ void MultiplyPairs(float (&sum)[4], const Unit& low, const Unit& high,
                                              const uint32_t (&x)[16]) {
  const uint32_t a[4] = {low.template Pair<kFirst>(), high.template Pair<kFirst>(),
                         low.template Pair<kFirst + 2>(), high.template Pair<kFirst + 2>()};
  constexpr int kAt = kFirst / 4 * 4 + kFirst % 4 * 2;
  MultiplyF16(sum, a, x[kAt], x[kAt + 1]);
}

// Of pairs kBegin, kBegin + 2, .. below kEnd.
template <int kBegin, int kEnd, typename Unit>
__device__ __forceinline__ void MultiplyEverySecond(float (&sum)[4], const Unit& low,
                                                    const Unit& high, const uint32_t (&x)[16]) {
  if constexpr (kBegin < kEnd) {
    MultiplyPairs<kBegin>(sum, low, high, x);
    MultiplyEverySecond<kBegin + 4, kEnd>(sum, low, high, x);
  }
}

// Adds the products of a group of the units, times 2^kExponent, to total: rows g and g + 8, tokens
// 0 and 1 each. sums: what offsets are multiplied by, of each group and token the sum of the
// activations times 2^kExponent; null: made here.
template <int kGroup, typename Format>
__device__ __forceinline__ void MultiplyGroup(float (&total)[4], const ExactUnit<Format>& low,
                                              const ExactUnit<Format>& high,
                                              const uint32_t (&x)[16], const float (*sums)[2]) {
  using Unit = ExactUnit<Format>;
  constexpr int kBegin = kGroup * 16 / Unit::kGroups, kEnd = kBegin + 16 / Unit::kGroups;
  constexpr float kOdd = Unit::kKeepsPlaces ? 1.0f / (1 << Unit::Fields::kShift) : 1.0f;
  // Two chains of products, for each waits for the one before.
  float even[4] = {}, odd[4] = {};
  MultiplyEverySecond<kBegin, kEnd>(even, low, high, x);
  MultiplyEverySecond<kBegin + 1, kEnd>(odd, low, high, x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    total[i] = fmaf((i < 2 ? low : high).scale[kGroup], fmaf(odd[i], kOdd, even[i]), total[i]);
  }
  if constexpr (Format::kHasOffset) {
    constexpr uint32_t kOne = HalfPower(Unit::Fields::kExponent);
    constexpr uint32_t kOnes[4] = {kOne, kOne, kOne, kOne};
    float sum[4] = {};
    if (sums != nullptr) {
      sum[0] = sum[2] = sums[kGroup][0], sum[1] = sum[3] = sums[kGroup][1];
    } else {
#pragma unroll
      for (int i = kBegin; i < kEnd; i += 2) MultiplyF16(sum, kOnes, x[i], x[i + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      total[i] = fmaf((i < 2 ? low : high).offset[kGroup], sum[i], total[i]);
    }
  }
}

// A lane's activations of a step, in Layout::kF16Narrow but for TwoTokenPlace; each chunk's are
// loaded as soon as those of the step before have been used.
class StepOfTwo {
 public:
  uint32_t v[2][16] = {};

  // Whether this lane has any, and of which token.
  static __device__ __forceinline__ bool Has() { return threadIdx.x % 32 / 8 == threadIdx.x % 4; }
  static __device__ __forceinline__ int Token() { return threadIdx.x % 8 / 4; }

  // Of rows of so many columns.
  __device__ __forceinline__ explicit StepOfTwo(int columns)
      : columns_(columns - 32 * (threadIdx.x % 4)) {}

  // What is loaded from now on is of another token, all of them in shared or all in global memory.
  __device__ __forceinline__ void MoveTo(const half* x_row, bool is_shared) {
    from_ = x_row + (columns_ > 0 ? 8 * (threadIdx.x % 4) : 0);
    is_shared_ = is_shared;
  }

  // From `column` on. Past the end scales are zeros, and any activations of the row will do: what
  // pads it may not be finite. A lane without a unit even in the first chunk takes another's.
  __device__ __forceinline__ void Load(int chunk, int column) {
    column += 128 * chunk;
    const half* from = from_ + (column < columns_ ? column : 0);
    uint32_t* to = v[chunk];
    // Without a branch: of conditional loads from one space the compiler makes several.
    asm volatile(
        "{\n"
        ".reg .pred has, shared, global;\n"
        "setp.ne.s32 has, %18, 0;\n"
        "setp.ne.and.s32 shared, %19, 0, has;\n"
        "setp.eq.and.s32 global, %19, 0, has;\n"
        "@shared ld.shared.v4.u32 {%0, %1, %2, %3}, [%17];\n"
        "@shared ld.shared.v4.u32 {%4, %5, %6, %7}, [%17 + 64];\n"
        "@shared ld.shared.v4.u32 {%8, %9, %10, %11}, [%17 + 128];\n"
        "@shared ld.shared.v4.u32 {%12, %13, %14, %15}, [%17 + 192];\n"
        "@global ld.global.v4.u32 {%0, %1, %2, %3}, [%16];\n"
        "@global ld.global.v4.u32 {%4, %5, %6, %7}, [%16 + 64];\n"
        "@global ld.global.v4.u32 {%8, %9, %10, %11}, [%16 + 128];\n"
        "@global ld.global.v4.u32 {%12, %13, %14, %15}, [%16 + 192];\n"
        "}\n"
        : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3]), "+r"(to[4]), "+r"(to[5]),
          "+r"(to[6]), "+r"(to[7]), "+r"(to[8]), "+r"(to[9]), "+r"(to[10]), "+r"(to[11]),
          "+r"(to[12]), "+r"(to[13]), "+r"(to[14]), "+r"(to[15])
        : "l"(from), "r"(SharedAddress(from)), "r"(static_cast<int>(Has())),
          "r"(static_cast<int>(is_shared_))
        : "memory");
  }

 private:
  const half* from_;
  bool is_shared_;
  int columns_;  // from this lane's unit on
};

// The units of rows lane / 4 and lane / 4 + 8 of a chunk.
template <typename Format, bool kWhole>
struct UnitsOfTwoRows {
  using Tiled = TiledUnit<Format>;
  ExactUnit<Format> low, high;

  // weights: of the step; columns: from its first one to the end of the row.
  __device__ __forceinline__ void Load(const uint8_t* weights, int chunk, int columns) {
    constexpr int kChunkBytes = 128 / Format::kBlock * tiled::Sizes<Format>::kBytes * 16;
    const uint8_t* atom = Tiled::kChunks == 2 ? weights : weights + chunk * kChunkBytes;
    typename Tiled::Place place = PlaceOf(chunk, columns);
    low.template Load<kWhole>(atom, place);
    place.row += 8;
    high.template Load<kWhole>(atom, place);
  }
  // Adds their products. x and sums (MultiplyGroup): of the chunk.
  __device__ __forceinline__ void Multiply(int chunk, int columns, const uint32_t (&x)[16],
                                           float (&total)[4], const float (*sums)[2] = nullptr) {
    typename Tiled::Place place = PlaceOf(chunk, columns);
    low.template SetScales<kWhole>(place);
    place.row += 8;
    high.template SetScales<kWhole>(place);
    MultiplyGroup<0>(total, low, high, x, sums);
    if constexpr (ExactUnit<Format>::kGroups == 2) MultiplyGroup<1>(total, low, high, x, sums);
  }

 private:
  static __device__ __forceinline__ typename Tiled::Place PlaceOf(int chunk, int columns) {
    const int lane = threadIdx.x % 32, units = kWhole ? 4 : min(4, columns / 32 - 4 * chunk);
    return {units, Tiled::kChunks == 2 ? chunk : 0, lane / 4, lane % 4};
  }
};

// kWhole: all units of both chunks are there.
template <typename Format, bool kWhole>
__device__ __forceinline__ void MultiplyTwoTokens(const uint8_t* weights, StepOfTwo& x, int column,
                                                  int next_column, int columns,
                                                  float (&total)[4]) {
  // Both chunks are loaded first where registers allow it.
  constexpr bool kAhead = kWhole && ShiftedFieldsOf<Format>::kWords <= 4 && !Format::kHasOffset;
  UnitsOfTwoRows<Format, kWhole> units[2];
  const int left = columns - column;
  if (kAhead) units[0].Load(weights, 0, left), units[1].Load(weights, 1, left);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    if (kWhole || 128 * c < left) {
      if (!kAhead) units[c].Load(weights, c, left);
      units[c].Multiply(c, left, x.v[c], total);
    }
    x.Load(c, next_column);
  }
}

// Adds the products of a step of a band, 256 columns from `column` on of so many. x: of the step;
// becomes that of the step at `next_column`.
template <typename Format>
__device__ __forceinline__ void MultiplyTwoTokens(const uint8_t* weights, StepOfTwo& x, int column,
                                                  int next_column, int columns,
                                                  float (&total)[4]) {
  if (TiledUnit<Format>::kChunks == 2 || column + 256 <= columns) {
    MultiplyTwoTokens<Format, true>(weights, x, column, next_column, columns, total);
  } else {
    MultiplyTwoTokens<Format, false>(weights, x, column, next_column, columns, total);
  }
}

// A step's or a band's sums of the quad's units together, to sums[token][row].
__device__ __forceinline__ void StoreSums(float (&total)[4], float (*sums)[16], int count,
                                          float scale) {
#pragma unroll
  for (float& part : total) {
    part += __shfl_xor_sync(0xffffffffu, part, 1);
    part += __shfl_xor_sync(0xffffffffu, part, 2);
  }
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, token = t % 2;
  const float value = t < 2 ? (t == 0 ? total[0] : total[1]) : (t == 2 ? total[2] : total[3]);
  if (token < count) sums[token][g + 8 * (t / 2)] = value * scale;
}

// What undoes 2^kExponent.
template <typename Format>
inline constexpr float kExactUnitScale = 1 << -ShiftedFieldsOf<Format>::kExponent;

}  // namespace jax_moe::cuda
