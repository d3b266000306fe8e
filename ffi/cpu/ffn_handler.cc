#include "ffi/cpu/handlers.h"
#include "ffi/cpu/operands.h"

namespace jax_moe::cpu {
namespace {

ffi::Error Ffn(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
               ffi::Dictionary attributes) {
  Checker check("jax_moe_ffn");
  const FfnOperands call = ReadFfn(check, arguments, results, attributes);
  if (!check.ok()) return check.error();
  const plan::FfnProblem& problem = call.problem;
  FfnArgs args;
  args.down = GgufWeights(check, "down", call.down);
  if (call.gate) args.gate = GgufWeights(check, "gate", *call.gate);
  if (call.up) args.up = GgufWeights(check, "up", *call.up);
  check.RequireWorkspace(call.workspace_bytes,
                         plan::CpuFfnWorkspace(problem.shape).Bytes(call.tokens));
  if (!check.ok()) return check.error();

  args.tokens = call.tokens;
  args.top_k = problem.shape.top_k;
  args.x = call.x;
  args.x_type = call.type;
  args.expert_ids = call.expert_ids;
  args.weights = call.weights;
  args.merged = call.merged;
  args.gate_bias = call.gate_bias;
  args.up_bias = call.up_bias;
  args.down_bias = call.down_bias;
  args.gate_scale = call.gate_scale;
  args.up_scale = call.up_scale;
  args.down_scale = call.down_scale;
  args.activation = problem.activation;
  args.limit = problem.limit;
  args.beta = call.beta;
  args.linear_beta = call.linear_beta;
  args.weights_before = call.weights_before;
  args.round = problem.variant == Variant::kScalarGguf;
  args.y = call.y;
  args.workspace = call.workspace;
  RunFfn(args, ExecutorOf(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_moe::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFfnCpu, jax_moe::cpu::Ffn,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());
