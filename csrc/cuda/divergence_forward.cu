// Forward pass of the divergences: a row is read once, and walked over twice more where it lies then.
//
//   row_kernel    rows of up to 16 elements a thread, in registers; of narrow rows several share a warp
//   long_kernel   any width: a running maximum in the first walk, which leaves as much of the row as fits in shared
//                 memory; the rest is read again. On GPUs with thread-block clusters the blocks of one share a row
//                 that does not fit one of them, or where there are fewer rows than multiprocessors
#include "divergence.h"
#include "launch.h"

namespace smart_fast {
namespace cuda {
namespace {

// Adds what a chunk has of the sums over its row (of terms there are none: their gradients ask for no sum that could be had
// here); beyond the row x = t = -inf, and a term is zero.
template <Kind KIND, int SIZE>
SMART_FAST_INLINE void sum_terms(const Divergence& args, const RowStatistics& row, const float (&x)[SIZE],
                                 const float (&t)[SIZE], float (&sums)[Row<KIND>::row_sums]) {
  float part[Row<KIND>::row_sums] = {};
  if (row.near) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      Row<KIND>::template add_row_terms<true>(0.0f, row.q(t[i]), row.r(d_of(args, x[i], t[i])), args.alpha, part);
  } else {
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      Row<KIND>::template add_row_terms<false>(row.p(x_of(args, x[i], t[i])), row.q(t[i]),
                                               row.r(d_of(args, x[i], t[i])), args.alpha, part);
  }
#pragma unroll
  for (int k = 0; k < Row<KIND>::row_sums; ++k) sums[k] += part[k];
}

// Elementwise terms of a chunk, written; zeros where the row is masked.
template <class T, Kind KIND>
SMART_FAST_INLINE void write_terms(const Divergence& args, const RowStatistics& statistics, int64_t row, int64_t first,
                                    bool real, const float (&x)[Chunk<T>::size], const float (&t)[Chunk<T>::size]) {
  constexpr int size = Chunk<T>::size;
  float terms[size];
#pragma unroll
  for (int i = 0; i < size; ++i) {
    terms[i] = Row<KIND>::element_term(statistics.p(x_of(args, x[i], t[i])), statistics.q(t[i]),
                                       statistics.r(d_of(args, x[i], t[i])), args.alpha);
    if (!real) terms[i] = 0.0f;
  }
  Writer<T>(args.terms, args.terms_dtype, row, args.shape.width).write(first, args.shape.width, terms);
}

template <class T, Kind KIND>
SMART_FAST_INLINE void add_terms(const Divergence& args, const RowStatistics& statistics, int64_t row, int64_t first,
                                 bool valid, bool real, const Chunk<T>& chunk_x, const Chunk<T>& chunk_t,
                                 float (&sums)[Row<KIND>::row_sums]) {
  float x[Chunk<T>::size], t[Chunk<T>::size];
  unpack<T>(args, chunk_x, chunk_t, x, t);
  if (args.terms == nullptr)
    sum_terms<KIND>(args, statistics, x, t, sums);
  else if (valid)
    write_terms<T, KIND>(args, statistics, row, first, real, x, t);
}

// The end of a row: its statistics, and its share of the loss of the block.
template <Kind KIND, class Group>
__device__ __forceinline__ float close(const Divergence& args, RowStatistics& statistics, int64_t row, bool valid,
                                       bool real, float (&sums)[Row<KIND>::row_sums], Group& group) {
  group.template reduce<Sum>(sums);
  Row<KIND>::conclude(sums, args.alpha, statistics.first, statistics.second);
  if (group.rank() != 0 || !valid) return 0.0f;
  if (args.stats != nullptr) statistics.write(args.stats + row * smart_fast::statistics, real);
  const float loss = real ? Row<KIND>::loss(statistics.first, statistics.second, args.alpha) : 0.0f;
  if (args.losses != nullptr) args.losses[row] = real ? args.weight * loss : 0.0f;
  return loss;
}

// All there is to say of a slice of the vocabulary. Without a finite logit sums are zero, which -inf - (-inf) is not.
__device__ __forceinline__ void write_parts(const Divergence& args, int64_t row, bool real, const float (&largest)[3],
                                            const float (&sums)[3]) {
  float* parts = args.parts + row * smart_fast::parts;
  parts[part_max_x] = real ? largest[0] : 0.0f;
  parts[part_sum_x] = real ? sums[0] : 0.0f;
  parts[part_max_t] = real ? largest[1] : 0.0f;
  parts[part_sum_t] = real ? sums[1] : 0.0f;
  parts[part_max_d] = real ? largest[2] : 0.0f;
  parts[part_sum_e] = real ? sums[2] : 0.0f;
}

// The loss of one block goes straight out; those of several are added by `sum_kernel`.
__device__ __forceinline__ void close_block(const Divergence& args, float loss, Group& group) {
  if (args.loss == nullptr) return;
  float total[1] = {loss};
  group.reduce_block<Sum>(total);
  if (threadIdx.x != 0 || threadIdx.y != 0) return;
  if (gridDim.x == 1)
    *args.loss = args.weight * total[0];
  else
    args.partial[blockIdx.x] = total[0];
}

template <class T, Kind KIND>
__global__ void __launch_bounds__(most_threads, 1) row_kernel(const Divergence args) {
  constexpr int size = Chunk<T>::size, chunks = CHUNKS<T>;
  SMART_FAST_SHARED(Shared, shared);
  Group group(shared);
  const Shape& shape = args.shape;
  float loss = 0.0f;

  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < shape.rows; base += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = base + threadIdx.y, skew = row * shape.width % size;
    const bool valid = row < shape.rows, real = valid && (args.mask == nullptr || args.mask[row] != 0);
    const auto first_of = [&](int k) { return (int64_t(k) * group.size() + group.rank()) * size - skew; };

    Chunk<T> chunks_x[chunks], chunks_t[chunks];
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      chunks_x[k] = chunks_t[k] = Chunk<T>::filled(Fill::minus_infinity);
      if (real) {
        chunks_x[k] = Reader<T>(shape, args.x, row).read(first_of(k), shape.width, Fill::minus_infinity);
        chunks_t[k] = Reader<T>(shape, args.t, row).read(first_of(k), shape.width, Fill::minus_infinity);
      }
    }
    float largest[3] = {-Scalar::infinity, -Scalar::infinity, 0.0f};
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      float x[size], t[size];
      unpack<T>(args, chunks_x[k], chunks_t[k], x, t);
#pragma unroll
      for (int i = 0; i < size; ++i) {
        largest[0] = fmaxf(largest[0], x_of(args, x[i], t[i]));
        largest[1] = fmaxf(largest[1], t[i]);
        largest[2] = fmaxf(largest[2], fabsf(d_of(args, x[i], t[i])));
      }
    }
    group.reduce<Max>(largest);
    const float safe_x = Formulas::finite_max(largest[0]), safe_t = Formulas::finite_max(largest[1]);
    float sums[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      float x[size], t[size];
      unpack<T>(args, chunks_x[k], chunks_t[k], x, t);
      if (largest[2] <= 1.0f) {
#pragma unroll
        for (int i = 0; i < size; ++i) {
          const float q = Scalar::exp(t[i] - safe_t);
          sums[0] += Scalar::exp(x_of(args, x[i], t[i]) - safe_x);
          sums[1] += q;
          sums[2] += q * Formulas::expm1_clamped(d_of(args, x[i], t[i]));
        }
      } else {
#pragma unroll
        for (int i = 0; i < size; ++i) {
          sums[0] += Scalar::exp(x_of(args, x[i], t[i]) - safe_x);
          sums[1] += Scalar::exp(t[i] - safe_t);
        }
      }
    }
    group.reduce<Sum>(sums);
    if (args.parts != nullptr) {
      if (group.rank() == 0 && valid) write_parts(args, row, real, largest, sums);
      continue;
    }
    RowStatistics statistics =
        RowStatistics::from(largest[0], largest[1], largest[2], sums[0], sums[1], sums[2]);
    if (size == 1 && shape.width == 1) {  // one class: p = q = 1, and r must be zero to the last bit
      float x[size], t[size];
      unpack<T>(args, chunks_x[0], chunks_t[0], x, t);
      statistics.shift = d_of(args, x[0], t[0]);
    }
    float sums_of_terms[Row<KIND>::row_sums] = {};
#pragma unroll
    for (int k = 0; k < chunks; ++k)
      if (real ? !outside(first_of(k), size, shape.width) : args.terms != nullptr)
        add_terms<T, KIND>(args, statistics, row, first_of(k), valid, real, chunks_x[k], chunks_t[k], sums_of_terms);
    loss += close<KIND>(args, statistics, row, valid, real, sums_of_terms, group);
  }
  close_block(args, loss, group);
}

