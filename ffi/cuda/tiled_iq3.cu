#include "ffi/cuda/tiled_instantiate.cuh"

JAX_MOE_INSTANTIATE_TILED(IQ3_XXS)
JAX_MOE_INSTANTIATE_TILED(IQ3_S)
