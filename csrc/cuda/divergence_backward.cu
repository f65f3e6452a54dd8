// What follows from the statistics of rows: gradients of the divergences, and the share of a slice of them. Floor of the
// gradients: read both, write each gradient.
#include "divergence.h"
#include "launch.h"

namespace smart_fast {
namespace cuda {
namespace {

constexpr int PER_THREAD = 2;  // chunks
constexpr int THREADS = 256;   // of a block of `backward_kernel`
constexpr int BLOCKS = 3;      // of them on a multiprocessor: four leave too few registers

SMART_FAST_INLINE float row_factor(const Divergence& args, int64_t row) {
  return read_element(advance(args.grad.data, args.grad.dtype, row_offset(args.shape, args.grad, row)), args.grad.dtype, 0);
}

// Gradients of a loss of whole rows: tiles in any order. Masked rows get zeros and are not read.
template <class T, Kind KIND>
__global__ void __launch_bounds__(THREADS, BLOCKS) backward_kernel(const Divergence args) {
  constexpr int size = Chunk<T>::size;
  const Shape& shape = args.shape;
  float scale = args.weight;
  if (args.upstream != nullptr) scale *= read_element(args.upstream, args.upstream_dtype, 0);
  scale = Row<KIND>::factor(scale, args.alpha);

  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < shape.rows;
       row += int64_t(gridDim.y) * blockDim.y) {
    const bool real = args.mask == nullptr || args.mask[row] != 0;
    const RowStatistics statistics = RowStatistics::read(args.stats + row * smart_fast::statistics);
    const float factor = args.grad.data == nullptr ? scale : scale * row_factor(args, row);
    const Reader<T> from_x(shape, args.x, row), from_t(shape, args.t, row);
    const int64_t skew = row * shape.width % size, stride = int64_t(gridDim.x) * blockDim.x * PER_THREAD * size;

    for (int64_t begin = (int64_t(blockIdx.x) * blockDim.x * PER_THREAD + threadIdx.x) * size - skew;
         begin < shape.width; begin += stride) {
      Chunk<T> chunks_x[PER_THREAD], chunks_t[PER_THREAD];
#pragma unroll
      for (int k = 0; k < PER_THREAD; ++k) {
        const int64_t first = begin + int64_t(k) * blockDim.x * size;
        chunks_x[k] = chunks_t[k] = Chunk<T>::filled(Fill::minus_infinity);
        if (real) {
          chunks_x[k] = from_x.read(first, shape.width, Fill::minus_infinity);
          chunks_t[k] = from_t.read(first, shape.width, Fill::minus_infinity);
        }
      }
#pragma unroll
      for (int k = 0; k < PER_THREAD; ++k) {
        const int64_t first = begin + int64_t(k) * blockDim.x * size;
        if (first >= shape.width) break;
        float t[size], r[size], dx[size], dt[size], furthest = 0.0f;
        deltas_of(args, statistics.center, chunks_x[k], chunks_t[k], t, r);
#pragma unroll
        for (int i = 0; i < size; ++i) {
          r[i] -= statistics.log_ratio;
          furthest = fmaxf(furthest, fabsf(r[i]));
        }
        if (furthest < 1.0f) {  // p is then not needed
#pragma unroll
          for (int i = 0; i < size; ++i)
            Row<KIND>::template row_gradients<true>(0.0f, statistics.q(args.scale * t[i]), r[i], args.alpha, factor,
                                                    statistics.first, statistics.second, dx[i], dt[i]);
        } else {
          float x[size], d[size];
          unpack<T>(args, chunks_x[k], chunks_t[k], x, t, d);
#pragma unroll
          for (int i = 0; i < size; ++i)
            Row<KIND>::template row_gradients<false>(statistics.p(args.scale * x[i]),
                                                     statistics.q(args.scale * t[i]), r[i], args.alpha, factor,
                                                     statistics.first, statistics.second, dx[i], dt[i]);
        }
#pragma unroll
        for (int i = 0; i < size; ++i) {
          dx[i] = real ? dx[i] : 0.0f;
          dt[i] = real ? dt[i] : 0.0f;
        }
        if (args.dx != nullptr) Writer<T>(args.dx, args.x.dtype, row, shape.width).write(first, shape.width, dx);
        if (args.dt != nullptr) Writer<T>(args.dt, args.t.dtype, row, shape.width).write(first, shape.width, dt);
      }
    }
  }
}

// Gradients of reduction="none": sums over the row in a first walk, gradients in a second. Upstream gradients come with
// any strides and dtypes, so everything is read one element at a time, neighbors by neighboring threads.
template <Kind KIND>
__global__ void __launch_bounds__(most_threads, 1) elements_backward_kernel(const Divergence args) {
  SMART_FAST_SHARED(Shared, shared);
  Group group(shared);
  const Shape& shape = args.shape;

  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < shape.rows; base += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = base + threadIdx.y, safe = row < shape.rows ? row : 0;
    const bool valid = row < shape.rows, real = valid && (args.mask == nullptr || args.mask[row] != 0);
    const RowStatistics statistics = RowStatistics::read(args.stats + safe * smart_fast::statistics);
    const Reader<Any<1>> from_x(shape, args.x, safe), from_t(shape, args.t, safe);
    const void* upstream = advance(args.grad.data, args.grad.dtype, row_offset(shape, args.grad, safe));
    const float g0 = real ? args.scale * read_element(upstream, args.grad.dtype, 0) : 0.0f;

    float sums[Row<KIND>::element_sums] = {};
    float p, q, r, h;
    const auto read = [&](int64_t column) {
      float x[1], t[1], delta[1];
      unpack<Any<1>>(args, from_x.read(column, shape.width, Fill::minus_infinity),
                     from_t.read(column, shape.width, Fill::minus_infinity), x, t, delta);
      center_on(args, statistics.center, x, t, delta);
      p = statistics.p(args.scale * x[0]);
      q = statistics.q(args.scale * t[0]);
      r = delta[0] - statistics.log_ratio;
      h = args.scale * read_element(upstream, args.grad.dtype, column * args.grad.column) - g0;
    };
    if (real)
      for (int64_t column = group.rank(); column < shape.width; column += group.size()) {
        read(column);
        Row<KIND>::add_element_sums(p, q, r, h + g0, h, args.alpha, sums);
      }
    group.reduce<Sum>(sums);
    if (!valid) continue;
    for (int64_t column = group.rank(); column < shape.width; column += group.size()) {
      float dx = 0.0f, dt = 0.0f;
      if (real) {
        read(column);
        Row<KIND>::element_gradients(p, q, r, h, g0, sums, args.alpha, dx, dt);
      }
      if (args.dx != nullptr) write_element(args.dx, args.x.dtype, row * shape.width + column, dx);
      if (args.dt != nullptr) write_element(args.dt, args.t.dtype, row * shape.width + column, dt);
    }
  }
}

// A slice's share of the sums over each row, from the statistics of whole rows. Any strides and dtypes, as above.
template <Kind KIND>
__global__ void __launch_bounds__(most_threads, 1) finish_kernel(const Divergence args) {
  SMART_FAST_SHARED(Shared, shared);
  Group group(shared);
  const Shape& shape = args.shape;

  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < shape.rows; base += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = base + threadIdx.y, safe = row < shape.rows ? row : 0;
    const bool valid = row < shape.rows, real = valid && (args.mask == nullptr || args.mask[row] != 0);
    const RowStatistics statistics = RowStatistics::read(args.stats + safe * smart_fast::statistics);
    const Reader<Any<1>> from_x(shape, args.x, safe), from_t(shape, args.t, safe);
    float sums[Row<KIND>::row_sums] = {};
    if (real)
      for (int64_t column = group.rank(); column < shape.width; column += group.size()) {
        float x[1], t[1], delta[1];
        unpack<Any<1>>(args, from_x.read(column, shape.width, Fill::minus_infinity),
                       from_t.read(column, shape.width, Fill::minus_infinity), x, t, delta);
        center_on(args, statistics.center, x, t, delta);
        Row<KIND>::template add_row_terms<false>(statistics.p(args.scale * x[0]),
                                                 statistics.q(args.scale * t[0]), delta[0] - statistics.log_ratio,
                                                 args.alpha, sums);
      }
    group.reduce<Sum>(sums);
    if (group.rank() != 0 || !valid) continue;
    float first, second;
    Row<KIND>::conclude(sums, args.alpha, first, second);
    args.losses[row * shares + share_first] = real ? first : 0.0f;
    args.losses[row * shares + share_second] = real ? second : 0.0f;
  }
}

