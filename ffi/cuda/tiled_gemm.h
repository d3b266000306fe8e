// Grouped products with tiled weights: arguments and kernels.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "ffi/blocks/formats.h"
#include "ffi/cuda/gemm.h"
#include "ffi/cuda/prepare.h"

namespace jax_moe::cuda {

// A weight matrix of every expert, or some of its rows: expert e's begin at data + e * expert_bytes.
struct TiledMatrix {
  const uint8_t* data;
  const float* aux;  // [.., 2] a row: normaliser, largest row norm of the expert
  int64_t expert_bytes;
  int64_t expert_rows;  // rows of aux an expert
};

// Either y[p, n] = weight_p * (W x), or, with `activate`, h[p, n] = act(gate x, up x) prepared as the
// activations of the next product.
struct TiledArgs {
  TiledMatrix matrix[2];  // activate: gate (or absent) and up; else the first alone
  int32_t rows;           // of a matrix, a multiple of 16
  int32_t columns;        // K
  int64_t row_bytes;
  Activations x;  // kF16Narrow or kF16Wide
  int32_t pairs_a_row;
  Lists lists;
  // Kernels with `places`: a block's panels, of block_rows weight rows, and all that there are; the chunks
  // of 128 columns that a block of a cluster has. LaunchTiled's affair.
  int32_t panels, all_panels, split_chunks;
  const float* pair_weight;  // null: 1; activate: multiplies gate and up, before scale and bias
  void* y;                   // activate: f16 [pairs, y_pitch] in x's layout
  int64_t y_pitch;
  Element y_type;
  float* y_scales;  // wide, not with `activate`, y f16: y is scaled, [pairs] undo it; null: it is not
  // With `activate` only.
  bool activate, gated;
  Projection projection[2];
  Activation activation;
  float limit, beta, linear_beta;
  float* h_scales;  // [pairs]: what undoes the scaling of h
};

// A kernel, the tokens of its tiles and the weight rows of its thread blocks.
struct TiledKernel {
  const void* function;
  int threads, tile_tokens;
  int block_rows;  // of one matrix, or half of it of gate and up each
  int shared_bytes;
  bool pads_rows;  // writes zeros of h up to its pitch
  int blocks;      // a multiprocessor, of a persistent grid; 0: a block for every tile and band
  int places;      // for blocks of a multiprocessor, if a block can have several block_rows; else 0
  int most_splits;  // blocks of a cluster, each with a part of the columns
};

// Warps of a thread block, of which a multiprocessor of sm_90 takes twice as many, and blocks of a
// cluster.
inline constexpr int kMostDownWarps = 8, kMostDownBlocks = 2;

// y[t] = sum over slots s of weight[t, s] * down_e h, in slot order, for at most 32 pairs.
struct TiledDownArgs {
  TiledMatrix matrix;
  int64_t row_bytes;
  int32_t columns;  // of h
  const half* h;    // kF16Narrow, [pairs, h_pitch]
  const float* h_scales;
  int64_t h_pitch;
  const int32_t* expert_ids;
  int32_t experts, tokens, top_k;
  int32_t splits;        // blocks, a cluster, that share 16 columns of y: LaunchTiledDown's affair
  const float* weights;  // [tokens, top_k]; null: 1
  Projection projection;
  void* y;  // [tokens, y_pitch], y_pitch a multiple of 16: the matrix' rows
  int64_t y_pitch;
  Element y_type;
};

// Warps of a block of TiledFew.
inline constexpr int kMostFewWarps = 8;

// y[p, n] = weight_p * (W x) for at most kFewPairs pairs in tiles of two, zeros for those without an
// expert; x as it is.
struct TiledFewArgs {
  TiledMatrix matrix;
  int32_t rows;     // a multiple of 16
  int32_t columns;  // K
  int64_t row_bytes;
  const void* x;  // [.., columns]
  Element x_type;
  int32_t pairs_a_row;
  uint32_t inverse_pairs_a_row;  // 2^16 over it, rounded up: LaunchTiledFew's affair
  const int32_t* expert_ids;     // [pairs]
  const int32_t* entries;        // [pairs], as of Lists, but never null
  int32_t pairs, experts;
  const float* pair_weight;  // null: 1
  void* y;                   // [pairs, rows]
  Element y_type;
};

struct TiledKernels {
  TiledKernel narrow[2];  // 8 tokens, kF16Narrow; the second one: plan::FindsCudaBlockTiles
  TiledKernel wide[4];  // 32, 64, 96 and 128 tokens, kF16Wide; Hopper only
  TiledKernel down;     // takes TiledDownArgs; threads and memory are the most of a block
  int down_warp_bytes;  // of shared memory, a warp
  const void* few;      // takes TiledFewArgs
  int few_warp_bytes;   // as above
};

// The kernels of one format, instantiated in tiled_*.cu.
template <typename Format>
const TiledKernels& Tiled();

// Format's weights with less rounding (tiled_centred.cuh). Its kernels are without `few`, which rounds no
// weight.
template <typename Format>
struct Centred;

// Formats that have Centred kernels.
template <typename Format>
inline constexpr bool kHasCentred = std::is_same_v<Format, Q2_K> || std::is_same_v<Format, Q4_K> ||
                                    std::is_same_v<Format, Q5_K>;

// The kernels for weights of ggml_type `format`, centred if there are such; null where there is no such
// format.
const TiledKernels* FindTiledKernels(int format, bool centred);

cudaError_t LaunchTiled(const TiledKernel& kernel, TiledArgs args, cudaStream_t stream);

cudaError_t LaunchTiledDown(const TiledKernels& kernels, TiledDownArgs args,
                            cudaStream_t stream);

cudaError_t LaunchTiledFew(const TiledKernels& kernels, TiledFewArgs args, cudaStream_t stream);

// Loads the kernels (load.h) that the current device has.
cudaError_t LoadTiled(const TiledKernels& kernels);

}  // namespace jax_moe::cuda
