#include "ffi/cuda/prepare.h"

#include <type_traits>

#include "ffi/cuda/hopper.cuh"
#include "ffi/cuda/launch_early.h"
#include "ffi/cuda/load.h"
#include "ffi/cuda/row_layouts.cuh"
#include "ffi/cuda/row_sources.cuh"
#include "ffi/cuda/sort_block.cuh"
#include "ffi/cuda/store.cuh"

namespace jax_moe::cuda {
namespace {

// Of a row's largest magnitude; value: that of this thread.
template <int kThreads>
__device__ uint32_t RowMaxBits(uint32_t value) {
  __shared__ uint32_t warp_max[kThreads / 32];
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(0xffffffffu, warp_max[threadIdx.x % (kThreads / 32)]);
}

// A row in one of the tiled layouts, whose rows have a norm. Warps measure their columns with
// exponents of their own, so that they have to wait for each other once only.
template <int kThreads, typename Rows>
__device__ __forceinline__ void PrepareTiledRow(const Rows& rows, const Activations& to,
                                                Layout layout, int columns, bool rounds,
                                                int64_t row) {
  constexpr int kWarps = kThreads / 32;
  __shared__ uint2 measured[kWarps];  // the bits of a warp's maximum and of its sum of squares
  const int groups = static_cast<int>(to.pitch / 8), lane = threadIdx.x % 32;
  const auto load = [&](int index) {
    Group group;
    group.index = index;
    group.inside = true;
    group.layout = layout;
    group.LoadFours(rows, row, columns);
    if (rounds) group.RoundToQ8();
    return group;
  };
  // The first group stays in registers. Lanes exchange values, so whole warps take part.
  const Group first = load(threadIdx.x);
  uint32_t max = first.MaxBits();
  for (int base = kThreads; base < groups; base += kThreads) {
    max = ::max(max, load(base + threadIdx.x).MaxBits());
  }
  max = __reduce_max_sync(0xffffffffu, max);
  const float own_factor = PowerOfTwo(ExponentOfBits(max));
  float squares = first.Squares(own_factor);
  for (int base = kThreads; base < groups; base += kThreads) {
    squares += load(base + threadIdx.x).Squares(own_factor);
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, d);
  if (lane == 0) measured[threadIdx.x / 32] = make_uint2(max, __float_as_uint(squares));
  __syncthreads();
  const uint2 other = measured[lane % kWarps];
  const int exponent = ExponentOfBits(__reduce_max_sync(0xffffffffu, other.x));

  const float factor = PowerOfTwo(exponent);
  auto* values = static_cast<uint4*>(const_cast<void*>(to.values)) + row * groups;
  for (int base = 0; base < groups; base += kThreads) {
    const int index = base + threadIdx.x;
    const Group group = base == 0 ? first : load(index);
    const uint4 packed = PackTiled(layout, group, factor);
    if (index < groups) values[PlaceOfGroup(index)] = packed;
  }
  if (threadIdx.x >= 32) return;
  // A warp of zeros has a smaller exponent than its row may have.
  const float to_row = PowerOfTwo(::max(exponent - ExponentOfBits(other.x), -126));
  squares = __uint_as_float(other.y) * to_row * to_row;
#pragma unroll
  for (int d = kWarps / 2; d > 0; d /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, d);
  if (lane == 0) {
    const_cast<float*>(to.scales)[row] = PowerOfTwo(-exponent);
    const_cast<float*>(to.norms)[row] = 1.001f * sqrtf(squares);
  }
}

// By one block. Few rows are a matter of latency: with a thread for every group nothing is loaded twice.
template <int kThreads, typename Rows>
__device__ __forceinline__ void PrepareRow(const Rows& rows, const Activations& to, Layout layout,
                                           int columns, bool rounds, int64_t row) {
  if (!rows.Has(row)) return;
  if (IsTiled(layout)) {
    PrepareTiledRow<kThreads>(rows, to, layout, columns, rounds, row);
    return;
  }
  const bool scaled = layout == Layout::kF16Lanes || layout == Layout::kF16;
  const int groups = static_cast<int>(to.pitch / 8);
  const auto load = [&](int base) {
    Group group;
    group.index = base + threadIdx.x;
    group.inside = group.index < groups;
    group.layout = layout;
    group.Load(rows, row, columns);
    return group;
  };
  // The first group stays in registers between the search for the maximum and the writing.
  const Group first = load(0);

  float factor = 1;
  if (scaled) {
    uint32_t max = first.MaxBits();
    for (int base = kThreads; base < groups; base += kThreads) {
      max = ::max(max, load(base).MaxBits());
    }
    const int exponent = ExponentOfBits(RowMaxBits<kThreads>(max));
    factor = PowerOfTwo(exponent);
    if (threadIdx.x == 0) const_cast<float*>(to.scales)[row] = PowerOfTwo(-exponent);
  }
  const int64_t scales_a_row = layout == Layout::kS8Lanes ? to.pitch / 32 : 0;
  const OutRow out = {
      layout, to.pitch / 32,
      static_cast<uint8_t*>(const_cast<void*>(to.values)) + row * to.pitch * LayoutBytes(layout),
      const_cast<float*>(to.scales) + row * scales_a_row,
      const_cast<uint32_t*>(to.sums) + row * (to.pitch / 16)};
  // Quads exchange sums, so whole warps take part.
  for (int base = 0; base < groups; base += kThreads) {
    Write(out, base == 0 ? first : load(base), factor);
  }
}

// One block a row.
template <int kThreads, typename Rows>
__global__ void __launch_bounds__(kThreads)
    Prepare(const __grid_constant__ Rows rows, Activations to, Layout layout, int columns,
            bool rounds) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  PrepareRow<kThreads>(rows, to, layout, columns, rounds, blockIdx.x);
}

// One block a row, after the cluster that sorts; clusters are as large throughout, the last one's
// blocks may be too many.
template <int kThreads, typename Rows>
__global__ void __launch_bounds__(kThreads, kThreads == 256 ? 5 : 1)
    SortAndPrepare(const __grid_constant__ SortArgs sort, int sort_blocks,
                   const __grid_constant__ Rows rows, Activations to, Layout layout,
                   int64_t number, int columns, bool rounds) {
  extern __shared__ int32_t counts[];
  const int block = static_cast<int>(blockIdx.x);
  if (block < sort_blocks) {
    if (threadIdx.x >= kSortThreads) return;
    SortBlock sorting(sort, sort.expert_ids, counts);
    sorting.Clear();
    WaitForEarlierKernels();
    LetNextKernelStart();
    sorting.Run();
    return;
  }
  WaitForEarlierKernels();
  LetNextKernelStart();
  if (block - sort_blocks >= number) return;
  PrepareRow<kThreads>(rows, to, layout, columns, rounds, block - sort_blocks);
}

// ids [pairs]: the last entry that names each pair decides, as in LaunchPairExperts. By the block that
// sorts.
__device__ __forceinline__ void FindPairExperts(const PairArgs& args, int pairs, int32_t* ids) {
  for (int i = threadIdx.x; i < pairs; i += kSortThreads) ids[i] = -1;  // the entries that win
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += kSortThreads) {
    const int pair = args.sorted_token_ids[i];
    if (pair >= 0 && pair < pairs) atomicMax(ids + pair, i);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += kSortThreads) {
    if (ids[i] >= 0) ids[i] = args.flat_expert_ids[ids[i]];
  }
  __syncthreads();
}

