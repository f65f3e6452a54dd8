// What the kernels use of CUDA. Tests define SMART_FAST_EMULATION, a header that runs the same sources on a CPU.
#pragma once

#if defined(SMART_FAST_EMULATION)
#include SMART_FAST_EMULATION
#else
#include <cuda_runtime.h>

#include <cstdint>

#define SMART_FAST_SHARED(type, name) __shared__ type name
#define SMART_FAST_DYNAMIC_SHARED(type, name)             \
  extern __shared__ __align__(16) char bytes_of_##name[]; \
  type* const name = reinterpret_cast<type*>(bytes_of_##name)

namespace smart_fast {
namespace cuda {

// 16 bytes in memory. On a device an address that is no multiple of 16 is a fault; the emulation reports it.
template <class Vector, class Element>
__host__ __device__ __forceinline__ Vector& vector_at(Element* address) {
  return *reinterpret_cast<Vector*>(address);
}

// Thread-block clusters, which have come with sm_90.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_blocks() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return int(count);
}
__device__ __forceinline__ int cluster_block() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// What stands at `mine` in the shared memory of another block of the cluster.
__device__ __forceinline__ float cluster_read(const float* mine, int block) {
  const uint32_t local = uint32_t(__cvta_generic_to_shared(mine));
  uint32_t remote;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
  return value;
}
#elif defined(__CUDACC__)
__device__ __forceinline__ int cluster_blocks() { return 1; }
__device__ __forceinline__ int cluster_block() { return 0; }
__device__ __forceinline__ void cluster_sync() {}
__device__ __forceinline__ float cluster_read(const float* mine, int) { return *mine; }
#endif

}  // namespace cuda
}  // namespace smart_fast
#endif

#include "../platform.h"
