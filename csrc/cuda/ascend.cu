// ascend: noise, gradient step, norm, projection and add, from the gradient to the next perturbed embedding.
//
//     smart-pytorch   m = noise + step_size * g    noise <- m / (norm(m) + epsilon)
//     sift            m = g                        noise <- noise + step_size * m / (norm(m) + epsilon)
//
// with g = 0 for rows where it is not finite. Floor: read embed, read g, write the result.
//
// Rows that fit stay in registers, noise and gradient. Longer ones, and tensors of mixed dtypes, are walked twice, the
// noise regenerated. Whether a gradient is finite is known at the end of the first pass: the norm with and without it
// are both taken.
#include "group.h"
#include "launch.h"
#include "noise.h"

namespace smart_fast {
namespace cuda {
namespace {

constexpr int PER_THREAD = 16;  // elements of a row that a thread keeps

template <Norm NORM>
SMART_FAST_INLINE float folded(float norm, float m) {
  if (NORM == Norm::inf) return fmaxf(norm, fabsf(m));
  return norm + (NORM == Norm::l2 ? m * m : fabsf(m));
}
template <Norm NORM>
struct Fold : Sum {};
template <>
struct Fold<Norm::inf> : Max {};

// Norms so far with the gradient and without it, and whether it held anything that is not finite.
struct Measure {
  float with, without, broken;

  template <Norm NORM, int SIZE>
  SMART_FAST_INLINE void add(const Ascend& args, const float (&noise)[SIZE], const float (&grad)[SIZE]) {
    const bool sift = args.update == Update::sift;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      with = folded<NORM>(with, sift ? grad[i] : noise[i] + args.step_size * grad[i]);
      without = folded<NORM>(without, sift ? 0.0f : noise[i]);
      if (!(fabsf(grad[i]) < Scalar::infinity)) broken = 1.0f;
    }
  }
};

// The norm of a row or of the rows it belongs to, and what becomes of the noise.
struct Projection {
  bool finite, sift, dead;
  float step_size, scale;

