// Enough of CUDA to run the kernels of csrc/cuda on a CPU: one fiber a thread, blocks one after the other. Barriers and
// shuffles suspend a fiber until the others arrive; threads that never do are reported instead of hanging.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SMART_FAST_SHARED(type, name)                                              \
  static type name##_of_blocks[emulation::most_blocks];                            \
  emulation::shared_size = sizeof(type);                                           \
  type& name = name##_of_blocks[emulation::block_in_cluster()]
#define SMART_FAST_DYNAMIC_SHARED(type, name)                                      \
  type* const name = reinterpret_cast<type*>(emulation::dynamic_shared.get() +     \
                                             emulation::block_in_cluster() * emulation::dynamic_size)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned most_blocks = 8;    // of a cluster
inline int shared_memory = 64 * 1024;  // of a multiprocessor
inline int major = 8, multiprocessors = 4;
inline std::unique_ptr<float4[]> dynamic_shared;
inline size_t dynamic_size, shared_size;  // of a block: in float4, in bytes

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
};
struct Warp {
  Barrier barrier;
  float value[32];
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index, block;
  bool done;
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier blocks[most_blocks], cluster;
inline unsigned cluster_size = 1;
inline size_t current, moves;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline unsigned block_in_cluster() { return blockIdx.x % cluster_size; }

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++moves;
    return;
  }
  while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
}

inline float exchange(float value, unsigned from) {
  Warp& warp = warps[current / 32];
  warp.value[current % 32] = value;
  wait(warp.barrier);
  const float received = warp.value[from];
  wait(warp.barrier);
  return received;
}

inline void enter() {
  body();
  fibers[current].done = true;
  ++moves;
  swapcontext(&fibers[current].context, &scheduler);
}

// One cluster of blocks of `block_threads` threads: the blocks at blockIdx and behind it along x.
inline void run_cluster(unsigned block_threads) {
  const unsigned threads = block_threads * cluster_size;
  const dim3 origin = blockIdx;
  cluster = Barrier{threads};
  for (unsigned b = 0; b < cluster_size; ++b) blocks[b] = Barrier{block_threads};
  warps.assign((threads + 31) / 32, Warp());
  for (size_t w = 0; w < warps.size(); ++w)
    warps[w].barrier.expected = threads - unsigned(w) * 32 < 32 ? threads - unsigned(w) * 32 : 32;
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(64 * 1024);
    fiber.index = dim3(i % block_threads % blockDim.x, i % block_threads / blockDim.x);
    fiber.block = dim3(origin.x + i / block_threads, origin.y);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = threads; left > 0;) {
    moves = 0;
    left = 0;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].done) continue;
      threadIdx = fibers[current].index;
      blockIdx = fibers[current].block;
      swapcontext(&scheduler, &fibers[current].context);
      left += !fibers[current].done;
    }
    if (left > 0 && moves == 0) {
      std::fprintf(stderr, "emulation: %u of %u threads wait for the others for ever\n", left, threads);
      std::abort();
    }
  }
  blockIdx = origin;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::blocks[emulation::block_in_cluster()]); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return emulation::exchange(value, unsigned(emulation::current % 32) ^ unsigned(mask));
}
inline float __shfl_sync(unsigned, float value, int from) { return emulation::exchange(value, unsigned(from)); }
inline int __any_sync(unsigned all, int flag) {
  float any = flag ? 1.0f : 0.0f;
  for (int offset = 16; offset > 0; offset /= 2) any += __shfl_xor_sync(all, any, offset);
  return any > 0.0f;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrComputeCapabilityMajor ? emulation::major
           : which == cudaDevAttrMultiProcessorCount  ? emulation::multiprocessors
                                                      : emulation::shared_memory;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t size, cudaStream_t) {
  std::memset(data, value, size);
  return cudaSuccess;
}

namespace smart_fast {
namespace cuda {

inline int cluster_blocks() { return int(emulation::cluster_size); }
inline int cluster_block() { return int(emulation::block_in_cluster()); }
inline void cluster_sync() { emulation::wait(emulation::cluster); }
inline float cluster_read(const float* mine, int block) {
  const char* here = reinterpret_cast<const char*>(mine);
  return *reinterpret_cast<const float*>(here + (block - cluster_block()) * std::ptrdiff_t(emulation::shared_size));
}

template <class... Args>
void launch_cluster(void (*kernel)(Args...), int cluster, dim3 grid, dim3 block, size_t shared, cudaStream_t,
                    const Args&... args) {
  gridDim = grid;
  blockDim = block;
  emulation::cluster_size = unsigned(cluster);
  emulation::body = [&] { kernel(args...); };
  emulation::dynamic_size = shared / 16 + 1;
  emulation::dynamic_shared.reset(new float4[emulation::dynamic_size * size_t(cluster)]);
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x += unsigned(cluster))
      emulation::run_cluster(block.x * block.y);
}

template <class... Args>
void launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const Args&... args) {
  launch_cluster(kernel, 1, grid, block, shared, stream, args...);
}

}  // namespace cuda
}  // namespace smart_fast
