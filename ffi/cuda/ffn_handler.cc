// jax_moe_ffn on CUDA: reads and checks the operands.

#include "ffi/cuda/ffn.h"
#include "ffi/cuda/handlers.h"

namespace jax_moe::cuda {
namespace {

const std::string kOp = "jax_moe_ffn";

using F32 = ffi::Buffer<ffi::F32>;
using S32Matrix = ffi::BufferR2<ffi::S32>;
using F32Matrix = ffi::BufferR2<ffi::F32>;
using Bytes = ffi::BufferR1<ffi::U8>;

// Attributes, in one place.
struct Options {
  int32_t gate_format, up_format, down_format, merged, activation;
  float limit, beta, linear_beta;
  int32_t weights_before, variant;
};

// A bias operand [experts, rows] | [0] and a scale operand [experts] | [0].
ffi::ErrorOr<Projection> ReadProjection(const char* name, const F32& bias, const F32& scale,
                                        int64_t experts, int64_t rows) {
  const int64_t biases = static_cast<int64_t>(bias.element_count());
  const int64_t scales = static_cast<int64_t>(scale.element_count());
  if ((biases != 0 && biases != experts * rows) || (scales != 0 && scales != experts)) {
    return ffi::Unexpected(
        Invalid(kOp, std::string(name) + "_bias or " + name + "_scale does not match its weight"));
  }
  return Projection{scales == 0 ? nullptr : scale.typed_data(),
                    biases == 0 ? nullptr : bias.typed_data(), rows};
}

ffi::Error ReadAndRun(cudaStream_t stream, ffi::AnyBuffer x, S32Matrix expert_ids,
                      F32Matrix weights, ffi::AnyBuffer gate, ffi::AnyBuffer up,
                      ffi::AnyBuffer down, F32 gate_bias, F32 up_bias, F32 down_bias,
                      F32 gate_scale, F32 up_scale, F32 down_scale, F32 gate_aux, F32 up_aux,
                      F32 down_aux, ffi::Result<ffi::AnyBuffer> y, ffi::Result<Bytes> workspace,
                      const Options& options) {
  Ffn ffn = {};
  const std::optional<Element> type = ElementOf(x.element_type());
  if (!type || x.element_type() != y->element_type()) {
    return Invalid(kOp, "x and y must both be float32, float16 or bfloat16");
  }
  const auto read_down = ReadWeight(kOp, "down", down, options.down_format, down_aux);
  if (!read_down.has_value()) return read_down.error();
  ffn.down = read_down.value();
  const auto read = [](const char* name, const ffi::AnyBuffer& buffer, int32_t format,
                       const F32& aux, std::optional<Weight>& weight) {
    if (format < 0) return ffi::Error::Success();
    const auto result = ReadWeight(kOp, name, buffer, format, aux);
    if (!result.has_value()) return result.error();
    weight = result.value();
    return ffi::Error::Success();
  };
  if (ffi::Error error = read("gate", gate, options.gate_format, gate_aux, ffn.gate);
      error.failure()) {
    return error;
  }
  if (ffi::Error error = read("up", up, options.up_format, up_aux, ffn.up); error.failure()) {
    return error;
  }

  ffn.type = *type;
  ffn.merged = options.merged != 0;
  ffn.tokens = expert_ids.dimensions()[0];
  ffn.top_k = static_cast<int32_t>(expert_ids.dimensions()[1]);
  ffn.pairs = ffn.tokens * ffn.top_k;
  ffn.d_model = ffn.down.rows;
  ffn.d_expert = ffn.down.columns;
  if (ffn.down.experts > kMaxExperts || ffn.pairs > (int64_t{1} << 30)) {
    return Invalid(kOp, "more than 8192 experts or 2^30 pairs");
  }
  ffn.experts = static_cast<int32_t>(ffn.down.experts);
  const auto matches = [&](const std::optional<Weight>& weight, int64_t rows) {
    return !weight || (weight->experts == ffn.experts && weight->rows == rows &&
                       weight->columns == ffn.d_model);
  };
  const bool complete = ffn.merged ? ffn.gate && !ffn.up : ffn.up.has_value();
  if (!complete || !matches(ffn.gate, (ffn.merged ? 2 : 1) * ffn.d_expert) ||
      !matches(ffn.up, ffn.d_expert)) {
    return Invalid(kOp, "gate " + ShapeText(gate) + " and up " + ShapeText(up) + " do not match down " +
                            ShapeText(down));
  }
  const auto x_dims = x.dimensions(), y_dims = y->dimensions();
  if (x_dims.size() != 2 || x_dims[0] != ffn.tokens || x_dims[1] != ffn.d_model ||
      y_dims.size() != 2 || y_dims[0] != ffn.tokens || y_dims[1] != ffn.d_model ||
      weights.dimensions()[0] != ffn.tokens || weights.dimensions()[1] != ffn.top_k) {
    return Invalid(kOp, "x " + ShapeText(x) + ", y " + ShapeText(*y) + ", expert_ids " +
                            ShapeText(expert_ids) + " and weights " + ShapeText(weights) +
                            " do not match down " + ShapeText(down));
  }
  const int64_t gate_rows = (ffn.merged ? 2 : 1) * ffn.d_expert;
  const auto gate_projection =
      ReadProjection("gate", gate_bias, gate_scale, ffn.experts, gate_rows);
  if (!gate_projection.has_value()) return gate_projection.error();
  const auto up_projection = ReadProjection("up", up_bias, up_scale, ffn.experts, ffn.d_expert);
  if (!up_projection.has_value()) return up_projection.error();
  const auto down_projection =
      ReadProjection("down", down_bias, down_scale, ffn.experts, ffn.d_model);
  if (!down_projection.has_value()) return down_projection.error();
  ffn.gate_projection = gate_projection.value();
  ffn.up_projection = up_projection.value();
  ffn.down_projection = down_projection.value();
  if (ffn.merged) {
    // The rows of up follow those of gate.
    ffn.up_projection = ffn.gate_projection;
    if (ffn.up_projection.bias != nullptr) ffn.up_projection.bias += ffn.d_expert;
  }
  ffn.x = x.untyped_data();
  ffn.y = y->untyped_data();
  ffn.expert_ids = expert_ids.typed_data();
  ffn.weights = weights.typed_data();
  ffn.weights_before = options.weights_before != 0;
  ffn.variant = static_cast<Variant>(options.variant);
  ffn.activation = static_cast<Activation>(options.activation);
  ffn.limit = options.limit;
  ffn.beta = options.beta;
  ffn.linear_beta = options.linear_beta;
  const bool biased = ffn.gate_projection.bias != nullptr || ffn.up_projection.bias != nullptr;
  const plan::FfnProblem problem = {{ffn.top_k, ffn.experts, ffn.d_model, ffn.d_expert},
                                    options.gate_format, options.up_format, options.down_format,
                                    ffn.variant, ffn.activation, ffn.limit, biased};
  ffn.fuses = plan::CudaFuses(problem);
  ffn.layout = plan::LayoutCudaFfn(problem, ffn.tokens);
  if (static_cast<int64_t>(workspace->size_bytes()) < ffn.layout.bytes) {
    return Invalid(kOp, "the workspace has " + std::to_string(workspace->size_bytes()) +
                            " bytes, but needs " + std::to_string(ffn.layout.bytes));
  }
  ffn.memory = workspace->typed_data();
  if (ffn.pairs == 0 || ffn.d_model == 0) return ffi::Error::Success();
  return CudaError(kOp, RunFfn(ffn, stream));
}

ffi::Error RunWithAttributes(cudaStream_t stream, ffi::AnyBuffer x, S32Matrix expert_ids,
                             F32Matrix weights, ffi::AnyBuffer gate, ffi::AnyBuffer up,
                             ffi::AnyBuffer down, F32 gate_bias, F32 up_bias, F32 down_bias,
                             F32 gate_scale, F32 up_scale, F32 down_scale, F32 gate_aux,
                             F32 up_aux, F32 down_aux, ffi::Result<ffi::AnyBuffer> y, ffi::Result<Bytes> workspace,
                             int32_t gate_format, int32_t up_format, int32_t down_format,
                             int32_t merged, int32_t activation, float limit, float beta,
                             float linear_beta, int32_t weights_before, int32_t variant) {
  return ReadAndRun(stream, x, expert_ids, weights, gate, up, down, gate_bias, up_bias, down_bias,
                    gate_scale, up_scale, down_scale, gate_aux, up_aux, down_aux, y, workspace,
                    {gate_format, up_format, down_format, merged, activation, limit, beta,
                     linear_beta, weights_before, variant});
}

ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  for (const char* name : {"gate_format", "up_format", "down_format"}) {
    const auto format = attributes.get<int32_t>(name);
    if (!format.has_value()) return format.error();
    const cudaError_t status = ConfigureFormat(format.value());
    if (status != cudaSuccess) return CudaError(kOp, status);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_moe::cuda

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFfnCudaInitialize, jax_moe::cuda::Initialize,
                              xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInitialize>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFfnCuda, jax_moe::cuda::RunWithAttributes,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jax_moe::cuda::S32Matrix>()
                                  .Arg<jax_moe::cuda::F32Matrix>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jax_moe::cuda::F32>()
                                  .Arg<jax_moe::cuda::F32>()
                                  .Arg<jax_moe::cuda::F32>()
                                  .Arg<jax_moe::cuda::F32>()
                                  .Arg<jax_moe::cuda::F32>()
                                  .Arg<jax_moe::cuda::F32>()
                                  .Arg<jax_moe::cuda::F32>()
                                  .Arg<jax_moe::cuda::F32>()
                                  .Arg<jax_moe::cuda::F32>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<jax_moe::cuda::Bytes>()
                                  .Attr<int32_t>("gate_format")
                                  .Attr<int32_t>("up_format")
                                  .Attr<int32_t>("down_format")
                                  .Attr<int32_t>("merged")
                                  .Attr<int32_t>("activation")
                                  .Attr<float>("limit")
                                  .Attr<float>("beta")
                                  .Attr<float>("linear_beta")
                                  .Attr<int32_t>("weights_before")
                                  .Attr<int32_t>("variant"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
