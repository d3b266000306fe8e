// jax_moe_ffn on CUDA: reads and checks the operands.

#include "ffi/cuda/ffn.h"
#include "ffi/cuda/handlers.h"
#include "ffi/cuda/load.h"

namespace jax_moe::cuda {
namespace {

constexpr const char* kOp = "jax_moe_ffn";

// The kernel for a whole layer, null where there is none. Formats as in plan::FfnProblem.
const TiledLayerKernel* FindLayer(int gate, int up, int down) {
  if (up < 0) up = gate;
  if (!IsHopper() || !plan::IsTiled(up) || !plan::IsTiled(down)) return nullptr;
  return FindTiledLayer(up & ~kTiledFormat, down & ~kTiledFormat);
}

ffi::Error Run(cudaStream_t stream, ffi::RemainingArgs arguments, ffi::RemainingRets results,
               ffi::Dictionary attributes) {
  Checker check(kOp);
  const FfnOperands call = ReadFfn(check, arguments, results, attributes);
  if (!check.ok()) return check.error();
  const plan::FfnShape& shape = call.problem.shape;
  Ffn ffn = {};
  ffn.layout = plan::LayoutCudaFfn(call.problem, call.tokens);
  RequireLimits(check, shape.experts, call.pairs);
  RequireLimits(check, "down", call.down);
  if (call.gate) RequireLimits(check, "gate", *call.gate);
  if (call.up) RequireLimits(check, "up", *call.up);
  check.RequireWorkspace(call.workspace_bytes, ffn.layout.bytes);
  if (!check.ok() || call.pairs == 0 || shape.d_model == 0) return check.error();

  ffn.type = static_cast<Element>(call.type);
  ffn.x = call.x;
  ffn.y = call.y;
  ffn.expert_ids = call.expert_ids;
  ffn.weights = call.weights;
  ffn.tokens = call.tokens;
  ffn.pairs = call.pairs;
  ffn.d_model = shape.d_model;
  ffn.d_expert = shape.d_expert;
  ffn.top_k = static_cast<int32_t>(shape.top_k);
  ffn.experts = static_cast<int32_t>(shape.experts);
  ffn.gate = call.gate;
  ffn.up = call.up;
  ffn.down = call.down;
  ffn.merged = call.merged;
  ffn.weights_before = call.weights_before;
  ffn.fuses = plan::CudaFuses(call.problem);
  ffn.layer = FindLayer(call.problem.gate_format, call.problem.up_format, call.problem.down_format);
  ffn.layer_shape =
      plan::ChooseCudaLayer(call.problem, call.tokens, Multiprocessors(), IsHopper());
  ffn.variant = call.problem.variant;
  const int64_t gate_rows = (ffn.merged ? 2 : 1) * ffn.d_expert;
  ffn.gate_projection = {call.gate_scale, call.gate_bias, gate_rows};
  ffn.up_projection = {call.up_scale, call.up_bias, ffn.d_expert};
  ffn.down_projection = {call.down_scale, call.down_bias, ffn.d_model};
  if (ffn.merged) {
    // The rows of up follow those of gate.
    ffn.up_projection = ffn.gate_projection;
    if (ffn.up_projection.bias != nullptr) ffn.up_projection.bias += ffn.d_expert;
  }
  ffn.activation = call.problem.activation;
  ffn.limit = call.problem.limit;
  ffn.beta = call.beta;
  ffn.linear_beta = call.linear_beta;
  ffn.memory = call.workspace;
  return CudaError(kOp, RunFfn(ffn, stream));
}

ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  int formats[3], i = 0;
  for (const char* name : {"gate_format", "up_format", "down_format"}) {
    const auto format = attributes.get<int32_t>(name);
    if (!format.has_value()) return format.error();
    formats[i++] = format.value();
    const cudaError_t status = LoadProducts(format.value());
    if (status != cudaSuccess) return CudaError(kOp, status);
  }
  const TiledLayerKernel* layer = FindLayer(formats[0], formats[1], formats[2]);
  return CudaError(kOp, layer == nullptr ? cudaSuccess : LoadTiledLayer(*layer));
}

}  // namespace
}  // namespace jax_moe::cuda

JAX_MOE_DEFINE_INITIALIZE(JaxMoeFfnCudaInitialize, jax_moe::cuda::Initialize);

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFfnCuda, jax_moe::cuda::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