  SMART_FAST_INLINE Projection(const Ascend& args, bool finite, float norm)
      : finite(finite), sift(args.update == Update::sift), step_size(args.step_size) {
    const float denominator = norm + args.epsilon;
    dead = denominator == 0.0f;  // leaves the noise where it is
    scale = 1.0f / (dead ? 1.0f : denominator);
  }
  SMART_FAST_INLINE float measured(float noise, float grad) const {
    const float g = finite ? grad : 0.0f;
    return sift ? g : noise + step_size * g;
  }
  SMART_FAST_INLINE float moved(float noise, float grad) const {
    const float m = measured(noise, grad);
    if (dead) return noise;
    return sift ? noise + step_size * m * scale : m * scale;
  }
};

// The noise of a chunk that may reach beyond its row: zero there, so that it adds nothing to a norm.
template <int SIZE>
SMART_FAST_INLINE void read_noise(const Ascend& args, uint64_t seed, int64_t row, int64_t first, float (&noise)[SIZE]) {
  const int64_t width = args.shape.width;
  if (args.noise != nullptr) return Floats<SIZE>::read(args.noise + row * width, first, width, noise);
  normal(seed, row * width + first, noise);
  const bool whole = inside(first, SIZE, width);
#pragma unroll
  for (int i = 0; i < SIZE; ++i)
    noise[i] = whole || (first + i >= 0 && first + i < width) ? noise[i] * args.noise_var : 0.0f;
}

template <Norm NORM>
__device__ __forceinline__ float norm_of(const Ascend& args, int64_t row, bool valid, float row_norm, Group& group) {
  float norm[1] = {row_norm};
  if (args.stage == Stage::given_norm) return valid ? args.norms[row / args.group] : 0.0f;
  if (args.stage == Stage::group_norm) {
    norm[0] = 0.0f;
    if (valid) {
      const float* partial = args.norms + row / args.group * args.group;
      for (int64_t i = group.rank(); i < args.group; i += group.size())
        norm[0] = NORM == Norm::inf ? fmaxf(norm[0], partial[i]) : norm[0] + partial[i];
    }
    group.reduce<Fold<NORM>>(norm);
  }
  return NORM == Norm::l2 ? sqrtf(norm[0]) : norm[0];
}

template <int SIZE>
SMART_FAST_INLINE void write_measured(const Ascend& args, const Projection& projection, int64_t row, int64_t first,
                                      bool real, const float (&noise)[SIZE], const float (&grad)[SIZE]) {
  float m[SIZE];
#pragma unroll
  for (int i = 0; i < SIZE; ++i) m[i] = real ? projection.measured(noise[i], grad[i]) : 0.0f;
  Floats<SIZE>::write(args.measured + row * args.shape.width, first, args.shape.width, m);
}

template <class T>
SMART_FAST_INLINE void write_moved(const Ascend& args, const Projection& projection, const Chunk<T>& embed, int64_t row,
                                   int64_t first, bool real, const float (&noise)[Chunk<T>::size],
                                   const float (&grad)[Chunk<T>::size]) {
  constexpr int size = Chunk<T>::size;
  const int64_t width = args.shape.width;
  float values[size], moved[size];
  embed.unpack(values);
#pragma unroll
  for (int i = 0; i < size; ++i) {
    moved[i] = real ? projection.moved(noise[i], grad[i]) : 0.0f;
    values[i] += moved[i];
  }
  Writer<T>(args.out, args.embed.dtype, row, width).write(first, width, values);
  if (args.noise_out != nullptr) Floats<size>::write(args.noise_out + row * width, first, width, moved);
}

template <class T, Norm NORM>
__global__ void __launch_bounds__(most_threads, 1) ascend_kernel(const Ascend args) {
  constexpr int size = Chunk<T>::size, CHUNKS = PER_THREAD / size;
  SMART_FAST_SHARED(Shared, shared);
  Group group(shared);
  const Shape& shape = args.shape;
  const uint64_t seed = args.noise == nullptr ? uint64_t(*args.seed) : 0;

  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < shape.rows; base += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = base + threadIdx.y, skew = row * shape.width % size;
    const bool valid = row < shape.rows, real = valid && (args.mask == nullptr || args.mask[row] != 0);
    const auto first_of = [&](int k) { return (int64_t(k) * group.size() + group.rank()) * size - skew; };

    Chunk<T> grads[CHUNKS], embeds[CHUNKS];
    const bool moves = args.stage != Stage::measure;
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      grads[k] = Chunk<T>::filled(Fill::zero);
      if (real) grads[k] = Reader<T>(shape, args.grad, row).read(first_of(k), shape.width, Fill::zero);
      embeds[k] = Chunk<T>::filled(Fill::zero);
      if (valid && moves) embeds[k] = Reader<T>(shape, args.embed, row).read(first_of(k), shape.width, Fill::zero);
    }
    float noise[CHUNKS][size];
    Measure measure = {0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
#pragma unroll
      for (int i = 0; i < size; ++i) noise[k][i] = 0.0f;
      if (real && !outside(first_of(k), size, shape.width)) read_noise(args, seed, row, first_of(k), noise[k]);
      float grad[size];
      grads[k].unpack(grad);
      measure.add<NORM>(args, noise[k], grad);
    }
    float sums[3] = {measure.with, measure.without, measure.broken};
    group.reduce<Fold<NORM>>(sums);
    const bool finite = sums[2] == 0.0f;
    const float row_norm = finite ? sums[0] : sums[1];

    if (!moves) {
      const Projection projection(args, finite, 0.0f);
      if (args.norm != Norm::opaque) {
        if (valid && group.rank() == 0) args.measured[row] = row_norm;
        continue;
      }
#pragma unroll
      for (int k = 0; k < CHUNKS; ++k) {
        float grad[size];
        grads[k].unpack(grad);
        if (valid && first_of(k) < shape.width)
          write_measured(args, projection, row, first_of(k), real, noise[k], grad);
      }
      continue;
    }
    const Projection projection(args, finite, norm_of<NORM>(args, row, valid, row_norm, group));
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      float grad[size];
      grads[k].unpack(grad);
      if (valid && first_of(k) < shape.width)
        write_moved(args, projection, embeds[k], row, first_of(k), real, noise[k], grad);
    }
  }
}

