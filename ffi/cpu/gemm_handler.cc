#include "ffi/cpu/handlers.h"
#include "ffi/cpu/operands.h"

namespace jax_moe::cpu {
namespace {

ffi::Error Gemm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                ffi::AnyBuffer sorted_token_ids, ffi::AnyBuffer flat_expert_ids,
                ffi::AnyBuffer topk_weights, ffi::AnyBuffer weight_aux,
                ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace,
                int32_t format, int32_t top_k, int32_t variant) {
  Checker check("jax_moe_gemm");
  GemmArgs args;
  args.weight = check.RequireWeights("weight", weight, format);
  check.RequireNoAux("weight_aux", weight_aux);
  check.Require(top_k > 0, "top_k is " + std::to_string(top_k) + ", expected at least 1");
  check.Require(x.dimensions().size() == 2, "x has shape " + ShapeText(x) + ", expected rank 2");
  check.Require(sorted_token_ids.dimensions().size() == 1,
                "sorted_token_ids has shape " + ShapeText(sorted_token_ids) + ", expected rank 1");
  if (!check.ok()) return check.error();

  const int64_t pairs = sorted_token_ids.dimensions()[0];
  const int64_t x_rows = x.dimensions()[0];
  args.tokens = pairs / top_k;
  args.top_k = top_k;
  args.rows_are_pairs = x_rows != args.tokens;
  check.Require(pairs % top_k == 0, "sorted_token_ids has " + std::to_string(pairs) +
                                        " entries, expected a multiple of top_k = " +
                                        std::to_string(top_k));
  check.Require(pairs <= INT32_MAX, "more than 2^31 - 1 pairs");
  check.Require(x_rows == args.tokens || x_rows == pairs,
                "x has " + std::to_string(x_rows) + " rows, expected " +
                    std::to_string(args.tokens) + " (tokens) or " + std::to_string(pairs) +
                    " (pairs)");
  check.Require(x.dimensions()[1] == args.weight.k,
                "x has rows of " + std::to_string(x.dimensions()[1]) + ", weight of " +
                    std::to_string(args.weight.k));
  check.RequireShape("sorted_token_ids", sorted_token_ids, ffi::DataType::S32, {pairs});
  check.RequireShape("flat_expert_ids", flat_expert_ids, ffi::DataType::S32, {pairs});
  check.RequireShape("y", *y, y->element_type(), {pairs, args.weight.n});
  args.topk_weights = check.OptionalFloats("topk_weights", topk_weights, {pairs});
  args.x_type = DenseTypeOf(x.element_type());
  args.y_type = DenseTypeOf(y->element_type());
  check.Require(args.x_type >= 0, "x must be float32, float16 or bfloat16");
  check.Require(args.y_type >= 0, "y must be float32, float16 or bfloat16");
  args.round = variant == static_cast<int>(Variant::kScalarGguf);
  check.Require(!args.round || x.element_type() == ffi::DataType::F32,
                "variant SCALAR_GGUF takes float32 x");
  check.Require(!args.round || weight.element_type() == ffi::DataType::U8,
                "variant SCALAR_GGUF takes packed weights");
  check.RequireWorkspace(*workspace,
                         plan::CpuGemmWorkspace({top_k, args.weight.experts, args.weight.n,
                                              args.weight.k, args.rows_are_pairs})
                             .Bytes(args.tokens));
  if (!check.ok()) return check.error();

  args.x = x.untyped_data();
  args.sorted_token_ids = static_cast<const int32_t*>(sorted_token_ids.untyped_data());
  args.flat_expert_ids = static_cast<const int32_t*>(flat_expert_ids.untyped_data());
  args.y = y->untyped_data();
  args.workspace = workspace->untyped_data();
  RunGemm(args, ExecutorOf(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_moe::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeGemmCpu, jax_moe::cpu::Gemm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // weight
                                  .Arg<xla::ffi::AnyBuffer>()  // sorted_token_ids
                                  .Arg<xla::ffi::AnyBuffer>()  // flat_expert_ids
                                  .Arg<xla::ffi::AnyBuffer>()  // topk_weights
                                  .Arg<xla::ffi::AnyBuffer>()  // weight_aux
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Ret<xla::ffi::AnyBuffer>()  // workspace
                                  .Attr<int32_t>("format")
                                  .Attr<int32_t>("top_k")
                                  .Attr<int32_t>("variant"));
