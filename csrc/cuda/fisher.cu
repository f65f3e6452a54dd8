// The Fisher direction softmax(x) - onehot(argmax x) of logits x; see kernels/fisher.py. Floor: read the logits, write the
// direction.
//
//   row_kernel    rows of up to 16 elements a thread, in registers; of narrow rows several share a warp
//   long_kernel   any width, read twice
//
// The entry of the largest (the first of equal ones) is the sum of the others with the sign changed, so that nothing
// cancels where it is near one. Rows with NaN or infinity, or of minus infinity throughout, become NaN.
#include "launch.h"

namespace smart_fast {
namespace cuda {
namespace {

// A column as a number that is the larger the earlier it is, for reductions by Max. Never subnormal.
SMART_FAST_INLINE float earliness(int64_t column) { return Scalar::from_bits(0x7F000000u - uint32_t(column)); }
SMART_FAST_INLINE int64_t column_of(float earliness) { return int64_t(0x7F000000u - Scalar::to_bits(earliness)); }

// What one thread has seen of a row: the largest, how often and how early, and the sum of the exponentials of all that
// are smaller, relative to it (Milakov & Gimelshein, 2018).
struct Seen {
  float largest = -Scalar::infinity, earliest = -Scalar::infinity, equal = 0.0f, smaller = 0.0f;

  template <int SIZE>
  SMART_FAST_INLINE void add(const float (&x)[SIZE], int64_t first) {
    float top = largest;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) top = fmaxf(top, x[i]);
    rebase(top);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const bool is_largest = x[i] == largest;
      equal += is_largest ? 1.0f : 0.0f;
      smaller += is_largest ? 0.0f : Scalar::exp(x[i] - largest);
      if (is_largest) earliest = fmaxf(earliest, earliness(first + i));
    }
  }

  SMART_FAST_INLINE void rebase(float top) {
    if (top > largest) {
      smaller = (smaller + equal) * Scalar::exp(largest - top);
      equal = 0.0f;
      earliest = -Scalar::infinity;
      largest = top;
    }
  }
};

// What a row's entries are made of, the same in all of its threads.
struct Direction {
  float largest, others, inverse;
  int64_t first;

  static __device__ __forceinline__ Direction from(Seen seen, Group& group) {
    float top[1] = {seen.largest};
    group.reduce<Max>(top);
    seen.rebase(top[0]);
    float earliest[1] = {seen.earliest};
    group.reduce<Max>(earliest);
    float sums[2] = {seen.smaller, seen.equal};
    group.reduce<Sum>(sums);
    const float others = sums[0] + (sums[1] - 1.0f);
    const bool finite = fabsf(top[0]) < Scalar::infinity;
    return {top[0], others, finite ? 1.0f / (others + 1.0f) : __builtin_nanf(""), column_of(earliest[0])};
  }

  template <class T>
  SMART_FAST_INLINE void write(const Fisher& args, int64_t row, int64_t begin, const Chunk<T>& chunk) const {
    constexpr int size = Chunk<T>::size;
    const int64_t width = args.shape.width;
    float values[size];
    chunk.unpack(values);
#pragma unroll
    for (int i = 0; i < size; ++i)
      values[i] = (begin + i == first ? -others : Scalar::exp(values[i] - largest)) * inverse;
    if (args.out_dtype == args.logits.dtype)
      Writer<T>(args.out, args.out_dtype, row, width).write(begin, width, values);
    else
      Floats<size>::write(static_cast<float*>(args.out) + row * width, begin, width, values);
  }
};

template <class T>
__global__ void __launch_bounds__(most_threads, 1) row_kernel(const Fisher args) {
  constexpr int size = Chunk<T>::size, chunks = CHUNKS<T>;
  SMART_FAST_SHARED(Shared, shared);
  Group group(shared);
  const Shape& shape = args.shape;

  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < shape.rows; base += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = base + threadIdx.y, skew = row * shape.width % size;
    const bool valid = row < shape.rows;
    const auto first_of = [&](int k) { return (int64_t(k) * group.size() + group.rank()) * size - skew; };
    Chunk<T> kept[chunks];
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      kept[k] = Chunk<T>::filled(Fill::minus_infinity);
      if (valid) kept[k] = Reader<T>(shape, args.logits, row).read(first_of(k), shape.width, Fill::minus_infinity);
    }
    Seen seen;
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      float x[size];
      kept[k].unpack(x);
      seen.add(x, first_of(k));
    }
    const Direction direction = Direction::from(seen, group);
    if (!valid) continue;
#pragma unroll
    for (int k = 0; k < chunks; ++k) direction.write(args, row, first_of(k), kept[k]);
  }
}

template <class T>
__global__ void __launch_bounds__(most_threads, 2) long_kernel(const Fisher args) {
  constexpr int size = Chunk<T>::size;
  SMART_FAST_SHARED(Shared, shared);
  Group group(shared);
  const Shape& shape = args.shape;
  const int64_t step = int64_t(group.size()) * size;

  for (int64_t row = blockIdx.x; row < shape.rows; row += gridDim.x) {
    const Reader<T> logits(shape, args.logits, row);
    const int64_t begin = int64_t(group.rank()) * size - row * shape.width % size;
    const auto each_chunk = [&](const auto& visit) {
      Chunk<T> next = logits.read(begin, shape.width, Fill::minus_infinity);
      for (int64_t first = begin; first < shape.width; first += step) {
        const Chunk<T> chunk = next;
        next = logits.read(first + step, shape.width, Fill::minus_infinity);  // on its way while this one is worked on
        visit(first, chunk);
      }
    };
    Seen seen;
    each_chunk([&](int64_t first, const Chunk<T>& chunk) {
      float x[size];
      chunk.unpack(x);
      seen.add(x, first);
    });
    const Direction direction = Direction::from(seen, group);
    each_chunk([&](int64_t first, const Chunk<T>& chunk) { direction.write(args, row, first, chunk); });
  }
}

}  // namespace

cudaError_t fisher_direction(const Fisher& args, cudaStream_t stream) {
  const Shape& shape = args.shape;
  if (shape.rows * shape.width == 0) return cudaSuccess;
  const auto run = [&](auto kernel, int64_t threads) {
    const dim3 block = block_of(threads);
    return launch(kernel, Config{rows_grid(shape, block), block}, stream, args);
  };
  const int size = chunk_size(args.logits.dtype);
  const int64_t chunks = chunks_of(shape, size);
  if (shape.width <= NARROW) return run(row_kernel<Any<1>>, ceil_div(shape.width, 4));
  if (!aligned(shape, args.logits, size)) return run(long_kernel<Any<4>>, shape.width < 512 ? 64 : ceil_div(shape.width, 8));
  return with_type(args.logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (chunks * size <= MOST_KEPT) return run(row_kernel<T>, ceil_div(chunks * size, 16));
    return run(long_kernel<T>, most_threads);
  });
}

}  // namespace cuda
}  // namespace smart_fast
