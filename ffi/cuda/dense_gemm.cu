// Dense weights times the tokens of an expert. Weights and activations go straight from global
// memory to registers: of every 32 columns, lane t of a quad owns 8t .. 8t + 7 of both, which is as
// good an order of the sum as any and makes every load 16 bytes wide. A warp has a band of 16
// weight rows.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ffi/cuda/packed_tile.cuh"
#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kWarps = 4;

// Eight consecutive values of row `row`, zeros past the end.
template <typename T>
struct alignas(16) Eight {
  T v[8];
};

template <typename T, bool kAligned>
__device__ __forceinline__ Eight<T> LoadEight(const T* row, int column, int columns) {
  Eight<T> result{};
  if constexpr (kAligned) {
    if (column < columns) result = *reinterpret_cast<const Eight<T>*>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < columns) result.v[i] = row[column + i];
    }
  }
  return result;
}

// How a 16 x 32 tile of W times 32 x 8 of x is multiplied.
template <typename W, typename X>
struct Product;

// Equal 16-bit types: two products with K = 16.
template <typename T>
struct Product<T, T> {
  __device__ __forceinline__ static void Add(float (&sum)[4], const Eight<T>& row_g,
                                             const Eight<T>& row_g8, const Eight<T>& x) {
    const auto* w0 = reinterpret_cast<const uint32_t*>(&row_g);
    const auto* w1 = reinterpret_cast<const uint32_t*>(&row_g8);
    const auto* b = reinterpret_cast<const uint32_t*>(&x);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t a[4] = {w0[2 * i], w1[2 * i], w0[2 * i + 1], w1[2 * i + 1]};
      if constexpr (std::is_same_v<T, half>) {
        MultiplyF16(sum, a, b[2 * i], b[2 * i + 1]);
      } else {
        MultiplyBF16(sum, a, b[2 * i], b[2 * i + 1]);
      }
    }
  }
};

// float32 activations: tf32, which holds f16 and bf16 weights exactly. Four products with K = 8.
template <typename W>
struct Product<W, float> {
  __device__ __forceinline__ static void Add(float (&sum)[4], const Eight<W>& row_g,
                                             const Eight<W>& row_g8, const Eight<float>& x) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const uint32_t a[4] = {RoundTF32(static_cast<float>(row_g.v[i])),
                             RoundTF32(static_cast<float>(row_g8.v[i])),
                             RoundTF32(static_cast<float>(row_g.v[i + 1])),
                             RoundTF32(static_cast<float>(row_g8.v[i + 1]))};
      MultiplyTF32(sum, a, RoundTF32(x.v[i]), RoundTF32(x.v[i + 1]));
    }
  }
};

// float32 weights: two tf32 parts, so that the activations' rounding stays the only one.
template <>
struct Product<float, float> {
  __device__ __forceinline__ static void Add(float (&sum)[4], const Eight<float>& row_g,
                                             const Eight<float>& row_g8, const Eight<float>& x) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float w[4] = {row_g.v[i], row_g8.v[i], row_g.v[i + 1], row_g8.v[i + 1]};
      uint32_t high[4], low[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        high[j] = __float_as_uint(w[j]) & 0xffffe000u;  // truncated, so that it stays finite
        const float rest = w[j] - __uint_as_float(high[j]);
        low[j] = RoundTF32(isfinite(w[j]) ? rest : 0.0f);
      }
      const uint32_t b0 = RoundTF32(x.v[i]), b1 = RoundTF32(x.v[i + 1]);
      MultiplyTF32(sum, high, b0, b1);
      MultiplyTF32(sum, low, b0, b1);
    }
  }
};

