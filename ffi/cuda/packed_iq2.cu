#include "ffi/blocks/iq2.h"
#include "ffi/cuda/instantiate.cuh"

JAX_MOE_INSTANTIATE(IQ2_XXS)
JAX_MOE_INSTANTIATE(IQ2_XS)
JAX_MOE_INSTANTIATE(IQ2_S)
