#include "ffi/cuda/tiled_instantiate.cuh"

JAX_MOE_INSTANTIATE_TILED(cuda::Centred<jax_moe::Q2_K>)
JAX_MOE_INSTANTIATE_TILED(cuda::Centred<jax_moe::Q4_K>)
JAX_MOE_INSTANTIATE_TILED(cuda::Centred<jax_moe::Q5_K>)
