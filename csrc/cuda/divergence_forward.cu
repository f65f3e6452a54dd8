// Forward pass of the divergences: a row is read once. Losses that follow from means over it are then known, where the row
// is near and nothing cancels; otherwise it is walked over once more where it lies then.
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
                                 const float (&t)[SIZE], const float (&delta)[SIZE],
                                 float (&sums)[Row<KIND>::row_sums]) {
  float part[Row<KIND>::row_sums] = {};
  if (row.near) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      Row<KIND>::template add_row_terms<true>(0.0f, row.q(args.scale * t[i]), delta[i] - row.log_ratio, args.alpha, part);
  } else {
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      Row<KIND>::template add_row_terms<false>(row.p(args.scale * x[i]), row.q(args.scale * t[i]),
                                               delta[i] - row.log_ratio, args.alpha, part);
  }
#pragma unroll
  for (int k = 0; k < Row<KIND>::row_sums; ++k) sums[k] += part[k];
}

// Elementwise terms of a chunk, written; zeros where the row is masked.
template <class T, Kind KIND>
SMART_FAST_INLINE void write_terms(const Divergence& args, const RowStatistics& statistics, int64_t row, int64_t first,
                                   bool real, const float (&x)[Chunk<T>::size], const float (&t)[Chunk<T>::size],
                                   const float (&delta)[Chunk<T>::size]) {
  constexpr int size = Chunk<T>::size;
  float terms[size];
#pragma unroll
  for (int i = 0; i < size; ++i) {
    terms[i] = Row<KIND>::element_term(statistics.p(args.scale * x[i]), statistics.q(args.scale * t[i]),
                                       delta[i] - statistics.log_ratio, args.alpha);
    if (!real) terms[i] = 0.0f;
  }
  Writer<T>(args.terms, args.terms_dtype, row, args.shape.width).write(first, args.shape.width, terms);
}

template <class T, Kind KIND>
SMART_FAST_INLINE void add_terms(const Divergence& args, const RowStatistics& statistics, int64_t row, int64_t first,
                                 bool valid, bool real, const Chunk<T>& chunk_x, const Chunk<T>& chunk_t,
                                 float (&sums)[Row<KIND>::row_sums]) {
  float x[Chunk<T>::size], t[Chunk<T>::size], delta[Chunk<T>::size];
  unpack<T>(args, chunk_x, chunk_t, x, t, delta);
  center_on(args, statistics.center, x, t, delta);
  if (args.terms == nullptr)
    sum_terms<KIND>(args, statistics, x, t, delta, sums);
  else if (valid)
    write_terms<T, KIND>(args, statistics, row, first, real, x, t, delta);
}

// Sums over a row whose |delta| are at most one, with exponentials e of t: where the loss follows from means over the row, of
// e delta, e (expm1(delta) - delta) and, if there are three, e delta expm1(delta); else of e expm1(delta).
template <Kind KIND>
struct NearSums {
  static constexpr int count = Row<KIND>::means > 0 ? Row<KIND>::means : 1;
  float values[count];

  SMART_FAST_INLINE void add(float e, float delta) {
    const float f = Formulas::f_near(delta), weighted = e * delta;
    if constexpr (Row<KIND>::means > 0) {
      values[0] += weighted;
      values[1] += e * f;
      if constexpr (Row<KIND>::means > 2) values[2] += weighted * (delta + f);
    } else {
      values[0] += weighted + e * f;
    }
  }
  SMART_FAST_INLINE void scale(float factor) {
#pragma unroll
    for (int k = 0; k < count; ++k) values[k] *= factor;
  }
  SMART_FAST_INLINE float expm1_sum() const {
    if constexpr (Row<KIND>::means > 0)
      return values[0] + values[1];
    else
      return values[0];
  }
  // Whether they make the loss of the row without cancellation; it is then in `first`.
  SMART_FAST_INLINE bool conclude(const Divergence& args, float sum_t, float& first) const {
    if constexpr (Row<KIND>::means > 0) {
      const float inverse = 1.0f / sum_t, delta = values[0] * inverse, f = values[1] * inverse, u = delta + f;
      first = Row<KIND>::first_of_means(delta, f, values[count - 1] * inverse, args.alpha);
      return args.terms == nullptr && u * u <= 0.5f * f;  // KL(q || p) is then most of f
    } else {
      return false;
    }
  }
};

// Sums over the group of both.
template <Kind KIND, class Group>
__device__ __forceinline__ void reduce_near(NearSums<KIND>& sums, float& sum_t, Group& group) {
  constexpr int count = NearSums<KIND>::count;
  float values[count + 1];
#pragma unroll
  for (int k = 0; k < count; ++k) values[k] = sums.values[k];
  values[count] = sum_t;
  group.template reduce<Sum>(values);
#pragma unroll
  for (int k = 0; k < count; ++k) sums.values[k] = values[k];
  sum_t = values[count];
}

