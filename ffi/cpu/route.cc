#include "ffi/cpu/route.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace jax_moe::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The smallest normal float16: the weights' sum is clamped to it before the division.
constexpr float kMinSum = 6.103515625e-5f;

float NanToMinusInf(float x) { return std::isnan(x) ? -kInf : x; }

// Sorts as: higher score first, then lower index. Comparing integers keeps the order the same
// whether or not the calling thread flushes subnormals.
uint64_t SortKey(float score, int64_t index) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  if (bits == 0x80000000u) bits = 0;  // -0 ties with +0
  const uint32_t ascending = (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(index);
}

int64_t KeyIndex(uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); }

// Brings the `count` best of keys to the front, in order.
void TopK(std::vector<uint64_t>& keys, int64_t count) {
  std::partial_sort(keys.begin(), keys.begin() + count, keys.end());
}

// In place, over n values. The sum is taken in double so that its order hardly matters.
void Softmax(float* x, int64_t n) {
  const float max = *std::max_element(x, x + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] - max);
    sum += x[i];
  }
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(x[i] / sum);
}

// Logits to gate values, in place.
void Gate(Gating gating, float* x, int64_t n) {
  switch (gating) {
    case Gating::kSoftmax:
      Softmax(x, n);
      break;
    case Gating::kSigmoid:
      for (int64_t i = 0; i < n; ++i) x[i] = 1 / (1 + std::exp(-x[i]));
      break;
    case Gating::kSoftmaxAfterTopk:
      break;
    case Gating::kSqrtSoftplus:
      for (int64_t i = 0; i < n; ++i) {
        x[i] = std::sqrt(std::max(x[i], 0.0f) + std::log1p(std::exp(-std::fabs(x[i]))));
      }
      break;
  }
}

// One row's buffers, and the steps that share them.
class Router {
 public:
  Router(int64_t experts, int64_t top_k, const RouteOptions& options)
      : experts_(experts), top_k_(top_k), options_(options), gates_(experts), scores_(experts) {
    keys_.reserve(experts);
  }

  void Route(const float* logits, const float* bias, int32_t* ids, float* weights) {
    const bool all_nan = std::all_of(logits, logits + experts_, [](float x) { return x != x; });
    if (all_nan) {
      for (int64_t s = 0; s < top_k_; ++s) ids[s] = static_cast<int32_t>(s);
      std::fill_n(weights, top_k_, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    std::transform(logits, logits + experts_, gates_.begin(), NanToMinusInf);
    const bool by_logits = bias == nullptr && options_.num_groups == 1;
    if (by_logits) scores_ = gates_;
    Gate(options_.gating, gates_.data(), experts_);
    if (!by_logits) ScoreGates(bias);
    if (options_.num_groups > 1) LimitGroups();
    Select(ids);
    Weigh(ids, weights);
  }

 private:
  void ScoreGates(const float* bias) {
    for (int64_t e = 0; e < experts_; ++e) {
      scores_[e] = NanToMinusInf(bias == nullptr ? gates_[e] : gates_[e] + bias[e]);
    }
  }

  // A group's score is the sum of its two best; experts of all but the best groups become -inf.
  void LimitGroups() {
    const int64_t size = experts_ / options_.num_groups;
    keys_.clear();
    for (int64_t g = 0; g < options_.num_groups; ++g) {
      float best = -kInf, second = -kInf;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        second = std::max(second, std::min(best, scores_[e]));
        best = std::max(best, scores_[e]);
      }
      keys_.push_back(SortKey(size == 1 ? best : NanToMinusInf(best + second), g));
    }
    TopK(keys_, options_.num_groups_used);
    for (int64_t i = options_.num_groups_used; i < options_.num_groups; ++i) {
      std::fill_n(scores_.begin() + KeyIndex(keys_[i]) * size, size, -kInf);
    }
  }

  void Select(int32_t* ids) {
    keys_.clear();
    for (int64_t e = 0; e < experts_; ++e) keys_.push_back(SortKey(scores_[e], e));
    TopK(keys_, top_k_);
    for (int64_t s = 0; s < top_k_; ++s) ids[s] = static_cast<int32_t>(KeyIndex(keys_[s]));
  }

  void Weigh(const int32_t* ids, float* weights) const {
    for (int64_t s = 0; s < top_k_; ++s) weights[s] = gates_[ids[s]];
    if (options_.gating == Gating::kSoftmaxAfterTopk) Softmax(weights, top_k_);
    if (options_.normalize) {
      float sum = 0;
      for (int64_t s = 0; s < top_k_; ++s) sum += weights[s];
      if (sum < kMinSum) sum = kMinSum;  // a NaN stays
      for (int64_t s = 0; s < top_k_; ++s) weights[s] /= sum;
    }
    if (options_.scale != 0) {
      for (int64_t s = 0; s < top_k_; ++s) weights[s] *= options_.scale;
    }
  }

  const int64_t experts_;
  const int64_t top_k_;
  const RouteOptions options_;
  std::vector<float> gates_;
  std::vector<float> scores_;
  std::vector<uint64_t> keys_;
};

}  // namespace

void RouteRows(const float* logits, const float* selection_bias, int64_t begin, int64_t end,
               int64_t experts, int64_t top_k, const RouteOptions& options, int32_t* expert_ids,
               float* weights) {
  Router router(experts, top_k, options);
  for (int64_t t = begin; t < end; ++t) {
    router.Route(logits + t * experts, selection_bias, expert_ids + t * top_k,
                 weights + t * top_k);
  }
}

}  // namespace jax_moe::cpu
