#include "ffi/blocks/iq1.h"
#include "ffi/cuda/instantiate.cuh"

JAX_MOE_INSTANTIATE(IQ1_S)
JAX_MOE_INSTANTIATE(IQ1_M)
