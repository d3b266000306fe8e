// Launches with attributes. Most may begin while the kernel before them in the stream ends, on
// devices that can: the kernel calls WaitForEarlierKernels (hopper.cuh).
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

namespace jax_moe::cuda {

// Whether the current device has compute capability 9.0, for which there are kernels of their own.
bool IsHopper();

// Of the current device, at least 1.
int Multiprocessors();

// Bytes of shared memory that a block may have on the current device.
int SharedMemoryLimit();

// `cluster` consecutive blocks form a cluster: a divisor of the grid, and 1 but on Hopper.
cudaError_t LaunchEarly(const void* kernel, dim3 grid, int threads, size_t shared_bytes,
                        cudaStream_t stream, void** parameters, int cluster = 1);

// A cooperative launch: all blocks run at the same time, so that they may wait for each other; an
// error where the device has no room for them. It begins after all earlier kernels of the stream.
cudaError_t LaunchTogether(const void* kernel, unsigned blocks, int threads, size_t shared_bytes,
                           cudaStream_t stream, void** parameters);

template <typename... Parameters, typename... Arguments>
cudaError_t LaunchClusters(void (*kernel)(Parameters...), int cluster, dim3 grid, int threads,
                           size_t shared_bytes, cudaStream_t stream,
                           const Arguments&... arguments) {
  static_assert((std::is_same_v<std::remove_cv_t<Parameters>, Arguments> && ...),
                "a kernel reads its arguments as they lie in memory");
  void* parameters[] = {const_cast<Arguments*>(&arguments)...};
  return LaunchEarly(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, stream,
                     parameters, cluster);
}

template <typename... Parameters, typename... Arguments>
cudaError_t LaunchEarly(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                        cudaStream_t stream, const Arguments&... arguments) {
  return LaunchClusters(kernel, 1, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace jax_moe::cuda
