#include "ffi/blocks/q1q2.h"
#include "ffi/cuda/instantiate.cuh"

JAX_MOE_INSTANTIATE(Q1_0)
JAX_MOE_INSTANTIATE(Q2_0)