// The end of a row: its statistics, and its share of the loss of the block.
template <Kind KIND, class Group>
__device__ __forceinline__ float close(const Divergence& args, const RowStatistics& statistics, int64_t row, bool valid,
                                       bool real, const Group& group) {
  if (group.rank() != 0 || !valid) return 0.0f;
  if (args.stats != nullptr) statistics.write(args.stats + row * smart_fast::statistics, args.scale, real);
  const float loss = real ? Row<KIND>::loss(statistics.first, statistics.second, args.alpha) : 0.0f;
  if (args.losses != nullptr) args.losses[row] = real ? args.weight * loss : 0.0f;
  return loss;
}

// All there is to say of a slice of the vocabulary. Without a finite logit there is nothing that sums could be relative to.
__device__ __forceinline__ void write_parts(const Divergence& args, int64_t row, bool real, const Center& center,
                                            float max_x, float max_t, float max_d, float sum_x, float sum_t,
                                            float expm1_sum) {
  const bool near = max_d <= 1.0f, empty = near && max_t == -Scalar::infinity;
  if (near) Formulas::sums_of_x(max_t, sum_t, expm1_sum, args.scale * center.shift, max_x, sum_x);
  float* parts = args.parts + row * smart_fast::parts;
  parts[part_max_x] = real ? max_x : 0.0f;
  parts[part_sum_x] = real && !empty ? sum_x : 0.0f;
  parts[part_max_t] = real ? max_t : 0.0f;
  parts[part_sum_t] = real ? sum_t : 0.0f;
  parts[part_max_d] = real && !empty ? max_d : 0.0f;
  parts[part_shift] = real && !empty ? center.shift : 0.0f;
  parts[part_sum_e] = real && near ? expm1_sum : 0.0f;
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
    float largest[4] = {-Scalar::infinity, -Scalar::infinity, -Scalar::infinity, -Scalar::infinity};  // of x, t, d, -d
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      float x[size], t[size], d[size];
      unpack<T>(args, chunks_x[k], chunks_t[k], x, t, d);
#pragma unroll
      for (int i = 0; i < size; ++i) {
        largest[0] = fmaxf(largest[0], x[i]);
        largest[1] = fmaxf(largest[1], t[i]);
        largest[2] = fmaxf(largest[2], d[i]);
        largest[3] = fmaxf(largest[3], -d[i]);
      }
    }
    group.reduce<Max>(largest);
    largest[0] *= args.scale;
    largest[1] *= args.scale;
    const float safe_x = Formulas::finite_max(largest[0]), safe_t = Formulas::finite_max(largest[1]);
    float mean[2] = {0.0f, 0.0f};  // of d under exp(t), and what it is to be divided by
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      float x[size], t[size], d[size];
      unpack<T>(args, chunks_x[k], chunks_t[k], x, t, d);
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const float q = Scalar::exp(args.scale * t[i] - safe_t);
        mean[0] += Formulas::times(q, d[i]);
        mean[1] += q;
      }
    }
    group.reduce<Sum>(mean);
    Center center = {Formulas::finite_or_zero(mean[0] / mean[1]), false};
    const float max_d = args.scale * fmaxf(largest[2] - center.shift, largest[3] + center.shift);
    // One class is zero to the last bit without what rounding left out.
    center.exact = shape.width > 1 && largest[2] + largest[3] < fabsf(center.shift);
    float sum_x[1] = {0.0f}, sum_t = 0.0f;
    NearSums<KIND> near = {};
    if (max_d <= 1.0f) {
#pragma unroll
      for (int k = 0; k < chunks; ++k) {
        float t[size], delta[size];
        deltas_of(args, center, chunks_x[k], chunks_t[k], t, delta);
#pragma unroll
        for (int i = 0; i < size; ++i) {
          const float q = Scalar::exp(args.scale * t[i] - safe_t);
          sum_t += q;
          near.add(q, delta[i]);
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < chunks; ++k) {
        float x[size], t[size], d[size];
        unpack<T>(args, chunks_x[k], chunks_t[k], x, t, d);
#pragma unroll
        for (int i = 0; i < size; ++i) {
          sum_t += Scalar::exp(args.scale * t[i] - safe_t);
          sum_x[0] += Scalar::exp(args.scale * x[i] - safe_x);
        }
      }
    }
    reduce_near(near, sum_t, group);
    if (group.any(max_d > 1.0f)) group.reduce<Sum>(sum_x);
    if (args.parts != nullptr) {
      if (group.rank() == 0 && valid)
        write_parts(args, row, real, center, largest[0], largest[1], max_d, sum_x[0], sum_t, near.expm1_sum());
      continue;
    }
    RowStatistics statistics = RowStatistics::from(args.scale, center, largest[0], largest[1], max_d, sum_x[0], sum_t,
                                                   near.expm1_sum());
    const bool done = max_d <= 1.0f && near.conclude(args, sum_t, statistics.first);
    if (group.any(!done)) {
      float sums[Row<KIND>::row_sums] = {};
#pragma unroll
      for (int k = 0; k < chunks; ++k)
        if (real ? !outside(first_of(k), size, shape.width) : args.terms != nullptr)
          add_terms<T, KIND>(args, statistics, row, first_of(k), valid, real, chunks_x[k], chunks_t[k], sums);
      group.reduce<Sum>(sums);
      if (!done) Row<KIND>::conclude(sums, args.alpha, statistics.first, statistics.second);
    }
    loss += close<KIND>(args, statistics, row, valid, real, group);
  }
  close_block(args, loss, group);
}

