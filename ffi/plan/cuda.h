// What the CUDA handlers run for a problem, and where everything lies in their workspace.
#pragma once

#include <cstdint>
#include <optional>

#include "ffi/plan/plan.h"

namespace jax_moe::plan {

// Kernels differ in how many tokens of an expert share one pass over its weights.
enum class CudaTile : int { kVector = 0, kNarrow = 1, kMedium = 2, kWide = 3 };

// From the mean number of pairs an expert: grids may depend on shapes only, not on the routing.
CudaTile ChooseCudaTile(int64_t pairs, int64_t experts);

// The tile that a device with `shared_limit` bytes of shared memory a block has for weights of this format
// (ggml_type) where `tile` is wanted: the largest that fits.
CudaTile FitCudaTile(CudaTile tile, int format, int64_t shared_limit);

// The kernels for tiled weights: 8 tokens a tile, or on Hopper 32, 64, 96 or 128. From the mean number
// of pairs an expert, but smaller where a moe_ffn's down projection has so few rows that larger tiles
// would leave many multiprocessors without one.
enum class CudaTiledTile : int { kNarrow = 0, k32 = 1, k64 = 2, k96 = 3, k128 = 4 };
CudaTiledTile ChooseCudaTiledTile(int64_t pairs, int64_t experts, int64_t rows, bool hopper);

// The number of tiles if all experts have the same number of pairs.
int64_t LikelyCudaTiles(int64_t pairs, int64_t experts, int64_t tile_tokens);

// Whether a moe_gemm with a tiled weight is one launch in which pairs are sorted and x is prepared by
// those who multiply (ffi/cuda/tiled_few.cuh): quicker where little is multiplied.
bool UsesCudaTiledFew(Variant variant, int64_t pairs, int64_t experts, int64_t rows, int64_t columns);

// So many pairs are a warp's to sort, one a lane.
inline constexpr int64_t kCudaFewPairs = 32;

// Whether the narrow kernels for tiled weights find the tiles of so many pairs from their ids themselves,
// without a sort before them.
bool FindsCudaTiles(int64_t pairs, CudaTiledTile tile);

// Whether, in a layer of more pairs, each of their blocks finds them.
inline constexpr int64_t kCudaBlockPairs = 512, kCudaBlockExperts = 2048;
bool FindsCudaBlockTiles(int64_t pairs, int64_t experts, CudaTiledTile tile);

// How many of an expert's panels of weight rows a block of these kernels goes through: several where they
// have few columns, but not so many that the device's places for blocks are filled unevenly. tiles: at
// most.
int64_t ChooseCudaTiledPanels(int64_t panels, int64_t columns, int64_t tiles, int64_t places);

// Blocks, a cluster of at most `most`, that share the steps of 256 columns of a tile and a panel: several
// where there are few blocks, for a device with so many multiprocessors and places for blocks in each.
int64_t ChooseCudaTiledSplits(int64_t blocks, int64_t steps, int64_t places,
                              int64_t multiprocessors, int64_t most);

// Weight rows of a thread block and tokens of a tile.
struct CudaTileShape {
  int rows, tokens;
};

// Of the kernel for dense 16-bit weights and many tokens, Hopper's alone (dense_wide.cuh). K has to be a
// multiple of 8, so that rows are aligned to 16 bytes.
inline constexpr CudaTileShape kCudaDenseWideShape = {256, 144};
bool UsesCudaDenseWide(int format, int64_t k, int64_t pairs, int64_t experts, bool hopper);

// Of the kernel that runs otherwise. q8_1 activations (kScalarGguf) have one kernel, dense weights two.
CudaTileShape ShapeOfCudaTile(CudaTile tile, bool packed, Variant variant);

// The kernel for an op; the arguments are those of CpuKernel, the weights' format (ggml_type) and columns,
// the pairs and experts of the problem and the device's compute capability, like 90.
Kernel CudaKernel(bool is_ffn, Variant variant, int format, bool packed, int x_type, int y_type,
                  int64_t k, int64_t pairs, int64_t experts, int capability,
                  int64_t workspace_bytes);

// The same for tiled weights (docs/kernels.md).
Kernel CudaTiledKernel(bool is_ffn, Variant variant, int x_type, int y_type, int64_t rows,
                       int64_t columns, int64_t pairs, int64_t experts, int capability,
                       int64_t workspace_bytes);

// The same for a layer in one launch.
Kernel CudaLayerKernel(Variant variant, int x_type, int64_t tokens, int64_t workspace_bytes);

// log2 of the warps that share 16 weight rows in a narrow kernel, of which a block has 4. Depends
// on K alone, so that a token's result has the same bits whatever the batch.
int ChooseCudaLogSplits(int64_t k);

// Whether gate, up and the activation are one launch: h then comes out as a tiled down projection
// reads it, and gate and up are stored nowhere. Rounding h to q8_1 needs its rows first, and so does
// scaling h where nothing bounds it.
bool CudaFuses(const FfnProblem& problem);

// The kernel for a whole layer of few tokens (ffi/cuda/tiled_layer.cuh), Hopper's: one block a
// multiprocessor, and what it has in shared memory: the kernel's own, x, sums.
inline constexpr int64_t kCudaLayerWarps = 16, kCudaLayerTokens = 8;
struct CudaLayerShape {
  int64_t blocks, down_blocks;  // down_blocks: those that have a part of down
  int64_t x_pitch;  // values
  int64_t x_bytes, shared_bytes;
};

// Calls X(UP, DOWN) for the different formats of gate and up and of down that it is there for beside equal
// ones: those of llama.cpp's Q2_K, Q3_K_M, Q3_K_L, Q4_K_M and Q5_K_M.
#define JAX_MOE_MIXED_LAYERS(X) \
  X(Q2_K, Q3_K) X(Q3_K, Q4_K) X(Q3_K, Q5_K) X(Q4_K, Q6_K) X(Q5_K, Q6_K)

// None where a layer takes several launches.
std::optional<CudaLayerShape> ChooseCudaLayer(const FfnProblem& problem, int64_t tokens,
                                              int64_t multiprocessors, bool hopper);

// The fewest tokens a tile, which bounds the number of tiles.
inline constexpr int64_t kCudaMinTileTokens = 4;

// Byte offsets of 256-byte aligned areas.
struct CudaGemmLayout {
  int64_t winners;     // s32 [pairs]
  int64_t expert_ids;  // s32 [pairs]
  int64_t pairs;       // s32 [pairs]
  int64_t offsets;     // s32 [experts + 1]
  int64_t tiles;       // 16 bytes a tile
  int64_t num_tiles;   // s32
  int64_t x;           // prepared activations
  int64_t bytes;       // of all
};

struct CudaFfnLayout {
  int64_t pairs, offsets, tiles, num_tiles;  // as above
  int64_t x;                                 // prepared activations of the tokens
  int64_t h;                                 // prepared activations of the pairs
  int64_t values;  // f32 of every pair: gate and up unless the call fuses, then down
  int64_t bytes;
};

CudaGemmLayout LayoutCudaGemm(const GemmProblem& problem, int64_t tokens);
CudaFfnLayout LayoutCudaFfn(const FfnProblem& problem, int64_t tokens);

// Upper bounds of the layouts' bytes for every number of tokens.
Workspace CudaGemmWorkspace(const GemmProblem& problem);
Workspace CudaFfnWorkspace(const FfnProblem& problem);

}  // namespace jax_moe::plan
