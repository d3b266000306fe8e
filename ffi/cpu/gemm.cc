#include <algorithm>
#include <cstring>

#include "ffi/cpu/moe.h"
#include "ffi/cpu/pair_lists.h"
#include "ffi/cpu/project.h"

namespace jax_moe::cpu {
namespace {

constexpr int64_t kRowsPerTask = 16;

class Gemm {
 public:
  Gemm(const GemmArgs& args, const Kernels& kernels, plan::WorkspaceCursor workspace)
      : args_(args),
        kernels_(kernels),
        format_(*kernels.find_format(args.weight.format)),
        pairs_(args.tokens * args.top_k),
        rows_(args.rows_are_pairs ? pairs_ : args.tokens),
        n_(args.weight.n),
        band_(BandRows(args.weight.k)),
        bands_((n_ + band_ - 1) / band_),
        lists_(pairs_, args.weight.experts, &workspace),
        x_(workspace.Take<uint8_t>(rows_ * RowBytes(args.weight.k))),
        factor_(workspace.Take<float>(rows_)) {
    BuildLists();
  }

  void Run(const Executor& executor) {
    const int64_t work = lists_.num_valid * n_ * args_.weight.k;
    RunPhases(executor,
              {{(rows_ + kRowsPerTask - 1) / kRowsPerTask, [this](int64_t i) { PrepareRows(i); }},
               {lists_.num_active * bands_, [this](int64_t i) { MultiplyBand(i); }},
               {(pairs_ - lists_.num_valid + kRowsPerTask - 1) / kRowsPerTask,
                [this](int64_t i) { ZeroRows(i); }}},
              work >= kParallelWork);
  }

 private:
  int64_t XRow(int64_t pair) const { return args_.rows_are_pairs ? pair : pair / args_.top_k; }

  size_t YBytes() const { return args_.y_type == kF32 ? 4 : 2; }

  uint8_t* YRow(int64_t pair) const {
    return static_cast<uint8_t*>(args_.y) + pair * n_ * static_cast<int64_t>(YBytes());
  }

  // Of entries for the same pair the last wins; a pair that no entry names has no expert.
  void BuildLists() {
    std::fill_n(lists_.expert_of, pairs_, -1);
    for (int64_t i = 0; i < pairs_; ++i) {
      const int64_t pair = args_.sorted_token_ids[i];
      if (pair >= 0 && pair < pairs_) lists_.expert_of[pair] = args_.flat_expert_ids[i];
    }
    lists_.Build();
  }

  void PrepareRows(int64_t task) {
    const int64_t k = args_.weight.k;
    const int64_t bytes = k * (args_.x_type == kF32 ? 4 : 2);
    const int64_t end = std::min(rows_, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      factor_[row] = kernels_.prepare(static_cast<const uint8_t*>(args_.x) + row * bytes,
                                      args_.x_type, k, args_.round, x_ + row * RowBytes(k));
    }
  }

  void MultiplyBand(int64_t task) {
    Scratch& scratch = Scratch::OfThread();
    const int64_t expert = lists_.active[task / bands_];
    const int64_t begin = task % bands_ * band_;
    const int64_t end = std::min(n_, begin + band_);
    const int32_t* pairs = lists_.pairs + lists_.begin[expert];
    const int64_t count = lists_.Count(expert);
    for (int64_t first = 0; first < count; first += kTokenTile) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTokenTile, count - first));
      for (int t = 0; t < tokens; ++t) {
        scratch.x[t] = x_ + XRow(pairs[first + t]) * RowBytes(args_.weight.k);
      }
      for (int64_t row = begin; row < end; row += kPanelRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, end - row));
        Project(kernels_, format_, args_.weight, expert, row, rows, tokens, scratch.x, args_.round,
                &scratch.panel, scratch.gate);
        StoreTile(pairs + first, tokens, row, rows, scratch.gate);
      }
    }
  }

  void StoreTile(const int32_t* pairs, int tokens, int64_t row, int rows, float* sums) {
    for (int t = 0; t < tokens; ++t) {
      const int64_t pair = pairs[t];
      const float factor = factor_[XRow(pair)];
      const float weight = args_.topk_weights != nullptr ? args_.topk_weights[pair] : 1.0f;
      float* sum = sums + t * kPanelRows;
      for (int r = 0; r < kPanelRows; ++r) sum[r] = sum[r] * factor * weight;
      kernels_.store(sum, rows, args_.y_type, YRow(pair) + row * static_cast<int64_t>(YBytes()));
    }
  }

  void ZeroRows(int64_t task) {
    const int64_t first = lists_.num_valid + task * kRowsPerTask;
    const int64_t end = std::min(pairs_, first + kRowsPerTask);
    for (int64_t i = first; i < end; ++i) {
      std::memset(YRow(lists_.pairs[i]), 0, static_cast<size_t>(n_) * YBytes());
    }
  }

  const GemmArgs& args_;
  const Kernels& kernels_;
  const Format& format_;
  const int64_t pairs_, rows_, n_, band_, bands_;
  PairLists lists_;
  uint8_t* const x_;     // prepared rows
  float* const factor_;  // what each row's product is multiplied by
};

}  // namespace

void RunGemm(const GemmArgs& args, const Executor& executor) {
  Gemm(args, SelectKernels(), plan::WorkspaceCursor(args.workspace)).Run(executor);
}

}  // namespace jax_moe::cpu
