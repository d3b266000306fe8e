#include "ffi/cuda/ffn.h"

#include "ffi/cuda/combine.h"

namespace jax_moe::cuda {
namespace {

// Sorts the pairs and cuts them into tiles of `tile_tokens`.
cudaError_t MakeLists(const Ffn& ffn, int tile_tokens, cudaStream_t stream) {
  return LaunchSort({ffn.expert_ids, ffn.pairs, ffn.experts, ffn.Ints(ffn.layout.pairs), nullptr,
                     ffn.Ints(ffn.layout.offsets), ffn.Ints(ffn.layout.counts), ffn.Tiles(),
                     ffn.Ints(ffn.layout.num_tiles), tile_tokens},
                    stream);
}

// One product of the pairs with one or two weight matrices of one format; y is [pairs, y_pitch].
class Products {
 public:
  Products(const Ffn& ffn, cudaStream_t stream) : ffn_(ffn), stream_(stream) {}

  cudaError_t Run(const Weight& weight, const Weight* second, const PreparedRows& x,
                  int32_t pairs_a_row, float* y, int64_t y_pitch) {
    const GemmKernel kernel = ChooseKernel(weight, x.layout, ffn_.Tile());
    if (kernel.tile_tokens != tile_tokens_) {
      tile_tokens_ = kernel.tile_tokens;
      const cudaError_t status = MakeLists(ffn_, tile_tokens_, stream_);
      if (status != cudaSuccess) return status;
    }
    GemmArgs args = {};
    args.weight[0] = weight.data;
    args.rows[0] = weight.rows;
    if (second != nullptr) {
      args.weight[1] = second->data;
      args.rows[1] = second->rows;
    }
    args.row_bytes = weight.row_bytes;
    args.experts = weight.experts;
    args.k = weight.columns;
    args.x = ViewPrepared(x);
    args.pairs_a_row = pairs_a_row;
    args.lists = {ffn_.Ints(ffn_.layout.pairs), ffn_.Tiles(), ffn_.Ints(ffn_.layout.num_tiles),
                  MaxTiles(ffn_.pairs, ffn_.experts, kernel.tile_tokens)};
    args.y = y;
    args.y_pitch = y_pitch;
    args.y_type = Element::kF32;
    args.log_splits = plan::ChooseCudaLogSplits(weight.columns);
    return LaunchGemm(kernel, args, stream_);
  }

 private:
  const Ffn& ffn_;
  cudaStream_t stream_;
  int tile_tokens_ = 0;
};

// gate and up: values [pairs, columns], gate's columns first.
cudaError_t RunGateAndUp(const Ffn& ffn, int64_t columns, Products& products, cudaStream_t stream) {
  std::optional<Layout> prepared;
  const auto run = [&](const Weight& weight, const Weight* second, int64_t column) {
    PreparedRows x = {ChooseLayout(weight, ffn.type, ffn.variant, ffn.Tile()), ffn.tokens,
                      ffn.d_model, ffn.memory + ffn.layout.x};
    if (prepared != x.layout) {
      const cudaError_t status = LaunchPrepare(ffn.x, ffn.type, x, stream);
      if (status != cudaSuccess) return status;
      prepared = x.layout;
    }
    return products.Run(weight, second, x, ffn.top_k, ffn.Values() + column, columns);
  };
  if (!ffn.gate) return run(*ffn.up, nullptr, 0);
  if (!ffn.up) return run(*ffn.gate, nullptr, 0);
  if (ffn.gate->format == ffn.up->format) return run(*ffn.gate, &*ffn.up, 0);
  const cudaError_t status = run(*ffn.gate, nullptr, 0);
  return status == cudaSuccess ? run(*ffn.up, nullptr, ffn.d_expert) : status;
}

}  // namespace

cudaError_t RunFfn(const Ffn& ffn, cudaStream_t stream) {
  const bool gated = ffn.gate.has_value();
  const int64_t columns = gated ? 2 * ffn.d_expert : ffn.d_expert;
  Products products(ffn, stream);
  cudaError_t status = RunGateAndUp(ffn, columns, products, stream);
  if (status != cudaSuccess) return status;

  const PreparedRows h = {ChooseLayout(ffn.down, Element::kF32, ffn.variant, ffn.Tile()), ffn.pairs,
                          ffn.d_expert, ffn.memory + ffn.layout.h};
  const float* values = ffn.Values();
  status = LaunchActivate(
      {gated ? values : nullptr, gated ? values + ffn.d_expert : values, columns,
       ffn.gate_projection, ffn.up_projection, ffn.weights_before ? ffn.weights : nullptr,
       ffn.expert_ids, ffn.experts, ffn.activation, ffn.limit, ffn.beta, ffn.linear_beta},
      h, stream);
  if (status != cudaSuccess) return status;
  // gate and up have been read: down takes their place.
  status = products.Run(ffn.down, nullptr, h, /*pairs_a_row=*/1, ffn.Values(), ffn.d_model);
  if (status != cudaSuccess) return status;
  return LaunchCombine(
      {ffn.Values(), ffn.expert_ids, ffn.weights_before ? nullptr : ffn.weights,
       ffn.down_projection, ffn.tokens, ffn.d_model, ffn.top_k, ffn.experts, ffn.y, ffn.type},
      stream);
}

}  // namespace jax_moe::cuda
