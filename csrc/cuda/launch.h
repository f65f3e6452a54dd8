// How work is laid out over blocks: functions of shapes alone.
#pragma once

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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunks of the widest row: one more than the width asks for where rows begin within a chunk.
inline int64_t chunks_of(const Shape& shape, int size) {
  const int64_t skew = shape.width % size == 0 || shape.rows == 1 ? 0 : size - 1;
  return ceil_div(shape.width + skew, size);
}

// [threads of a row, rows of a block]: lanes of a warp while they suffice, then whole warps.
inline dim3 block_of(int64_t threads) {
  if (threads > 32) {
    const int64_t whole = ceil_div(threads, 32) * 32;
    return dim3(unsigned(whole < most_threads ? whole : most_threads), 1);
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
void with_type(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::fp32:
      return visit(Tag<float>());
    case Dtype::bf16:
      return visit(Tag<Bf16>());
    case Dtype::fp16:
      return visit(Tag<Fp16>());
  }
}

#if !defined(SMART_FAST_EMULATION)
template <class... Args>
void launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const Args&... args) {
  kernel<<<grid, block, shared, stream>>>(args...);
}

// The same with the blocks in clusters; the grid is a multiple of `cluster`.
template <class... Args>
void launch_cluster(void (*kernel)(Args...), int cluster, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                    const Args&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, args...);
}
#endif

}  // namespace cuda
}  // namespace smart_fast
