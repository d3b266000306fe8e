#include "ffi/cuda/tiled_instantiate.cuh"

JAX_MOE_INSTANTIATE_TILED(Q5_0)
JAX_MOE_INSTANTIATE_TILED(Q5_1)
