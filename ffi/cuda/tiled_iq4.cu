#include "ffi/cuda/tiled_instantiate.cuh"

JAX_MOE_INSTANTIATE_TILED(IQ4_NL)
JAX_MOE_INSTANTIATE_TILED(IQ4_XS)
