#include "ffi/cuda/ffn.h"

#include "ffi/cuda/combine.h"

namespace jax_moe::cuda {
namespace {

// Whether tiles of so many tokens are those of dense_wide.h.
bool EvenTiles(int tile_tokens) { return tile_tokens == kDenseWideTokens; }

// Sorts the pairs and cuts them into tiles of `tile_tokens`.
SortArgs ListsOf(const Ffn& ffn, int tile_tokens) {
  return {ffn.expert_ids, ffn.pairs, ffn.experts, ffn.Ints(ffn.layout.pairs), nullptr,
          ffn.Ints(ffn.layout.offsets), ffn.Tiles(), ffn.Ints(ffn.layout.num_tiles), tile_tokens,
          EvenTiles(tile_tokens)};
}

// How activations are prepared for a weight, in `memory`; choose: ChooseLayout or ChooseHiddenLayout.
PreparedRows PrepareFor(const Ffn& ffn, const Weight& weight, decltype(ChooseLayout)& choose,
                        int64_t rows, int64_t columns, uint8_t* memory) {
  if (weight.tiled) {
    return {TiledLayout(ffn.TiledTile()), rows, columns, memory,
            ffn.variant == Variant::kScalarGguf};
  }
  return {choose(weight, ffn.type, ffn.variant, ffn.Tile(), ffn.DenseWide(weight)), rows, columns,
          memory};
}
// x for gate or up, and h for down.
PreparedRows PrepareX(const Ffn& ffn, const Weight& weight) {
  return PrepareFor(ffn, weight, ChooseLayout, ffn.tokens, ffn.d_model,
                    ffn.memory + ffn.layout.x);
}
PreparedRows PrepareH(const Ffn& ffn) {
  return PrepareFor(ffn, ffn.down, ChooseHiddenLayout, ffn.pairs, ffn.d_expert,
                    ffn.memory + ffn.layout.h);
}

// What makes h of gate and up, in the arguments of the kernel that does.
template <typename Args>
void SetActivation(const Ffn& ffn, Args& args) {
  args.activate = true;
  args.pair_weight = ffn.weights_before ? ffn.weights : nullptr;
  args.projection[0] = ffn.gate_projection;
  args.projection[1] = ffn.up_projection;
  args.activation = ffn.activation;
  args.limit = ffn.limit;
  args.beta = ffn.beta;
  args.linear_beta = ffn.linear_beta;
}

TiledDownArgs DownOf(const Ffn& ffn, const PreparedRows& h) {
  const Weight& down = ffn.down;
  const Activations prepared = ViewPrepared(h);
  TiledDownArgs args = {};
  args.matrix = TiledMatrixOf(down);
  args.row_bytes = down.row_bytes;
  args.columns = static_cast<int32_t>(ffn.d_expert);
  args.h = static_cast<const half*>(prepared.values);
  args.h_scales = prepared.scales;
  args.h_pitch = prepared.pitch;
  args.expert_ids = ffn.expert_ids;
  args.experts = ffn.experts;
  args.tokens = static_cast<int32_t>(ffn.tokens);
  args.top_k = ffn.top_k;
  args.weights = ffn.weights_before ? nullptr : ffn.weights;
  args.projection = ffn.down_projection;
  args.y = ffn.y;
  args.y_pitch = ffn.d_model;
  args.y_type = ffn.type;
  return args;
}

// gate and up, both tiled alike, and the activation: to h, prepared for a tiled down projection.
TiledArgs ActivatedOf(const Ffn& ffn, const Activations& x, const Lists& lists,
                      const PreparedRows& h) {
  const bool two = ffn.gate.has_value() && !ffn.merged;
  const Weight& up = ffn.up ? *ffn.up : *ffn.gate;
  TiledArgs args = TiledProduct(up, x, ffn.top_k, lists);
  args.matrix[1] = args.matrix[0];
  if (two) args.matrix[0].data = ffn.gate->data, args.matrix[0].aux = ffn.gate->aux;
  if (ffn.merged) {
    args.rows = static_cast<int32_t>(ffn.d_expert);
    args.matrix[1].data += ffn.d_expert * up.row_bytes;
    args.matrix[1].aux += 2 * ffn.d_expert;
  }
  const Activations to = ViewPrepared(h);
  args.y = const_cast<void*>(to.values);
  args.y_pitch = to.pitch;
  args.h_scales = const_cast<float*>(to.scales);
  args.gated = ffn.gate.has_value();
  SetActivation(ffn, args);
  return args;
}

cudaError_t RunLayer(const Ffn& ffn, const PreparedRows& h, cudaStream_t stream) {
  TiledLayerArgs args = {};
  args.up = ActivatedOf(ffn, {}, {}, h);
  args.down = DownOf(ffn, h);
  args.given = ffn.Values();
  args.x = ffn.x;
  args.x_type = ffn.type;
  return LaunchTiledLayer(*ffn.layer, *ffn.layer_shape, args, stream);
}

// One product of the pairs with one or two weight matrices of one format; y is [pairs, y_pitch].
class Products {
 public:
  Products(const Ffn& ffn, cudaStream_t stream)
      : ffn_(ffn),
        stream_(stream),
        block_tiles_(plan::FindsCudaBlockTiles(ffn.pairs, ffn.experts, ffn.TiledTile())),
        finds_tiles_(block_tiles_ || plan::FindsCudaTiles(ffn.pairs, ffn.TiledTile())) {}

