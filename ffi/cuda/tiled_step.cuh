// What a warp does with 16 rows and 256 columns of tiled weights that have come, for up to 8
// tokens.
#pragma once

#include "ffi/cuda/powers.cuh"
#include "ffi/cuda/ptx.cuh"
#include "ffi/cuda/tiled_unit.cuh"
#include "ffi/cuda/warp_ring.cuh"

namespace jax_moe::cuda {

template <typename Format>
using StepUnit = LaneUnit<Format, ShiftedFieldsOf<Format>>;

// Adds the products of one chunk of 128 columns. unit: of rows lane / 4 and lane / 4 + 8.
template <typename Format, int kStep = 0>
__device__ __forceinline__ void MultiplySteps(float (&sum)[4], const StepUnit<Format> (&unit)[2],
                                              const uint4 (&x)[4]) {
  if constexpr (kStep < 8) {
    uint32_t a[4];
    unit[0].template Decode<kStep>(a[0], a[2]);
    unit[1].template Decode<kStep>(a[1], a[3]);
    const uint4& b = x[kStep / 2];
    MultiplyF16(sum, a, kStep % 2 == 0 ? b.x : b.z, kStep % 2 == 0 ? b.y : b.w);
    MultiplySteps<Format, kStep + 1>(sum, unit, x);
  }
}

// A lane's activations of a step: each chunk's are loaded as soon as those of the step before have
// been used. x_row: of token lane / 4, or of any other token where there is no such one, for a
// token's sums depend on its own activations only.
class StepOfX {
 public:
  uint4 v[2][4] = {};

  __device__ __forceinline__ explicit StepOfX(int columns)
      : columns_(columns - 32 * (threadIdx.x % 4)) {}

  // What is loaded from now on is of another token.
  __device__ __forceinline__ void MoveTo(const half* x_row) {
    from_ = x_row + (columns_ > 0 ? 8 * (threadIdx.x % 4) : 0);
  }

  // From `column` on. Past the end weights are zeros, and any activations of the row will do: what
  // pads it may not be finite. A lane without a unit even in the first chunk takes another's.
  // kWhole: the row's columns are a multiple of 256.
  template <bool kWhole = false>
  __device__ __forceinline__ void Load(int chunk, int column) {
    const int wanted = column >= 0;
    column += 128 * chunk;
    if (!kWhole && column >= columns_) column = 0;
    uint4(&to)[4] = v[chunk];
    // Without a branch, for which the compiler would put the loads of both chunks together.
    asm volatile(
        "{\n"
        ".reg .pred wanted;\n"
        "setp.ne.s32 wanted, %17, 0;\n"
        "@wanted ld.global.v4.u32 {%0, %1, %2, %3}, [%16];\n"
        "@wanted ld.global.v4.u32 {%4, %5, %6, %7}, [%16 + 64];\n"
        "@wanted ld.global.v4.u32 {%8, %9, %10, %11}, [%16 + 128];\n"
        "@wanted ld.global.v4.u32 {%12, %13, %14, %15}, [%16 + 192];\n"
        "}\n"
        : "+r"(to[0].x), "+r"(to[0].y), "+r"(to[0].z), "+r"(to[0].w), "+r"(to[1].x),
          "+r"(to[1].y), "+r"(to[1].z), "+r"(to[1].w), "+r"(to[2].x), "+r"(to[2].y),
          "+r"(to[2].z), "+r"(to[2].w), "+r"(to[3].x), "+r"(to[3].y), "+r"(to[3].z),
          "+r"(to[3].w)
        : "l"(from_ + column), "r"(wanted)
        : "memory");
  }
  __device__ __forceinline__ void Load(int column) {
    Load(0, column);
    Load(1, column);
  }

 private:
  const half* from_;
  int columns_;  // from this lane's unit on
};

// What a warp has of a band: the sums of rows lane / 4 and lane / 4 + 8 in the order of
// MultiplyF16, and 2^24 over these rows' normalisers, by which weights are multiplied.
struct BandSums {
  float sum[4], factor[2];

  __device__ __forceinline__ void Begin(const float (&aux)[16][2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = InverseNormaliser(aux[threadIdx.x % 32 / 4 + 8 * i][0]);
    }
#pragma unroll
    for (float& value : sum) value = 0;
  }
  __device__ __forceinline__ float Sum(int i) const {
    return sum[i] * InverseNormaliser(factor[i / 2]);
  }
};

// kWhole: all units of both chunks are there.
template <typename Format, bool kWhole>
__device__ __forceinline__ void MultiplyStage(const uint8_t* stage, StepOfX& x, int column,
                                              int next_column, int columns, BandSums& sums) {
  using Tiled = TiledUnit<Format>;
  using Words = typename StepUnit<Format>::ScaleWords;
  const int lane = threadIdx.x % 32;
  // The words of both chunks of an atom at once: what they share is then loaded and made once, and
  // the second chunk's scales need not be waited for.
  constexpr bool kOneAtom = Tiled::kChunks == 2;
  [[maybe_unused]] Words words[2][2];
  if constexpr (kOneAtom) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i / 2][i % 2] = Words(stage, {4, i / 2, lane / 4 + 8 * (i % 2), lane % 4});
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int units = kWhole ? 4 : min(4, (columns - column) / 32 - 4 * c);
    if (kWhole || units > 0) {
      const uint8_t* atom = kOneAtom ? stage : stage + TiledRow<Format>::BandBytes(128 * c);
      typename Tiled::Place place = {units, kOneAtom ? c : 0, lane / 4, lane % 4};
      StepUnit<Format> unit[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kOneAtom) {
          unit[i].Load(atom, place, words[c][i], sums.factor[i]);
        } else {
          unit[i].Load(atom, place, sums.factor[i]);
        }
        place.row += 8;
      }
      MultiplySteps<Format>(sums.sum, unit, x.v[c]);
    }
    x.Load<kOneAtom>(c, next_column);
    // Else the compiler moves these loads to those of the other chunk, at the end of the step, or
    // branches around the last one.
    __syncwarp();
  }
}

// Adds the products of the ring's next step, 256 columns from `column` on. first: the band's sums
// begin. x: of the step; becomes that of the step at `next_column`, not past the end, if that is
// not negative.
template <typename Format, typename Ring>
__device__ __forceinline__ void MultiplyStep(Ring& ring, StepOfX& x, bool first,
                                             int column, int next_column, int columns,
                                             BandSums& sums) {
  const auto& stage = ring.Wait();
  if (first) sums.Begin(stage.aux);
  if (TiledUnit<Format>::kChunks == 2 || column + 256 <= columns) {
    MultiplyStage<Format, true>(stage.weights, x, column, next_column, columns, sums);
  } else {
    MultiplyStage<Format, false>(stage.weights, x, column, next_column, columns, sums);
  }
}

}  // namespace jax_moe::cuda