// Maxima and sums of what one thread has seen of a row, the sums relative to the maxima (Milakov & Gimelshein, 2018).
struct Running {
  float max_x, max_t, max_d, sum_x, sum_t, expm1_sum;

  template <int SIZE>
  SMART_FAST_INLINE void add(const Divergence& args, const float (&x)[SIZE], const float (&t)[SIZE]) {
    float new_x = max_x, new_t = max_t;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      new_x = fmaxf(new_x, x_of(args, x[i], t[i]));
      new_t = fmaxf(new_t, t[i]);
      max_d = fmaxf(max_d, fabsf(d_of(args, x[i], t[i])));
    }
    rebase(new_x, new_t);
    const float safe_x = Formulas::finite_max(max_x), safe_t = Formulas::finite_max(max_t);
    if (max_d <= 1.0f) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const float q = Scalar::exp(t[i] - safe_t);
        sum_x += Scalar::exp(x_of(args, x[i], t[i]) - safe_x);
        sum_t += q;
        expm1_sum += q * Formulas::expm1_clamped(d_of(args, x[i], t[i]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        sum_x += Scalar::exp(x_of(args, x[i], t[i]) - safe_x);
        sum_t += Scalar::exp(t[i] - safe_t);
      }
    }
  }

  SMART_FAST_INLINE void rebase(float new_x, float new_t) {
    if (new_x > max_x) {
      sum_x *= Scalar::exp(max_x - new_x);
      max_x = new_x;
    }
    if (new_t > max_t) {
      const float scale = Scalar::exp(max_t - new_t);
      sum_t *= scale;
      expm1_sum *= scale;
      max_t = new_t;
    }
  }
};