  cudaError_t Run(const Weight& weight, const Weight* second, const PreparedRows& x,
                  int32_t pairs_a_row, float* y, int64_t y_pitch) {
    if (weight.tiled) {
      const cudaError_t status = RunTiled(weight, x, pairs_a_row, y, y_pitch);
      if (status != cudaSuccess || second == nullptr) return status;
      return RunTiled(*second, x, pairs_a_row, y + weight.rows, y_pitch);
    }
    if (ffn_.DenseWide(weight)) {
      const cudaError_t status = RunDense(weight, x, pairs_a_row, y, y_pitch);
      if (status != cudaSuccess || second == nullptr) return status;
      return RunDense(*second, x, pairs_a_row, y + weight.rows, y_pitch);
    }
    const GemmKernel kernel = ChooseKernel(weight, x.layout, ffn_.Tile());
    const cudaError_t status = UseTiles(kernel.tile_tokens);
    if (status != cudaSuccess) return status;
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
    args.lists = CurrentLists();
    args.y = y;
    args.y_pitch = y_pitch;
    args.y_type = Element::kF32;
    args.log_splits = plan::ChooseCudaLogSplits(weight.columns);
    return LaunchGemm(kernel, args, stream_);
  }

  // The down projection with the wide kernels: scaled f16 values, half of the bytes of float32.
  cudaError_t RunScaled(const Weight& down, const PreparedRows& h, half* y, float* y_scales) {
    if (ffn_.DenseWide(down)) {
      return RunDense(down, h, /*pairs_a_row=*/1, y, ffn_.d_model, y_scales);
    }
    return RunTiled(down, h, /*pairs_a_row=*/1, y, ffn_.d_model, y_scales);
  }

  // x prepared and ActivatedOf.
  cudaError_t RunActivated(const Weight& up, const PreparedRows& x, const PreparedRows& h) {
    const TiledKernel& kernel = KernelFor(up);
    const cudaError_t status = finds_tiles_ ? LaunchPrepare(ffn_.x, ffn_.type, x, stream_)
                                            : SortAndPrepare(kernel.tile_tokens, x);
    if (status != cudaSuccess) return status;
    lists_are_older_ = ffn_.TiledTile() == plan::CudaTiledTile::kNarrow;
    return LaunchTiled(kernel, ActivatedOf(ffn_, ViewPrepared(x), TiledLists(), h), stream_);
  }

  // The same of dense gate and up, for a down projection of any kind.
  cudaError_t RunDenseActivated(const Weight* gate, const Weight& up, const PreparedRows& x,
                                const PreparedRows& h) {
    cudaError_t status = SortAndPrepare(kDenseWideTokens, x);
    if (status != cudaSuccess) return status;
    DenseWideArgs args =
        DenseWideProduct(up, x.layout, ViewPrepared(x), ffn_.pairs, ffn_.top_k, CurrentLists());
    args.weight[0] = gate == nullptr ? nullptr : gate->data;
    args.weight[1] = up.data;
    if (ffn_.merged) {
      args.rows = ffn_.d_expert;
      args.weight[0] = up.data;
      args.weight[1] += ffn_.d_expert * up.row_bytes;
    }
    SetActivation(ffn_, args);
    // What is scaled by a row's maximum waits for all of the row.
    args.h_parts = h.layout == Layout::kBF16 ? 1 : h.layout == Layout::kBF16Pair ? 2 : 0;
    const Activations to = ViewPrepared(h);
    args.y = args.h_parts > 0 ? const_cast<void*>(to.values) : ffn_.Values();
    args.y_pitch = args.h_parts > 0 ? to.pitch : ffn_.d_expert;
    status = LaunchDenseWide(args, stream_);
    lists_are_older_ = args.h_parts > 0;
    if (status != cudaSuccess || args.h_parts > 0) return status;
    return LaunchPrepare(ffn_.Values(), Element::kF32, h, stream_);
  }

