// How work is laid out over blocks, functions of shapes and of the device alone, and how kernels are launched.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "group.h"
#include "kernels.h"
#include "memory.h"

namespace smart_fast {
namespace cuda {

constexpr int64_t most_blocks = (int64_t(1) << 31) - 1;

constexpr int64_t NARROW = 128;  // rows up to this width are read one element at a time, several rows a warp

// Chunks of a row that a thread keeps in registers: 16 elements, or 4 of a narrow row.
template <class T>
constexpr int CHUNKS = Chunk<T>::size == 1 ? 4 : 16 / Chunk<T>::size;
constexpr int64_t MOST_KEPT = 16 * most_threads;

SMART_FAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunks of the widest row: one more than the width asks for where rows begin within a chunk.
inline int64_t chunks_of(const Shape& shape, int size) {
  const int64_t skew = shape.width % size == 0 || shape.rows == 1 ? 0 : size - 1;
  return ceil_div(shape.width + skew, size);
}

// [threads of a row, rows of a block]: lanes of a warp while they suffice, then whole warps, up to the `most` threads
// that the kernel's launch bounds allow.
inline dim3 block_of(int64_t threads, int most = most_threads) {
  if (threads > 32) {
    const int64_t whole = ceil_div(threads, 32) * 32;
    return dim3(unsigned(whole < most ? whole : most), 1);
  }
  unsigned lanes = 1;
  while (lanes < threads) lanes *= 2;
  return dim3(lanes, 128 / lanes);
}

// A block for each group of rows; kernels walk on by the grid's size.
inline dim3 rows_grid(const Shape& shape, dim3 block) {
  const int64_t blocks = ceil_div(shape.rows, block.y);
  return dim3(unsigned(blocks < most_blocks ? blocks : most_blocks));
}

// Columns along x, rows along y.
inline dim3 tiles_grid(const Shape& shape, dim3 block, int64_t chunks, int per_thread) {
  const int64_t across = ceil_div(chunks, int64_t(block.x) * per_thread), down = ceil_div(shape.rows, block.y);
  return dim3(unsigned(across < most_blocks ? across : most_blocks), unsigned(down < 65535 ? down : 65535));
}

// Whether chunks of `size` elements that start at multiples of `size` of the logical index are aligned in memory.
inline bool aligned(const Shape& shape, const Rows& tensor, int size) {
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0) return false;
  if (tensor.column != 1 && shape.width != 1) return false;
  if (shape.rows == 1) return true;
  if (shape.size1 == 1 && shape.size2 == 1 && tensor.stride0 == shape.width) return true;
  return shape.width % size == 0 && tensor.stride0 % size == 0 && tensor.stride1 % size == 0 &&
         tensor.stride2 % size == 0;
}

inline int chunk_size(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 8; }

template <class T>
struct Tag {
  using type = T;
};

// Calls visit(Tag<T>) with the element type of a dtype.
template <class Visit>
[[nodiscard]] cudaError_t with_type(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::fp32:
      return visit(Tag<float>());
    case Dtype::bf16:
      return visit(Tag<Bf16>());
    case Dtype::fp16:
      return visit(Tag<Fp16>());
  }
  return cudaErrorInvalidValue;
}

// What launches depend on. `shared`: bytes of dynamic shared memory that a block may take so that two of them run at once
// on a multiprocessor.
struct Device {
  int id, shared, multiprocessors;
  bool clusters;
};

// The current device. Attributes are asked for once a device: each query costs as much as a launch.
[[nodiscard]] inline cudaError_t current_device(Device& device) {
  int id = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error != cudaSuccess) return error;
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(id);
  if (found != known.end()) {
    device = found->second;
    return cudaSuccess;
  }
  int each = 0, most = 0, major = 0, count = 0;
  const std::pair<int*, cudaDeviceAttr> wanted[] = {{&each, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                                                    {&most, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                                                    {&major, cudaDevAttrComputeCapabilityMajor},
                                                    {&count, cudaDevAttrMultiProcessorCount}};
  for (const auto& [value, attribute] : wanted) {
    error = cudaDeviceGetAttribute(value, attribute, id);
    if (error != cudaSuccess) return error;
  }
  const int half = each / 2 - 2048, whole = most - int(sizeof(Shared));  // less what the system and the reductions take
  const int shared = half < whole ? half : whole;
  device = known[id] = {id, shared > 0 ? shared : 0, count, major == 9 || major == 10};
  return cudaSuccess;
}

// Lets a kernel take all of `Device::shared`. Without that a block gets 48 KiB, static shared memory included. Set once
// for each kernel and device, always, so that no width depends on it being needed.
[[nodiscard]] inline cudaError_t opt_in(const void* kernel, const Device& device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device.id}) != 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
  if (error == cudaSuccess) done.insert({kernel, device.id});
  return error;
}

// What `with_kind` and the like give for a number that stands for no choice.
[[nodiscard]] inline cudaError_t unknown_choice() { return cudaErrorInvalidValue; }

struct Config {
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;    // blocks of a cluster, of which the grid holds whole ones
};

template <class... Parameters, class... Args>
[[nodiscard]] cudaError_t launch(void (*kernel)(Parameters...), const Config& config, cudaStream_t stream,
                                 const Args&... args) {
  if (config.shared > 0) {
    Device device;
    cudaError_t error = current_device(device);
    if (error == cudaSuccess) error = opt_in(reinterpret_cast<const void*>(kernel), device);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(config.cluster), 1, 1};
  cudaLaunchConfig_t settings = {};
  settings.gridDim = config.grid;
  settings.blockDim = config.block;
  settings.dynamicSmemBytes = config.shared;
  settings.stream = stream;
  settings.attrs = &cluster;
  settings.numAttrs = config.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&settings, kernel, args...);
}

}  // namespace cuda
}  // namespace smart_fast
