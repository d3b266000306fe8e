#include "ffi/cuda/prepare.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ffi/cuda/activation.cuh"
#include "ffi/cuda/split.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kThreads = 256;

// Four consecutive values.
struct Four {
  float v[4];
};

__device__ Four Load4(const float* x) {
  const float4 f = *reinterpret_cast<const float4*>(x);
  return {{f.x, f.y, f.z, f.w}};
}

template <typename T2, typename T>
__device__ Four Load4As(const T* x) {
  const uint2 bits = *reinterpret_cast<const uint2*>(x);
  const T2 low = *reinterpret_cast<const T2*>(&bits.x), high = *reinterpret_cast<const T2*>(&bits.y);
  return {{static_cast<float>(low.x), static_cast<float>(low.y), static_cast<float>(high.x),
           static_cast<float>(high.y)}};
}
__device__ Four Load4(const half* x) { return Load4As<half2>(x); }
__device__ Four Load4(const __nv_bfloat16* x) { return Load4As<__nv_bfloat162>(x); }

// Rows as the kernel reads them: Has(row); At(row, column); and At4 of four columns from a multiple of 4
// on, where the number of columns is a multiple of 4.
template <typename T>
struct Dense {
  const T* x;
  int64_t columns;
  __device__ bool Has(int64_t) const { return true; }
  __device__ float At(int64_t row, int64_t column) const {
    return static_cast<float>(x[row * columns + column]);
  }
  __device__ Four At4(int64_t row, int64_t column) const { return Load4(x + row * columns + column); }
};

struct Activated {
  ActivateArgs args;

  __device__ bool Has(int64_t row) const {
    return args.expert_ids[row] >= 0 && args.expert_ids[row] < args.experts;
  }
  __device__ float Finish(float value, const Projection& projection, int64_t row,
                          int64_t column) const {
    const int64_t expert = args.expert_ids[row];
    if (args.pair_weight != nullptr) value *= args.pair_weight[row];
    if (projection.scale != nullptr) value *= projection.scale[expert];
    if (projection.bias != nullptr) value += projection.bias[expert * projection.bias_pitch + column];
    return value;
  }
  __device__ float Act(float gate, float up, int64_t row, int64_t column) const {
    if (args.gate != nullptr) gate = Finish(gate, args.gate_projection, row, column);
    return Activate(args.activation, gate, Finish(up, args.up_projection, row, column), args.limit,
                    args.beta, args.linear_beta);
  }
  __device__ float At(int64_t row, int64_t column) const {
    const int64_t at = row * args.pitch + column;
    return Act(args.gate == nullptr ? 0.0f : args.gate[at], args.up[at], row, column);
  }
  __device__ Four At4(int64_t row, int64_t column) const {
    const int64_t at = row * args.pitch + column;
    const Four gate = args.gate == nullptr ? Four{} : Load4(args.gate + at), up = Load4(args.up + at);
    Four result;
#pragma unroll
    for (int i = 0; i < 4; ++i) result.v[i] = Act(gate.v[i], up.v[i], row, column + i);
    return result;
  }
};

__device__ float MaxWithNan(float a, float b) { return a > b || a != a ? a : b; }

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

// The power of two that brings `max` to 2^14 .. 2^15. It and its inverse are normal float32. Rows that
// are not finite stay as they are, so that it shows in the result.
__device__ int RowExponent(float max) {
  if (!(max < INFINITY) || max == 0) return 0;
  return min(14 - ilogbf(max), 126);
}

// Eight values of a row that stand next to each other in the layout. In lane order, lane t of a quad has
// columns 4t .. 4t + 3 and 16 + 4t .. 16 + 4t + 3 of every 32.
struct Group {
  int64_t index;
  bool inside;  // false: past the end of the row; takes part in exchanges only
  bool lanes;
  float v[8];

  // The columns of v[0 .. 3] and v[4 .. 7] begin here.
  __device__ int64_t Column(int half) const {
    if (!lanes) return index * 8 + half * 4;
    return index / 4 * 32 + index % 4 * 4 + half * 16;
  }
  template <typename Rows>
  __device__ void Load(const Rows& rows, int64_t row, int64_t columns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = Column(half);
      Four four = {};
      if (inside && columns % 4 == 0) {
        if (column < columns) four = rows.At4(row, column);
      } else if (inside) {
        for (int i = 0; i < 4; ++i) four.v[i] = column + i < columns ? rows.At(row, column + i) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) v[4 * half + i] = four.v[i];
    }
  }
  __device__ float Max() const {
    float max = 0;
    for (const float x : v) max = MaxWithNan(fabsf(x), max);
    return max;
  }
};

__device__ uint32_t PackHalves(float a, float b) {
  const half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}

__device__ float SumHalves(uint32_t packed) {
  const float2 f = __half22float2(*reinterpret_cast<const half2*>(&packed));
  return f.x + f.y;
}

// A prepared row, writable.
struct OutRow {
  Layout layout;
  uint8_t* values;
  float* scales;
  uint32_t* sums;
};