 private:
  // The first lists, and x.
  cudaError_t SortAndPrepare(int tile_tokens, const PreparedRows& x) {
    tile_tokens_ = tile_tokens;
    const SortArgs sort = ListsOf(ffn_, tile_tokens);
    return LaunchPrepare(ffn_.x, ffn_.type, x, stream_, &sort);
  }

  cudaError_t UseTiles(int tile_tokens) {
    if (tile_tokens == tile_tokens_) return cudaSuccess;
    tile_tokens_ = tile_tokens;
    lists_are_older_ = false;
    return LaunchSort(ListsOf(ffn_, tile_tokens), stream_);
  }

  Lists CurrentLists() const {
    return {ffn_.Ints(ffn_.layout.pairs), ffn_.Tiles(), ffn_.Ints(ffn_.layout.num_tiles),
            MaxTiles(ffn_.pairs, ffn_.experts, tile_tokens_, EvenTiles(tile_tokens_)),
            plan::LikelyCudaTiles(ffn_.pairs, ffn_.experts, tile_tokens_)};
  }

  const TiledKernel& KernelFor(const Weight& tiled) const {
    return ChooseTiledKernel(tiled, ffn_.TiledTile(), ffn_.Centred(), block_tiles_);
  }
  Lists TiledLists() const {
    return finds_tiles_ ? ListsOfIds(ffn_.expert_ids, nullptr, ffn_.pairs, ffn_.experts)
                        : CurrentLists();
  }

  // y: float32, or float16 that y_scales undo the scaling of.
  cudaError_t RunTiled(const Weight& weight, const PreparedRows& x, int32_t pairs_a_row, void* y,
                       int64_t y_pitch, float* y_scales = nullptr) {
    const TiledKernel& kernel = KernelFor(weight);
    const cudaError_t status = finds_tiles_ ? cudaSuccess : UseTiles(kernel.tile_tokens);
    if (status != cudaSuccess) return status;
    TiledArgs args = TiledProduct(weight, ViewPrepared(x), pairs_a_row, TiledLists());
    args.y = y;
    args.y_pitch = y_pitch;
    args.y_type = y_scales == nullptr ? Element::kF32 : Element::kF16;
    args.y_scales = y_scales;
    args.lists.older = lists_are_older_;
    return LaunchTiled(kernel, args, stream_);
  }

  // The same with a dense weight and Hopper's kernel; y_scales are of kDenseWideScaleColumns.
  cudaError_t RunDense(const Weight& weight, const PreparedRows& x, int32_t pairs_a_row, void* y,
                       int64_t y_pitch, float* y_scales = nullptr) {
    const cudaError_t status = UseTiles(kDenseWideTokens);
    if (status != cudaSuccess) return status;
    DenseWideArgs args = DenseWideProduct(weight, x.layout, ViewPrepared(x), ffn_.pairs,
                                          pairs_a_row, CurrentLists());
    args.y = y;
    args.y_pitch = y_pitch;
    args.y_type = y_scales == nullptr ? Element::kF32 : Element::kF16;
    args.y_scales = y_scales;
    args.lists.older = lists_are_older_;
    return LaunchDenseWide(args, stream_);
  }

