#include "ffi/cuda/route.h"

#include <algorithm>
#include <climits>

#include "ffi/cuda/load.h"

namespace jax_moe::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// The smallest normal float16: the weights' sum is clamped to it before the division.
constexpr float kMinSum = 6.103515625e-5f;

__device__ int Lane() { return threadIdx.x % 32; }

__device__ float NanToMinusInf(float x) { return x != x ? -INFINITY : x; }

// Of a number that is no NaN: larger numbers have larger keys, and none has 0. -0 ties with +0.
__device__ uint32_t SortKey(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float NumberOf(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ float WarpMax(float x) { return NumberOf(__reduce_max_sync(kAll, SortKey(x))); }

__device__ double WarpSum(double x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return x;
}

// A warp's numbers, those of index lane, lane + 32, ... in each lane: `kValues` of them in
// registers or, if that is 0, any number in shared memory. For one token nothing but latencies
// counts, those of instructions that come from memory included.
template <int kValues>
struct Row {
  float x[kValues];

  __device__ explicit Row(float*) {}
  __device__ float& operator[](int j) { return x[j]; }
};

template <>
struct Row<0> {
  float* x;

  __device__ explicit Row(float* memory) : x(memory + Lane()) {}
  __device__ float& operator[](int j) { return x[32 * j]; }
};

// f(j, i) for all indices i of the lane, row[j]; in registers also for those beyond n.
template <int kValues, typename F>
__device__ void ForEach(int n, F f) {
  if constexpr (kValues > 0) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) f(j, Lane() + 32 * j);
  } else {
    for (int j = 0; Lane() + 32 * j < n; ++j) f(j, Lane() + 32 * j);
  }
}

struct Softmax {
  float max;
  double factor;

  __device__ float operator()(float x) const { return static_cast<float>(expf(x - max) * factor); }
};

// Over n numbers, with -inf beyond them.
template <int kValues>
__device__ Softmax SoftmaxOf(Row<kValues>& row, int n) {
  float max = -INFINITY;
  ForEach<kValues>(n, [&](int j, int) { max = fmaxf(max, row[j]); });
  max = WarpMax(max);
  double sum = 0;
  ForEach<kValues>(n, [&](int j, int) { sum += expf(row[j] - max); });
  return {max, 1 / WarpSum(sum)};
}

// Rounded as 1 / y is, by way of a double that is exact enough: without that division's branch for
// results below the normal floats, so that the numbers of a lane are computed side by side.
__device__ float Sigmoid(float x) {
  const float y = 1.0f + expf(-x);
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(static_cast<double>(y)));
  for (int i = 0; i < 2; ++i) r = fma(r, fma(-static_cast<double>(y), r, 1.0), r);
  return y == INFINITY ? 0.0f : static_cast<float>(r);
}

// The gate of a logit, 0 for -inf; with softmax after top-k the logit itself.
template <Gating kGating>
struct Gate {
  Softmax softmax;

  __device__ float operator()(float x) const {
    if constexpr (kGating == Gating::kSoftmax) return softmax(x);
    if constexpr (kGating == Gating::kSigmoid) return Sigmoid(x);
    if constexpr (kGating == Gating::kSqrtSoftplus) {
      return sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
    }
    return x;
  }
};

struct Candidate {
  uint32_t key;
  int index;

  __device__ void Replace(bool by, const Candidate& other) {
    key = by ? other.key : key;
    index = by ? other.index : index;
  }
};

// The scores of a lane, of which the best may be taken away: sorted lists of four.
template <int kValues>
class Candidates {
 public:
  __device__ Candidates(Row<kValues>& scores, int n) {
    ForEach<kValues>(n, [&](int j, int i) { list_[j] = {i < n ? SortKey(scores[j]) : 0, i}; });
    // Only neighbours are exchanged, so that ties stay in order.
#pragma unroll
    for (int round = 0; round < 4; ++round) {
#pragma unroll
      for (int j = round % 2; j < kValues - 1; j += 2) {
        if (j % 4 == 3) continue;
        const Candidate first = list_[j];
        const bool exchange = list_[j + 1].key > first.key;
        list_[j].Replace(exchange, list_[j + 1]);
        list_[j + 1].Replace(exchange, first);
      }
    }
  }

  __device__ Candidate Best() const {
    Candidate best = list_[0];
#pragma unroll
    for (int j = 4; j < kValues; j += 4) best.Replace(list_[j].key > best.key, list_[j]);
    return best;
  }

  // The best one of some lane.
  __device__ void Remove(int index) {
#pragma unroll
    for (int j = 0; j < kValues; j += 4) {
      const bool here = list_[j].index == index;
#pragma unroll
      for (int i = j; i < j + 3; ++i) list_[i].Replace(here, list_[i + 1]);
      list_[j + 3].key = here ? 0 : list_[j + 3].key;
    }
  }

 private:
  Candidate list_[kValues];
};

template <>
class Candidates<0> {
 public:
  __device__ Candidates(Row<0>& scores, int n) : scores_(scores), n_(n) { Find(); }

