#include "ffi/blocks/iq4.h"
#include "ffi/cuda/instantiate.cuh"

JAX_MOE_INSTANTIATE(IQ4_NL)
JAX_MOE_INSTANTIATE(IQ4_XS)
