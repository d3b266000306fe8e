#include "ffi/cuda/tiled_instantiate.cuh"

JAX_MOE_INSTANTIATE_TILED(MXFP4)
JAX_MOE_INSTANTIATE_TILED(NVFP4)