  __device__ Candidate Best() const { return best_; }

  __device__ void Remove(int index) {
    if (best_.index != index) return;
    scores_[index / 32] = NAN;
    Find();
  }

 private:
  __device__ void Find() {
    best_ = {0, 0};
    ForEach<0>(n_, [&](int j, int i) {
      const uint32_t key = scores_[j] != scores_[j] ? 0 : SortKey(scores_[j]);
      if (key > best_.key) best_ = {key, i};
    });
  }

  Row<0>& scores_;
  int n_;
  Candidate best_;
};

// Of two groups, by their scores and indices.
__device__ bool IsBetter(float a, int a_index, float b, int b_index) {
  const uint32_t a_key = SortKey(a), b_key = SortKey(b);
  return a_key > b_key || (a_key == b_key && a_index < b_index);
}

// A group's score is the sum of its two best; experts of all but the best groups become -inf.
// `team` lanes, a power of two, look at a group together; a group has `size` experts.
__device__ void LimitGroups(const RouteArgs& args, int size, float* scores, float* group_scores) {
  const int groups = args.num_groups, shift = max(0, __clz(groups - 1) - 27), team = 1 << shift;
  const int first = Lane() >> shift, member = Lane() & (team - 1), step = 32 >> shift;
  for (int base = 0; base < groups; base += step) {
    const int group = base + first;
    float best = -INFINITY, second = -INFINITY;
    for (int i = member; i < size && group < groups; i += team) {
      const float score = scores[group * size + i];
      second = fmaxf(second, fminf(best, score));
      best = fmaxf(best, score);
    }
    for (int d = team / 2; d > 0; d /= 2) {
      const float other = __shfl_xor_sync(kAll, best, d);
      second = fmaxf(fmaxf(second, __shfl_xor_sync(kAll, second, d)), fminf(best, other));
      best = fmaxf(best, other);
    }
    if (group < groups) group_scores[group] = size == 1 ? best : NanToMinusInf(best + second);
  }
  __syncwarp();
  for (int group = first; group < groups; group += step) {
    const float score = group_scores[group];
    int better = 0;
    for (int other = 0; other < groups; ++other) {
      better += IsBetter(group_scores[other], other, score, group);
    }
    if (better < args.num_groups_used) continue;
    for (int i = member; i < size; i += team) scores[group * size + i] = -INFINITY;
  }
  __syncwarp();
}

template <int kValues>
__device__ void LimitGroups(const RouteArgs& args, int size, Row<kValues>& row, float* scores,
                            float* group_scores) {
  ForEach<kValues>(args.experts, [&](int j, int e) {
    if (e < args.experts) scores[e] = row[j];
  });
  __syncwarp();
  LimitGroups(args, size, scores, group_scores);
  ForEach<kValues>(args.experts, [&](int j, int e) {
    if (e < args.experts) row[j] = scores[e];
  });
}

// The sum of the first n numbers in their order; 0 must be beyond them.
__device__ float SumInOrder(Row<1>& row, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; i += 8) {
#pragma unroll
    for (int j = i; j < i + 8; ++j) sum += __shfl_sync(kAll, row[0], j);
  }
  return sum;
}

__device__ float SumInOrder(Row<0>& row, int n) {
  __syncwarp();
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += row.x[i - Lane()];
  return sum;
}

bool InRegisters(const RouteArgs& args) { return args.experts <= 512 && args.top_k <= 32; }

// What a token needs of shared memory: its scores, their bias, and the groups' scores.
__host__ __device__ int ScratchFloats(const RouteArgs& args, bool registers) {
  if (!registers) return 2 * args.experts + args.num_groups;
  return args.num_groups == 1 ? 0 : args.experts + args.num_groups;
}