// A block's pair: it looks for the pair's expert by itself.
__device__ __forceinline__ void ZeroRowWithoutExpert(const PairArgs& args, int pairs, int experts,
                                                     int pair) {
  __shared__ int32_t winner;
  if (threadIdx.x == 0) winner = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    if (args.sorted_token_ids[i] == pair) atomicMax(&winner, i);
  }
  __syncthreads();
  const int expert = winner < 0 ? -1 : args.flat_expert_ids[winner];
  if (expert >= 0 && expert < experts) return;
  for (int64_t column = threadIdx.x; column < args.columns; column += blockDim.x) {
    Store(args.y, pair * args.columns + column, args.y_type, 0.0f);
  }
}

// A block that sorts, or none, then one a pair, then one a row.
template <int kThreads, typename Rows>
__global__ void __launch_bounds__(kThreads)
    PrepareGemm(const __grid_constant__ PairArgs pairs, const __grid_constant__ SortArgs sort,
                int sort_blocks, const __grid_constant__ Rows rows, Activations to, Layout layout,
                int columns, bool rounds) {
  extern __shared__ int32_t counts[];
  WaitForEarlierKernels();
  LetNextKernelStart();
  const int number = static_cast<int>(sort.pairs);
  const int block = static_cast<int>(blockIdx.x) - sort_blocks;
  if (block < 0) {
    __shared__ int32_t ids[kPairsInOneLaunch];
    // What the other functions have there is less than 1 KB.
    static_assert(4 * (kMostSortCounters + kPairsInOneLaunch) + 1024 <= 48 * 1024);
    if (threadIdx.x >= kSortThreads) return;
    SortBlock sorting(sort, ids, counts);
    sorting.Clear();
    FindPairExperts(pairs, number, ids);
    sorting.Run();
  } else if (block < number) {
    ZeroRowWithoutExpert(pairs, number, sort.experts, block);
  } else {
    PrepareRow<kThreads>(rows, to, layout, columns, rounds, block - number);
  }
}

