// The threads that share a row: some lanes of a warp, a block, or a cluster of blocks. Blocks are [rows of a
// block][threads of a row].
#pragma once

#include "device.h"
#include "scalar.h"

namespace smart_fast {
namespace cuda {

constexpr int most_threads = 512;  // of a block
constexpr int most_warps = most_threads / 32;
constexpr int most_values = 4;  // that a reduction takes at once

struct Max {
  static SMART_FAST_INLINE float identity() { return -Scalar::infinity; }
  static SMART_FAST_INLINE float of(float a, float b) { return fmaxf(a, b); }
};
struct Sum {
  static SMART_FAST_INLINE float identity() { return 0.0f; }
  static SMART_FAST_INLINE float of(float a, float b) { return a + b; }
};

// Room for the partial results of the warps of a block. Two of it take turns, so that one barrier a reduction is enough:
// whoever writes one of them has passed the barrier of the other, behind every reader of the first. Of a multiple of 16
// bytes, as the dynamic shared memory behind it is aligned.
struct alignas(16) Shared {
  float turn[2][most_values][most_warps];
  float cluster[2][most_values];
};

class Group {
 public:
  __device__ __forceinline__ explicit Group(Shared& shared) : shared_(shared), turn_(0) {}

  __device__ __forceinline__ int size() const { return int(blockDim.x); }
  __device__ __forceinline__ int rank() const { return int(threadIdx.x); }

  // Every thread gets the result; the order of the operations depends on sizes alone.
  template <class Op, int N>
  __device__ __forceinline__ void reduce(float (&values)[N]) {
    reduce_over<Op>(values, int(blockDim.x));
  }

  __device__ __forceinline__ void finish() const {}

  // The same over all threads of the block, whichever row they are on.
  template <class Op, int N>
  __device__ __forceinline__ void reduce_block(float (&values)[N]) {
    reduce_over<Op>(values, int(blockDim.x * blockDim.y));
  }

  // Whether any thread of the warp says so: rows that share one stay together. Longer rows agree anyway.
  __device__ __forceinline__ bool any(bool flag) const { return __any_sync(0xFFFFFFFFu, flag); }

 protected:
  Shared& shared_;

 private:
  template <class Op, int N>
  __device__ __forceinline__ void reduce_over(float (&values)[N], int threads) {
    for (int offset = (threads < 32 ? threads : 32) / 2; offset > 0; offset /= 2) exchange<Op>(values, offset);
    if (threads <= 32) return;
    const int thread = int(threadIdx.y * blockDim.x + threadIdx.x), warp = thread / 32, lane = thread % 32;
    float(&partial)[most_values][most_warps] = shared_.turn[turn_];
    turn_ ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) partial[i][warp] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = lane < threads / 32 ? partial[i][lane] : Op::identity();
    for (int offset = most_warps / 2; offset > 0; offset /= 2) exchange<Op>(values, offset);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = __shfl_sync(0xFFFFFFFFu, values[i], 0);
  }

  template <class Op, int N>
  static __device__ __forceinline__ void exchange(float (&values)[N], int offset) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = Op::of(values[i], __shfl_xor_sync(0xFFFFFFFFu, values[i], offset));
  }

  int turn_;
};

// Blocks of a cluster on one row. `finish` keeps a block from ending while others still read its results.
class ClusterGroup : public Group {
 public:
  __device__ __forceinline__ explicit ClusterGroup(Shared& shared) : Group(shared), cluster_turn_(0) {}

  __device__ __forceinline__ int size() const { return cluster_blocks() * int(blockDim.x); }
  __device__ __forceinline__ int rank() const { return cluster_block() * int(blockDim.x) + int(threadIdx.x); }

  template <class Op, int N>
  __device__ __forceinline__ void reduce(float (&values)[N]) {
    Group::reduce<Op>(values);
    float(&mine)[most_values] = shared_.cluster[cluster_turn_];
    cluster_turn_ ^= 1;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) mine[i] = values[i];
    }
    cluster_sync();
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = Op::identity();
    for (int block = 0; block < cluster_blocks(); ++block)
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = Op::of(values[i], cluster_read(&mine[i], block));
  }

  __device__ __forceinline__ void finish() const { cluster_sync(); }

 private:
  int cluster_turn_;
};

}  // namespace cuda
}  // namespace smart_fast