// Of `long_kernel` on a multiprocessor. Two sums over eight elements at once take a register more than two blocks leave.
template <class T, Kind KIND>
constexpr int BLOCKS = Row<KIND>::row_sums * Chunk<T>::size < 16 ? 2 : 1;

template <class T, Kind KIND, class Group>
__global__ void __launch_bounds__(most_threads, BLOCKS<T, KIND>) long_kernel(const Divergence args, const int kept) {
  constexpr int size = Chunk<T>::size;
  SMART_FAST_SHARED(Shared, shared);
  SMART_FAST_DYNAMIC_SHARED(Chunk<T>, stored);  // [kept chunks a thread][x, t][threads]
  Group group(shared);
  const Shape& shape = args.shape;
  const int64_t step = int64_t(group.size()) * size;
  const int together = group.size() / int(blockDim.x);  // blocks of a row
  float loss = 0.0f;

  for (int64_t row = blockIdx.x / together; row < shape.rows; row += gridDim.x / together) {
    const bool real = args.mask == nullptr || args.mask[row] != 0;
    const int64_t begin = int64_t(group.rank()) * size - row * shape.width % size;
    const Reader<T> from_x(shape, args.x, row), from_t(shape, args.t, row);
    Running running = {-Scalar::infinity, -Scalar::infinity, 0.0f, 0.0f, 0.0f, 0.0f};
    if (real) {
      Chunk<T> next_x = from_x.read(begin, shape.width, Fill::minus_infinity);
      Chunk<T> next_t = from_t.read(begin, shape.width, Fill::minus_infinity);
      int k = 0;
      for (int64_t first = begin; first < shape.width; first += step, ++k) {
        const Chunk<T> chunk_x = next_x, chunk_t = next_t;
        if (first + step < shape.width) {  // on its way while this one is worked on
          next_x = from_x.read(first + step, shape.width, Fill::minus_infinity);
          next_t = from_t.read(first + step, shape.width, Fill::minus_infinity);
        }
        if (k < kept) {
          stored[2 * k * blockDim.x + threadIdx.x] = chunk_x;
          stored[(2 * k + 1) * blockDim.x + threadIdx.x] = chunk_t;
        }
        float x[size], t[size];
        unpack<T>(args, chunk_x, chunk_t, x, t);
        running.add(args, x, t);
      }
    }
    float largest[3] = {running.max_x, running.max_t, running.max_d};
    group.template reduce<Max>(largest);
    running.rebase(largest[0], largest[1]);
    float sums[3] = {running.sum_x, running.sum_t, running.expm1_sum};
    group.template reduce<Sum>(sums);
    if (args.parts != nullptr) {
      if (group.rank() == 0) write_parts(args, row, real, largest, sums);
      continue;
    }
    RowStatistics statistics =
        RowStatistics::from(largest[0], largest[1], largest[2], sums[0], sums[1], sums[2]);

    float sums_of_terms[Row<KIND>::row_sums] = {};
    if (real || args.terms != nullptr) {
      int k = 0;
      for (int64_t first = begin; first < shape.width; first += step, ++k) {
        Chunk<T> chunk_x = Chunk<T>::filled(Fill::minus_infinity), chunk_t = chunk_x;
        if (real && k < kept) {
          chunk_x = stored[2 * k * blockDim.x + threadIdx.x];
          chunk_t = stored[(2 * k + 1) * blockDim.x + threadIdx.x];
        } else if (real) {
          chunk_x = from_x.read(first, shape.width, Fill::minus_infinity);
          chunk_t = from_t.read(first, shape.width, Fill::minus_infinity);
        }
        add_terms<T, KIND>(args, statistics, row, first, true, real, chunk_x, chunk_t, sums_of_terms);
      }
    }
    loss += close<KIND>(args, statistics, row, true, real, sums_of_terms, group);
  }
  group.finish();
  close_block(args, loss, group);
}

