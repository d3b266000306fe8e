// GGUF's layout to the tiled one (ffi/blocks/tiled.h) and back.
#pragma once

#include <cstdint>

#include "ffi/cpu/parallel.h"

namespace jax_moe::cpu {

// Weights [experts, rows, blocks]; kBandRows divides rows.
struct RepackShape {
  int64_t experts, rows, blocks;
};

// aux is [experts, rows, 2].
void RunRepack(int format, const RepackShape& shape, const uint8_t* data, uint8_t* tiled,
               float* aux, const Executor& executor);
void RunUnpack(int format, const RepackShape& shape, const uint8_t* tiled, uint8_t* data,
               const Executor& executor);

}  // namespace jax_moe::cpu
