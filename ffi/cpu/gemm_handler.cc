#include "ffi/cpu/handlers.h"
#include "ffi/cpu/operands.h"

namespace jax_moe::cpu {
namespace {

ffi::Error Gemm(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                ffi::Dictionary attributes) {
  Checker check("jax_moe_gemm");
  const GemmOperands call = ReadGemm(check, arguments, results, attributes);
  if (!check.ok()) return check.error();
  const plan::GemmShape& shape = call.problem.shape;
  GemmArgs args;
  args.weight = GgufWeights(check, "weight", call.weight);
  check.RequireWorkspace(call.workspace_bytes, plan::CpuGemmWorkspace(shape).Bytes(call.tokens));
  if (!check.ok()) return check.error();

  args.tokens = call.tokens;
  args.top_k = shape.top_k;
  args.x = call.x;
  args.x_type = call.x_type;
  args.rows_are_pairs = shape.rows_are_pairs;
  args.sorted_token_ids = call.sorted_token_ids;
  args.flat_expert_ids = call.flat_expert_ids;
  args.topk_weights = call.topk_weights;
  args.round = call.variant == Variant::kScalarGguf;
  args.y = call.y;
  args.y_type = call.y_type;
  args.workspace = call.workspace;
  RunGemm(args, ExecutorOf(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_moe::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeGemmCpu, jax_moe::cpu::Gemm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());
