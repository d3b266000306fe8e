#include "ffi/cuda/tiled_instantiate.cuh"

JAX_MOE_INSTANTIATE_TILED(Q2_K)
JAX_MOE_INSTANTIATE_TILED(Q3_K)
