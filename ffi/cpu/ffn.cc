#include <algorithm>

#include "ffi/cpu/moe.h"
#include "ffi/cpu/pair_lists.h"
#include "ffi/cpu/project.h"

namespace jax_moe::cpu {
namespace {

constexpr int64_t kRowsPerTask = 8;

int64_t Tasks(int64_t count) { return (count + kRowsPerTask - 1) / kRowsPerTask; }

// Five phases: prepare x; gate, up and activation; prepare h; down; sum over a token's slots.
class Ffn {
 public:
  Ffn(const FfnArgs& args, const Kernels& kernels, plan::WorkspaceCursor workspace)
      : args_(args),
        kernels_(kernels),
        up_(args.merged ? args.gate : args.up),
        up_format_(*kernels.find_format(up_.format)),
        gate_format_(args.gate.format >= 0 ? *kernels.find_format(args.gate.format)
                                               : up_format_),
        down_format_(*kernels.find_format(args.down.format)),
        d_model_(args.down.n),
        d_expert_(args.down.k),
        hidden_band_(BandRows(2 * d_model_)),
        hidden_bands_((d_expert_ + hidden_band_ - 1) / hidden_band_),
        down_band_(BandRows(d_expert_)),
        down_bands_((d_model_ + down_band_ - 1) / down_band_),
        lists_(args.tokens * args.top_k, args.down.experts, &workspace),
        x_(workspace.Take<uint8_t>(args.tokens * RowBytes(d_model_))),
        x_factor_(workspace.Take<float>(args.tokens)),
        // Read as hidden rows in the third phase, written as down rows in the fourth.
        hidden_(workspace.Take<float>(lists_.num_pairs *
                                      std::max(plan::PaddedRow(d_expert_), d_model_))),
        h_(workspace.Take<uint8_t>(lists_.num_pairs * RowBytes(d_expert_))),
        h_factor_(workspace.Take<float>(lists_.num_pairs)) {
    std::copy_n(args.expert_ids, lists_.num_pairs, lists_.expert_of);
    lists_.Build();
  }

  void Run(const Executor& executor) {
    const int64_t work = lists_.num_valid * d_model_ * d_expert_;
    RunPhases(executor,
              {{Tasks(args_.tokens), [this](int64_t i) { PrepareTokens(i); }},
               {lists_.num_active * hidden_bands_, [this](int64_t i) { HiddenBand(i); }},
               {Tasks(lists_.num_valid), [this](int64_t i) { PrepareHidden(i); }},
               {lists_.num_active * down_bands_, [this](int64_t i) { DownBand(i); }},
               {Tasks(args_.tokens), [this](int64_t i) { SumSlots(i); }}},
              work >= kParallelWork);
  }

 private:
  void PrepareTokens(int64_t task) {
    const int64_t bytes = d_model_ * (args_.x_type == kF32 ? 4 : 2);
    const int64_t end = std::min(args_.tokens, (task + 1) * kRowsPerTask);
    for (int64_t t = task * kRowsPerTask; t < end; ++t) {
      x_factor_[t] =
          kernels_.prepare(static_cast<const uint8_t*>(args_.x) + t * bytes, args_.x_type, d_model_,
                           args_.round, x_ + t * RowBytes(d_model_));
    }
  }

