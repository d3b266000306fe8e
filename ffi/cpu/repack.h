// GGUF's layout to the tiled one (ffi/blocks/tiled.h) and back.
#pragma once

#include <cstdint>

#include "ffi/cpu/parallel.h"

namespace jax_moe::cpu {

// Weights [experts, rows, row_bytes] of a format that can be tiled; kBandRows divides rows.
struct RepackShape {
  int64_t experts, rows, row_bytes;
};

// aux is [experts, rows, 2].
void RunRepack(int format, const RepackShape& shape, const uint8_t* data, uint8_t* tiled,
               float* aux, const Executor& executor);
void RunUnpack(int format, const RepackShape& shape, const uint8_t* tiled, uint8_t* data,
               const Executor& executor);

// Bytes of a block, 0 where there is no such format or it cannot be tiled.
int64_t TiledBlockBytes(int format);

}  // namespace jax_moe::cpu
