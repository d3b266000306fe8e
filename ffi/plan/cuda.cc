#include "ffi/plan/cuda.h"

#include <algorithm>

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

// Values of at most 4 bytes, columns padded to 64, and what goes with a row.
int64_t PreparedRowBytes(int64_t columns) { return 4 * ((columns + 63) / 64 * 64) + 16; }

int64_t ValueColumns(const FfnShape& shape) { return std::max(2 * shape.d_expert, shape.d_model); }

}  // namespace

CudaTile ChooseCudaTile(int64_t pairs, int64_t experts) {
  const double mean = static_cast<double>(pairs) / static_cast<double>(std::max<int64_t>(experts, 1));
  return mean <= 5 ? CudaTile::kNarrow : mean <= 40 ? CudaTile::kMedium : CudaTile::kWide;
}

int ChooseCudaLogSplits(int64_t k) {
  const int64_t chunks = (k + 255) / 256;
  return chunks >= 8 ? 2 : chunks >= 4 ? 1 : 0;
}

CudaGemmLayout LayoutCudaGemm(const GemmShape& shape, int64_t tokens) {
  const int64_t pairs = tokens * shape.top_k;
  Areas areas;
  CudaGemmLayout layout;
  layout.winners = areas.Add(4 * pairs);
  layout.expert_ids = areas.Add(4 * pairs);
  layout.pairs = areas.Add(4 * pairs);
  layout.counts = areas.Add(4 * pairs);
  layout.offsets = areas.Add(4 * (shape.experts + 1));
  layout.tiles = areas.Add(TileBytes(pairs, shape.experts));
  layout.num_tiles = areas.Add(4);
  layout.x = areas.Add((shape.rows_are_pairs ? pairs : tokens) * PreparedRowBytes(shape.k));
  layout.bytes = areas.end();
  return layout;
}

CudaFfnLayout LayoutCudaFfn(const FfnShape& shape, int64_t tokens) {
  const int64_t pairs = tokens * shape.top_k;
  Areas areas;
  CudaFfnLayout layout;
  layout.pairs = areas.Add(4 * pairs);
  layout.counts = areas.Add(4 * pairs);
  layout.offsets = areas.Add(4 * (shape.experts + 1));
  layout.tiles = areas.Add(TileBytes(pairs, shape.experts));
  layout.num_tiles = areas.Add(4);
  layout.x = areas.Add(tokens * PreparedRowBytes(shape.d_model));
  layout.h = areas.Add(pairs * PreparedRowBytes(shape.d_expert));
  layout.values = areas.Add(pairs * 4 * ValueColumns(shape));
  layout.bytes = areas.end();
  return layout;
}

// The bounds: every area without its rounding, and the rounding of eight areas.

Workspace CudaGemmWorkspace(const GemmShape& shape) {
  const int64_t rows = shape.rows_are_pairs ? shape.top_k : 1;
  return {8 * kAlign + 4 * (shape.experts + 1) + kTileBytes * shape.experts + 4,
          shape.top_k * (4 * 4 + kTileBytes / kCudaMinTileTokens) + rows * PreparedRowBytes(shape.k)};
}

Workspace CudaFfnWorkspace(const FfnShape& shape) {
  return {8 * kAlign + 4 * (shape.experts + 1) + kTileBytes * shape.experts + 4,
          shape.top_k * (2 * 4 + kTileBytes / kCudaMinTileTokens + PreparedRowBytes(shape.d_expert) +
                         4 * ValueColumns(shape)) +
              PreparedRowBytes(shape.d_model)};
}

}  // namespace jax_moe::plan
