#include "ffi/cpu/route_handlers.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "ffi/cpu/operands.h"
#include "ffi/cpu/parallel.h"
#include "ffi/cpu/route.h"
#include "ffi/cpu/sort.h"
#include "ffi/targets.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe::cpu {
namespace {

namespace ffi = xla::ffi;

using F32Vector = ffi::BufferR1<ffi::F32>;
using F32Matrix = ffi::BufferR2<ffi::F32>;
using S32Matrix = ffi::BufferR2<ffi::S32>;

// Logits that a task handles: with fewer, another thread costs more than it saves.
constexpr int64_t kLogitsPerTask = 16384;

ffi::Error CheckRoute(const F32Matrix& logits, const F32Vector& selection_bias,
                      const S32Matrix& expert_ids, const F32Matrix& weights, int32_t gating,
                      int32_t num_groups, int32_t num_groups_used) {
  const int64_t tokens = logits.dimensions()[0];
  const int64_t experts = logits.dimensions()[1];
  const int64_t top_k = expert_ids.dimensions()[1];
  const int64_t biases = selection_bias.dimensions()[0];
  const auto fail = [](const std::string& what) {
    return ffi::Error::InvalidArgument("jax_moe_route: " + what);
  };
  if (experts < 1 || experts > std::numeric_limits<int32_t>::max()) {
    return fail("logits must be [tokens, experts] with experts in 1..2^31-1, not " +
                ShapeText(logits));
  }
  if (biases != 0 && biases != experts) {
    return fail("selection_bias must be [0] or [" + std::to_string(experts) + "], not " +
                ShapeText(selection_bias));
  }
  if (expert_ids.dimensions()[0] != tokens || weights.dimensions()[0] != tokens ||
      weights.dimensions()[1] != top_k) {
    return fail("the results must be [" + std::to_string(tokens) + ", top_k], not " +
                ShapeText(expert_ids) + " and " + ShapeText(weights));
  }
  if (gating < 0 || gating > static_cast<int32_t>(Gating::kSqrtSoftplus)) {
    return fail("unknown gating " + std::to_string(gating));
  }
  if (num_groups < 1 || experts % num_groups != 0) {
    return fail("num_groups " + std::to_string(num_groups) + " does not divide " +
                std::to_string(experts) + " experts");
  }
  if (num_groups_used < 1 || num_groups_used > num_groups) {
    return fail("num_groups_used must be in 1.." + std::to_string(num_groups) + ", not " +
                std::to_string(num_groups_used));
  }
  const int64_t eligible = experts / num_groups * num_groups_used;
  if (top_k < 1 || top_k > eligible) {
    return fail("top_k must be in 1.." + std::to_string(eligible) + ", the eligible experts, not " +
                std::to_string(top_k));
  }
  return ffi::Error::Success();
}

ffi::Error Route(ffi::ThreadPool pool, F32Matrix logits, F32Vector selection_bias,
                 ffi::Result<S32Matrix> expert_ids, ffi::Result<F32Matrix> weights, int32_t gating,
                 int32_t normalize, float scale, int32_t num_groups, int32_t num_groups_used) {
  ffi::Error error = CheckRoute(logits, selection_bias, *expert_ids, *weights, gating, num_groups,
                                num_groups_used);
  if (error.failure()) return error;
  const RouteOptions options = {static_cast<Gating>(gating), normalize != 0, scale, num_groups,
                                num_groups_used};
  const float* bias = selection_bias.dimensions()[0] == 0 ? nullptr : selection_bias.typed_data();
  const int64_t tokens = logits.dimensions()[0];
  const int64_t experts = logits.dimensions()[1];
  const int64_t rows = std::max<int64_t>(1, kLogitsPerTask / experts);
  const Phase phase = {(tokens + rows - 1) / rows, [&](int64_t task) {
    RouteRows(logits.typed_data(), bias, task * rows, std::min(tokens, (task + 1) * rows), experts,
              expert_ids->dimensions()[1], options, expert_ids->typed_data(),
              weights->typed_data());
  }};
  RunPhases(ExecutorOf(pool), {phase}, /*parallel=*/phase.tasks > 1);
  return ffi::Error::Success();
}

ffi::Error Sort(S32Matrix expert_ids, ffi::Result<S32Matrix> sorted_token_ids,
                ffi::Result<S32Matrix> flat_expert_ids, ffi::Result<S32Matrix> expert_offsets) {
  const int64_t batch = expert_ids.dimensions()[0];
  const int64_t pairs = expert_ids.dimensions()[1];
  const int64_t offsets = expert_offsets->dimensions()[1];
  const auto fail = [](const std::string& what) {
    return ffi::Error::InvalidArgument("jax_moe_sort: " + what);
  };
  if (pairs > std::numeric_limits<int32_t>::max()) {
    return fail("expert_ids must have fewer than 2^31 pairs a row, not " + ShapeText(expert_ids));
  }
  if (ShapeText(*sorted_token_ids) != ShapeText(expert_ids) ||
      ShapeText(*flat_expert_ids) != ShapeText(expert_ids)) {
    return fail("sorted_token_ids and flat_expert_ids must be " + ShapeText(expert_ids) + ", not " +
                ShapeText(*sorted_token_ids) + " and " + ShapeText(*flat_expert_ids));
  }
  if (expert_offsets->dimensions()[0] != batch || offsets < 2) {
    return fail("expert_offsets must be [" + std::to_string(batch) + ", experts + 1], not " +
                ShapeText(*expert_offsets));
  }
  for (int64_t b = 0; b < batch; ++b) {
    SortByExpert(expert_ids.typed_data() + b * pairs, pairs, offsets - 1,
                 sorted_token_ids->typed_data() + b * pairs,
                 flat_expert_ids->typed_data() + b * pairs,
                 expert_offsets->typed_data() + b * offsets);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_moe::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeRouteCpu, jax_moe::cpu::Route,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jax_moe::cpu::F32Matrix>()
                                  .Arg<jax_moe::cpu::F32Vector>()
                                  .Ret<jax_moe::cpu::S32Matrix>()
                                  .Ret<jax_moe::cpu::F32Matrix>()
                                  .Attr<int32_t>("gating")
                                  .Attr<int32_t>("normalize")
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("num_groups")
                                  .Attr<int32_t>("num_groups_used"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeSortCpu, jax_moe::cpu::Sort,
                              xla::ffi::Ffi::Bind()
                                  .Arg<jax_moe::cpu::S32Matrix>()
                                  .Ret<jax_moe::cpu::S32Matrix>()
                                  .Ret<jax_moe::cpu::S32Matrix>()
                                  .Ret<jax_moe::cpu::S32Matrix>());