__device__ void WriteHalves(const OutRow& out, const Group& group, float factor) {
  const float(&v)[8] = group.v;
  const uint4 packed = {
      PackHalves(v[0] * factor, v[1] * factor), PackHalves(v[2] * factor, v[3] * factor),
      PackHalves(v[4] * factor, v[5] * factor), PackHalves(v[6] * factor, v[7] * factor)};
  if (group.inside) reinterpret_cast<uint4*>(out.values)[group.index] = packed;
  if (out.layout != Layout::kF16Lanes) return;
  float2 sum = {SumHalves(packed.x) + SumHalves(packed.y), SumHalves(packed.z) + SumHalves(packed.w)};
  for (int d = 1; d < 4; d *= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, d);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, d);
  }
  if (group.inside && group.index % 4 == 0) {
    reinterpret_cast<uint2*>(out.sums)[group.index / 4] = make_uint2(SplitBF16(sum.x), SplitBF16(sum.y));
  }
}

// q8_1: d = max / 127 over 32 columns, q = x / d rounded half away from zero.
__device__ void WriteS8(const OutRow& out, const Group& group) {
  float max = group.Max();
  for (int d = 1; d < 4; d *= 2) max = MaxWithNan(__shfl_xor_sync(0xffffffffu, max, d), max);
  const float scale = max / 127.0f;
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool finite = scale > 0 && scale < INFINITY;
    const int q = finite ? static_cast<int>(roundf(group.v[i] / scale)) : 0;
    words[i / 4] |= static_cast<uint32_t>(q & 0xff) << 8 * (i % 4);
  }
  if (!group.inside) return;
  reinterpret_cast<uint2*>(out.values)[group.index] = make_uint2(words[0], words[1]);
  if (group.index % 4 == 0) out.scales[group.index / 4] = scale;
}

template <typename T>
__device__ void WriteAs(const OutRow& out, const Group& group) {
  if (!group.inside) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    reinterpret_cast<T*>(out.values)[group.index * 8 + i] = static_cast<T>(group.v[i]);
  }
}

__device__ void Write(const OutRow& out, const Group& group, float factor) {
  switch (out.layout) {
    case Layout::kF16Lanes:
    case Layout::kF16:
      return WriteHalves(out, group, factor);
    case Layout::kS8Lanes:
      return WriteS8(out, group);
    case Layout::kBF16:
      return WriteAs<__nv_bfloat16>(out, group);
    case Layout::kF32:
      return WriteAs<float>(out, group);
  }
}

// One block a row.
template <typename Rows>
__global__ void __launch_bounds__(kThreads)
    Prepare(const __grid_constant__ Rows rows, Activations to, Layout layout, int64_t columns) {
  const int64_t row = blockIdx.x;
  if (!rows.Has(row)) return;
  const bool scaled = layout == Layout::kF16Lanes || layout == Layout::kF16;
  const bool lanes = layout == Layout::kF16Lanes || layout == Layout::kS8Lanes;
  const int64_t groups = to.pitch / 8;
  const auto load = [&](int64_t base) {
    Group group;
    group.index = base + threadIdx.x;
    group.inside = group.index < groups;
    group.lanes = lanes;
    group.Load(rows, row, columns);
    return group;
  };
  // The first groups stay in registers between the search for the maximum and the writing.
  constexpr int kKept = 2;
  Group kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) kept[i] = load(i * kThreads);

  float factor = 1;
  if (scaled) {
    float max = MaxWithNan(kept[0].Max(), kept[1].Max());
    for (int64_t base = kKept * kThreads; base < groups; base += kThreads) {
      max = MaxWithNan(load(base).Max(), max);
    }
    const int exponent = RowExponent(RowMax(max));
    factor = ldexpf(1.0f, exponent);
    if (threadIdx.x == 0) const_cast<float*>(to.scales)[row] = ldexpf(1.0f, -exponent);
  }
  const int64_t scales_a_row = layout == Layout::kS8Lanes ? to.pitch / 32 : 0;
  const OutRow out = {
      layout,
      static_cast<uint8_t*>(const_cast<void*>(to.values)) + row * to.pitch * LayoutBytes(layout),
      const_cast<float*>(to.scales) + row * scales_a_row,
      const_cast<uint32_t*>(to.sums) + row * (to.pitch / 16)};
  // Quads exchange sums, so whole warps take part.
#pragma unroll
  for (int i = 0; i < kKept; ++i) Write(out, kept[i], factor);
  for (int64_t base = kKept * kThreads; base < groups; base += kThreads) {
    Write(out, load(base), factor);
  }
}

template <typename Rows>
cudaError_t Launch(const Rows& rows, const PreparedRows& to, cudaStream_t stream) {
  if (to.rows == 0) return cudaSuccess;
  Prepare<<<static_cast<unsigned>(to.rows), kThreads, 0, stream>>>(rows, ViewPrepared(to), to.layout,
                                                                   to.columns);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchPrepare(const void* x, Element x_type, const PreparedRows& to,
                          cudaStream_t stream) {
  switch (x_type) {
    case Element::kF32:
      return Launch(Dense<float>{static_cast<const float*>(x), to.columns}, to, stream);
    case Element::kF16:
      return Launch(Dense<half>{static_cast<const half*>(x), to.columns}, to, stream);
    case Element::kBF16:
      return Launch(Dense<__nv_bfloat16>{static_cast<const __nv_bfloat16*>(x), to.columns}, to,
                    stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t LaunchActivate(const ActivateArgs& args, const PreparedRows& to, cudaStream_t stream) {
  return Launch(Activated{args}, to, stream);
}

}  // namespace jax_moe::cuda
