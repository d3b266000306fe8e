#include "ffi/blocks/ternary.h"
#include "ffi/cuda/instantiate.cuh"

JAX_MOE_INSTANTIATE(TQ1_0)
JAX_MOE_INSTANTIATE(TQ2_0)
