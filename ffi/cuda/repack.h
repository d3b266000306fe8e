// Launches of the kernels between GGUF's layout and the tiled one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_moe::cuda {

// Weights [experts, rows, blocks]; rows is a multiple of kBandRows.
struct RepackShape {
  int64_t experts, rows, blocks;
};

// aux is [experts, rows, 2].
cudaError_t LaunchRepack(int format, const RepackShape& shape, const uint8_t* data, uint8_t* tiled,
                         float* aux, cudaStream_t stream);
cudaError_t LaunchUnpack(int format, const RepackShape& shape, const uint8_t* tiled, uint8_t* data,
                         cudaStream_t stream);

// Loads the kernels of a format (load.h).
cudaError_t LoadRepack(int format);

}  // namespace jax_moe::cuda
