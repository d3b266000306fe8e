// What every grouped matrix product takes, and the kernels that can be launched.
//
// All products are transposed: weights are the 16-row tensor-core operand, tokens its 8 columns, so
// one token fills an eighth of a tile and not a sixteenth.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "ffi/plan/cuda.h"

namespace jax_moe::cuda {

// The grid of `blocks` blocks for each of `tiles` tiles, which are spread over two dimensions; none where
// they are too many. Both are at least 1.
std::optional<dim3> TileGrid(int64_t blocks, int64_t tiles);

// Up to a fixed number of pairs of one expert: entries begin .. begin + count - 1 of Lists::pairs.
struct TokenTile {
  int32_t expert;
  int32_t begin;
  int32_t count;
  int32_t unused;
};

inline constexpr int kFewPairs = plan::kCudaFewPairs;

// Who goes where, built on the device (dispatch.cu). The host knows upper bounds only, and how many tiles
// there are if all experts have the same number of pairs.
struct Lists {
  const int32_t* pairs;  // pair ids, ascending by expert
  const TokenTile* tiles;
  const int32_t* num_tiles;
  int64_t max_tiles, likely_tiles;
  // Tiled narrow kernels that find tiles themselves: the ids in place of the above, max_tiles of them,
  // and, up to kFewPairs, the pairs that they are of (null: each pair's own id).
  const int32_t* expert_ids = nullptr;
  const int32_t* entries = nullptr;
  int32_t experts = 0;
  // Tiled narrow and dense wide kernels: the lists were there before the kernel before this one let
  // it start.
  bool older = false;
};

// How activations are held for the tensor cores (prepare.cu). Rows are padded with zeros.
enum class Layout : int {
  // f16 times a power of two that brings the row's largest magnitude to 2^14 .. 2^15, and the sum
  // of
  // every 16 columns as two bf16, the second one the first one's error. Of every 32 columns, lane t
  // of a quad owns 4t .. 4t + 3 and 16 + 4t .. 16 + 4t + 3:
  // the order is lane by lane, so that a lane reads 16 bytes at once.
  kF16Lanes,
  // q8_1: int8 and a float32 scale for every 32 columns, in the same order.
  kS8Lanes,
  // Integers of at most 23 bits times a power of two for every 32 columns, as eight 16-byte pieces:
  // two
  // each of three planes of int8, of weight 65536, 256 and 1; the power of two and the sums of the
  // integers over each 16 columns, in float32; padding. A row is [8 pieces, units of 32 columns].
  kPlanes,
  kF16,   // as kF16Lanes, columns in their own order, no sums
  kBF16,  // columns in their own order, as they are
  kF32,
  // f16 scaled as kF16Lanes, rows padded to chunks of 128 columns, for tiled weights: columns in the
  // order in which tensor-core operands are read. Of a chunk's 32-column units, lane t of a quad has
  // unit t. kF16Narrow: columns 8 i .. 8 i + 7 of each unit together; kF16Wide: columns 4 s .. 4 s + 3
  // of each unit make the 16 columns of product s, the first two of each unit first.
  kF16Narrow,
  kF16Wide,
  // Two bf16 rows of `pitch` columns, one after the other: values rounded, and what that left of them.
  kBF16Pair,
};

struct Activations {
  const void* values;   // [rows, pitch]
  const float* scales;  // kS8Lanes: [rows, pitch / 32]; kF16*: [rows], what undoes the power of 2
  const uint32_t* sums;  // kF16Lanes: [rows, pitch / 16], the first bf16 in the low half
  int64_t pitch;         // a multiple of 64; kF16Narrow and kF16Wide: of 128
  const float* norms;    // kF16Narrow and kF16Wide: [rows], Euclidean norm of the scaled row
};

enum class Element : int { kF32 = 0, kF16 = 1, kBF16 = 30 };

// y[p, n] = weight_p * sum over k of x[row(p), k] * W[e, n, k] for the pairs of every tile. W is
// one matrix, or two with the same format and columns: the second one's rows follow the first one's
// in y.
struct GemmArgs {
  const uint8_t* weight[2];
  int64_t rows[2];  // N of each; 0: absent
  int64_t row_bytes;
  int64_t experts;
  int64_t k;
  Activations x;
  int32_t pairs_a_row;  // row(p) = p / pairs_a_row
  Lists lists;
  const float* pair_weight;  // null: 1
  void* y;
  int64_t y_pitch;
  Element y_type;
  int32_t log_splits;  // narrow kernels: log2 of the warps that share a band, each with a part of K
};

// A kernel, the tokens of its tiles and the weight rows of its thread blocks.
struct GemmKernel {
  const void* function;
  int threads;
  int tile_tokens;
  int block_rows;  // narrow kernels: of a band; a block has 4 warps and so 4 / splits bands
  int shared_bytes;
  bool narrow;
};

// The kernels of a block format.
struct PackedKernels {
  GemmKernel vector;     // kPlanes, 4 tokens
  GemmKernel narrow;     // f16 activations, 8 tokens
  GemmKernel narrow_s8;  // q8_1 activations, 8 tokens
  GemmKernel medium;     // f16, 32 tokens
  GemmKernel wide;       // f16, 128 tokens
};

// Kernels for dense weights of type `weight` and activations in `layout`; null where there is none.
struct DenseKernels {
  GemmKernel narrow;  // 8 tokens
  GemmKernel wide;    // 64 tokens
};
const DenseKernels* FindDenseKernels(Element weight, Layout layout);

// Launches as many thread blocks as `args.lists.max_tiles` may need; those without a tile end at
// once.
cudaError_t LaunchGemm(const GemmKernel& kernel, const GemmArgs& args, cudaStream_t stream);

}  // namespace jax_moe::cuda
