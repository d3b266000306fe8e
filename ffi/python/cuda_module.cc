// Module jax_moe._cuda: handler capsules of CUDA. Importing it needs no GPU and no driver.

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "ffi/cuda/handlers.h"

namespace nb = nanobind;

namespace jax_moe {
namespace {

using Handler = XLA_FFI_Error*(XLA_FFI_CallFrame*);

nb::dict Bundle(Handler* initialize, Handler* execute) {
  nb::dict bundle;
  bundle["initialize"] = nb::capsule(reinterpret_cast<void*>(initialize));
  bundle["execute"] = nb::capsule(reinterpret_cast<void*>(execute));
  return bundle;
}

nb::dict CudaHandlers() {
  nb::dict handlers;
  handlers["jax_moe_route"] = Bundle(JaxMoeRouteCudaInitialize, JaxMoeRouteCuda);
  handlers["jax_moe_sort"] = Bundle(JaxMoeSortCudaInitialize, JaxMoeSortCuda);
  handlers["jax_moe_gemm"] = Bundle(JaxMoeGemmCudaInitialize, JaxMoeGemmCuda);
  handlers["jax_moe_ffn"] = Bundle(JaxMoeFfnCudaInitialize, JaxMoeFfnCuda);
  handlers["jax_moe_dequantize"] =
      Bundle(JaxMoeDequantizeCudaInitialize, JaxMoeDequantizeCuda);
  handlers["jax_moe_repack"] = Bundle(JaxMoeRepackCudaInitialize, JaxMoeRepackCuda);
  handlers["jax_moe_unpack"] = Bundle(JaxMoeRepackCudaInitialize, JaxMoeUnpackCuda);
  return handlers;
}

// Versions as in CUDA: 13000 is 13.0. The driver's is 0 where there is none.
nb::dict BuildInfo() {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  nb::dict info;
  info["cuda_version"] = CUDART_VERSION;
  info["driver_cuda_version"] = driver;
  return info;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.def("ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("cuda_handlers", &CudaHandlers, "Target names to the stages that jax.ffi registers.");
  m.def("build_info", &BuildInfo);
}

}  // namespace jax_moe