template <int kThreads, typename Rows>
cudaError_t LaunchRows(const Rows& rows, const PreparedRows& to, cudaStream_t stream) {
  return LaunchEarly(Prepare<kThreads, Rows>, static_cast<unsigned>(to.rows), kThreads, 0, stream,
                     rows, ViewPrepared(to), to.layout, static_cast<int>(to.columns), to.rounds);
}

template <int kThreads, typename Rows>
cudaError_t LaunchSortAndRows(const SortArgs& sort, const Rows& rows, const PreparedRows& to,
                              cudaStream_t stream) {
  const int cluster = SortBlocks(sort);
  const int64_t blocks = cluster + (to.rows + cluster - 1) / cluster * cluster;
  return LaunchClusters(SortAndPrepare<kThreads, Rows>, cluster, static_cast<unsigned>(blocks),
                        kThreads, SortSharedBytes(sort, cluster), stream, sort, cluster, rows,
                        ViewPrepared(to), to.layout, to.rows, static_cast<int>(to.columns),
                        to.rounds);
}

// f(rows, the number of threads) for an array of rows.
template <typename F>
cudaError_t WithDenseRows(const void* x, Element x_type, const PreparedRows& to, F f) {
  if (to.rows == 0) return cudaSuccess;
  const int64_t groups = PreparedPitch(to.layout, to.columns) / 8;
  const auto run = [&](auto rows) {
    // Many rows are a matter of how many are under way.
    if (groups <= 256 || to.rows >= 512) return f(rows, std::integral_constant<int, 256>());
    if (groups <= 512) return f(rows, std::integral_constant<int, 512>());
    return f(rows, std::integral_constant<int, 1024>());
  };
  switch (x_type) {
    case Element::kF32:
      return run(Dense<float>{static_cast<const float*>(x), to.columns});
    case Element::kF16:
      return run(Dense<half>{static_cast<const half*>(x), to.columns});
    case Element::kBF16:
      return run(Dense<__nv_bfloat16>{static_cast<const __nv_bfloat16*>(x), to.columns});
  }
  return cudaErrorInvalidValue;
}

template <typename Rows>
cudaError_t LoadDense() {
  return LoadKernels(Prepare<256, Rows>, Prepare<512, Rows>, Prepare<1024, Rows>,
                     SortAndPrepare<256, Rows>, SortAndPrepare<512, Rows>,
                     SortAndPrepare<1024, Rows>, PrepareGemm<256, Rows>, PrepareGemm<512, Rows>,
                     PrepareGemm<1024, Rows>);
}

}  // namespace

cudaError_t LaunchPrepare(const void* x, Element x_type, const PreparedRows& to,
                          cudaStream_t stream, const SortArgs* sort) {
  return WithDenseRows(x, x_type, to, [&](auto rows, auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    return sort == nullptr ? LaunchRows<kThreads>(rows, to, stream)
                           : LaunchSortAndRows<kThreads>(*sort, rows, to, stream);
  });
}

cudaError_t LaunchPrepareGemm(const PairArgs& pairs, const SortArgs& sort, bool sorts, const void* x,
                              Element x_type, const PreparedRows& to, cudaStream_t stream) {
  return WithDenseRows(x, x_type, to, [&](auto rows, auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    const int sort_blocks = sorts ? 1 : 0;
    return LaunchEarly(PrepareGemm<kThreads, decltype(rows)>,
                       static_cast<unsigned>(sort_blocks + sort.pairs + to.rows), kThreads,
                       sorts ? SortSharedBytes(sort, 1) : 0, stream, pairs, sort, sort_blocks, rows,
                       ViewPrepared(to), to.layout, static_cast<int>(to.columns), to.rounds);
  });
}

cudaError_t LaunchActivate(const ActivateArgs& args, const PreparedRows& to, cudaStream_t stream) {
  if (to.rows == 0) return cudaSuccess;
  switch (args.activation) {
#define JAX_MOE_ACTIVATION(NAME) \
  case Activation::NAME:         \
    return LaunchRows<256>(Activated<Activation::NAME>{args}, to, stream);
    JAX_MOE_ACTIVATIONS(JAX_MOE_ACTIVATION)
#undef JAX_MOE_ACTIVATION
  }
  return cudaErrorInvalidValue;
}

cudaError_t LoadPrepare() {
  cudaError_t status = LoadDense<Dense<float>>();
  if (status == cudaSuccess) status = LoadDense<Dense<half>>();
  if (status == cudaSuccess) status = LoadDense<Dense<__nv_bfloat16>>();
#define JAX_MOE_ACTIVATION(NAME) \
  if (status == cudaSuccess) status = LoadKernel(Prepare<256, Activated<Activation::NAME>>);
  JAX_MOE_ACTIVATIONS(JAX_MOE_ACTIVATION)
#undef JAX_MOE_ACTIVATION
  return status;
}

}  // namespace jax_moe::cuda