// The center of a row from what each thread finds first in it: the mean, over the threads, of means under exp(t), together
// with that of how far the differences of one thread are apart.
template <class T, class Group>
__device__ __forceinline__ Center center_of(const Divergence& args, const Chunk<T>& chunk_x, const Chunk<T>& chunk_t,
                                            Group& group) {
  constexpr int size = Chunk<T>::size;
  float x[size], t[size], d[size], max_t = -Scalar::infinity, most = max_t, least = -max_t;
  unpack<T>(args, chunk_x, chunk_t, x, t, d);
#pragma unroll
  for (int i = 0; i < size; ++i) {
    max_t = fmaxf(max_t, t[i]);
    most = fmaxf(most, d[i]);
    least = fminf(least, d[i]);
  }
  float weighted = 0.0f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < size; ++i) {
    const float q = Scalar::exp(args.scale * (t[i] - Formulas::finite_max(max_t)));
    weighted += Formulas::times(q, d[i]);
    sum += q;
  }
  float means[3] = {0.0f, 0.0f, 0.0f};  // of the differences, of how far apart they are; of how many threads
  if (max_t > -Scalar::infinity) {
    means[0] = weighted / sum;
    means[1] = most - least;
    means[2] = 1.0f;
  }
  group.template reduce<Sum>(means);
  const float shift = Formulas::finite_or_zero(means[0] / means[2]);
  return {shift, means[1] < fabsf(means[0])};
}

// Maxima and sums of what one thread has seen of a row, the sums relative to the maxima (Milakov & Gimelshein, 2018). Of x
// there are none as long as no |delta| exceeds one.
template <Kind KIND>
struct Running {
  float max_x, max_t, max_d, sum_x, sum_t;
  NearSums<KIND> near;

  static SMART_FAST_INLINE Running nothing() { return {-Scalar::infinity, -Scalar::infinity, 0.0f, 0.0f, 0.0f, {}}; }

  template <int SIZE>
  SMART_FAST_INLINE void add_near(const Divergence& args, const float (&t)[SIZE], const float (&delta)[SIZE]) {
    float new_t = t[0];
#pragma unroll
    for (int i = 1; i < SIZE; ++i) new_t = fmaxf(new_t, t[i]);
    rebase_t(args.scale * new_t);
    const float safe_t = Formulas::finite_max(max_t);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float q = Scalar::exp(args.scale * t[i] - safe_t);
      sum_t += q;
      near.add(q, delta[i]);
    }
  }

  template <int SIZE>
  SMART_FAST_INLINE void add_far(const Divergence& args, const Center& center, const float (&x)[SIZE],
                                 const float (&t)[SIZE], const float (&d)[SIZE]) {
    float new_x = -Scalar::infinity, new_t = -Scalar::infinity;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      max_d = fmaxf(max_d, args.scale * fabsf(d[i] - center.shift));
      new_x = fmaxf(new_x, x[i]);
      new_t = fmaxf(new_t, t[i]);
    }
    rebase_t(args.scale * new_t);
    rebase_x(args.scale * new_x);
    const float safe_x = Formulas::finite_max(max_x), safe_t = Formulas::finite_max(max_t);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      sum_x += Scalar::exp(args.scale * x[i] - safe_x);
      sum_t += Scalar::exp(args.scale * t[i] - safe_t);
    }
  }

  // What the sums of a near row have said of x.
  SMART_FAST_INLINE void leave(const Divergence& args, const Center& center) {
    if (max_t > -Scalar::infinity)
      Formulas::sums_of_x(max_t, sum_t, near.expm1_sum(), args.scale * center.shift, max_x, sum_x);
  }

  SMART_FAST_INLINE void rebase_x(float new_x) {
    if (new_x > max_x) {
      sum_x *= Scalar::exp(max_x - new_x);
      max_x = new_x;
    }
  }
  SMART_FAST_INLINE void rebase_t(float new_t) {
    if (new_t > max_t) {
      const float scale = Scalar::exp(max_t - new_t);
      sum_t *= scale;
      near.scale(scale);
      max_t = new_t;
    }
  }

  // Of the whole group. `left`: whether this thread has sums of x.
  template <class Group>
  __device__ __forceinline__ void merge(const Divergence& args, const Center& center, bool left, Group& group) {
    float furthest[2] = {max_d, max_t};
    group.template reduce<Max>(furthest);
    if (furthest[0] > 1.0f && !left) leave(args, center);
    rebase_t(furthest[1]);
    max_d = furthest[0];
    if (max_d <= 1.0f) {
      reduce_near(near, sum_t, group);
      return;
    }
    float largest[1] = {max_x};
    group.template reduce<Max>(largest);
    rebase_x(largest[0]);
    float sums[2] = {sum_x, sum_t};
    group.template reduce<Sum>(sums);
    sum_x = sums[0];
    sum_t = sums[1];
  }
};