// Any width, any dtypes.
template <Norm NORM>
__global__ void __launch_bounds__(most_threads, 1) ascend_long_kernel(const Ascend args) {
  constexpr int size = 4;
  SMART_FAST_SHARED(Shared, shared);
  Group group(shared);
  const Shape& shape = args.shape;
  const uint64_t seed = args.noise == nullptr ? uint64_t(*args.seed) : 0;
  const int64_t step = int64_t(group.size()) * size;

  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < shape.rows; base += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = base + threadIdx.y, begin = group.rank() * size - row * shape.width % size;
    const bool valid = row < shape.rows, real = valid && (args.mask == nullptr || args.mask[row] != 0);
    const Reader<Any<size>> grads(shape, args.grad, valid ? row : 0);
    Measure measure = {0.0f, 0.0f, 0.0f};
    if (real)
      for (int64_t first = begin; first < shape.width; first += step) {
        float noise[size], grad[size];
        grads.read(first, shape.width, Fill::zero).unpack(grad);
        read_noise(args, seed, row, first, noise);
        measure.add<NORM>(args, noise, grad);
      }
    float sums[3] = {measure.with, measure.without, measure.broken};
    group.reduce<Fold<NORM>>(sums);
    const bool finite = sums[2] == 0.0f, moves = args.stage != Stage::measure;
    const float row_norm = finite ? sums[0] : sums[1];
    const float norm = moves ? norm_of<NORM>(args, row, valid, row_norm, group) : 0.0f;
    const Projection projection(args, finite, norm);
    if (!valid) continue;
    if (!moves && args.norm != Norm::opaque) {
      if (group.rank() == 0) args.measured[row] = row_norm;
      continue;
    }
    for (int64_t first = begin; first < shape.width; first += step) {
      float noise[size] = {}, grad[size] = {};
      if (real) {
        grads.read(first, shape.width, Fill::zero).unpack(grad);
        read_noise(args, seed, row, first, noise);
      }
      if (moves)
        write_moved(args, projection, Reader<Any<size>>(shape, args.embed, row).read(first, shape.width, Fill::zero),
                    row, first, real, noise, grad);
      else
        write_measured(args, projection, row, first, real, noise, grad);
    }
  }
}

template <Norm NORM>
void run(const Ascend& args, cudaStream_t stream) {
  const Shape& shape = args.shape;
  const Dtype dtype = args.grad.dtype;
  const int size = chunk_size(dtype);
  const bool moves = args.stage != Stage::measure;
  const bool fits = chunks_of(shape, size) * size <= int64_t(PER_THREAD) * most_threads;
  const bool fast = aligned(shape, args.grad, size) &&
                    (!moves || (args.embed.dtype == dtype && aligned(shape, args.embed, size)));
  if (fits && fast) {
    const dim3 block = block_of(ceil_div(chunks_of(shape, size) * size, PER_THREAD));
    with_type(dtype, [&](auto tag) {
      launch(ascend_kernel<typename decltype(tag)::type, NORM>, rows_grid(shape, block), block, 0, stream, args);
    });
  } else {
    const dim3 block = block_of(ceil_div(chunks_of(shape, 4), 2));
    launch(ascend_long_kernel<NORM>, rows_grid(shape, block), block, 0, stream, args);
  }
}

}  // namespace

cudaError_t ascend(const Ascend& args, cudaStream_t stream) {
  if (args.shape.rows * args.shape.width == 0) return cudaSuccess;
  switch (args.norm) {
    case Norm::l2:
      run<Norm::l2>(args, stream);
      break;
    case Norm::l1:
      run<Norm::l1>(args, stream);
      break;
    case Norm::inf:
    case Norm::opaque:
      run<Norm::inf>(args, stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace smart_fast
