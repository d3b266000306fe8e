#include "ffi/cuda/prepare.h"

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/launch_early.h"
#include "ffi/cuda/row_layouts.cuh"
#include "ffi/cuda/row_sources.cuh"
#include "ffi/cuda/sort_block.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kThreads = kSortThreads;

// The largest magnitude of a row, NaN where it holds one.
__device__ float RowMax(float value) {
  __shared__ float warp_max[kThreads / 32];
  for (int d = 16; d > 0; d /= 2) value = MaxWithNan(value, __shfl_xor_sync(0xffffffffu, value, d));
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp_max[0];
  for (int w = 1; w < kThreads / 32; ++w) value = MaxWithNan(value, warp_max[w]);
  return value;
}

__device__ float RowSum(float value) {
  __shared__ float warp_sums[kThreads / 32];
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(0xffffffffu, value, d);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < kThreads / 32; ++w) value += warp_sums[w];
  return value;
}

// The power of two that brings `max` to 2^14 .. 2^15. It and its inverse are normal float32. Rows
// that are not finite stay as they are, so that it shows in the result.
__device__ int RowExponent(float max) {
  if (!(max < INFINITY) || max == 0) return 0;
  return min(14 - ilogbf(max), 126);
}

// By one block.
template <typename Rows>
__device__ __forceinline__ void PrepareRow(const Rows& rows, const Activations& to, Layout layout,
                                           int64_t columns, bool rounds, int64_t row) {
  if (!rows.Has(row)) return;
  const bool scaled =
      layout == Layout::kF16Lanes || layout == Layout::kF16 || IsTiled(layout);
  const int64_t groups = to.pitch / 8;
  const auto load = [&](int64_t base) {
    Group group;
    group.index = base + threadIdx.x;
    group.inside = group.index < groups;
    group.layout = layout;
    group.Load(rows, row, columns);
    if (rounds) group.RoundToQ8();
    return group;
  };
  // The first group stays in registers between the search for the maximum and the writing.
  const Group first = load(0);

  float factor = 1;
  if (scaled) {
    float max = first.Max();
    for (int64_t base = kThreads; base < groups; base += kThreads) {
      max = MaxWithNan(load(base).Max(), max);
    }
    const int exponent = RowExponent(RowMax(max));
    factor = ldexpf(1.0f, exponent);
    if (threadIdx.x == 0) const_cast<float*>(to.scales)[row] = ldexpf(1.0f, -exponent);
  }
  const int64_t scales_a_row = layout == Layout::kS8Lanes ? to.pitch / 32 : 0;
  const OutRow out = {
      layout, to.pitch / 32,
      static_cast<uint8_t*>(const_cast<void*>(to.values)) + row * to.pitch * LayoutBytes(layout),
      const_cast<float*>(to.scales) + row * scales_a_row,
      const_cast<uint32_t*>(to.sums) + row * (to.pitch / 16)};
  // Quads exchange sums, so whole warps take part.
  float squares = 0;
  for (int64_t base = 0; base < groups; base += kThreads) {
    const Group group = base == 0 ? first : load(base);
    Write(out, group, factor);
    if (IsTiled(layout)) squares += group.Squares(factor);
  }
  if (IsTiled(layout)) {
    squares = RowSum(squares);
    if (threadIdx.x == 0) const_cast<float*>(to.norms)[row] = 1.001f * sqrtf(squares);
  }
}

// One block a row.
template <typename Rows>
__global__ void __launch_bounds__(kThreads)
    Prepare(const __grid_constant__ Rows rows, Activations to, Layout layout, int64_t columns,
            bool rounds) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  PrepareRow(rows, to, layout, columns, rounds, blockIdx.x);
}

// One block a row, after one that sorts.
template <typename Rows>
__global__ void __launch_bounds__(kThreads)
    SortAndPrepare(const __grid_constant__ SortArgs sort, const __grid_constant__ Rows rows,
                   Activations to, Layout layout, int64_t columns, bool rounds) {
  extern __shared__ int32_t counts[];
  WaitForEarlierKernels();
  LetNextKernelStart();
  if (blockIdx.x == 0) return SortInBlock(sort, counts);
  PrepareRow(rows, to, layout, columns, rounds, blockIdx.x - 1);
}

template <typename Rows>
cudaError_t Launch(const Rows& rows, const PreparedRows& to, cudaStream_t stream,
                   const SortArgs* sort = nullptr) {
  if (to.rows == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(to.rows);
  if (sort == nullptr) {
    return LaunchEarly(Prepare<Rows>, blocks, kThreads, 0, stream, rows, ViewPrepared(to), to.layout,
                       to.columns, to.rounds);
  }
  return LaunchEarly(SortAndPrepare<Rows>, blocks + 1, kThreads, SortSharedBytes(*sort), stream,
                     *sort, rows, ViewPrepared(to), to.layout, to.columns, to.rounds);
}

}  // namespace

cudaError_t LaunchPrepare(const void* x, Element x_type, const PreparedRows& to,
                          cudaStream_t stream, const SortArgs* sort) {
  switch (x_type) {
    case Element::kF32:
      return Launch(Dense<float>{static_cast<const float*>(x), to.columns}, to, stream, sort);
    case Element::kF16:
      return Launch(Dense<half>{static_cast<const half*>(x), to.columns}, to, stream, sort);
    case Element::kBF16:
      return Launch(Dense<__nv_bfloat16>{static_cast<const __nv_bfloat16*>(x), to.columns}, to,
                    stream, sort);
  }
  return cudaErrorInvalidValue;
}

cudaError_t LaunchActivate(const ActivateArgs& args, const PreparedRows& to, cudaStream_t stream) {
  switch (args.activation) {
#define JAX_MOE_ACTIVATION(NAME) \
  case Activation::NAME:         \
    return Launch(Activated<Activation::NAME>{args}, to, stream);
    JAX_MOE_ACTIVATIONS(JAX_MOE_ACTIVATION)
#undef JAX_MOE_ACTIVATION
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_moe::cuda
