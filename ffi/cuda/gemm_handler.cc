// jax_moe_gemm on CUDA: lists, prepared activations, one grouped product, zeros for the other rows.

#include "ffi/cuda/check.h"
#include "ffi/cuda/combine.h"
#include "ffi/cuda/dispatch.h"
#include "ffi/cuda/handlers.h"
#include "ffi/cuda/load.h"
#include "ffi/cuda/prepare.h"

namespace jax_moe::cuda {
namespace {

constexpr const char* kOp = "jax_moe_gemm";

ffi::Error Gemm(cudaStream_t stream, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                ffi::Dictionary attributes) {
  Checker check(kOp);
  const GemmOperands call = ReadGemm(check, arguments, results, attributes);
  if (!check.ok()) return check.error();
  const Weight& weight = call.weight;
  const int64_t pairs = call.pairs;
  const plan::CudaGemmLayout layout = plan::LayoutCudaGemm(call.problem, call.tokens);
  RequireLimits(check, weight.experts, pairs);
  RequireLimits(check, "weight", weight);
  check.RequireWorkspace(call.workspace_bytes, layout.bytes);
  if (!check.ok() || pairs == 0 || weight.rows == 0) return check.error();

  const bool rows_are_pairs = call.problem.shape.rows_are_pairs;
  const int32_t top_k = static_cast<int32_t>(call.problem.shape.top_k);
  const Element x_type = static_cast<Element>(call.x_type);
  const Element y_type = static_cast<Element>(call.y_type);
  uint8_t* memory = call.workspace;
  const auto ints = [&](int64_t offset) { return reinterpret_cast<int32_t*>(memory + offset); };
  const int32_t experts = static_cast<int32_t>(weight.experts);
  if (weight.tiled && plan::UsesCudaTiledFew(call.variant, pairs, weight.experts, weight.rows,
                                             weight.columns)) {
    TiledFewArgs args = {};
    args.matrix = TiledMatrixOf(weight);
    args.rows = static_cast<int32_t>(weight.rows);
    args.columns = static_cast<int32_t>(weight.columns);
    args.row_bytes = weight.row_bytes;
    args.x = call.x;
    args.x_type = x_type;
    args.pairs_a_row = rows_are_pairs ? 1 : top_k;
    args.expert_ids = call.flat_expert_ids;
    args.entries = call.sorted_token_ids;
    args.pairs = static_cast<int32_t>(pairs);
    args.experts = experts;
    args.pair_weight = call.topk_weights;
    args.y = call.y;
    args.y_type = y_type;
    const TiledKernels& kernels = *FindTiledKernels(weight.format, /*centred=*/false);
    return CudaError(kOp, LaunchTiledFew(kernels, args, stream));
  }
  const plan::CudaTile tile = plan::ChooseCudaTile(pairs, weight.experts);
  const plan::CudaTiledTile tiled_tile =
      plan::ChooseCudaTiledTile(pairs, weight.experts, weight.rows, IsHopper());
  const bool rounds = call.variant == Variant::kScalarGguf;
  const bool dense_wide = UsesDenseWide(weight, pairs);
  const Layout x_layout = weight.tiled
                              ? TiledLayout(tiled_tile)
                              : ChooseLayout(weight, x_type, call.variant, tile, dense_wide);
  const TiledKernel* tiled =
      weight.tiled ? &ChooseTiledKernel(weight, tiled_tile,
                                        CentresFields(x_type, y_type, call.variant))
                   : nullptr;
  const int tile_tokens = weight.tiled ? tiled->tile_tokens
                          : dense_wide ? kDenseWideTokens
                                       : ChooseKernel(weight, x_layout, tile).tile_tokens;
  auto* tiles = reinterpret_cast<TokenTile*>(memory + layout.tiles);
  const PreparedRows prepared = {x_layout, rows_are_pairs ? pairs : call.tokens, weight.columns,
                                 memory + layout.x, weight.tiled && rounds};

  if (!CanAddress(prepared)) return CudaError(kOp, cudaErrorInvalidConfiguration);
  const SortArgs sort = {ints(layout.expert_ids), pairs, experts, ints(layout.pairs), nullptr,
                         ints(layout.offsets), tiles, ints(layout.num_tiles), tile_tokens,
                         dense_wide};
  cudaError_t status;
  const bool few = weight.tiled && plan::FindsCudaTiles(pairs, tiled_tile);
  if (pairs <= kPairsInOneLaunch) {
    status = LaunchPrepareGemm(
        {call.sorted_token_ids, call.flat_expert_ids, call.y, weight.rows, y_type}, sort, !few,
        call.x, x_type, prepared, stream);
  } else {
    status = LaunchPairExperts(call.sorted_token_ids, call.flat_expert_ids, pairs,
                               ints(layout.winners), ints(layout.expert_ids), stream);
    if (status == cudaSuccess) status = LaunchSort(sort, stream);
    if (status == cudaSuccess) {
      status = LaunchZeroRows(ints(layout.expert_ids), pairs, experts, call.y, weight.rows,
                              y_type, stream);
    }
    if (status == cudaSuccess) status = LaunchPrepare(call.x, x_type, prepared, stream);
  }
  if (status != cudaSuccess) return CudaError(kOp, status);
  const Lists lists = few ? ListsOfIds(call.flat_expert_ids, call.sorted_token_ids, pairs, experts)
                          : Lists{ints(layout.pairs), tiles, ints(layout.num_tiles),
                                  MaxTiles(pairs, weight.experts, tile_tokens, dense_wide),
                                  plan::LikelyCudaTiles(pairs, weight.experts, tile_tokens)};
  if (weight.tiled) {
    TiledArgs args = TiledProduct(weight, ViewPrepared(prepared), rows_are_pairs ? 1 : top_k, lists);
    args.pair_weight = call.topk_weights;
    args.y = call.y;
    args.y_pitch = weight.rows;
    args.y_type = y_type;
    status = LaunchTiled(*tiled, args, stream);
  } else if (dense_wide) {
    DenseWideArgs args = DenseWideProduct(weight, x_layout, ViewPrepared(prepared), pairs,
                                          rows_are_pairs ? 1 : top_k, lists);
    args.pair_weight = call.topk_weights;
    args.y = call.y;
    args.y_pitch = weight.rows;
    args.y_type = y_type;
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
    args.pair_weight = call.topk_weights;
    args.y = call.y;
    args.y_pitch = weight.rows;
    args.y_type = y_type;
    args.log_splits = plan::ChooseCudaLogSplits(weight.columns);
    status = LaunchGemm(ChooseKernel(weight, x_layout, tile), args, stream);
  }
  return CudaError(kOp, status);
}

ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  const auto format = attributes.get<int32_t>("format");
  if (!format.has_value()) return format.error();
  return CudaError(kOp, LoadProducts(format.value()));
}

}  // namespace
}  // namespace jax_moe::cuda

JAX_MOE_DEFINE_INITIALIZE(JaxMoeGemmCudaInitialize, jax_moe::cuda::Initialize);

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeGemmCuda, jax_moe::cuda::Gemm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
