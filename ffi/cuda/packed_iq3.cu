#include "ffi/blocks/iq3.h"
#include "ffi/cuda/instantiate.cuh"

JAX_MOE_INSTANTIATE(IQ3_XXS)
JAX_MOE_INSTANTIATE(IQ3_S)