template <typename W, typename X, int kTokens, bool kAligned>
__device__ __forceinline__ void AddColumns(const GemmArgs& args, const Band& band, int split,
                                           const int64_t (&x_rows)[kTokens / 8],
                                           float (&sum)[kTokens / 8][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int k = static_cast<int>(args.k);
  const auto* weights = reinterpret_cast<const W*>(band.rows.tensor);
  const W* rows[2];
  for (int i = 0; i < 2; ++i) {
    rows[i] =
        weights + (band.rows.first + min(band.begin + g + 8 * i, band.rows.count - 1)) * args.k;
  }
  const auto* x = static_cast<const X*>(args.x.values);
#pragma unroll(kTokens == 8 ? 4 : 1)
  for (int base = split * 32; base < k; base += 32 << args.log_splits) {
    const int column = base + 8 * t;
    const Eight<W> row_g = LoadEight<W, kAligned>(rows[0], column, k);
    const Eight<W> row_g8 = LoadEight<W, kAligned>(rows[1], column, k);
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      Eight<X> b{};
      if (x_rows[n] >= 0) b = *reinterpret_cast<const Eight<X>*>(x + x_rows[n] + column);
      Product<W, X>::Add(sum[n], row_g, row_g8, b);
    }
  }
}

template <typename W, typename X, int kTokens>
__global__ void __launch_bounds__(32 * kWarps) DenseGemm(const __grid_constant__ GemmArgs args) {
  constexpr int kTiles = kTokens / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  TokenTile tile;
  if (!FindTile(args.lists, &tile)) return;
  const int log_splits = args.log_splits, splits = 1 << log_splits, split = warp & (splits - 1);
  const Band band =
      FindBand(args, tile.expert, (blockIdx.x << (2 - log_splits)) + (warp >> log_splits), 16);

  int64_t x_rows[kTiles];
  for (int n = 0; n < kTiles; ++n) {
    const int token = 8 * n + g;
    x_rows[n] = token < tile.count
                    ? args.lists.pairs[tile.begin + token] / args.pairs_a_row * args.x.pitch
                    : -1;
  }
  float sum[kTiles][4] = {};
  if (band.valid) {
    if (args.k % 8 == 0) {
      AddColumns<W, X, kTokens, true>(args, band, split, x_rows, sum);
    } else {
      AddColumns<W, X, kTokens, false>(args, band, split, x_rows, sum);
    }
  }

  if (splits > 1) {
    __shared__ float4 partial[kWarps][kTiles][32];
    for (int n = 0; n < kTiles; ++n) {
      partial[warp][n][lane] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
    }
    __syncthreads();
    if (split != 0) return;
    for (int other = 1; other < splits; ++other) {
      for (int n = 0; n < kTiles; ++n) {
        const float4 more = partial[warp + other][n][lane];
        sum[n][0] += more.x;
        sum[n][1] += more.y;
        sum[n][2] += more.z;
        sum[n][3] += more.w;
      }
    }
  }
  if (!band.valid) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int token = 8 * n + 2 * t + column;
      if (token >= tile.count) continue;
      const int pair = args.lists.pairs[tile.begin + token];
      const float factor = PairFactor(args, pair, /*scaled_rows=*/std::is_same_v<X, half>);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = band.begin + g + 8 * half;
        if (row < band.rows.count) {
          Store(args.y, pair * args.y_pitch + band.y_column + row, args.y_type,
                sum[n][2 * half + column] * factor);
        }
      }
    }
  }
}

template <typename W, typename X, int kTokens>
GemmKernel Describe() {
  return {reinterpret_cast<const void*>(&DenseGemm<W, X, kTokens>),
          32 * kWarps,
          kTokens,
          16,
          0,
          /*narrow=*/true};
}

template <typename W, typename X>
const DenseKernels* Kernels() {
  static const DenseKernels kernels = {Describe<W, X, 8>(), Describe<W, X, 64>()};
  return &kernels;
}

}  // namespace

const DenseKernels* FindDenseKernels(Element weight, Layout layout) {
  if (weight == Element::kF16 && layout == Layout::kF16) return Kernels<half, half>();
  if (weight == Element::kBF16 && layout == Layout::kBF16) {
    return Kernels<__nv_bfloat16, __nv_bfloat16>();
  }
  if (weight == Element::kBF16 && layout == Layout::kF32) return Kernels<__nv_bfloat16, float>();
  if (weight == Element::kF32 && layout == Layout::kF32) return Kernels<float, float>();
  return nullptr;
}

}  // namespace jax_moe::cuda