// One warp a token. kPlain: there is neither a bias nor more than one group, and the selection is
// made on the logits. Groups have `group_size` experts.
template <int kValues, Gating kGating, bool kPlain>
__global__ void Route(const __grid_constant__ RouteArgs args, int group_size) {
  extern __shared__ float shared[];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (token >= args.tokens) return;
  const int experts = args.experts, top_k = args.top_k;
  const float* logits = args.logits + token * experts;
  int32_t* ids = args.expert_ids + token * top_k;
  float* weights = args.weights + token * top_k;
  float* scratch = shared + static_cast<int64_t>(warp) * ScratchFloats(args, kValues > 0);

  // The bias comes from memory, so it is fetched together with the logits.
  Row<kValues> scores(scratch), bias(scratch + experts);
  if constexpr (!kPlain) {
    const int biased = args.selection_bias == nullptr ? 0 : experts;
    ForEach<kValues>(experts, [&](int j, int e) {
      bias[j] = e < biased ? args.selection_bias[e] : 0.0f;
    });
  }
  bool all_nan = true;
  ForEach<kValues>(experts, [&](int j, int e) {
    const float logit = e < experts ? logits[e] : NAN;
    all_nan = all_nan && logit != logit;
    scores[j] = NanToMinusInf(logit);
  });
  if (__all_sync(kAll, all_nan)) {
    for (int s = Lane(); s < top_k; s += 32) {
      ids[s] = s;
      weights[s] = NAN;
    }
    return;
  }
  Gate<kGating> gate;
  if constexpr (kGating == Gating::kSoftmax) gate.softmax = SoftmaxOf(scores, experts);
  if constexpr (!kPlain) {
    ForEach<kValues>(experts, [&](int j, int) {
      scores[j] = NanToMinusInf(gate(scores[j]) + bias[j]);
    });
    if (args.num_groups > 1) {
      float* group_scores = scratch + ScratchFloats(args, kValues > 0) - args.num_groups;
      LimitGroups(args, group_size, scores, scratch, group_scores);
    }
  }

  int first_id = 0;  // of this lane's ranks; the others are read again
  Candidates<kValues> candidates(scores, experts);
#pragma unroll 1
  for (int rank = 0; rank < top_k; ++rank) {
    const Candidate best = candidates.Best();
    const uint32_t max = __reduce_max_sync(kAll, best.key);
    const int winner = __reduce_min_sync(kAll, best.key == max ? best.index : INT_MAX);
    candidates.Remove(winner);
    if (rank % 32 != Lane()) continue;
    if (kValues > 0 || rank < 32) {
      first_id = winner;
    } else {
      ids[rank] = winner;
    }
  }

  // In shared memory the gates of the selected take the place of the scores, which are done with.
  constexpr int kSelected = kValues > 0 ? 1 : 0;
  Row<kSelected> selected(scratch);
  const auto id_of = [&](int s) { return kValues > 0 || s < 32 ? first_id : ids[s]; };
  ForEach<kSelected>(top_k, [&](int j, int s) {
    selected[j] = gate(s < top_k ? NanToMinusInf(logits[id_of(s)]) : -INFINITY);
  });
  if constexpr (kGating == Gating::kSoftmaxAfterTopk) {
    const Softmax softmax = SoftmaxOf(selected, top_k);
    ForEach<kSelected>(top_k, [&](int j, int) { selected[j] = softmax(selected[j]); });
  }
  float divisor = 1;
  if (args.normalize) {
    const float sum = SumInOrder(selected, top_k);
    divisor = sum < kMinSum ? kMinSum : sum;  // a NaN stays
  }
  ForEach<kSelected>(top_k, [&](int j, int s) {
    float weight = selected[j];
    if (args.normalize) weight /= divisor;
    if (args.scale != 0) weight *= args.scale;
    if (s >= top_k) return;
    ids[s] = id_of(s);
    weights[s] = weight;
  });
}

using Kernel = void (*)(RouteArgs, int);

template <int kValues, bool kPlain>
Kernel KernelOf(Gating gating) {
  switch (gating) {
    case Gating::kSoftmax:
      return Route<kValues, Gating::kSoftmax, kPlain>;
    case Gating::kSigmoid:
      return Route<kValues, Gating::kSigmoid, kPlain>;
    case Gating::kSoftmaxAfterTopk:
      return Route<kValues, Gating::kSoftmaxAfterTopk, kPlain>;
    case Gating::kSqrtSoftplus:
      return Route<kValues, Gating::kSqrtSoftplus, kPlain>;
  }
  return nullptr;
}

template <bool kPlain>
Kernel KernelOf(const RouteArgs& args) {
  if (!InRegisters(args)) return KernelOf<0, kPlain>(args.gating);
  if (args.experts <= 128) return KernelOf<4, kPlain>(args.gating);
  if (args.experts <= 256) return KernelOf<8, kPlain>(args.gating);
  return KernelOf<16, kPlain>(args.gating);
}

template <bool kPlain>
cudaError_t Load(Gating gating) {
  return LoadKernels(KernelOf<0, kPlain>(gating), KernelOf<4, kPlain>(gating),
                     KernelOf<8, kPlain>(gating), KernelOf<16, kPlain>(gating));
}

}  // namespace

cudaError_t LaunchRoute(const RouteArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) return cudaSuccess;
  const bool plain = args.selection_bias == nullptr && args.num_groups == 1;
  const Kernel kernel = plain ? KernelOf<true>(args) : KernelOf<false>(args);
  const int bytes = 4 * ScratchFloats(args, InRegisters(args));
  const int fit = std::min(48 * 1024 / std::max(bytes, 1), 4);
  const int warps = static_cast<int>(std::min<int64_t>(fit, args.tokens));
  const unsigned blocks = static_cast<unsigned>((args.tokens + warps - 1) / warps);
  const int group_size = args.experts / args.num_groups;
  kernel<<<blocks, 32 * warps, bytes * warps, stream>>>(args, group_size);
  return cudaGetLastError();
}

cudaError_t LoadRoute(Gating gating) {
  const cudaError_t status = Load<true>(gating);
  return status == cudaSuccess ? Load<false>(gating) : status;
}

}  // namespace jax_moe::cuda