// Threads of a block of `long_kernel`, and such blocks of a multiprocessor: more would leave them too few registers. Two sums
// over eight elements at once take what two blocks leave.
constexpr int LONG_THREADS = 384;
template <class T, Kind KIND>
constexpr int BLOCKS = Row<KIND>::row_sums * Chunk<T>::size < 16 ? 2 : 1;

template <class T, Kind KIND, class Group>
__global__ void __launch_bounds__(LONG_THREADS, BLOCKS<T, KIND>) long_kernel(const Divergence args, const int kept) {
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
    Chunk<T> next_x = Chunk<T>::filled(Fill::minus_infinity), next_t = next_x;
    if (real) {
      next_x = from_x.read(begin, shape.width, Fill::minus_infinity);
      next_t = from_t.read(begin, shape.width, Fill::minus_infinity);
    }
    // Chunks of every thread, the last ones beyond the row: threads of a warp stay together.
    const int count = real ? int(ceil_div(shape.width + row * shape.width % size, step)) : 0;
    const Center center = center_of<T>(args, next_x, next_t, group);
    Running<KIND> running = Running<KIND>::nothing();
    bool left = false;
    for (int k = 0; k < count; ++k) {
      const int64_t first = begin + k * step;
      const Chunk<T> chunk_x = next_x, chunk_t = next_t;
      if (k + 1 < count) {  // on its way while this one is worked on
        next_x = from_x.read(first + step, shape.width, Fill::minus_infinity);
        next_t = from_t.read(first + step, shape.width, Fill::minus_infinity);
      }
      if (k < kept) {
        stored[2 * k * blockDim.x + threadIdx.x] = chunk_x;
        stored[(2 * k + 1) * blockDim.x + threadIdx.x] = chunk_t;
      }
      if (!left) {
        float t[size], delta[size], furthest = running.max_d;
        deltas_of(args, center, chunk_x, chunk_t, t, delta);
#pragma unroll
        for (int i = 0; i < size; ++i) furthest = fmaxf(furthest, fabsf(delta[i]));
        left = group.any(furthest > 1.0f);
        if (!left) {
          running.max_d = furthest;
          running.add_near(args, t, delta);
          continue;
        }
        running.leave(args, center);
      }
      float x[size], t[size], d[size];
      unpack<T>(args, chunk_x, chunk_t, x, t, d);
      running.add_far(args, center, x, t, d);
    }
    running.merge(args, center, left, group);
    if (args.parts != nullptr) {
      if (group.rank() == 0)
        write_parts(args, row, real, center, running.max_x, running.max_t, running.max_d, running.sum_x, running.sum_t,
                    running.near.expm1_sum());
      continue;
    }
    RowStatistics statistics = RowStatistics::from(args.scale, center, running.max_x, running.max_t, running.max_d,
                                                   running.sum_x, running.sum_t, running.near.expm1_sum());
    const bool done = running.max_d <= 1.0f && running.near.conclude(args, running.sum_t, statistics.first);
    if (!done) {  // all threads of the row agree
      float sums[Row<KIND>::row_sums] = {};
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
          add_terms<T, KIND>(args, statistics, row, first, true, real, chunk_x, chunk_t, sums);
        }
      }
      group.template reduce<Sum>(sums);
      Row<KIND>::conclude(sums, args.alpha, statistics.first, statistics.second);
    }
    loss += close<KIND>(args, statistics, row, true, real, group);
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
    block = block_of(chunks < 128 ? 64 : ceil_div(chunks, 2), LONG_THREADS);
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
