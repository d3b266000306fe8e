#include "ffi/blocks/fp4.h"
#include "ffi/cuda/instantiate.cuh"

JAX_MOE_INSTANTIATE(MXFP4)
JAX_MOE_INSTANTIATE(NVFP4)