struct Partials {
  const float* values;
  int64_t count;
  float weight;
  float* out;
};

// One block, a fixed order: the same sum on every run.
__global__ void __launch_bounds__(most_threads, 1) sum_kernel(const Partials args) {
  SMART_FAST_SHARED(Shared, shared);
  Group group(shared);
  double sum = 0.0;
  for (int64_t i = group.rank(); i < args.count; i += group.size()) sum += args.values[i];
  // Two floats carry a double's sum through the reduction; an infinite one has no rest.
  const float whole = float(sum), rest = float(sum - double(whole));
  float parts[2] = {whole, fabsf(whole) < Scalar::infinity ? rest : 0.0f};
  group.reduce<Sum>(parts);
  if (group.rank() == 0) *args.out = args.weight * (parts[0] + parts[1]);
}

enum class Layout { narrow, registers, general };

struct Plan {
  Layout layout;
  bool typed;  // one dtype, chunks aligned
  int kept;    // chunks a thread leaves in shared memory
  Config config;
};

cudaError_t plan_of(const Divergence& args, Plan& plan) {
  const int size = chunk_size(args.x.dtype);
  const Shape& shape = args.shape;
  plan = {};
  plan.typed = args.x.dtype == args.t.dtype && aligned(shape, args.x, size) && aligned(shape, args.t, size);
  const int64_t chunks = chunks_of(shape, plan.typed ? size : 4);
  dim3& block = plan.config.block;
  int& cluster = plan.config.cluster;
  if (shape.width <= NARROW) {
    plan.layout = Layout::narrow;
    block = block_of(ceil_div(shape.width, 4));
  } else if (plan.typed && chunks * size <= MOST_KEPT) {
    plan.layout = Layout::registers;
    block = block_of(ceil_div(chunks * size, 16));
  } else {
    plan.layout = Layout::general;
    block = block_of(chunks < 128 ? 64 : ceil_div(chunks, 2));
    Device device;
    const cudaError_t error = current_device(device);
    if (error != cudaSuccess) return error;
    const int64_t slot = 2 * 16 * int64_t(block.x), room = device.shared / slot;
    const auto needed = [&] { return ceil_div(chunks, int64_t(block.x) * cluster); };
    if (plan.typed && device.clusters)
      while (cluster < 8 && needed() > 1 && (needed() > room || shape.rows * cluster < device.multiprocessors)) cluster *= 2;
    plan.kept = int(needed() < room ? needed() : room);
    plan.config.shared = size_t(plan.kept * slot);
  }
  plan.config.grid = rows_grid(shape, block);
  if (cluster > 1) {
    const int64_t most_rows = most_blocks / cluster;
    plan.config.grid.x = unsigned((shape.rows < most_rows ? shape.rows : most_rows) * cluster);
  }
  return cudaSuccess;
}

template <Kind KIND>
cudaError_t run(const Divergence& args, const Plan& plan, cudaStream_t stream) {
  const Config& config = plan.config;
  if (plan.layout == Layout::narrow) return launch(row_kernel<Any<1>, KIND>, config, stream, args);
  if (!plan.typed) return launch(long_kernel<Any<4>, KIND, Group>, config, stream, args, plan.kept);
  return with_type(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (plan.layout == Layout::registers) return launch(row_kernel<T, KIND>, config, stream, args);
    if (config.cluster > 1) return launch(long_kernel<T, KIND, ClusterGroup>, config, stream, args, plan.kept);
    return launch(long_kernel<T, KIND, Group>, config, stream, args, plan.kept);
  });
}

cudaError_t run(const Divergence& args, const Plan& plan, cudaStream_t stream) {
  return with_kind(args.kind, [&](auto kind) { return run<kind.value>(args, plan, stream); }, unknown_choice);
}

}  // namespace

cudaError_t forward_partials(const Divergence& args, int64_t& count) {
  count = 0;
  if (args.shape.rows == 0) return cudaSuccess;
  Plan plan;
  const cudaError_t error = plan_of(args, plan);
  if (error == cudaSuccess) count = plan.config.grid.x;
  return error;
}

cudaError_t divergence_forward(const Divergence& args, cudaStream_t stream) {
  if (args.shape.rows == 0) {
    if (args.loss != nullptr) return cudaMemsetAsync(args.loss, 0, sizeof(float), stream);
    return cudaSuccess;
  }
  Plan plan;
  cudaError_t error = plan_of(args, plan);
  if (error == cudaSuccess) error = run(args, plan, stream);
  if (error != cudaSuccess || args.loss == nullptr || plan.config.grid.x == 1) return error;
  const Partials partials = {args.partial, int64_t(plan.config.grid.x), args.weight, args.loss};
  return launch(sum_kernel, Config{dim3(1), dim3(most_threads)}, stream, partials);
}

}  // namespace cuda
}  // namespace smart_fast
