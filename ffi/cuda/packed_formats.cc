#include "ffi/cuda/packed_formats.h"

#include "ffi/blocks/formats.h"

namespace jax_moe::cuda {

const PackedFormat* FindPackedFormat(int type) {
  const PackedFormat* found = nullptr;
  VisitFormat(type, [&](auto format) { found = &Packed<decltype(format)>(); });
  return found;
}

}  // namespace jax_moe::cuda
