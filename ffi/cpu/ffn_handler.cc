#include "ffi/cpu/handlers.h"
#include "ffi/cpu/operands.h"

namespace jax_moe::cpu {
namespace {

ffi::Error Ffn(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer expert_ids,
               ffi::AnyBuffer weights, ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::AnyBuffer down,
               ffi::AnyBuffer gate_bias, ffi::AnyBuffer up_bias, ffi::AnyBuffer down_bias,
               ffi::AnyBuffer gate_scale, ffi::AnyBuffer up_scale, ffi::AnyBuffer down_scale,
               ffi::AnyBuffer gate_aux, ffi::AnyBuffer up_aux, ffi::AnyBuffer down_aux,
               ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace,
               int32_t gate_format, int32_t up_format, int32_t down_format, int32_t merged,
               int32_t activation, float limit, float beta, float linear_beta,
               int32_t weights_before, int32_t variant) {
  Checker check("jax_moe_ffn");
  FfnArgs args;
  args.merged = merged != 0;
  args.activation = static_cast<Activation>(activation);
  check.Require(activation >= 0 && activation <= static_cast<int>(Activation::kRelu2),
                "unknown activation " + std::to_string(activation));
  const bool gated = args.activation < Activation::kSilu;
  check.Require(gated == (gate_format >= 0), "gate must be given for a gated activation only");
  check.Require((gated && args.merged) == (up_format < 0),
                "up must be given unless gate is merged");
  check.Require(x.dimensions().size() == 2, "x has shape " + ShapeText(x) + ", expected rank 2");
  check.Require(expert_ids.dimensions().size() == 2,
                "expert_ids has shape " + ShapeText(expert_ids) + ", expected rank 2");
  args.down = check.RequireWeights("down", down, down_format);
  if (gate_format >= 0) args.gate = check.RequireWeights("gate", gate, gate_format);
  if (up_format >= 0) args.up = check.RequireWeights("up", up, up_format);
  check.RequireNoAux("gate_aux", gate_aux);
  check.RequireNoAux("up_aux", up_aux);
  check.RequireNoAux("down_aux", down_aux);
  if (!check.ok()) return check.error();

  const int64_t experts = args.down.experts, d_model = args.down.n, d_expert = args.down.k;
  args.tokens = x.dimensions()[0];
  args.top_k = expert_ids.dimensions()[1];
  check.Require(args.tokens * args.top_k <= INT32_MAX, "more than 2^31 - 1 pairs");
  check.RequireShape("x", x, x.element_type(), {args.tokens, d_model});
  check.RequireShape("expert_ids", expert_ids, ffi::DataType::S32, {args.tokens, args.top_k});
  check.RequireShape("weights", weights, ffi::DataType::F32, {args.tokens, args.top_k});
  check.RequireShape("y", *y, x.element_type(), {args.tokens, d_model});
  const int64_t gate_rows = args.merged ? 2 * d_expert : d_expert;
  const auto matches = [&](const Weights& w, int64_t rows) {
    return w.experts == experts && w.n == rows && w.k == d_model;
  };
  check.Require(gate_format < 0 || matches(args.gate, gate_rows),
                "gate is not [experts, " + std::to_string(gate_rows) + ", " +
                    std::to_string(d_model) + "] as down demands");
  check.Require(up_format < 0 || matches(args.up, d_expert),
                "up is not [experts, " + std::to_string(d_expert) + ", " +
                    std::to_string(d_model) + "] as down demands");
  args.gate_bias = check.OptionalFloats("gate_bias", gate_bias, {experts, gate_rows});
  args.up_bias = check.OptionalFloats("up_bias", up_bias, {experts, d_expert});
  args.down_bias = check.OptionalFloats("down_bias", down_bias, {experts, d_model});
  args.gate_scale = check.OptionalFloats("gate_scale", gate_scale, {experts});
  args.up_scale = check.OptionalFloats("up_scale", up_scale, {experts});
  args.down_scale = check.OptionalFloats("down_scale", down_scale, {experts});
  args.x_type = DenseTypeOf(x.element_type());
  check.Require(args.x_type >= 0, "x must be float32, float16 or bfloat16");
  args.round = variant == static_cast<int>(Variant::kScalarGguf);
  const auto packed = [](const ffi::AnyBuffer& w, int format) {
    return format < 0 || w.element_type() == ffi::DataType::U8;
  };
  check.Require(!args.round || x.element_type() == ffi::DataType::F32,
                "variant SCALAR_GGUF takes float32 x");
  check.Require(!args.round || (packed(gate, gate_format) && packed(up, up_format) &&
                                packed(down, down_format)),
                "variant SCALAR_GGUF takes packed weights");
  check.RequireWorkspace(
      *workspace, plan::CpuFfnWorkspace({args.top_k, experts, d_model, d_expert}).Bytes(args.tokens));
  if (!check.ok()) return check.error();

  args.x = x.untyped_data();
  args.expert_ids = static_cast<const int32_t*>(expert_ids.untyped_data());
  args.weights = static_cast<const float*>(weights.untyped_data());
  args.limit = limit;
  args.beta = beta;
  args.linear_beta = linear_beta;
  args.weights_before = weights_before != 0;
  args.y = y->untyped_data();
  args.workspace = workspace->untyped_data();
  RunFfn(args, ExecutorOf(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_moe::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFfnCpu, jax_moe::cpu::Ffn,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // expert_ids
                                  .Arg<xla::ffi::AnyBuffer>()  // weights
                                  .Arg<xla::ffi::AnyBuffer>()  // gate
                                  .Arg<xla::ffi::AnyBuffer>()  // up
                                  .Arg<xla::ffi::AnyBuffer>()  // down
                                  .Arg<xla::ffi::AnyBuffer>()  // gate_bias
                                  .Arg<xla::ffi::AnyBuffer>()  // up_bias
                                  .Arg<xla::ffi::AnyBuffer>()  // down_bias
                                  .Arg<xla::ffi::AnyBuffer>()  // gate_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // up_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // down_scale
                                  .Arg<xla::ffi::AnyBuffer>()  // gate_aux
                                  .Arg<xla::ffi::AnyBuffer>()  // up_aux
                                  .Arg<xla::ffi::AnyBuffer>()  // down_aux
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Ret<xla::ffi::AnyBuffer>()  // workspace
                                  .Attr<int32_t>("gate_format")
                                  .Attr<int32_t>("up_format")
                                  .Attr<int32_t>("down_format")
                                  .Attr<int32_t>("merged")
                                  .Attr<int32_t>("activation")
                                  .Attr<float>("limit")
                                  .Attr<float>("beta")
                                  .Attr<float>("linear_beta")
                                  .Attr<int32_t>("weights_before")
                                  .Attr<int32_t>("variant"));