  const Ffn& ffn_;
  cudaStream_t stream_;
  // Whether the blocks of the kernel for tiled weights find tiles, or anyone there: no lists.
  const bool block_tiles_, finds_tiles_;
  int tile_tokens_ = 0;
  bool lists_are_older_ = false;  // Lists::older, for the next kernel
};

bool SameKind(const Weight& a, const Weight& b) {
  return a.format == b.format && a.tiled == b.tiled;
}

// Whether the launch for gate, up and the activation is that of Hopper's kernel for dense weights.
bool FusesDense(const Ffn& ffn, const Weight& up) {
  return ffn.DenseWide(up) && (!ffn.gate || SameKind(*ffn.gate, up));
}

// gate and up: values [pairs, columns], gate's columns first.
cudaError_t RunGateAndUp(const Ffn& ffn, int64_t columns, Products& products, cudaStream_t stream) {
  std::optional<Layout> prepared;
  const auto run = [&](const Weight& weight, const Weight* second, int64_t column) {
    const PreparedRows x = PrepareX(ffn, weight);
    if (prepared != x.layout) {
      const cudaError_t status = LaunchPrepare(ffn.x, ffn.type, x, stream);
      if (status != cudaSuccess) return status;
      prepared = x.layout;
    }
    return products.Run(weight, second, x, ffn.top_k, ffn.Values() + column, columns);
  };
  if (!ffn.gate) return run(*ffn.up, nullptr, 0);
  if (!ffn.up) return run(*ffn.gate, nullptr, 0);
  if (SameKind(*ffn.gate, *ffn.up)) return run(*ffn.gate, &*ffn.up, 0);
  const cudaError_t status = run(*ffn.gate, nullptr, 0);
  return status == cudaSuccess ? run(*ffn.up, nullptr, ffn.d_expert) : status;
}

}  // namespace

cudaError_t RunFfn(const Ffn& ffn, cudaStream_t stream) {
  const bool gated = ffn.gate.has_value();
  const int64_t columns = gated ? 2 * ffn.d_expert : ffn.d_expert;
  Products products(ffn, stream);
  const PreparedRows h = PrepareH(ffn);
  if (ffn.layer_shape) return RunLayer(ffn, h, stream);
  const Weight& up = ffn.up ? *ffn.up : *ffn.gate;
  const PreparedRows x = PrepareX(ffn, up);
  if (!CanAddress(x) || !CanAddress(h)) return cudaErrorInvalidConfiguration;
  cudaError_t status;
  if (ffn.fuses) {
    status = products.RunActivated(up, x, h);
    // Down and the sum are one.
    if (status == cudaSuccess && plan::FindsCudaTiles(ffn.pairs, ffn.TiledTile())) {
      return LaunchTiledDown(*FindTiledKernels(ffn.down.format, ffn.Centred()), DownOf(ffn, h),
                             stream);
    }
  } else if (FusesDense(ffn, up)) {
    status = products.RunDenseActivated(ffn.gate ? &*ffn.gate : nullptr, up, x, h);
  } else {
    status = RunGateAndUp(ffn, columns, products, stream);
    if (status != cudaSuccess) return status;
    const float* values = ffn.Values();
    status = LaunchActivate(
        {gated ? values : nullptr, gated ? values + ffn.d_expert : values, columns,
         ffn.gate_projection, ffn.up_projection, ffn.weights_before ? ffn.weights : nullptr,
         ffn.expert_ids, ffn.experts, ffn.activation, ffn.limit, ffn.beta, ffn.linear_beta},
        h, stream);
  }
  if (status != cudaSuccess) return status;
  // gate and up have been read: down takes their place.
  CombineArgs combine = {};
  const bool dense = ffn.DenseWide(ffn.down);
  if (dense ? ffn.d_model % 8 == 0
            : ffn.down.tiled && ffn.TiledTile() != plan::CudaTiledTile::kNarrow) {
    auto* values = reinterpret_cast<half*>(ffn.Values());
    auto* scales = reinterpret_cast<float*>(values + (ffn.pairs * ffn.d_model + 1) / 2 * 2);
    combine.scaled_values = values;
    combine.scales = scales;
    combine.scale_columns = dense ? kDenseWideScaleColumns : 0;
    status = products.RunScaled(ffn.down, h, values, scales);
  } else {
    combine.values = ffn.Values();
    status = products.Run(ffn.down, nullptr, h, /*pairs_a_row=*/1, ffn.Values(), ffn.d_model);
  }
  if (status != cudaSuccess) return status;
  combine.expert_ids = ffn.expert_ids;
  combine.weights = ffn.weights_before ? nullptr : ffn.weights;
  combine.projection = ffn.down_projection;
  combine.tokens = ffn.tokens;
  combine.columns = ffn.d_model;
  combine.top_k = ffn.top_k;
  combine.experts = ffn.experts;
  combine.y = ffn.y;
  combine.y_type = ffn.type;
  return LaunchCombine(combine, stream);
}

}  // namespace jax_moe::cuda