template <class T, Kind KIND>
cudaError_t run_tiles(const Divergence& args, cudaStream_t stream) {
  const int64_t chunks = chunks_of(args.shape, Chunk<T>::size);
  const dim3 block = block_of(ceil_div(chunks, PER_THREAD), THREADS);
  return launch(backward_kernel<T, KIND>, Config{tiles_grid(args.shape, block, chunks, PER_THREAD), block}, stream, args);
}

template <Kind KIND>
cudaError_t run(const Divergence& args, cudaStream_t stream) {
  const int size = chunk_size(args.x.dtype);
  if (args.shape.width <= NARROW) return run_tiles<Any<1>, KIND>(args, stream);
  if (args.x.dtype == args.t.dtype && aligned(args.shape, args.x, size) && aligned(args.shape, args.t, size))
    return with_type(args.x.dtype, [&](auto tag) { return run_tiles<typename decltype(tag)::type, KIND>(args, stream); });
  return run_tiles<Any<4>, KIND>(args, stream);
}

// Kernels that walk over rows one element at a time.
cudaError_t run_rows(void (*kernel)(Divergence), const Divergence& args, cudaStream_t stream) {
  const dim3 block = block_of(ceil_div(args.shape.width, 4));
  return launch(kernel, Config{rows_grid(args.shape, block), block}, stream, args);
}

template <class Run>
cudaError_t by_kind(const Divergence& args, const Run& run) {
  if (args.shape.rows == 0) return cudaSuccess;
  return with_kind(args.kind, run, unknown_choice);
}

}  // namespace

cudaError_t divergence_backward(const Divergence& args, cudaStream_t stream) {
  return by_kind(args, [&](auto kind) { return run<kind.value>(args, stream); });
}

cudaError_t divergence_elements_backward(const Divergence& args, cudaStream_t stream) {
  return by_kind(args, [&](auto kind) { return run_rows(elements_backward_kernel<kind.value>, args, stream); });
}

cudaError_t divergence_finish(const Divergence& args, cudaStream_t stream) {
  return by_kind(args, [&](auto kind) { return run_rows(finish_kernel<kind.value>, args, stream); });
}

}  // namespace cuda
}  // namespace smart_fast
