#include "ffi/cuda/tiled_instantiate.cuh"

JAX_MOE_INSTANTIATE_TILED(IQ1_S)
JAX_MOE_INSTANTIATE_TILED(IQ1_M)
