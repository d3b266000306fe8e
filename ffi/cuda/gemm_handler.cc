// jax_moe_gemm on CUDA: lists, prepared activations, one grouped product, zeros for the other rows.

#include "ffi/cuda/check.h"
#include "ffi/cuda/combine.h"
#include "ffi/cuda/dispatch.h"
#include "ffi/cuda/handlers.h"
#include "ffi/cuda/prepare.h"

namespace jax_moe::cuda {
namespace {

const std::string kOp = "jax_moe_gemm";

using S32Vector = ffi::BufferR1<ffi::S32>;
using Bytes = ffi::BufferR1<ffi::U8>;

ffi::Error Gemm(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer weight_buffer,
                S32Vector sorted_token_ids, S32Vector flat_expert_ids,
                ffi::BufferR1<ffi::F32> topk_weights, ffi::Buffer<ffi::F32> weight_aux,
                ffi::Result<ffi::AnyBuffer> y,
                ffi::Result<Bytes> workspace, int32_t format, int32_t top_k, int32_t variant) {
  const auto read = ReadWeight(kOp, "weight", weight_buffer, format, weight_aux);
  if (!read.has_value()) return read.error();
  const Weight& weight = read.value();
  const int64_t pairs = sorted_token_ids.dimensions()[0];
  const std::optional<Element> x_type = ElementOf(x.element_type());
  const std::optional<Element> y_type = ElementOf(y->element_type());
  if (!x_type || !y_type) return Invalid(kOp, "x and y must be float32, float16 or bfloat16");
  if (top_k < 1 || pairs % top_k != 0) {
    return Invalid(kOp, "top_k " + std::to_string(top_k) + " does not divide the number of pairs");
  }
  const int64_t tokens = pairs / top_k;
  const auto x_dims = x.dimensions();
  if (x_dims.size() != 2 || (x_dims[0] != tokens && x_dims[0] != pairs) ||
      x_dims[1] != weight.columns) {
    return Invalid(kOp, "x must be [tokens or pairs, " + std::to_string(weight.columns) +
                            "], not " + ShapeText(x));
  }
  const auto y_dims = y->dimensions();
  if (y_dims.size() != 2 || y_dims[0] != pairs || y_dims[1] != weight.rows) {
    return Invalid(kOp, "y must be [pairs, N], not " + ShapeText(*y));
  }
  const int64_t num_weights = topk_weights.dimensions()[0];
  if (flat_expert_ids.dimensions()[0] != pairs || (num_weights != 0 && num_weights != pairs)) {
    return Invalid(kOp, "flat_expert_ids and topk_weights must have an element for every pair");
  }
  if (weight.experts > kMaxExperts || pairs > (int64_t{1} << 30)) {
    return Invalid(kOp, "more than 8192 experts or 2^30 pairs");
  }
  if (pairs == 0 || weight.rows == 0) return ffi::Error::Success();

  const bool rows_are_pairs = x_dims[0] == pairs;
  const plan::CudaGemmLayout layout = plan::LayoutCudaGemm(
      {{top_k, weight.experts, weight.rows, weight.columns, rows_are_pairs}, format}, tokens);
  if (static_cast<int64_t>(workspace->size_bytes()) < layout.bytes) {
    return Invalid(kOp, "the workspace has " + std::to_string(workspace->size_bytes()) +
                            " bytes, but needs " + std::to_string(layout.bytes));
  }
  uint8_t* memory = workspace->typed_data();
  const auto ints = [&](int64_t offset) { return reinterpret_cast<int32_t*>(memory + offset); };
  const int32_t experts = static_cast<int32_t>(weight.experts);
  const plan::CudaTile tile = plan::ChooseCudaTile(pairs, weight.experts);
  const plan::CudaTiledTile tiled_tile =
      plan::ChooseCudaTiledTile(pairs, weight.experts, IsHopper());
  const bool rounds = static_cast<Variant>(variant) == Variant::kScalarGguf;
  const bool dense_wide = UsesDenseWide(weight, pairs);
  const Layout x_layout =
      weight.tiled
          ? TiledLayout(tiled_tile)
          : ChooseLayout(weight, *x_type, static_cast<Variant>(variant), tile, dense_wide);
  const int tile_tokens = weight.tiled ? ChooseTiledKernel(weight, tiled_tile).tile_tokens
                          : dense_wide ? kDenseWideTokens
                                       : ChooseKernel(weight, x_layout, tile).tile_tokens;
  auto* tiles = reinterpret_cast<TokenTile*>(memory + layout.tiles);
  const PreparedRows prepared = {x_layout, x_dims[0], weight.columns, memory + layout.x,
                                 weight.tiled && rounds};

  cudaError_t status =
      LaunchPairExperts(sorted_token_ids.typed_data(), flat_expert_ids.typed_data(), pairs,
                        ints(layout.winners), ints(layout.expert_ids), stream);
  if (status == cudaSuccess) {
    status = LaunchSort(
        {ints(layout.expert_ids), pairs, experts, ints(layout.pairs), nullptr, ints(layout.offsets),
         ints(layout.counts), tiles, ints(layout.num_tiles), tile_tokens},
        stream);
  }
  if (status == cudaSuccess) {
    status = LaunchZeroRows(ints(layout.expert_ids), pairs, experts, y->untyped_data(), weight.rows,
                            *y_type, stream);
  }
  if (status == cudaSuccess) status = LaunchPrepare(x.untyped_data(), *x_type, prepared, stream);
  if (status != cudaSuccess) return CudaError(kOp, status);
  const Lists lists = {ints(layout.pairs), tiles, ints(layout.num_tiles),
                       MaxTiles(pairs, weight.experts, tile_tokens)};
  const float* pair_weight = num_weights == 0 ? nullptr : topk_weights.typed_data();
  if (weight.tiled) {
    TiledArgs args = TiledProduct(weight, ViewPrepared(prepared), rows_are_pairs ? 1 : top_k, lists);
    args.pair_weight = pair_weight;
    args.y = y->untyped_data();
    args.y_pitch = weight.rows;
    args.y_type = *y_type;
    status = LaunchTiled(ChooseTiledKernel(weight, tiled_tile), args, stream);
  } else if (dense_wide) {
    DenseWideArgs args = DenseWideProduct(weight, x_layout, ViewPrepared(prepared),
                                          rows_are_pairs ? 1 : top_k, lists);
    args.pair_weight = pair_weight;
    args.y = y->untyped_data();
    args.y_pitch = weight.rows;
    args.y_type = *y_type;
    status = LaunchDenseWide(args, stream);
  } else {
    GemmArgs args = {};
    args.weight[0] = weight.data;
    args.rows[0] = weight.rows;
    args.row_bytes = weight.row_bytes;
    args.experts = weight.experts;
    args.k = weight.columns;
    args.x = ViewPrepared(prepared);
    args.pairs_a_row = rows_are_pairs ? 1 : top_k;
    args.lists = lists;
    args.pair_weight = pair_weight;
    args.y = y->untyped_data();
    args.y_pitch = weight.rows;
    args.y_type = *y_type;
    args.log_splits = plan::ChooseCudaLogSplits(weight.columns);
    status = LaunchGemm(ChooseKernel(weight, x_layout, tile), args, stream);
  }
  return CudaError(kOp, status);
}

ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  const auto format = attributes.get<int32_t>("format");
  if (!format.has_value()) return format.error();
  return CudaError(kOp, ConfigureFormat(format.value()));
}

}  // namespace
}  // namespace jax_moe::cuda

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeGemmCudaInitialize, jax_moe::cuda::Initialize,
                              xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInitialize>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeGemmCuda, jax_moe::cuda::Gemm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jax_moe::cuda::S32Vector>()
                                  .Arg<jax_moe::cuda::S32Vector>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<jax_moe::cuda::Bytes>()
                                  .Attr<int32_t>("format")
                                  .Attr<int32_t>("top_k")
                                  .Attr<int32_t>("variant"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
