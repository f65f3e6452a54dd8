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
#define __shared__ static
#define __launch_bounds__(...)
#define SMART_FAST_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::dynamic_shared.get())

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
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline int shared_memory = 64 * 1024;  // of a multiprocessor
inline std::unique_ptr<float4[]> dynamic_shared;

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
  dim3 index;
  bool done;
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline size_t current, moves;
inline ucontext_t scheduler;
inline std::function<void()> body;

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

inline void run_block(unsigned threads) {
  block = Barrier{threads};
  warps.assign((threads + 31) / 32, Warp());
  for (size_t w = 0; w < warps.size(); ++w)
    warps[w].barrier.expected = threads - unsigned(w) * 32 < 32 ? threads - unsigned(w) * 32 : 32;
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(64 * 1024);
    fiber.index = dim3(i % blockDim.x, i / blockDim.x);
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
      swapcontext(&scheduler, &fibers[current].context);
      left += !fibers[current].done;
    }
    if (left > 0 && moves == 0) {
      std::fprintf(stderr, "emulation: %u of %u threads wait for the others for ever\n", left, threads);
      std::abort();
    }
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return emulation::exchange(value, unsigned(emulation::current % 32) ^ unsigned(mask));
}
inline float __shfl_sync(unsigned, float value, int from) { return emulation::exchange(value, unsigned(from)); }

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulation::shared_memory, cudaSuccess;
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

template <class... Args>
void launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared, cudaStream_t, const Args&... args) {
  gridDim = grid;
  blockDim = block;
  emulation::body = [&] { kernel(args...); };
  emulation::dynamic_shared.reset(new float4[shared / 16 + 1]);
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) emulation::run_block(block.x * block.y);
}

}  // namespace cuda
}  // namespace smart_fast
