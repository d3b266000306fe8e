#include "ffi/cuda/route.h"

namespace jax_moe::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// The smallest normal float16: the weights' sum is clamped to it before the division.
constexpr float kMinSum = 6.103515625e-5f;

__device__ float NanToMinusInf(float x) { return x != x ? -INFINITY : x; }

// Larger keys come first: higher score, then lower index. 0 is below all of them.
__device__ uint64_t SortKey(float score, int index) {
  uint32_t bits = __float_as_uint(score);
  if (bits == 0x80000000u) bits = 0;  // -0 ties with +0
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ascending) << 32 | static_cast<uint32_t>(~index);
}

__device__ int KeyIndex(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

__device__ uint64_t WarpMax(uint64_t key) {
  const uint32_t high = static_cast<uint32_t>(key >> 32);
  const uint32_t max = __reduce_max_sync(kAll, high);
  const uint32_t low = high == max ? static_cast<uint32_t>(key) : 0;
  return static_cast<uint64_t>(max) << 32 | __reduce_max_sync(kAll, low);
}

__device__ float WarpMax(float x) {
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, d));
  return x;
}

__device__ double WarpSum(double x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return x;
}

// In place, over the n values of a warp's row.
__device__ void Softmax(float* x, int n) {
  const int lane = threadIdx.x % 32;
  float max = -INFINITY;
  for (int i = lane; i < n; i += 32) max = fmaxf(max, x[i]);
  max = WarpMax(max);
  double sum = 0;
  for (int i = lane; i < n; i += 32) {
    x[i] = expf(x[i] - max);
    sum += x[i];
  }
  const double factor = 1 / WarpSum(sum);
  for (int i = lane; i < n; i += 32) x[i] = static_cast<float>(x[i] * factor);
  __syncwarp();
}

__device__ void Gate(Gating gating, float* x, int n) {
  const int lane = threadIdx.x % 32;
  switch (gating) {
    case Gating::kSoftmax:
      Softmax(x, n);
      break;
    case Gating::kSigmoid:
      for (int i = lane; i < n; i += 32) x[i] = 1.0f / (1.0f + expf(-x[i]));
      break;
    case Gating::kSoftmaxAfterTopk:
      break;
    case Gating::kSqrtSoftplus:
      for (int i = lane; i < n; i += 32) {
        x[i] = sqrtf(fmaxf(x[i], 0.0f) + log1pf(expf(-fabsf(x[i]))));
      }
      break;
  }
  __syncwarp();
}

// The `count` best of n scores, in order: take(rank, index). The lane that owned a winner looks for
// its next best; the others keep theirs.
template <typename Take>
__device__ void TopK(const float* scores, int n, int count, Take take) {
  const int lane = threadIdx.x % 32;
  const auto best_below = [&](uint64_t bound) {
    uint64_t best = 0;
    for (int i = lane; i < n; i += 32) {
      const uint64_t key = SortKey(scores[i], i);
      if (key < bound && key > best) best = key;
    }
    return best;
  };
  uint64_t own = best_below(~uint64_t{0});
  for (int rank = 0; rank < count; ++rank) {
    const uint64_t winner = WarpMax(own);
    take(rank, KeyIndex(winner));
    if (own == winner) own = best_below(winner);
  }
  __syncwarp();
}

// A group's score is the sum of its two best; experts of all but the best groups become -inf.
__device__ void LimitGroups(const RouteArgs& args, float* scores, float* group_scores) {
  const int lane = threadIdx.x % 32, size = args.experts / args.num_groups;
  for (int group = lane; group < args.num_groups; group += 32) {
    float best = -INFINITY, second = -INFINITY;
    for (int e = group * size; e < (group + 1) * size; ++e) {
      second = fmaxf(second, fminf(best, scores[e]));
      best = fmaxf(best, scores[e]);
    }
    group_scores[group] = size == 1 ? best : NanToMinusInf(best + second);
  }
  __syncwarp();
  for (int group = lane; group < args.num_groups; group += 32) {
    const uint64_t key = SortKey(group_scores[group], group);
    int better = 0;
    for (int other = 0; other < args.num_groups; ++other) {
      better += SortKey(group_scores[other], other) > key;
    }
    if (better < args.num_groups_used) continue;
    for (int e = group * size; e < (group + 1) * size; ++e) scores[e] = -INFINITY;
  }
  __syncwarp();
}

// One warp a token; gates, scores and group scores lie in shared memory.
__global__ void Route(const __grid_constant__ RouteArgs args) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (token >= args.tokens) return;
  const int experts = args.experts;
  float* gates = shared + static_cast<int64_t>(warp) * (2 * experts + args.num_groups);
  float* scores = gates + experts;
  float* group_scores = scores + experts;
  int32_t* ids = args.expert_ids + token * args.top_k;
  float* weights = args.weights + token * args.top_k;

  bool all_nan = true;
  for (int e = lane; e < experts; e += 32) {
    const float logit = args.logits[token * experts + e];
    all_nan = all_nan && logit != logit;
    gates[e] = scores[e] = NanToMinusInf(logit);
  }
  __syncwarp();
  if (__all_sync(kAll, all_nan)) {
    for (int s = lane; s < args.top_k; s += 32) {
      ids[s] = s;
      weights[s] = NAN;
    }
    return;
  }
  Gate(args.gating, gates, experts);
  if (args.selection_bias != nullptr || args.num_groups > 1) {
    for (int e = lane; e < experts; e += 32) {
      const float bias = args.selection_bias == nullptr ? 0.0f : args.selection_bias[e];
      scores[e] = NanToMinusInf(gates[e] + bias);
    }
    __syncwarp();
  }
  if (args.num_groups > 1) LimitGroups(args, scores, group_scores);
  int first_id = 0;  // of this lane's ranks; the others are read again
  TopK(scores, experts, args.top_k, [&](int rank, int index) {
    if (rank % 32 != lane) return;
    ids[rank] = index;
    if (rank < 32) first_id = index;
  });
  // The selected gate values go to the front of `scores` only after all have been selected.
  float* selected = scores;
  for (int s = lane; s < args.top_k; s += 32) selected[s] = gates[s < 32 ? first_id : ids[s]];
  __syncwarp();
  if (args.gating == Gating::kSoftmaxAfterTopk) Softmax(selected, args.top_k);
  float divisor = 1;
  if (args.normalize) {
    float sum = 0;
    for (int s = 0; s < args.top_k; ++s) sum += selected[s];
    divisor = sum < kMinSum ? kMinSum : sum;  // a NaN stays
  }
  for (int s = lane; s < args.top_k; s += 32) {
    float weight = selected[s];
    if (args.normalize) weight /= divisor;
    if (args.scale != 0) weight *= args.scale;
    weights[s] = weight;
  }
}

}  // namespace

cudaError_t LaunchRoute(const RouteArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) return cudaSuccess;
  const int floats = 2 * args.experts + args.num_groups;
  const int fit = 48 * 1024 / (4 * floats);
  const int warps = fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
  const unsigned blocks = static_cast<unsigned>((args.tokens + warps - 1) / warps);
  Route<<<blocks, 32 * warps, sizeof(float) * floats * warps, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace jax_moe::cuda
