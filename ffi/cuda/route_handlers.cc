// jax_moe_route and jax_moe_sort on CUDA.

#include "ffi/cuda/check.h"
#include "ffi/cuda/dispatch.h"
#include "ffi/cuda/handlers.h"
#include "ffi/cuda/load.h"
#include "ffi/cuda/route.h"

namespace jax_moe::cuda {
namespace {

using F32Vector = ffi::BufferR1<ffi::F32>;
using F32Matrix = ffi::BufferR2<ffi::F32>;
using S32Matrix = ffi::BufferR2<ffi::S32>;

ffi::Error Route(cudaStream_t stream, F32Matrix logits, F32Vector selection_bias,
                 ffi::Result<S32Matrix> expert_ids, ffi::Result<F32Matrix> weights, int32_t gating,
                 int32_t normalize, float scale, int32_t num_groups, int32_t num_groups_used) {
  const std::string op = "jax_moe_route";
  const int64_t tokens = logits.dimensions()[0], experts = logits.dimensions()[1];
  const int64_t top_k = expert_ids->dimensions()[1], biases = selection_bias.dimensions()[0];
  if (experts < 1 || experts > kMaxRoutedExperts) {
    return Invalid(op,
                   "logits must be [tokens, experts] with 1..4096 experts, not " + ShapeText(logits));
  }
  if (biases != 0 && biases != experts) {
    return Invalid(op, "selection_bias must be [0] or [experts], not " + ShapeText(selection_bias));
  }
  if (expert_ids->dimensions()[0] != tokens || weights->dimensions()[0] != tokens ||
      weights->dimensions()[1] != top_k) {
    return Invalid(op, "the results must be [tokens, top_k], not " + ShapeText(*expert_ids) +
                           " and " + ShapeText(*weights));
  }
  if (gating < 0 || gating > static_cast<int32_t>(Gating::kSqrtSoftplus)) {
    return Invalid(op, "unknown gating " + std::to_string(gating));
  }
  if (num_groups < 1 || experts % num_groups != 0 || num_groups_used < 1 ||
      num_groups_used > num_groups) {
    return Invalid(op,
                   "num_groups must divide the experts, and num_groups_used be in 1..num_groups");
  }
  if (top_k < 1 || top_k > experts / num_groups * num_groups_used) {
    return Invalid(op, "top_k " + std::to_string(top_k) + " is not in 1..the eligible experts");
  }
  return CudaError(
      op,
      LaunchRoute({logits.typed_data(), biases == 0 ? nullptr : selection_bias.typed_data(),
                   expert_ids->typed_data(), weights->typed_data(), tokens,
                   static_cast<int32_t>(experts), static_cast<int32_t>(top_k),
                   static_cast<Gating>(gating), normalize != 0, scale, num_groups, num_groups_used},
                  stream));
}

ffi::Error Sort(cudaStream_t stream, S32Matrix expert_ids, ffi::Result<S32Matrix> sorted_token_ids,
                ffi::Result<S32Matrix> flat_expert_ids, ffi::Result<S32Matrix> expert_offsets) {
  const std::string op = "jax_moe_sort";
  const int64_t batch = expert_ids.dimensions()[0], pairs = expert_ids.dimensions()[1];
  const int64_t offsets = expert_offsets->dimensions()[1];
  if (pairs > (int64_t{1} << 30) || offsets < 2 || offsets - 1 > kMaxExperts) {
    return Invalid(op, "takes at most 2^30 pairs a row and 1..8192 experts");
  }
  if (ShapeText(*sorted_token_ids) != ShapeText(expert_ids) ||
      ShapeText(*flat_expert_ids) != ShapeText(expert_ids) ||
      expert_offsets->dimensions()[0] != batch) {
    return Invalid(op, "the results must be [batch, pairs] twice and [batch, experts + 1]");
  }
  for (int64_t b = 0; b < batch; ++b) {
    const cudaError_t status =
        LaunchSort({expert_ids.typed_data() + b * pairs, pairs, static_cast<int32_t>(offsets - 1),
                    sorted_token_ids->typed_data() + b * pairs,
                    flat_expert_ids->typed_data() + b * pairs,
                    expert_offsets->typed_data() + b * offsets, nullptr, nullptr, 1, false},
                   stream);
    if (status != cudaSuccess) return CudaError(op, status);
  }
  return ffi::Error::Success();
}

ffi::Error InitializeRoute(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  constexpr int kGatings = static_cast<int>(Gating::kSqrtSoftplus) + 1;
  static OncePerDevice loaded[kGatings];
  const auto gating = attributes.get<int32_t>("gating");
  if (!gating.has_value()) return gating.error();
  const int number = gating.value();
  // Others are Route's to complain of.
  if (number < 0 || number >= kGatings) return ffi::Error::Success();
  return CudaError("jax_moe_route",
                   loaded[number]([&] { return LoadRoute(static_cast<Gating>(number)); }));
}

ffi::Error InitializeSort(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  static OncePerDevice loaded;
  return CudaError("jax_moe_sort", loaded([] { return LoadDispatch(); }));
}

}  // namespace
}  // namespace jax_moe::cuda

JAX_MOE_DEFINE_INITIALIZE(JaxMoeRouteCudaInitialize, jax_moe::cuda::InitializeRoute);
JAX_MOE_DEFINE_INITIALIZE(JaxMoeSortCudaInitialize, jax_moe::cuda::InitializeSort);

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeRouteCuda, jax_moe::cuda::Route,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<jax_moe::cuda::F32Matrix>()
                                  .Arg<jax_moe::cuda::F32Vector>()
                                  .Ret<jax_moe::cuda::S32Matrix>()
                                  .Ret<jax_moe::cuda::F32Matrix>()
                                  .Attr<int32_t>("gating")
                                  .Attr<int32_t>("normalize")
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("num_groups")
                                  .Attr<int32_t>("num_groups_used"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeSortCuda, jax_moe::cuda::Sort,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<jax_moe::cuda::S32Matrix>()
                                  .Ret<jax_moe::cuda::S32Matrix>()
                                  .Ret<jax_moe::cuda::S32Matrix>()
                                  .Ret<jax_moe::cuda::S32Matrix>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
