// Enough of CUDA to run the kernels of csrc/cuda on a CPU: one fiber a thread, blocks one after the other. Barriers and
// shuffles suspend a fiber until the others arrive; threads that never do are reported instead of hanging.
//
// What a device would refuse is refused here, by the same error codes: too much shared memory (static and dynamic
// together, with and without the attribute), grids, blocks and clusters beyond their limits, misaligned vectors.
// Unchecked return codes do not compile.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SMART_FAST_SHARED(type, name)                                              \
  static type name##_of_blocks[emulation::most_blocks];                            \
  emulation::declare_shared(sizeof(type));                                         \
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

// As CUDA numbers them.
enum [[nodiscard]] cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchTimeout = 702,
  cudaErrorMisalignedAddress = 716,
  cudaErrorInvalidClusterSize = 912,
};
using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned most_blocks = 8;             // of a cluster that every device takes
constexpr size_t shared_by_default = 48 * 1024;  // bytes that a block gets without asking, static ones included

// By cudaDeviceAttr. Every device that was ever set has a number of its own, since csrc remembers what it asked them.
using Device = std::array<int, 4>;
inline std::vector<Device> devices = {{64 * 1024, 64 * 1024, 8, 4}};
inline size_t device = 0;
inline size_t queries = 0;  // of attributes, so far
inline std::map<std::pair<const void*, size_t>, size_t> opted_in;  // dynamic bytes of kernels on devices

inline size_t attribute(cudaDeviceAttr which) { return size_t(devices[device][which]); }

inline std::unique_ptr<float4[]> dynamic_shared;
inline size_t dynamic_size, dynamic_bytes, shared_size;  // of a block: in float4, in bytes; static ones
inline const void* kernel;                               // that is running
// Run only that many clusters at the end of the grid along x, and along y the blocks of this row; 0: all there are.
inline unsigned last_clusters = 0;
inline int64_t last_row = 0;

inline unsigned block_in_cluster();

// Called by every thread of a kernel that has static shared memory.
inline void declare_shared(size_t bytes) {
  shared_size = bytes;
  const auto asked = opted_in.find({kernel, device});
  if (asked != opted_in.end() && bytes + asked->second > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))
    throw cudaErrorInvalidValue;  // cudaFuncSetAttribute fails
  if (asked == opted_in.end() ? bytes + dynamic_bytes > shared_by_default : dynamic_bytes > asked->second)
    throw cudaErrorInvalidValue;
}

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
inline cudaError_t failure = cudaSuccess;  // of the launch that is running

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
  try {
    body();
  } catch (cudaError_t error) {
    failure = error;
  }
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
      if (failure != cudaSuccess) return;  // the other threads stay where they are
    }
    if (left > 0 && moves == 0) {
      std::fprintf(stderr, "emulation: %u of %u threads wait for the others for ever\n", left, threads);
      failure = cudaErrorLaunchTimeout;
      return;
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

inline cudaError_t cudaGetDevice(int* device) { return *device = int(emulation::device), cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  ++emulation::queries;
  return *value = emulation::devices[size_t(device)][which], cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > emulation::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return cudaErrorInvalidValue;
  emulation::opted_in[{kernel, emulation::device}] = size_t(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t size, cudaStream_t) {
  std::memset(data, value, size);
  return cudaSuccess;
}

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Args&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  const auto within = [](unsigned size, uint64_t most) { return size >= 1 && size <= most; };
  if (!within(grid.x, (uint64_t(1) << 31) - 1) || !within(grid.y, 65535) || !within(grid.z, 65535) ||
      !within(block.x, 1024) || !within(block.y, 1024) || !within(block.z, 64) ||
      !within(block.x * block.y * block.z, 1024))
    return cudaErrorInvalidConfiguration;
  if (cluster != 1 && (cluster > emulation::most_blocks || grid.x % cluster != 0 ||
                       emulation::attribute(cudaDevAttrComputeCapabilityMajor) < 9))
    return cudaErrorInvalidClusterSize;
  gridDim = grid;
  blockDim = block;
  emulation::kernel = reinterpret_cast<const void*>(kernel);
  emulation::cluster_size = cluster;
  emulation::body = [&] { kernel(args...); };
  emulation::dynamic_bytes = config->dynamicSmemBytes;
  emulation::dynamic_size = config->dynamicSmemBytes / 16 + 1;
  emulation::dynamic_shared.reset(new float4[emulation::dynamic_size * size_t(cluster)]);
  emulation::failure = cudaSuccess;
  const unsigned only = emulation::last_clusters * cluster;
  const unsigned first = only > 0 && only < grid.x ? grid.x - only : 0;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    if (only > 0 && blockIdx.y != unsigned(emulation::last_row / block.y % grid.y)) continue;
    for (blockIdx.x = first; blockIdx.x < grid.x; blockIdx.x += cluster) {
      emulation::run_cluster(block.x * block.y);
      if (emulation::failure != cudaSuccess) return emulation::failure;
    }
  }
  return cudaSuccess;
}

namespace smart_fast {
namespace cuda {

template <class Vector, class Element>
Vector& vector_at(Element* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(Vector) != 0) throw cudaErrorMisalignedAddress;
  return *reinterpret_cast<Vector*>(address);
}

inline int cluster_blocks() { return int(emulation::cluster_size); }
inline int cluster_block() { return int(emulation::block_in_cluster()); }
inline void cluster_sync() { emulation::wait(emulation::cluster); }
inline float cluster_read(const float* mine, int block) {
  const char* here = reinterpret_cast<const char*>(mine);
  return *reinterpret_cast<const float*>(here + (block - cluster_block()) * std::ptrdiff_t(emulation::shared_size));
}

}  // namespace cuda
}  // namespace smart_fast
