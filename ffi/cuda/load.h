// Kernels are on the device, and may use their shared memory, before they are first launched: in the
// initialize stage, for CUDA loads a kernel when it is first named, which in a capture is too late.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace jax_moe::cuda {

// Loads a kernel onto the current device and lets it use `shared_bytes` of dynamic shared memory.
cudaError_t LoadKernel(const void* function, int shared_bytes = 0);

template <typename... Parameters>
cudaError_t LoadKernel(void (*kernel)(Parameters...), int shared_bytes = 0) {
  return LoadKernel(reinterpret_cast<const void*>(kernel), shared_bytes);
}

// All of them, up to the first one that fails.
template <typename... Kernels>
cudaError_t LoadKernels(const Kernels&... kernels) {
  cudaError_t status = cudaSuccess;
  static_cast<void>((((status = LoadKernel(kernels)) == cudaSuccess) && ...));
  return status;
}

// What is to be done once a device. XLA initializes every op at each execution of a program, where
// what a format's kernels need would take longer than to launch them.
class OncePerDevice {
 public:
  // load(), unless that has been done for the current device.
  template <typename F>
  cudaError_t operator()(F load) {
    int device = 0;
    if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if ((done_.load(std::memory_order_acquire) & bit) != 0) return cudaSuccess;
    const cudaError_t status = load();
    if (status == cudaSuccess) done_.fetch_or(bit, std::memory_order_release);
    return status;
  }

 private:
  std::atomic<uint64_t> done_{0};
};

// What products with weights of `format` use, once a device; nothing where there is no such format (-1).
cudaError_t LoadProducts(int format);

}  // namespace jax_moe::cuda
