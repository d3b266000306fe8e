// Clusters: blocks that run at the same time and read each other's shared memory (Hopper).
// Elsewhere a block is a cluster of its own.
#pragma once

#include <cstdint>

namespace jax_moe::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ int ClusterSize() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// This block's place in its cluster.
__device__ __forceinline__ int ClusterRank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// This cluster's place in the grid, whose clusters lie along x.
__device__ __forceinline__ int ClusterIndex() {
  int index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}

// Every thread of the cluster arrives, and later waits for all others to have arrived: what was written to
// shared memory before is there then.
__device__ __forceinline__ void ArriveInCluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// The same without the promise about memory, which waits for all writes to global memory too.
__device__ __forceinline__ void ArriveInClusterRelaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void WaitInCluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes to where the block of this rank has what this one has at `shared`.
__device__ __forceinline__ void StoreToCluster(float* shared, int rank, float value) {
  asm volatile(
      "{\n"
      ".reg .b32 address;\n"
      "mapa.shared::cluster.u32 address, %0, %1;\n"
      "st.shared::cluster.f32 [address], %2;\n"
      "}\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "r"(rank), "f"(value)
      : "memory");
}

// Sends to where the block of this rank has what this one has at `shared`, and its bytes to the
// barrier there.
__device__ __forceinline__ void SendToCluster(int32_t* shared, uint64_t* barrier, int rank,
                                              int32_t value) {
  asm volatile(
      "{\n"
      ".reg .b32 address, barrier;\n"
      "mapa.shared::cluster.u32 address, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.s32 [address], %3, [barrier];\n"
      "}\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))), "r"(rank), "r"(value)
      : "memory");
}

// Arrives at the barrier of the block of this rank.
__device__ __forceinline__ void ArriveInBlock(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 address;\n"
      "mapa.shared::cluster.u32 address, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [address];\n"
      "}\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
      "r"(rank)
      : "memory");
}

#else

__device__ __forceinline__ int ClusterSize() { return 1; }
__device__ __forceinline__ int ClusterRank() { return 0; }
__device__ __forceinline__ int ClusterIndex() { return blockIdx.x; }
__device__ __forceinline__ void ArriveInCluster() { __syncthreads(); }
__device__ __forceinline__ void WaitInCluster() {}
__device__ __forceinline__ void StoreToCluster(float* shared, int, float value) { *shared = value; }

#endif

}  // namespace jax_moe::cuda
