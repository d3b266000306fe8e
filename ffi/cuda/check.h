// What the handlers share: errors, operands, and the kernel for a weight.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>

#include "ffi/cuda/dense_wide.h"
#include "ffi/cuda/gemm.h"
#include "ffi/cuda/launch_early.h"
#include "ffi/cuda/tiled_gemm.h"
#include "ffi/operands.h"
#include "ffi/plan/cuda.h"
#include "ffi/targets.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe::cuda {

namespace ffi = xla::ffi;

ffi::Error Invalid(const std::string& op, const std::string& what);

// An error that names the call where `status` is one, success otherwise.
ffi::Error CudaError(const std::string& op, cudaError_t status);

// What the kernels take of what ffi/operands.h allows: sizes that their indices hold, and alignment, for
// cp.async and 16-byte loads. XLA aligns its buffers to 256 bytes or 16 at least.
void RequireLimits(Checker& check, const char* name, const Weight& weight);
void RequireLimits(Checker& check, int64_t experts, int64_t pairs);

// Whether a product with `weight` runs on Hopper's kernel for dense weights and many tokens.
bool UsesDenseWide(const Weight& weight, int64_t pairs);

// How the activations x of a product with `weight` are prepared.
Layout ChooseLayout(const Weight& weight, Element x_type, Variant variant, plan::CudaTile tile,
                    bool dense_wide);

// How h of a moe_ffn on x (and y) of this type is prepared for its down projection.
Layout ChooseHiddenLayout(const Weight& down, Element x_type, Variant variant, plan::CudaTile tile,
                          bool dense_wide);

// Whether kernels for tiled weights are to be Centred: what that saves is lost in q8_1 activations and in
// bfloat16's rounding, and it takes up to a tenth more time.
bool CentresFields(Element x, Element y, Variant variant);

// The kernel for a product with a tiled weight. block_tiles: plan::FindsCudaBlockTiles.
const TiledKernel& ChooseTiledKernel(const Weight& weight, plan::CudaTiledTile tile, bool centred,
                                     bool block_tiles = false);

// The lists of kernels that find tiles themselves (plan::FindsCudaTiles, FindsCudaBlockTiles).
Lists ListsOfIds(const int32_t* expert_ids, const int32_t* entries, int64_t pairs,
                 int32_t experts);

// How the activations of a tiled weight are prepared.
Layout TiledLayout(plan::CudaTiledTile tile);

TiledMatrix TiledMatrixOf(const Weight& weight);

// The arguments of a product with a tiled weight, but for the result's.
TiledArgs TiledProduct(const Weight& weight, const Activations& x, int32_t pairs_a_row,
                       const Lists& lists);

// The arguments of a product with a dense weight for LaunchDenseWide, but for the result's.
DenseWideArgs DenseWideProduct(const Weight& weight, Layout layout, const Activations& x,
                               int64_t pairs, int32_t pairs_a_row, const Lists& lists);

// The kernel for a product, given the device's shared memory.
GemmKernel ChooseKernel(const Weight& weight, Layout layout, plan::CudaTile tile);

// To 16 bytes.
bool IsAligned(const void* data);

}  // namespace jax_moe::cuda

// The initialize stage of a handler: `function` gets the arguments, the results and the attributes.
#define JAX_MOE_DEFINE_INITIALIZE(symbol, function)                                          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, function,                                            \
                                xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInitialize>() \
                                    .RemainingArgs()                                         \
                                    .RemainingRets()                                         \
                                    .Attrs())
