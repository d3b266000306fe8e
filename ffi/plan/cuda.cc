#include "ffi/plan/cuda.h"

#include <algorithm>
#include <cmath>

#include "ffi/blocks/formats.h"
#include "ffi/blocks/tiled.h"
#include "ffi/plan/cuda_shared.h"

namespace jax_moe::plan {
namespace {

constexpr int64_t kAlign = 256;

// Hands out areas one after another.
class Areas {
 public:
  int64_t Add(int64_t bytes) {
    const int64_t begin = end_;
    end_ += (bytes + kAlign - 1) / kAlign * kAlign;
    return begin;
  }
  int64_t end() const { return end_; }

 private:
  int64_t end_ = 0;
};

constexpr int64_t kTileBytes = 16;

int64_t TileBytes(int64_t pairs, int64_t experts) {
  return kTileBytes * (std::min(pairs, experts) + pairs / kCudaMinTileTokens);
}

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A prepared row and what goes with it (ffi/cuda/prepare.h) for a weight of this format, at most: of
// the activations for a tiled weight, f16 whatever the kernel, a scale and a norm; else up to 4 bytes
// a column.
int64_t PreparedRowBytes(int format, int64_t columns) {
  return IsTiled(format) ? 2 * RoundUp(columns, 128) + 8 : 4 * RoundUp(columns, 64) + 16;
}

// What a row of each area of moe_ffn takes.
struct FfnRowBytes {
  int64_t x;          // of a token
  int64_t h, values;  // of a pair
};

FfnRowBytes RowBytesOf(const FfnProblem& problem) {
  const FfnShape& shape = problem.shape;
  FfnRowBytes bytes = {};
  // One area serves gate and up in turn.
  for (const int format : {problem.gate_format, problem.up_format}) {
    if (format >= 0) bytes.x = std::max(bytes.x, PreparedRowBytes(format, shape.d_model));
  }
  bytes.h = PreparedRowBytes(problem.down_format, shape.d_expert);
  // What the wide kernels for tiled weights store of down, f16 and a scale, is less, but not every
  // device has them.
  bytes.values = 4 * shape.d_model;
  if (!CudaFuses(problem)) {
    const int64_t columns = (problem.gate_format >= 0 ? 2 : 1) * shape.d_expert;
    bytes.values = std::max(bytes.values, 4 * columns);
  }
  return bytes;
}

}  // namespace

CudaTile ChooseCudaTile(int64_t pairs, int64_t experts) {
  const double mean =
      static_cast<double>(pairs) / static_cast<double>(std::max<int64_t>(experts, 1));
  if (mean <= 1) return CudaTile::kVector;
  return mean <= 5 ? CudaTile::kNarrow : mean <= 40 ? CudaTile::kMedium : CudaTile::kWide;
}

CudaTile FitCudaTile(CudaTile tile, int format, int64_t shared_limit) {
  const auto fits = [&](int64_t tokens) {
    bool result = true;
    VisitFormat(format, [&](auto block) {
      result = CudaWideSharedBytes<decltype(block)>(tokens) <= shared_limit;
    });
    return result;
  };
  if (tile == CudaTile::kWide && !fits(128)) tile = CudaTile::kMedium;
  if (tile == CudaTile::kMedium && !fits(32)) tile = CudaTile::kNarrow;
  return tile;
}

int64_t LikelyCudaTiles(int64_t pairs, int64_t experts, int64_t tile_tokens) {
  if (experts == 0) return 0;
  const int64_t tiles = (pairs + experts * tile_tokens - 1) / (experts * tile_tokens);
  return std::min(pairs, experts * tiles);
}

CudaTiledTile ChooseCudaTiledTile(int64_t pairs, int64_t experts, int64_t rows, bool hopper) {
  constexpr int64_t kFewBlocks = 80;  // Hopper has 132 multiprocessors
  const double mean =
      static_cast<double>(pairs) / static_cast<double>(std::max<int64_t>(experts, 1));
  if (!hopper || mean <= 6) return CudaTiledTile::kNarrow;
  const auto few = [&](int64_t tokens, int64_t block_rows) {
    const int64_t bands = (rows + block_rows - 1) / block_rows;
    return LikelyCudaTiles(pairs, experts, tokens) * bands < kFewBlocks;
  };
  // With a larger mean, too many experts have more than 96 pairs.
  if (mean > 48 && mean <= 72 && !few(96, 256)) return CudaTiledTile::k96;
  if (mean > 48 && !few(128, 256)) return CudaTiledTile::k128;
  return mean > 24 && !few(64, 128) ? CudaTiledTile::k64 : CudaTiledTile::k32;
}

bool UsesCudaTiledFew(Variant variant, int64_t pairs, int64_t experts, int64_t rows,
                      int64_t columns) {
  // Up to two tiles of an only expert: the second one's weights come from the L2.
  const int64_t tiles = experts == 1 ? (pairs + 1) / 2 : pairs;
  // Products of 16 rows and 256 columns, where the kernel for 8 tokens draws level.
  const int64_t most_products = tiles == 1 ? 12288 : 6144;
  return variant != Variant::kScalarGguf &&
         pairs <= std::min(kCudaFewPairs, std::max<int64_t>(4, 2 * experts)) &&
         tiles * (rows / 16) * ((columns + 255) / 256) <= most_products && columns > 0;
}

bool FindsCudaTiles(int64_t pairs, CudaTiledTile tile) {
  return pairs <= kCudaFewPairs && tile == CudaTiledTile::kNarrow;
}

bool FindsCudaBlockTiles(int64_t pairs, int64_t experts, CudaTiledTile tile) {
  return pairs > kCudaFewPairs && pairs <= kCudaBlockPairs && experts <= kCudaBlockExperts &&
         tile == CudaTiledTile::kNarrow;
}

bool UsesCudaDenseWide(int format, int64_t k, int64_t pairs, int64_t experts, bool hopper) {
  return hopper && (format == kF16 || format == kBF16) && k > 0 && k % 8 == 0 && pairs > 6 * experts;
}

CudaTileShape ShapeOfCudaTile(CudaTile tile, bool packed, Variant variant) {
  if (!packed) return {16, tile == CudaTile::kVector || tile == CudaTile::kNarrow ? 8 : 64};
  if (variant == Variant::kScalarGguf) return {16, 8};
  switch (tile) {
    case CudaTile::kVector:
      return {8, 4};
    case CudaTile::kNarrow:
      return {16, 8};
    case CudaTile::kMedium:
      return {128, 32};
    case CudaTile::kWide:
      return {128, 128};
  }
  return {16, 8};
}

namespace {

// What the kernels for both layouts guarantee.
Kernel Guarantees(bool is_ffn, Variant variant, int x_type, int y_type, int64_t workspace_bytes) {
  const bool rounds = variant == Variant::kScalarGguf;
  const auto element_bound = [](int type) {
    return type == kF32 ? 1e-3 : type == kF16 ? 5e-4 : 2e-3;
  };
  Kernel kernel;
  kernel.variant = variant;
  kernel.workspace_bytes = workspace_bytes;
  kernel.accumulator = "float32";
  kernel.deterministic = true;
  kernel.rounds_activations = rounds;
  kernel.error_bound = std::max(element_bound(x_type), element_bound(y_type));
  if (rounds) kernel.error_bound = std::max(kernel.error_bound, is_ffn ? 2.4e-2 : 1.2e-2);
  return kernel;
}

}  // namespace

Kernel CudaKernel(bool is_ffn, Variant variant, int format, bool packed, int x_type, int y_type,
                  int64_t k, int64_t pairs, int64_t experts, int capability,
                  int64_t workspace_bytes) {
  Kernel kernel = Guarantees(is_ffn, variant, x_type, y_type, workspace_bytes);
  kernel.arch = capability / 10 == 9 ? "sm_90a" : "sm_80";
  if (UsesCudaDenseWide(format, k, pairs, experts, capability / 10 == 9)) {
    kernel.name = "cuda_wgmma_dense";
    kernel.tile_rows = kCudaDenseWideShape.rows;
    kernel.tile_tokens = kCudaDenseWideShape.tokens;
    // h is rounded to bf16 like y.
    if (is_ffn && format == kBF16 && x_type == kBF16) kernel.error_bound *= 2;
    return kernel;
  }
  const bool rounds = variant == Variant::kScalarGguf;
  CudaTile tile = ChooseCudaTile(pairs, experts);
  if (packed) tile = FitCudaTile(tile, format, CudaSharedLimit(capability));
  const CudaTileShape shape = ShapeOfCudaTile(tile, packed, variant);
  const bool vector = packed && !rounds && tile == CudaTile::kVector;
  kernel.name = rounds   ? "cuda_mma_int8"
                : vector ? "cuda_dp4a_24bit"
                : packed ? "cuda_mma_packed"
                         : "cuda_mma_dense";
  kernel.tile_rows = shape.rows;
  kernel.tile_tokens = shape.tokens;
  if (rounds || vector) kernel.accumulator = "int32 in a group, float32";
  return kernel;
}

Kernel CudaTiledKernel(bool is_ffn, Variant variant, int x_type, int y_type, int64_t rows,
                       int64_t columns, int64_t pairs, int64_t experts, int capability,
                       int64_t workspace_bytes) {
  Kernel kernel = Guarantees(is_ffn, variant, x_type, y_type, workspace_bytes);
  const bool hopper = capability / 10 == 9;
  kernel.arch = hopper ? "sm_90a" : "sm_80";
  if (!is_ffn && UsesCudaTiledFew(variant, pairs, experts, rows, columns)) {
    kernel.name = "cuda_tiled_few";
    kernel.tile_rows = 16;
    kernel.tile_tokens = 2;
    return kernel;
  }
  const CudaTiledTile tile = ChooseCudaTiledTile(pairs, experts, rows, hopper);
  const bool narrow = tile == CudaTiledTile::kNarrow;
  const int tokens[] = {8, 32, 64, 96, 128};
  kernel.name = narrow ? "cuda_tiled_mma" : "cuda_tiled_wgmma";
  kernel.tile_tokens = tokens[static_cast<int>(tile)];
  kernel.tile_rows = narrow ? 16 : kernel.tile_tokens >= 96 ? 256 : 128;
  // Scales rounded to f16 add up over the two products.
  if (is_ffn && kernel.error_bound < 1e-3) kernel.error_bound = 1e-3;
  return kernel;
}

Kernel CudaLayerKernel(Variant variant, int x_type, int64_t tokens, int64_t workspace_bytes) {
  Kernel kernel = Guarantees(/*is_ffn=*/true, variant, x_type, x_type, workspace_bytes);
  kernel.name = "cuda_tiled_layer";
  kernel.arch = "sm_90a";
  kernel.tile_rows = 16;
  kernel.tile_tokens = tokens > 1 ? 2 : 1;
  kernel.error_bound = std::max(kernel.error_bound, 1e-3);
  return kernel;
}

int64_t ChooseCudaTiledPanels(int64_t panels, int64_t columns, int64_t tiles, int64_t places) {
  constexpr int64_t kMost = 4, kMostColumns = 4096, kRounds = 3;
  for (int64_t number = kMost; number > 1; number /= 2) {
    const int64_t blocks = tiles * ((panels + number - 1) / number);
    if (number * columns <= kMostColumns && blocks >= kRounds * places) return number;
  }
  return 1;
}

int64_t ChooseCudaTiledSplits(int64_t blocks, int64_t steps, int64_t places,
                              int64_t multiprocessors, int64_t most) {
  // In what a step takes a block that has its multiprocessor for itself: what a block takes besides, what
  // each block of a cluster adds, and how much longer all takes for every block beside it.
  constexpr double kBlock = 4, kShare = 0.5, kNeighbour = 0.08;
  const auto cost = [&](int64_t splits) {
    const double share = static_cast<double>((steps + splits - 1) / splits);
    const double alone = share + kBlock + (splits > 1 ? 1 + kShare * static_cast<double>(splits) : 0);
    // Blocks of a multiprocessor.
    const double load = static_cast<double>(blocks * splits) / static_cast<double>(multiprocessors);
    const double together = std::clamp(std::ceil(load), 1.0, static_cast<double>(places));
    return std::max(load / together, 1.0) * (1 + kNeighbour * (together - 1)) * alone;
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= std::min(most, steps); ++splits) {
    if (cost(splits) < cost(best)) best = splits;
  }
  return best;
}

int ChooseCudaLogSplits(int64_t k) {
  const int64_t chunks = (k + 255) / 256;
  return chunks >= 3 ? 2 : chunks == 2 ? 1 : 0;
}

bool CudaFuses(const FfnProblem& problem) {
  const int gate = problem.gate_format;
  const int up = problem.up_format >= 0 ? problem.up_format : gate;
  // A larger limit would leave h no bits.
  const bool bounded = problem.activation == Activation::kSwigluOai && problem.limit <= 1024;
  return IsTiled(up) && IsTiled(problem.down_format) && (gate < 0 || gate == up) &&
         problem.variant != Variant::kScalarGguf && problem.shape.d_expert % 16 == 0 &&
         (bounded || !problem.biased);
}

namespace {

bool HasCudaLayer(int up, int down) {
#define JAX_MOE_IS(UP, DOWN) || (up == UP::kType && down == DOWN::kType)
  return up == down JAX_MOE_MIXED_LAYERS(JAX_MOE_IS);
#undef JAX_MOE_IS
}

// Of 256 columns of 16 tiled rows.
int64_t RingStageBytes(int format) {
  int64_t bytes = 0;
  VisitFormat(format, [&](auto block) {
    using Format = decltype(block);
    bytes = 16 * 256 / Format::kBlock * tiled::Sizes<Format>::kBytes;
  });
  return bytes;
}

}  // namespace

std::optional<CudaLayerShape> ChooseCudaLayer(const FfnProblem& problem, int64_t tokens,
                                              int64_t multiprocessors, bool hopper) {
  // The kernel divides by means of products, exactly below these.
  constexpr int64_t kMostColumns = 1 << 15, kMostItems = 512;
  constexpr int64_t kRows = 16;  // of a band
  // What it costs a block to wait for another's values, 0.7 us, in bytes of weights.
  constexpr int64_t kWaitBytes = 24576;
  const FfnShape& shape = problem.shape;
  const int64_t pairs = tokens * shape.top_k;
  const int up = (problem.up_format >= 0 ? problem.up_format : problem.gate_format) & ~kTiledFormat;
  const int down = problem.down_format & ~kTiledFormat;
  // An expert's third token has its weights read again. With more than a pair an expert the kernels
  // for up to 8 tokens draw level at 5 tokens (Mixtral-8x7B).
  constexpr int64_t kTokensOfFewExperts = 4;
  const int64_t most = pairs <= shape.experts ? kCudaLayerTokens : kTokensOfFewExperts;
  if (!hopper || !CudaFuses(problem) || !HasCudaLayer(up, down) || tokens < 1 || tokens > most ||
      pairs > kCudaFewPairs || std::min(shape.d_model, shape.d_expert) == 0 ||
      std::max(shape.d_model, shape.d_expert) > kMostColumns) {
    return std::nullopt;
  }
  const auto share = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
  const int64_t items = pairs * (shape.d_expert / kRows), bands = shape.d_model / kRows;
  CudaLayerShape result;
  result.blocks = std::min(multiprocessors, std::max(items, bands));
  // Down goes to all blocks where that takes so many groups, 16 rows of an expert, from the block
  // that has most; else to as many as have equally many bands, of which none waits for another.
  const int64_t most_bands = share(bands, result.blocks), whole = share(bands, most_bands);
  const int64_t saved_groups = pairs * most_bands - share(pairs * bands, result.blocks);
  const int64_t saved_bytes = saved_groups * share(shape.d_expert, 256) * RingStageBytes(down);
  const bool splits = bands > result.blocks && (bands % whole != 0 || saved_bytes > kWaitBytes);
  result.down_blocks = splits ? result.blocks : whole;
  const int64_t block_items = share(items, result.blocks);
  const int64_t block_groups = share(pairs * bands, result.down_blocks);
  if (block_items > kMostItems) return std::nullopt;
  // 64 bytes more, so that two rows' units are in different banks.
  result.x_pitch = RoundUp(shape.d_model, 128) + 32;
  result.x_bytes = 2 * tokens * result.x_pitch;
  // A warp leaves the sums of 16 rows of a tile for each part of a group that it has.
  const int64_t parts = std::max(2 * block_items, block_groups) + kCudaLayerWarps;
  const int64_t sum_bytes = parts * 4 * kRows * std::min<int64_t>(tokens, 2);
  result.shared_bytes = CudaLayerBytes(RingStageBytes(up), RingStageBytes(down)) + result.x_bytes +
                        sum_bytes;
  if (result.shared_bytes > CudaSharedLimit(90)) return std::nullopt;
  return result;
}

CudaGemmLayout LayoutCudaGemm(const GemmProblem& problem, int64_t tokens) {
  const GemmShape& shape = problem.shape;
  const int64_t pairs = tokens * shape.top_k;
  Areas areas;
  CudaGemmLayout layout;
  layout.winners = areas.Add(4 * pairs);
  layout.expert_ids = areas.Add(4 * pairs);
  layout.pairs = areas.Add(4 * pairs);
  layout.offsets = areas.Add(4 * (shape.experts + 1));
  layout.tiles = areas.Add(TileBytes(pairs, shape.experts));
  layout.num_tiles = areas.Add(4);
  layout.x = areas.Add((shape.rows_are_pairs ? pairs : tokens) *
                       PreparedRowBytes(problem.format, shape.k));
  layout.bytes = areas.end();
  return layout;
}

CudaFfnLayout LayoutCudaFfn(const FfnProblem& problem, int64_t tokens) {
  const FfnShape& shape = problem.shape;
  const FfnRowBytes bytes = RowBytesOf(problem);
  const int64_t pairs = tokens * shape.top_k;
  Areas areas;
  CudaFfnLayout layout;
  layout.pairs = areas.Add(4 * pairs);
  layout.offsets = areas.Add(4 * (shape.experts + 1));
  layout.tiles = areas.Add(TileBytes(pairs, shape.experts));
  layout.num_tiles = areas.Add(4);
  layout.x = areas.Add(tokens * bytes.x);
  layout.h = areas.Add(pairs * bytes.h);
  layout.values = areas.Add(pairs * bytes.values);
  layout.bytes = areas.end();
  return layout;
}

// The bounds: every area without its rounding, and the rounding of seven areas.

Workspace CudaGemmWorkspace(const GemmProblem& problem) {
  const GemmShape& shape = problem.shape;
  const int64_t rows = shape.rows_are_pairs ? shape.top_k : 1;
  return {7 * kAlign + 4 * (shape.experts + 1) + kTileBytes * shape.experts + 4,
          shape.top_k * (3 * 4 + kTileBytes / kCudaMinTileTokens) +
              rows * PreparedRowBytes(problem.format, shape.k)};
}

Workspace CudaFfnWorkspace(const FfnProblem& problem) {
  const FfnShape& shape = problem.shape;
  const FfnRowBytes bytes = RowBytesOf(problem);
  return {7 * kAlign + 4 * (shape.experts + 1) + kTileBytes * shape.experts + 4,
          shape.top_k * (4 + kTileBytes / kCudaMinTileTokens + bytes.h + bytes.values) +
              bytes.x};
}

}  // namespace jax_moe::plan