  void HiddenBand(int64_t task) {
    Scratch& scratch = Scratch::OfThread();
    const int64_t expert = lists_.active[task / hidden_bands_];
    const int64_t begin = task % hidden_bands_ * hidden_band_;
    const int64_t end = std::min(d_expert_, begin + hidden_band_);
    const int32_t* pairs = lists_.pairs + lists_.begin[expert];
    const int64_t count = lists_.Count(expert);
    for (int64_t first = 0; first < count; first += kTokenTile) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTokenTile, count - first));
      for (int t = 0; t < tokens; ++t) {
        const int64_t pair = pairs[first + t], token = pair / args_.top_k;
        scratch.x[t] = x_ + token * RowBytes(d_model_);
        // The routing weight of the expert's input comes out of a linear map unchanged.
        scratch.factor[t] = x_factor_[token] * (args_.weights_before ? args_.weights[pair] : 1.0f);
        scratch.h[t] = hidden_ + pair * d_expert_ + begin;
      }
      for (int64_t row = begin; row < end; row += kPanelRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, end - row));
        HiddenTile(expert, row, rows, tokens, &scratch);
        for (int t = 0; t < tokens; ++t) scratch.h[t] += rows;
      }
    }
  }

  void HiddenTile(int64_t expert, int64_t row, int rows, int tokens, Scratch* scratch) {
    const bool gated = args_.gate.format >= 0;
    const int64_t up_row = args_.merged ? d_expert_ + row : row;
    const float* up_bias = args_.merged ? args_.gate_bias : args_.up_bias;
    const float* up_scale = args_.merged ? args_.gate_scale : args_.up_scale;
    if (gated) {
      Project(kernels_, gate_format_, args_.gate, expert, row, rows, tokens, scratch->x,
              args_.round, &scratch->panel, scratch->gate);
    }
    Project(kernels_, up_format_, up_, expert, up_row, rows, tokens, scratch->x, args_.round,
            &scratch->panel, scratch->up);
    ActivateArgs act;
    act.activation = args_.activation;
    act.limit = args_.limit;
    act.beta = args_.beta;
    act.linear_beta = args_.linear_beta;
    act.rows = rows;
    act.tokens = tokens;
    act.gate = scratch->gate;
    act.up = scratch->up;
    act.token_factor = scratch->factor;
    act.gate_scale = gated && args_.gate_scale != nullptr ? args_.gate_scale[expert] : 1.0f;
    act.up_scale = up_scale != nullptr ? up_scale[expert] : 1.0f;
    act.gate_bias = gated && args_.gate_bias != nullptr
                        ? args_.gate_bias + expert * args_.gate.n + row
                        : nullptr;
    act.up_bias = up_bias != nullptr ? up_bias + expert * up_.n + up_row : nullptr;
    act.h = scratch->h;
    kernels_.activate(act);
  }

  void PrepareHidden(int64_t task) {
    const int64_t end = std::min(lists_.num_valid, (task + 1) * kRowsPerTask);
    for (int64_t i = task * kRowsPerTask; i < end; ++i) {
      const int64_t pair = lists_.pairs[i];
      h_factor_[pair] = kernels_.prepare(hidden_ + pair * d_expert_, kF32, d_expert_, args_.round,
                                         h_ + pair * RowBytes(d_expert_));
    }
  }

  void DownBand(int64_t task) {
    Scratch& scratch = Scratch::OfThread();
    const int64_t expert = lists_.active[task / down_bands_];
    const int64_t begin = task % down_bands_ * down_band_;
    const int64_t end = std::min(d_model_, begin + down_band_);
    const int32_t* pairs = lists_.pairs + lists_.begin[expert];
    const int64_t count = lists_.Count(expert);
    for (int64_t first = 0; first < count; first += kTokenTile) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTokenTile, count - first));
      for (int t = 0; t < tokens; ++t) scratch.x[t] = h_ + pairs[first + t] * RowBytes(d_expert_);
      for (int64_t row = begin; row < end; row += kPanelRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, end - row));
        Project(kernels_, down_format_, args_.down, expert, row, rows, tokens, scratch.x,
                args_.round, &scratch.panel, scratch.gate);
        StoreDown(expert, pairs + first, tokens, row, rows, scratch.gate);
      }
    }
  }

  void StoreDown(int64_t expert, const int32_t* pairs, int tokens, int64_t row, int rows,
                 const float* sums) {
    const float scale = args_.down_scale != nullptr ? args_.down_scale[expert] : 1.0f;
    const float* bias =
        args_.down_bias != nullptr ? args_.down_bias + expert * d_model_ + row : nullptr;
    for (int t = 0; t < tokens; ++t) {
      const int64_t pair = pairs[t];
      const float factor = h_factor_[pair];
      const float weight = args_.weights_before ? 1.0f : args_.weights[pair];
      float* out = hidden_ + pair * d_model_ + row;
      for (int r = 0; r < rows; ++r) {
        const float value = sums[t * kPanelRows + r] * factor * scale;
        out[r] = (bias != nullptr ? value + bias[r] : value) * weight;
      }
    }
  }

  void SumSlots(int64_t task) {
    constexpr int64_t kColumns = 512;
    const int64_t element = args_.x_type == kF32 ? 4 : 2;
    const int64_t end = std::min(args_.tokens, (task + 1) * kRowsPerTask);
    for (int64_t t = task * kRowsPerTask; t < end; ++t) {
      for (int64_t c = 0; c < d_model_; c += kColumns) {
        const int64_t columns = std::min(kColumns, d_model_ - c);
        float sum[kColumns] = {};
        for (int64_t pair = t * args_.top_k; pair < (t + 1) * args_.top_k; ++pair) {
          if (!lists_.Valid(pair)) continue;
          const float* down = hidden_ + pair * d_model_ + c;
          for (int64_t i = 0; i < columns; ++i) sum[i] += down[i];
        }
        kernels_.store(sum, columns, args_.x_type,
                       static_cast<uint8_t*>(args_.y) + (t * d_model_ + c) * element);
      }
    }
  }

  const FfnArgs& args_;
  const Kernels& kernels_;
  const Weights& up_;
  const Format &up_format_, &gate_format_, &down_format_;
  const int64_t d_model_, d_expert_;
  const int64_t hidden_band_, hidden_bands_, down_band_, down_bands_;
  PairLists lists_;
  uint8_t* const x_;        // [T] prepared rows
  float* const x_factor_;   // [T]
  float* const hidden_;     // [P, d_expert], later [P, d_model]
  uint8_t* const h_;        // [P] prepared rows
  float* const h_factor_;   // [P]
};

}  // namespace

void RunFfn(const FfnArgs& args, const Executor& executor) {
  Ffn(args, SelectKernels(), plan::WorkspaceCursor(args.workspace)).Run(executor);
}

}  // namespace jax_moe::cpu
