// ascend: noise, gradient step, norm, projection and add, a row at a time.
//
//     smart-pytorch   m = noise + step_size * g    noise <- m / (norm(m) + epsilon)
//     sift            m = g                        noise <- noise + step_size * m / (norm(m) + epsilon)
//
// with g = 0 for rows where it is not finite. Masked rows get no noise.
#pragma once

#include "kernels.h"
#include "noise.h"

namespace smart_fast {
namespace {

// The noise of a row, padded with zeros to whole vectors; `buffer` holds width + 256 floats.
inline const float* row_noise(const cpu::Ascend& args, int64_t row, float* buffer) {
  const int64_t width = args.shape.width, first = row * width;
  if (args.noise != nullptr && width % LANES == 0) return args.noise + first;
  float* noise = buffer;
  if (args.noise != nullptr) {
    __builtin_memcpy(noise, args.noise + first, size_t(width) * 4);
  } else {
    const void* grad = advance(args.grad.data, args.grad.dtype, row_offset(args.shape, args.grad, row));
    const void* embed = args.embed.data == nullptr
                            ? grad
                            : advance(args.embed.data, args.embed.dtype, row_offset(args.shape, args.embed, row));
    make_noise(buffer, args.seed, uint64_t(first) / 4, width + first % 4, args.noise_var, [&](int64_t i) {
      prefetch<NORMALS>(grad, args.grad.dtype, i);
      prefetch<NORMALS>(embed, args.embed.dtype, i);
    });
    noise += first % 4;
  }
  __builtin_memset(noise + width, 0, size_t(whole(width) - width) * 4);
  return noise;
}

struct RowNorm {
  F largest_ = {}, poison = {};
  double sum = 0;
};

// Writes m (`measured`, whole vectors) and folds its norm. `poison` becomes NaN if any gradient is not finite.
template <Norm NORM, Update UPDATE>
inline void measure_row(const void* grad, Dtype dtype, const float* noise, float step_size, int64_t width,
                        float* measured, RowNorm& norm) {
  alignas(64) float from[BLOCK + LANES];
  for (int64_t begin = 0; begin < width; begin += BLOCK) {
    const int64_t part = width - begin < BLOCK ? width - begin : BLOCK;
    const float* g = read_block(advance(grad, dtype, begin), dtype, part, from, 0.0f);
    F sum = {};
    for (int64_t i = 0; i < part; i += LANES) {
      const F value = load(g + i);
      norm.poison += value * 0.0f;
      const F m = UPDATE == Update::sift ? value : load(noise + begin + i) + step_size * value;
      if (NORM == Norm::inf) norm.largest_ = Simd::max(norm.largest_, Simd::abs(m));
      if (NORM == Norm::l1) sum += Simd::abs(m);
      if (NORM == Norm::l2) sum += m * m;
      store(measured + begin + i, m);
    }
    if (NORM == Norm::l1 || NORM == Norm::l2) norm.sum += total(sum);
  }
}

inline void measure_row(Norm kind, Update update, const void* grad, Dtype dtype, const float* noise, float step_size,
                        int64_t width, float* measured, RowNorm& norm) {
#define SMART_FAST_CASE(NORM)                                                                                     \
  case NORM:                                                                                                      \
    if (update == Update::sift)                                                                                   \
      measure_row<NORM, Update::sift>(grad, dtype, noise, step_size, width, measured, norm);                      \
    else                                                                                                          \
      measure_row<NORM, Update::smart_pytorch>(grad, dtype, noise, step_size, width, measured, norm);             \
    break;
  switch (kind) {
    SMART_FAST_CASE(Norm::inf)
    SMART_FAST_CASE(Norm::l2)
    SMART_FAST_CASE(Norm::l1)
    SMART_FAST_CASE(Norm::opaque)
  }
#undef SMART_FAST_CASE
}

// m of a row and its partial norm (l2: of squares), with the gradient left out where it is not finite.
inline float measure_row(const cpu::Ascend& args, int64_t row, const float* noise, float* measured) {
  const int64_t width = args.shape.width;
  const void* grad = advance(args.grad.data, args.grad.dtype, row_offset(args.shape, args.grad, row));
  RowNorm norm;
  measure_row(args.norm, args.update, grad, args.grad.dtype, noise, args.step_size, width, measured, norm);
  if (any(norm.poison != 0.0f)) {
    norm = RowNorm();
    for (int64_t i = 0; i < width; i += LANES) {
      const F m = args.update == Update::sift ? F{} : load(noise + i);
      norm.largest_ = Simd::max(norm.largest_, Simd::abs(m));
      norm.sum += total(args.norm == Norm::l2 ? m * m : Simd::abs(m));
      store(measured + i, m);
    }
  }
  return args.norm == Norm::inf ? largest(norm.largest_) : float(norm.sum);
}

inline void measure(const cpu::Ascend& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = args.shape.width, per_chunk = cpu::rows_per_chunk(width);
  float* buffer = scratch + width + 256;
  const int64_t last = end * per_chunk < args.shape.rows ? end * per_chunk : args.shape.rows;
  for (int64_t row = begin * per_chunk; row < last; ++row) {
    const bool masked = args.mask != nullptr && args.mask[row] == 0;
    const float norm = masked ? 0.0f : measure_row(args, row, row_noise(args, row, scratch), buffer);
    if (args.norm != Norm::opaque) {
      args.measured[row] = norm;
    } else if (masked) {
      __builtin_memset(args.measured + row * width, 0, size_t(width) * 4);
    } else {
      __builtin_memcpy(args.measured + row * width, buffer, size_t(width) * 4);
    }
  }
}

inline void ascend(const cpu::Ascend& args, int64_t begin, int64_t end, float* scratch) {
  alignas(64) float from[BLOCK + LANES], to[BLOCK + LANES];
  const int64_t width = args.shape.width, per_chunk = cpu::rows_per_chunk(width);
  const Dtype dtype = args.embed.dtype;
  float* measured = scratch + width + 256;
  const int64_t last = end * per_chunk < args.shape.rows ? end * per_chunk : args.shape.rows;
  for (int64_t row = begin * per_chunk; row < last; ++row) {
    const void* embed = advance(args.embed.data, dtype, row_offset(args.shape, args.embed, row));
    void* out = advance(args.out, dtype, row * width);
    float* noise_out = args.noise_out == nullptr ? nullptr : args.noise_out + row * width;
    if (args.mask != nullptr && args.mask[row] == 0) {
      __builtin_memcpy(out, embed, size_t(width) * (dtype == Dtype::fp32 ? 4 : 2));
      if (noise_out != nullptr) __builtin_memset(noise_out, 0, size_t(width) * 4);
      continue;
    }
    const float* noise = row_noise(args, row, scratch);
    float norm = measure_row(args, row, noise, measured);
    if (args.norms != nullptr)
      norm = args.norms[row / args.group];
    else if (args.norm == Norm::l2)
      norm = __builtin_sqrtf(norm);
    // A zero denominator leaves the noise where it is.
    const float denominator = norm + args.epsilon;
    const bool sift = args.update == Update::sift, add_noise = sift || denominator == 0.0f;
    const float scale = denominator == 0.0f ? 0.0f : (sift ? args.step_size : 1.0f) / denominator;

    for (int64_t start = 0; start < width; start += BLOCK) {
      const int64_t part = width - start < BLOCK ? width - start : BLOCK;
      void* target = advance(out, dtype, start);
      const float* source = read_block(advance(embed, dtype, start), dtype, part, from, 0.0f);
      float* result = open_block(target, dtype, part, to, args.stream);
      for (int64_t i = 0; i < part; i += LANES) {
        F moved = load(measured + start + i) * scale;
        if (add_noise) moved += load(noise + start + i);
        store(measured + start + i, moved);
        store(result + i, load(source + i) + moved);
      }
      write_block(target, dtype, part, result, args.stream);
      if (noise_out != nullptr) write_block(noise_out + start, Dtype::fp32, part, measured + start, args.stream);
    }
  }
  if (args.stream) end_of_stream();
}

}  // namespace
}  // namespace smart_fast
